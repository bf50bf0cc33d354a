"""What a process hands over each second: nothing twice, nothing left out."""

import msgspec
from vitalis_load.histograms import Histogram
from vitalis_load.meter import Batch, Meter
from vitalis_load.records import ClientSecond, GapsOfSecond, Record


def record(**fields: object) -> Record:
    given: dict[str, object] = {"task": "chat", "api": "chat", "scheduled": 0.0, "sent": 0.0, "ended": 1.0}
    return Record(**(given | fields))  # type: ignore[arg-type]


def read(lines: bytes, kind: type) -> list:  # type: ignore[type-arg]
    return [msgspec.json.decode(line, type=kind) for line in lines.splitlines()]


def test_records_are_handed_over_once() -> None:
    meter = Meter(3)
    for _ in range(2):
        meter.begin(0.0)
        meter.end(record(completion_tokens=7))
    first, second = meter.batch(1.5), meter.batch(2.5)
    assert [len(read(batch.requests, Record)) for batch in (first, second)] == [2, 0]
    assert (first.number, second.number, second.ended, second.tokens, second.process) == (0, 1, 2, 14, 3)


def test_counts_tell_failed_from_unfinished_and_late_from_now() -> None:
    meter = Meter(0)
    for _ in range(3):
        meter.begin(0.25)
    meter.end(record(error="http_503"))
    meter.end(record(unfinished=True))
    batch = meter.batch(1.0)
    assert (batch.scheduled, batch.in_flight, batch.ended, batch.failed, batch.behind) == (3, 1, 1, 1, 0.25)
    assert [one.unfinished for one in read(batch.requests, Record)] == [False, True]


def test_gaps_of_the_second_that_is_not_over_wait_for_its_end() -> None:
    meter = Meter(1)
    meter.gap(0.010, 4.9)
    meter.gap(0.020, 5.0)
    early = read(meter.batch(5.1).gaps, GapsOfSecond)
    meter.gap(0.030, 5.9)
    late = read(meter.batch(5.95, last=True).gaps, GapsOfSecond)
    assert [(one.at, one.process) for one in (*early, *late)] == [(4, 1), (5, 1)]
    assert [Histogram.decode(one.hdr).count for one in (*early, *late)] == [1, 2]


def test_a_second_counts_chunks_of_answers_that_still_come() -> None:
    meter = Meter(0)
    meter.begin(0.0)
    meter.begin(0.0)
    meter.second(0, 0.5, 1.0, 2, chunks_open=30)
    meter.end(record(chunks=40))
    meter.second(1, 0.5, 1.0, 2, chunks_open=5)
    seconds = read(meter.batch(2.0).client, ClientSecond)
    assert [(one.events, one.started, one.ended, one.in_flight) for one in seconds] == [(30, 2, 0, 2), (15, 0, 1, 1)]


def test_a_batch_survives_its_way_to_the_master() -> None:
    meter = Meter(2)
    meter.begin(0.0)
    meter.end(record(detail="é\n"))
    batch = meter.batch(1.0, idle=True, last=True)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=Batch) == batch

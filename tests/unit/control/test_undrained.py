"""What of a spool folder is not in the store: batches out of files that the real writer wrote."""

import os
from pathlib import Path

import msgspec
from vitalis_serve.control.undrained import FINISHED, KEPT_SECONDS, Batch, Undrained, row
from vitalis_serve.spool.files import files
from vitalis_serve.spool.writer import SpoolWriter

from tests.support.spooling import closed, opened

SEGMENT = 1 << 16


def drained(spool: Undrained, most: int = 1000) -> list[Batch]:
    """Batches until there is nothing more, each stored."""
    batches = []
    while (batch := spool.batch(most)).marks:
        spool.stored(batch)
        batches.append(batch)
        if not batch.more:
            break
    return batches


def ids(batches: list[Batch]) -> list[int]:
    return [int(found["id"], 16) for batch in batches for found in batch.rows]


def test_batches_are_bounded_and_miss_nothing_over_many_files(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, "w", segment_bytes=SEGMENT)
    for number in range(1000):
        while not writer.room:  # its thread makes the next file
            os.sched_yield()
        writer.open(opened(number))
        writer.close(closed(number))
    spool = Undrained(tmp_path)
    batches = drained(spool, 150)
    assert ids(batches) == list(range(1000))
    assert all(len(batch.rows) <= 150 for batch in batches)
    assert [batch.more for batch in batches] == [True] * (len(batches) - 1) + [False]
    assert drained(spool) == []
    writer.open(opened(5000))
    assert drained(spool) == []  # an opened one alone is no reason to go to the store
    writer.close(closed(5000))
    assert ids(drained(spool)) == [5000]
    writer.stop()


def test_a_dead_writer_s_open_requests_are_cut_once(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, "w", segment_bytes=SEGMENT)
    for number in range(3):
        writer.open(opened(number, at=50.0))
    writer.close(closed(1, ended=60.0))
    spool = Undrained(tmp_path)
    assert ids(drained(spool)) == [1]
    writer.stop()
    batches = drained(spool)
    assert [(int(r["id"], 16), r["outcome"], r["prompt_tokens"], r["prompt_estimated"]) for r in batches[0].rows] == [
        (0, "cut", 10, True),
        (2, "cut", 10, True),
    ]
    assert sum(batch.cut for batch in batches) == 2
    assert {mark.after for batch in batches for mark in batch.marks} == {FINISHED}
    # Another control, told by the store how far it is:
    anew = Undrained(tmp_path)
    anew.knows({mark.name: mark.after for mark in batches[0].marks})
    assert drained(anew) == []


def test_a_restart_goes_on_where_the_store_is(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, "w", segment_bytes=SEGMENT)
    for number in range(40):
        writer.open(opened(number))
        writer.close(closed(number))
    first = Undrained(tmp_path).batch(30)
    again = Undrained(tmp_path)
    again.knows({mark.name: mark.after for mark in first.marks})
    assert ids([first, *drained(again)]) == list(range(40))
    writer.stop()


def test_depth_is_what_waits(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, "w", segment_bytes=SEGMENT)
    spool = Undrained(tmp_path)
    assert spool.count()
    assert spool.depth(5000.0) == (0, 0, 0.0)
    for number in range(10):
        writer.open(opened(number))
        writer.close(closed(number, ended=1000.0 + number))
    assert spool.count()
    size, records, oldest = spool.depth(1500.0)
    assert (records, oldest) == (10, 500.0)
    batch = spool.batch(8)  # four of them
    assert size > batch.marks[0].after > 0
    spool.stored(batch)
    assert spool.depth(1500.0) == (size - batch.marks[0].after, 6, 497.0)
    spool.stored(spool.batch(1000))
    assert spool.depth(1500.0).records == 0
    writer.stop()


def test_files_go_when_they_are_drained_covered_old_and_the_first_of_their_process(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, "w", segment_bytes=SEGMENT)
    for number in range(1000):
        while not writer.room:
            os.sched_yield()
        writer.open(opened(number))
        writer.close(closed(number))
    writer.stop()
    spool = Undrained(tmp_path)
    there = files(tmp_path)
    assert len(there) > 2
    now = there[-1].stat().st_mtime + KEPT_SECONDS + 10
    assert spool.unneeded(now, lambda path: True) == []
    drained(spool)
    assert spool.unneeded(now, lambda path: True) == there
    assert spool.unneeded(now - KEPT_SECONDS, lambda path: True) == []
    assert spool.unneeded(now, lambda path: path != there[1]) == there[:1]
    there[0].unlink()
    assert spool.gone({path.name for path in files(tmp_path)}) == {spool.prefix() + there[0].name}


def test_hosts_have_names_of_their_own_and_keep_them(tmp_path: Path) -> None:
    one, other = Undrained(tmp_path / "one").prefix(), Undrained(tmp_path / "other").prefix()
    assert one != other
    assert Undrained(tmp_path / "one").prefix() == one


def test_a_file_that_cannot_be_read_keeps_no_other_waiting(tmp_path: Path) -> None:
    (tmp_path / "a-1-1-000001.spool").mkdir()
    writer = SpoolWriter(tmp_path, "w", segment_bytes=SEGMENT)
    writer.close(closed(1))
    assert ids(drained(Undrained(tmp_path))) == [1]
    writer.stop()


def test_every_value_fits_its_column() -> None:
    odd = closed(1, request_id="a\0b", prompt_tokens=2**63 - 1, completion_tokens=-5, status=70_000, ended=1e300)
    stored = row(odd)
    assert stored["request_id"] == "ab"
    assert (stored["prompt_tokens"], stored["completion_tokens"], stored["status"]) == (2**40 - 1, 0, 999)
    assert stored["day"] == 2**31 - 1
    plain = msgspec.structs.replace(odd, ended=86_400.25, began=86_399.5)
    assert (row(plain)["day"], row(plain)["ended_ms"], row(plain)["began_ms"]) == (1, 86_400_250, 86_399_500)

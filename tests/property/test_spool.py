"""Spool files under any damage, and the sums under any order of writing, counting, deleting and dying."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from vitalis_serve.spool.reader import files, scan
from vitalis_serve.spool.record import MAX_FRAME_BYTES, Closed, Opened, Record, frame, frames
from vitalis_serve.spool.spent import Spent, seed
from vitalis_serve.spool.writer import SpoolWriter

from tests.support.spool import NOW, Ledger, closed, opened

TEXT = st.text(max_size=150)
COUNT = st.integers(-(1 << 70), 1 << 70)
TIME = st.floats(0, 4e9)
ID = st.binary(min_size=16, max_size=16)
RECORDS = st.one_of(
    st.builds(Opened, ID, TIME, *[TEXT] * 7, st.booleans(), COUNT, COUNT),
    st.builds(Closed, ID, TIME, TIME, *[TEXT] * 7, st.booleans(), TEXT, TEXT, *[COUNT] * 5, st.booleans(),
              st.booleans()),
)  # fmt: skip


def written(content: bytes, finished: bool, limit: int = 10_000) -> tuple[list[Record], int]:
    with tempfile.NamedTemporaryFile(suffix=".spool") as file:
        file.write(content)
        file.flush()
        records: list[Record] = []
        torn = position = 0
        while True:
            found = scan(Path(file.name), position, finished=finished, limit=limit)
            assert found.position >= position
            assert len(found.records) <= limit
            records += found.records
            torn += found.torn
            position = found.position
            if found.end:
                return records, torn


@settings(max_examples=60)
@given(RECORDS)
def test_every_record_fits_and_comes_back(record: Record) -> None:
    made = frame(record)
    assert len(made) <= MAX_FRAME_BYTES
    ((position, again),) = frames(made)
    assert position == len(made)
    assert type(again) is type(record)
    assert (again.id, again.stream) == (record.id, record.stream)
    if len(record.tenant.encode()) <= 64 and len(record.key.encode()) <= 64:
        assert (again.tenant, again.key) == (record.tenant, record.key)


@settings(max_examples=60)
@given(st.lists(RECORDS, max_size=8), st.integers(0, 8 * MAX_FRAME_BYTES), st.integers(1, 5))
def test_cut_anywhere(records: list[Record], cut: int, limit: int) -> None:
    """What stands before the cut is there; half a record is counted where nobody writes any more."""
    parts = [frame(record) for record in records]
    content = b"".join(parts)[:cut]
    whole, end = 0, 0
    while whole < len(parts) and end + len(parts[whole]) <= len(content):
        end += len(parts[whole])
        whole += 1
    intact = [next(frames(part))[1] for part in parts[:whole]]
    assert written(content + bytes(2000), False, limit) == (intact, 0)
    assert written(content + bytes(2000), True, limit) == (intact, int(any(content[end:])))
    assert written(content, True, limit)[0] == intact


@settings(max_examples=60)
@given(st.lists(RECORDS, min_size=1, max_size=8), st.data())
def test_damaged_anywhere(records: list[Record], data: st.DataObject) -> None:
    """Nothing is invented, and nothing before the damage is lost."""
    parts = [frame(record) for record in records]
    content = bytearray(b"".join(parts))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    intact = [next(frames(part))[1] for part in parts]
    before, end = 0, 0
    while end + len(parts[before]) <= at:
        end += len(parts[before])
        before += 1
    found, torn = written(bytes(content) + bytes(2000), True)
    assert torn == 1
    assert found[:before] == intact[:before]
    assert found in (intact[:before], intact[:before] + intact[before + 1 :])
    assert written(bytes(content) + bytes(2000), False) == (intact[:before], 0)


@given(st.binary(max_size=3000), st.booleans())
def test_any_bytes(content: bytes, finished: bool) -> None:
    records, torn = written(content, finished)
    # None is invented but with a checksum that fits.
    assert (records == [] and torn <= 1) or content
    assert finished or not torn


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(1, 40)),
        st.tuples(st.just("close"), st.integers(1, 40)),
        st.tuples(st.just("count"), st.integers(1, 50)),
        st.tuples(st.just("forget"), st.just(0)),
        st.tuples(st.just("write"), st.just(0)),
        st.tuples(st.just("drain"), st.just(0)),
        st.tuples(st.just("restart"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=40)
@given(STEPS)
def test_sums_are_exact_whoever_dies_when(steps: list[tuple[str, int]]) -> None:
    """`forget`: who counts is killed before it wrote. `restart`: the worker is, with requests open."""
    with tempfile.TemporaryDirectory() as where:
        folder, path = Path(where, "spool"), Path(where, "spent.json")
        ledger = Ledger(folder, path)
        spent = Spent.read(path)
        writer = SpoolWriter(folder, "worker-0", segment_bytes=16 << 10)
        running: list[int] = []
        made = cut = ended = 0
        for step, count in steps:
            if step == "open":
                for _ in range(count):
                    if writer.room:
                        made += 1
                        running.append(made)
                        writer.open(opened(made.to_bytes(16, "big")))
            elif step == "close":
                for _ in range(min(count, len(running))):
                    ended += 1
                    writer.close(closed(running.pop(0).to_bytes(16, "big")))
            elif step == "count":
                spent.advance(folder, limit=count)
            elif step == "forget":
                spent = Spent.read(path)
            elif step == "write":
                spent.write(path, NOW)
            elif step == "drain":
                ledger.round()
                spent = Spent.read(path)
            else:
                writer.stop()
                cut += len(running)
                running.clear()
                writer = SpoolWriter(folder, "worker-0", segment_bytes=16 << 10)
            tokens = ended * 108 + cut * 150
            assert seed(path, folder, NOW).get("tenant:acme", (0, 0)) == (tokens, tokens)
        writer.stop()
        cut += len(running)
        assert writer.unwritten == 0
        ledger.round()
        assert len(ledger.kept) == made
        assert sum(record.outcome == "cut" for record in ledger.kept.values()) == cut
        assert files(folder) == []

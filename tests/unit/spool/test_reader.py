"""What is read back: damaged places, files that are still written, requests that nobody closed."""

import fcntl
import os
from pathlib import Path

import pytest
from vitalis_serve.spool.reader import cuts, files, is_finished, scan
from vitalis_serve.spool.record import Closed, Opened, frame

from tests.support.spool import NOW, closed, opened

PROCESS = "worker-0-1790000000000-77"


def number(value: int) -> bytes:
    return value.to_bytes(16, "big")


def spool(folder: Path, at: int, *records: Opened | Closed, tail: bytes = b"", process: str = PROCESS) -> Path:
    path = folder / f"{process}-{at:06d}.spool"
    content = b"".join(map(frame, records)) + tail
    path.write_bytes(content + bytes(8192 - len(content) % 8192))
    return path


def test_scan_goes_on_where_it_was(tmp_path: Path) -> None:
    records = [opened(number(value)) for value in range(10)]
    path = spool(tmp_path, 1, *records)
    first = scan(path, limit=4)
    assert (first.records, first.end) == (records[:4], False)
    rest = scan(path, first.position)
    assert (rest.records, rest.end) == (records[4:], True)
    assert scan(path, rest.position) == ([], rest.position, 0, True)
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "none.spool")


def test_half_a_record_is_left_while_its_file_is_written(tmp_path: Path) -> None:
    whole = frame(closed(number(1)))
    path = spool(tmp_path, 1, opened(number(1)), tail=whole[:-3])
    found = scan(path)
    assert (found.records, found.torn, found.end) == ([opened(number(1))], 0, True)
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), whole, found.position)
    assert scan(path, found.position).records == [closed(number(1))]


def test_half_a_record_at_the_end_is_counted_once(tmp_path: Path) -> None:
    path = spool(tmp_path, 1, opened(number(1)), tail=frame(closed(number(1)))[:-3])
    found = scan(path, finished=True)
    assert (found.records, found.torn, found.end) == ([opened(number(1))], 1, True)
    assert scan(path, found.position, finished=True) == ([], found.position, 0, True)
    assert [cut.id for cut in cuts(path)] == [number(1)]


def test_damaged_record_in_the_middle_costs_itself_only(tmp_path: Path) -> None:
    records = [closed(number(value)) for value in range(5)]
    path = spool(tmp_path, 1, *records)
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"\xff", 2 * len(frame(records[0])) + 20)
    found = scan(path, finished=True)
    assert found.records == [*records[:2], *records[3:]]
    assert found.torn == 1


def test_zeros_where_a_page_was_lost_are_counted(tmp_path: Path) -> None:
    path = spool(tmp_path, 1, closed(number(1)), tail=bytes(300) + frame(closed(number(2))))
    found = scan(path, finished=True)
    assert (found.records, found.torn) == ([closed(number(1))], 1)
    assert scan(path, found.position, finished=True).torn == 0


def test_larger_than_is_read_at_once(tmp_path: Path) -> None:
    records = [opened(number(value), request_id="x" * 100) for value in range(12_000)]
    path = spool(tmp_path, 1, *records)
    assert path.stat().st_size > 2 << 20
    assert scan(path, finished=True, limit=1 << 20) == (records, sum(len(frame(each)) for each in records), 0, True)


def test_cut_is_told_once_of_the_last_file_that_knows_the_request(tmp_path: Path) -> None:
    first = spool(tmp_path, 1, *(opened(number(value)) for value in range(4)), closed(number(0), ended=NOW + 9))
    # 1 was carried over and closed, 2 carried over and cut, 3 closed while no file could be written.
    second = spool(tmp_path, 2, opened(number(1)), opened(number(2)), closed(number(3)), closed(number(1)))
    spool(tmp_path, 3)
    # Another process has a request of its own.
    other = spool(tmp_path, 9, opened(number(7)), process="worker-1-1790000000000-78")
    assert cuts(first) == []
    (cut,) = cuts(second)
    assert cut == Closed(
        number(2), NOW, NOW + 1, "acme", "k1", "chat", "gpt-oss-20b", "chat", "standard", "r", True,
        "cut", "worker_died", 0, 100, 0, 50, 0, True, True,
    )  # fmt: skip
    assert [cut.id for cut in cuts(other)] == [number(7)]
    second.unlink()
    assert [cut.id for cut in cuts(first)] == [number(1), number(2), number(3)], "why the order of deletion matters"
    with pytest.raises(FileNotFoundError):
        cuts(second)


def test_clock_that_went_back_orders_nothing_within_a_process(tmp_path: Path) -> None:
    later = spool(tmp_path, 2, opened(number(1), at=NOW - 900), closed(number(2), ended=NOW - 800))
    earlier = spool(tmp_path, 1, opened(number(1), at=NOW), opened(number(2), at=NOW))
    assert files(tmp_path) == [earlier, later]
    assert cuts(earlier) == []
    (cut,) = cuts(later)
    assert (cut.began, cut.ended) == (NOW - 900, NOW - 800)


def test_names_are_ordered_as_numbers_and_others_are_left_alone(tmp_path: Path) -> None:
    names = ["worker-0-99-7-999999.spool", "worker-0-99-7-1000000.spool", "a-b-100-7-000001.spool"]
    for name in ("x.spool", "worker-0-99-7-000003.spool.spare", "worker-0-99-7-12.spool", *reversed(names)):
        (tmp_path / name).touch()
    assert [path.name for path in files(tmp_path)] == names
    assert files(tmp_path / "none") == []


def test_two_who_ask_do_not_take_each_other_for_the_writer(tmp_path: Path) -> None:
    path = spool(tmp_path, 1)
    with open(path, "rb") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert is_finished(path)
    with open(path, "rb") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        assert not is_finished(path)
    assert is_finished(tmp_path / "gone.spool")

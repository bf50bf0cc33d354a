"""The sums of the day and the month, and that no record is in them twice or not at all."""

import logging
import threading
import time
from pathlib import Path

import pytest
from vitalis_serve.spool.reader import files
from vitalis_serve.spool.spent import Spent, day_of, month_of, seed
from vitalis_serve.spool.writer import SpoolWriter

from tests.support.spool import NOW, SEGMENT, Ledger, closed, opened

DAY = 86_400
TODAY = day_of(NOW)


def number(value: int) -> bytes:
    return value.to_bytes(16, "big")


def test_days_and_months_are_utc() -> None:
    assert (day_of(0), day_of(DAY - 0.001), day_of(DAY)) == (0, 0, 1)
    assert month_of(day_of(1_790_000_000)) == 56 * 12 + 8  # 21 September 2026
    assert month_of(30) == 0
    assert month_of(31) == 1
    assert day_of(-5) == 0
    assert month_of(day_of(1e300)) == 8029 * 12 + 11


def test_tokens_of_a_day_and_its_month() -> None:
    spent = Spent()
    spent.add(closed(number(1), prompt=10, completion=5))
    spent.add(closed(number(2), prompt=1, completion=1, ended=NOW + DAY, key="k2"))
    # Yesterday's comes late, because its clock went back.
    spent.add(closed(number(3), prompt=100, completion=0, ended=NOW - DAY))
    assert spent.tokens("key:k1", TODAY) == (15, 115)
    assert spent.tokens("key:k2", TODAY) == (0, 2)
    assert spent.tokens("tenant:acme", TODAY + 1) == (2, 117)
    assert spent.tokens("route:chat", TODAY + 60) == (0, 0)
    assert spent.today(NOW) == {
        "key:k1": (15, 115),
        "key:k2": (0, 2),
        "tenant:acme": (15, 117),
        "route:chat": (15, 117),
    }


def test_days_are_forgotten_but_those_near_today(tmp_path: Path) -> None:
    """A clock that was years ahead for one record takes no room and no place from others."""
    path = tmp_path / "spent.json"
    spent = Spent()
    for back in range(40):
        spent.add(closed(number(back), prompt=1, completion=0, ended=NOW - back * DAY))
    spent.add(closed(number(99), prompt=1, completion=0, ended=NOW + 3650 * DAY))
    spent.write(path, NOW)
    again = Spent.read(path)
    assert [again.tokens("key:k1", TODAY - back)[0] for back in (0, 7, 8, 39, -3650)] == [1, 1, 0, 0, 0]
    assert again.tokens("key:k1", TODAY)[1] == 21


def test_written_and_read_again(tmp_path: Path) -> None:
    folder, path = tmp_path / "spool", tmp_path / "spent.json"
    writer = SpoolWriter(folder, "worker-0", segment_bytes=SEGMENT)
    for value in range(3):
        writer.open(opened(number(value)))
    writer.close(closed(number(0), prompt=10, completion=5))
    spent = Spent.read(path)
    assert spent.advance(folder)
    spent.write(path, NOW)
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.stat()
    spent.advance(folder)
    spent.write(path, NOW)
    assert path.stat() == before, "nothing changed, nothing is written"
    assert not spent.covers(files(folder)[0])

    writer.close(closed(number(1), prompt=20, completion=5))
    assert seed(path, folder, NOW)["key:k1"] == (40, 40)
    writer.stop()
    assert seed(path, folder, NOW)["key:k1"] == (190, 190), "and one that was cut, as expected"
    spent.advance(folder)
    assert not spent.covers(files(folder)[0]), "not written yet"
    spent.write(path, NOW)
    assert spent.covers(files(folder)[0])
    assert Spent.read(path).covers(files(folder)[0])
    files(folder)[0].unlink()
    assert seed(path, folder, NOW) == dict.fromkeys(("key:k1", "tenant:acme", "route:chat"), (190, 190))
    assert seed(path, folder, NOW + DAY)["key:k1"] == (0, 190)
    assert seed(path, folder, NOW + 40 * DAY) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\x00",
        b'{"version":2,"days":{},"months":{},"files":{}}',
        b'{"version":1,"days":{"x":{}},"months":{},"files":{}}',
        b'{"version":1,"days":{},"months":{},"files":{"a":[-1,false]}}',
    ],
)
def test_spoilt_file_starts_from_what_the_spool_holds(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder, path = tmp_path / "spool", tmp_path / "spent.json"
    writer = SpoolWriter(folder, "worker-0", segment_bytes=SEGMENT)
    writer.close(closed(number(0), prompt=10, completion=5))
    writer.stop()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert seed(path, folder, NOW)["key:k1"] == (15, 15)
    assert f"{path} cannot be read" in caplog.text
    spent = Spent.read(path)
    spent.advance(folder)
    spent.write(path, NOW)
    caplog.clear()
    assert seed(path, folder, NOW)["key:k1"] == (15, 15)
    assert not caplog.text


def test_no_spool_folder_and_no_file(tmp_path: Path) -> None:
    assert seed(tmp_path / "spent.json", tmp_path / "none", NOW) == {}
    (tmp_path / "file").touch()
    assert seed(tmp_path / "spent.json", tmp_path / "file", NOW) == {}
    assert seed(tmp_path, tmp_path, NOW) == {}


def test_counts_that_an_engine_made_up_spoil_no_sums(tmp_path: Path) -> None:
    spent = Spent()
    for value in range(100):
        spent.add(closed(number(value), prompt=(1 << 63) - 1))
    spent.add(closed(number(100), prompt=-5, completion=-(1 << 62), key="k2"))
    spent.write(tmp_path / "spent.json", NOW)
    again = Spent.read(tmp_path / "spent.json")
    assert again.tokens("key:k1", TODAY) == (100 << 40, 100 << 40)
    assert again.tokens("key:k2", TODAY) == (0, 0)


def test_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    spent = Spent()
    spent.add(closed(number(0)))
    with pytest.raises(OSError, match="No such file"):
        spent.write(tmp_path / "none" / "spent.json", NOW)
    spent.write(tmp_path / "spent.json", NOW)
    assert Spent.read(tmp_path / "spent.json").tokens("key:k1", TODAY) == (108, 108)


def test_spool_that_is_away_for_a_while_is_not_counted_again(tmp_path: Path) -> None:
    """Its disk was not mounted, say."""
    folder, path = tmp_path / "spool", tmp_path / "spent.json"
    writer = SpoolWriter(folder, "worker-0", segment_bytes=SEGMENT)
    writer.close(closed(number(0)))
    writer.stop()
    for present in (True, False, True):
        if not present:
            folder.rename(tmp_path / "away")
        spent = Spent.read(path)
        spent.add(closed(number(9), key="other"))
        spent.advance(folder)
        spent.write(path, NOW)
        if not present:
            (tmp_path / "away").rename(folder)
    assert Spent.read(path).tokens("key:k1", TODAY) == (108, 108)


def test_seed_while_files_are_counted_and_deleted(tmp_path: Path) -> None:
    folder, path = tmp_path / "spool", tmp_path / "spent.json"
    ledger = Ledger(folder, path)
    ended = threading.Event()

    def count() -> None:
        while not ended.is_set():
            ledger.round()

    counting = threading.Thread(target=count)
    counting.start()
    total = 0
    try:
        writer = SpoolWriter(folder, "worker-0", segment_bytes=SEGMENT)
        for value in range(3000):
            while not writer.room:
                time.sleep(0.001)
            writer.open(opened(number(value)))
            writer.close(closed(number(value)))
            total += 108
            if value % 100 == 0:
                assert seed(path, folder, NOW)["key:k1"] == (total, total)
    finally:
        ended.set()
        counting.join()
        writer.stop()
    ledger.round()
    assert len(ledger.kept) == 3000
    assert files(folder) == []
    assert seed(path, folder, NOW)["key:k1"] == (total, total)

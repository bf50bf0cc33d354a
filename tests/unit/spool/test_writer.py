"""The worker's side: room that is kept, files that follow each other, disks that are full or broken."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vitalis_serve.spool.files import reclaim
from vitalis_serve.spool.reader import cuts, files, is_finished, scan
from vitalis_serve.spool.record import MAX_FRAME_BYTES, Closed, Opened, frame
from vitalis_serve.spool.writer import SpoolWriter

from tests.support.spool import NOW, ROOT, SEGMENT, Ledger, closed, opened

DEADLINE = 30.0


def eventually(holds: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def number(value: int) -> bytes:
    return value.to_bytes(16, "big")


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[SpoolWriter]:
    made = SpoolWriter(tmp_path / "spool", "worker-0", segment_bytes=SEGMENT)
    yield made
    made.stop()


def test_what_was_written_is_there_at_once_and_the_file_is_locked(tmp_path: Path, writer: SpoolWriter) -> None:
    assert writer.room
    writer.open(opened(number(1)))
    writer.close(closed(number(1)))
    path = files(tmp_path / "spool")[0]
    assert path.stat().st_mode & 0o777 == 0o600
    assert scan(path).records == [opened(number(1)), closed(number(1))]
    assert not is_finished(path)
    with pytest.raises(ValueError, match="still being written"):
        cuts(path)
    writer.stop()
    assert is_finished(path)
    assert files(tmp_path / "spool") == [path], "files that were only made ready are gone"
    assert cuts(path) == []


def test_next_file_begins_with_what_is_open(tmp_path: Path, writer: SpoolWriter) -> None:
    folder = tmp_path / "spool"
    writer.open(opened(number(0)))
    for value in range(1, 2000):
        eventually(lambda: writer.room, "no room")
        writer.open(opened(number(value)))
        writer.close(closed(number(value)))
    assert {path.stat().st_size for path in files(folder)} == {SEGMENT}
    used = [path for path in files(folder) if scan(path).records]
    assert len(used) > 4
    eventually(lambda: is_finished(used[-2]), "a full file is let go")
    for path in used:
        assert scan(path).records[0] == opened(number(0))
    assert not any(cuts(path) for path in used[:-1])
    eventually(lambda: len(files(folder)) >= len(used) + 2, "two files are ready")
    writer.stop()
    assert [cut.id for cut in cuts(used[-1])] == [number(0)]
    assert writer.unwritten == writer.errors == 0


@pytest.mark.parametrize("length", [1, 5000])
def test_every_open_request_has_room_for_its_end(tmp_path: Path, writer: SpoolWriter, length: int) -> None:
    """As many as can be, of the longest records that there can be too."""
    value = 0
    limit = SEGMENT // (2 * MAX_FRAME_BYTES)
    while writer.room:
        writer.open(opened(number(value), request_id="x" * length))
        value += 1
        assert value <= limit
    assert value == limit
    writer.open(opened(number(9999)))
    assert writer.unwritten == 1, "more than there is room for"
    for each in range(value):
        writer.close(closed(number(each)))
    assert writer.room
    writer.stop()
    ledger = Ledger(tmp_path / "spool", tmp_path / "spent.json")
    ledger.round()
    assert {record.outcome for record in ledger.kept.values()} == {"ok"}
    assert len(ledger.kept) == value


def test_all_that_is_open_may_end_at_once(tmp_path: Path, writer: SpoolWriter) -> None:
    """Wherever in a file that is."""
    for cycle in range(60):
        for value in range(40):
            eventually(lambda: writer.room, "no room")
            writer.open(opened(number(cycle * 40 + value)))
        for value in range(40):
            writer.close(closed(number(cycle * 40 + value)))
    assert len(files(tmp_path / "spool")) > 6
    assert {path.stat().st_size for path in files(tmp_path / "spool")} == {SEGMENT}, "one grew"
    assert writer.unwritten == writer.errors == 0


def test_stopped_it_takes_nothing_and_says_so(tmp_path: Path, writer: SpoolWriter) -> None:
    writer.open(opened(number(1)))
    writer.stop()
    assert not writer.room
    writer.open(opened(number(2)))
    writer.close(closed(number(1)))
    writer.close(closed(number(3)))
    writer.stop()
    assert writer.unwritten == 3
    path = files(tmp_path / "spool")[0]
    assert [cut.id for cut in cuts(path)] == [number(1)]


def test_close_without_open_is_written(tmp_path: Path, writer: SpoolWriter) -> None:
    writer.close(closed(number(1)))
    assert scan(files(tmp_path / "spool")[0]).records == [closed(number(1))]


def test_two_in_one_millisecond_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    made = [SpoolWriter(tmp_path, "worker-0", segment_bytes=SEGMENT) for _ in range(4)]
    for value, each in enumerate(made):
        each.open(opened(number(value)))
    for value, each in enumerate(made):
        each.close(closed(number(value)))
        each.stop()
    found = [record.id for path in files(tmp_path) for record in scan(path).records if isinstance(record, Closed)]
    assert sorted(found) == [number(value) for value in range(4)]
    assert all(not cuts(path) for path in files(tmp_path))


def test_folder_cleared_by_hand_is_noticed(tmp_path: Path, writer: SpoolWriter) -> None:
    folder = tmp_path / "spool"
    writer.open(opened(number(1)))
    for path in files(folder):
        path.unlink()
    folder.rmdir()
    eventually(lambda: writer.room and files(folder) and scan(files(folder)[0]).records, "new files")
    writer.close(closed(number(1)))
    records = [record for path in files(folder) for record in scan(path).records]
    assert records == [opened(number(1)), closed(number(1))]


def test_disk_that_hangs_in_a_sync_delays_nobody(
    tmp_path: Path, writer: SpoolWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written while one sync hangs is synced by the next. The kernel's call is what is replaced."""
    hanging, go_on = threading.Event(), threading.Event()
    synced: list[int] = []
    sync = os.fdatasync

    def slow(descriptor: int) -> None:
        hanging.set()
        go_on.wait(DEADLINE)
        synced.append(len(scan(files(tmp_path / "spool")[0]).records))
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    writer.open(opened(number(1)))
    assert hanging.wait(DEADLINE)
    hanging.clear()
    writer.open(opened(number(2)))
    writer.close(closed(number(1)))
    assert not synced
    go_on.set()
    assert hanging.wait(DEADLINE)
    eventually(lambda: len(synced) == 2, "the second sync")
    time.sleep(0.3)
    assert len(synced) == 2, "nothing new, nothing to sync"


def test_sync_that_fails_moves_on_to_another_file(
    tmp_path: Path, writer: SpoolWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a lost page once only, so nothing more is trusted to that file."""
    folder = tmp_path / "spool"
    sync = os.fdatasync
    told: list[int] = []

    def broken(descriptor: int) -> None:
        if not told:
            told.append(descriptor)
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", broken)
    writer.open(opened(number(1)))
    eventually(lambda: writer.errors, "the error is counted")
    writer.close(closed(number(1)))
    assert writer.room
    first, second = files(folder)[:2]
    assert scan(first).records == [opened(number(1))]
    assert scan(second).records == [closed(number(1))]
    eventually(lambda: is_finished(first), "the broken one is let go")
    assert cuts(first) == []
    assert writer.unwritten == 0


def test_reclaim_leaves_what_is_used(tmp_path: Path, writer: SpoolWriter) -> None:
    folder = tmp_path / "spool"
    writer.open(opened(number(1)))
    before = files(folder)
    dead = folder / "worker-9-1-1-000001.spool"
    dead.write_bytes(bytes(SEGMENT))
    (folder / "worker-9-1-1-000002.spool.spare").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    reclaim(folder)
    assert files(folder) == before
    assert (folder / "notes.txt").exists()
    assert len(list(folder.iterdir())) == len(before) + 1


def limited(program: str, folder: Path) -> None:
    """Runs it in a process of its own, whose limits on file sizes stand for a disk that refuses."""
    head = (
        "import resource, sys, time\n"
        "from pathlib import Path\n"
        "from tests.support.spool import SEGMENT, closed, opened\n"
        "from vitalis_serve.spool.reader import cuts, files, is_finished\n"
        "from vitalis_serve.spool.writer import SpoolWriter\n"
        "def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
        "def until(holds):\n"
        "    end = time.monotonic() + 30\n"
        "    while not holds():\n"
        "        assert time.monotonic() < end\n"
        "        time.sleep(0.01)\n"
        "def number(value): return value.to_bytes(16, 'big')\n"
        "folder = Path(sys.argv[1])\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "server")}
    ended = subprocess.run(
        [sys.executable, "-c", head + program, str(folder)],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


def test_files_cannot_be_made_at_first(tmp_path: Path) -> None:
    limited(
        "limit(SEGMENT // 2)\n"
        "writer = SpoolWriter(folder, 'w', segment_bytes=SEGMENT)\n"
        "assert not writer.room and writer.errors\n"
        "writer.open(opened(number(7)))\n"
        "writer.close(closed(number(7)))\n"
        "assert writer.unwritten == 2\n"
        "limit(resource.RLIM_INFINITY)\n"
        "until(lambda: writer.room)\n"
        "writer.open(opened(number(1)))\n"
        "writer.close(closed(number(1)))\n"
        "writer.stop()\n"
        "assert writer.unwritten == 2\n",
        tmp_path,
    )
    assert [record for path in files(tmp_path) for record in scan(path).records] == [
        opened(number(1)),
        closed(number(1)),
    ]


def test_no_new_files_for_a_while(tmp_path: Path) -> None:
    """What is made ready is used up, then there is no room, with room left for what is open; and it comes back."""
    limited(
        "writer = SpoolWriter(folder, 'w', segment_bytes=SEGMENT)\n"
        "limit(0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (SEGMENT - 1, resource.RLIM_INFINITY))\n"
        "running, value = [], 0\n"
        "while writer.room:\n"
        "    writer.open(opened(number(value)))\n"
        "    running.append(value)\n"
        "    value += 1\n"
        "    if len(running) > 30: writer.close(closed(number(running.pop(0))))\n"
        "assert value > 300, value\n"
        "for each in running: writer.close(closed(number(each)))\n"
        "assert writer.unwritten == 0\n"
        "limit(resource.RLIM_INFINITY)\n"
        "until(lambda: writer.room)\n"
        "writer.open(opened(number(value)))\n"
        "writer.close(closed(number(value)))\n"
        "writer.stop()\n"
        "assert writer.unwritten == 0\n"
        "(folder / 'count').write_text(str(value + 1))\n",
        tmp_path,
    )
    ledger = Ledger(tmp_path, tmp_path / "spent.json")
    ledger.round()
    assert len(ledger.kept) == int((tmp_path / "count").read_text())
    assert {record.outcome for record in ledger.kept.values()} == {"ok"}


@pytest.mark.parametrize("size", [0, 1000, 20 * len(frame(opened(number(0)))) + 1])
def test_even_ready_files_refuse_for_a_while(tmp_path: Path, size: int) -> None:
    """As on file systems that copy on write. size: 1000 lets a file take a part of what it is to carry,
    the last one all that, and nothing of what waits. While it lasts nobody may take a request for cut."""
    limited(
        "writer = SpoolWriter(folder, 'w', segment_bytes=SEGMENT)\n"
        "for value in range(20): writer.open(opened(number(value)))\n"
        f"limit({size})\n"
        "for value in range(10): writer.close(closed(number(value)))\n"
        "assert not writer.room and writer.errors and not writer.unwritten\n"
        "time.sleep(0.3)\n"
        "assert not writer.room\n"
        "assert not any(cuts(path) for path in files(folder) if is_finished(path))\n"
        "limit(resource.RLIM_INFINITY)\n"
        "until(lambda: writer.room)\n"
        "for value in range(10, 15): writer.close(closed(number(value)))\n"
        "writer.stop()\n"
        "assert not writer.unwritten\n",
        tmp_path,
    )
    ledger = Ledger(tmp_path, tmp_path / "spent.json")
    ledger.round()
    outcomes = {int.from_bytes(identity, "big"): record.outcome for identity, record in ledger.kept.items()}
    assert outcomes == {value: "ok" if value < 15 else "cut" for value in range(20)}


def test_stopped_while_the_disk_refuses(tmp_path: Path) -> None:
    """What was finished and never reached the disk is told as cut, and counted."""
    limited(
        "writer = SpoolWriter(folder, 'w', segment_bytes=SEGMENT)\n"
        "for value in range(20): writer.open(opened(number(value)))\n"
        "limit(0)\n"
        "for value in range(10): writer.close(closed(number(value)))\n"
        "writer.stop()\n"
        "assert writer.unwritten == 10\n",
        tmp_path,
    )
    ledger = Ledger(tmp_path, tmp_path / "spent.json")
    ledger.round()
    assert len(ledger.kept) == 20
    assert {record.outcome for record in ledger.kept.values()} == {"cut"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "disk"
    where.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(where)], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return ballast


def test_full_disk(small_disk: Path) -> None:
    folder = small_disk / "spool"
    ledger = Ledger(folder, small_disk / "spent.json")
    ledger.round()
    writer = SpoolWriter(folder, "worker-0", segment_bytes=SEGMENT)
    ballast = fill(small_disk)
    running: list[int] = []
    value = 0
    while writer.room:
        writer.open(opened(number(value)))
        running.append(value)
        value += 1
        if len(running) > 30:
            writer.close(closed(number(running.pop(0))))
    for each in running:
        writer.close(closed(number(each)))
    assert {path.stat().st_size for path in files(folder)} == {SEGMENT}, "none grows: there would be no room for it"
    assert value > 300
    assert writer.unwritten == 0
    # Counting has room of its own, and so the spool becomes smaller and the worker has room again.
    eventually(lambda: sum(map(is_finished, files(folder))) >= 2, "full files are let go")
    fill(small_disk)
    ledger.round()
    eventually(lambda: writer.room, "no room after files were deleted")
    ballast.unlink()
    writer.open(opened(number(value)))
    writer.close(closed(number(value)))
    writer.stop()
    ledger.round()
    assert len(ledger.kept) == value + 1
    assert {record.outcome for record in ledger.kept.values()} == {"ok"}


def test_long_and_strange_fields_are_cut_not_refused(tmp_path: Path, writer: SpoolWriter) -> None:
    long = "é" * 4000
    strange = Opened(number(1), 1.0, "acme", "k1", long, long, long, long, "\ud800", True, 1 << 70, -(1 << 70))
    writer.open(strange)
    writer.close(closed(number(1)))
    written, ended = scan(files(tmp_path / "spool")[0]).records
    assert isinstance(written, Opened) and isinstance(ended, Closed)
    assert (written.tenant, written.key, written.request_id) == ("acme", "k1", "")
    assert long.startswith(written.api)
    assert (written.prompt_tokens, written.output_tokens) == ((1 << 63) - 1, -(1 << 63) + 1)
    writer.open(opened(number(2), request_id="\ud800 half"))
    assert scan(files(tmp_path / "spool")[0]).records[2] == opened(number(2), request_id="? half")
    assert writer.unwritten == 0

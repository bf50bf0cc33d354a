"""The access log loses no record in silence."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vitalis_serve.gateway import access
from vitalis_serve.gateway.access import AccessLog, Record


def record(number: int) -> Record:
    return Record(0.0, f"req-{number}", "POST", "/v1/chat/completions", 200, "ok")


def ids(path: Path) -> list[str]:
    return [json.loads(line)["request_id"] for line in path.read_text().splitlines()]


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_every_record_is_written_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    access_log = AccessLog(str(path), flush_seconds=0.0005)
    for number in range(8_000):
        access_log.add(record(number))
    access_log.close()
    assert ids(path) == [f"req-{number}" for number in range(8_000)]
    assert access_log.dropped == 0


def test_what_waits_is_written_when_the_log_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    access_log = AccessLog(str(path))
    access_log.add(record(1))
    access_log.close()
    assert ids(path) == ["req-1"]


def test_a_log_that_cannot_be_written_counts_what_it_drops(tmp_path: Path) -> None:
    access_log = AccessLog(str(tmp_path / "missing" / "access.jsonl"))
    for number in range(300):
        access_log.add(record(number))
    access_log.close()
    assert access_log.dropped == 300


def test_a_log_that_was_rotated_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    access_log = AccessLog(str(path), flush_seconds=0.001)
    access_log.add(record(1))
    while not path.exists() or not ids(path):
        pass
    path.rename(tmp_path / "access.1.jsonl")
    access_log.add(record(2))
    access_log.close()
    assert ids(path) == ["req-2"]


def test_the_log_is_bounded(tmp_path: Path) -> None:
    access_log = AccessLog(str(tmp_path / "access.jsonl"), flush_seconds=60)
    for number in range(access.MAX_WAITING + 7):
        access_log.add(record(number))
    assert access_log.dropped == 7
    access_log.close()


def test_no_log_is_no_thread() -> None:
    access_log = AccessLog("")
    assert not access_log.enabled
    access_log.close()


def test_is_private_and_does_not_grow_without_end(tmp_path: Path) -> None:
    """One file of the size allowed and two older ones, readable by nobody else."""
    path = tmp_path / "access.jsonl"
    log = AccessLog(str(path), flush_seconds=0.005, max_bytes=2000)
    for number in range(200):
        log.add(Record(0.0, f"req-{number}", "GET", "/healthz", 200, "ok"))
        time.sleep(0.002)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] in (
        ["access.jsonl", "access.jsonl.1", "access.jsonl.2"],
        ["access.jsonl.1", "access.jsonl.2"],
    )
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert all(file.stat().st_size < 10_000 for file in files)
    assert "req-199" in "".join(file.read_text() for file in files)

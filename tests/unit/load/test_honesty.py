"""A run that says more about its load generator than about the server says so, and only such a one."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from vitalis_load import result
from vitalis_load.honesty import Honesty
from vitalis_load.records import Record, RepeatEnd

from tests.support import measured
from tests.support.measured import Load, Server


def judged(folder: Path, server: Server | None = None, *, repeats: int = 1, **load: Any) -> Honesty:
    asked = Load(**({"rate": 10, "seconds": 14, "warmup": 2, "cooldown": 2} | load))
    return result.build(measured.write(folder / "run", server or Server(), asked, repeats=repeats)).honesty


def test_an_idle_client_is_believed(tmp_path: Path) -> None:
    found = judged(tmp_path)
    assert not found.client_bound
    assert found.reasons == []
    assert found.open_loop
    assert found.requested_rate == found.achieved_rate == pytest.approx(10, rel=0.3)


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ({"cpu": 0.97}, "more than 90% of a core in"),
        ({"late": 0.02}, "Requests were sent late"),
        ({"lag": 0.09, "cpu": 0.2}, "other programs held this machine's cores"),
        ({"lag": 0.09, "cpu": 0.7}, "waited more than 20 ms to be read in 100% of the seconds."),
    ],
)
def test_a_client_that_could_not_keep_up_says_why(tmp_path: Path, load: dict[str, Any], words: str) -> None:
    found = judged(tmp_path, **load)
    assert found.client_bound
    assert words in "\n".join(found.reasons)


def test_being_late_counts_beside_a_slow_first_token(tmp_path: Path) -> None:
    """5 ms late on average, some 25 ms at p99, is nothing beside a TTFT of a second."""
    assert not judged(tmp_path, Server(prefill=1.0), late=0.005).client_bound


def test_a_request_without_a_socket_is_the_clients_fault(tmp_path: Path) -> None:
    folder = measured.write(tmp_path / "run", Server(), Load(rate=10, seconds=14, warmup=2, cooldown=2), repeats=1)
    path = folder / "repeat-1" / "requests.jsonl"
    records = [msgspec.json.decode(line, type=Record) for line in path.read_bytes().splitlines()]
    for record in records[50:52]:
        record.error, record.detail = "client", "http://10.0.0.1: Too many open files"
    measured.lines(path, records)
    found = result.build(folder).honesty
    assert found.client_bound
    assert found.reasons[0].startswith("2 requests never left this machine (http://10.0.0.1: Too many open files)")


def test_requests_that_were_never_due_are_missed(tmp_path: Path) -> None:
    folder = measured.write(tmp_path / "run", Server(), Load(rate=30, seconds=14, warmup=2, cooldown=2), repeats=1)
    scenario = msgspec.json.decode((folder / "run.json").read_bytes())
    scenario["scenario"]["expected"]["mean_rate"] = 60.0
    (folder / "run.json").write_bytes(msgspec.json.encode(scenario))
    found = result.build(folder).honesty
    assert found.client_bound
    assert "asks for 60 requests/s" in found.reasons[0]
    # one that was interrupted could not
    end = RepeatEnd(began_at=1.0, seconds=10.0, complete=False, reason="interrupted")
    (folder / "repeat-1" / "end.json").write_bytes(msgspec.json.encode(end))
    assert not result.build(folder).honesty.client_bound


def test_closed_users_are_told_what_they_hide(tmp_path: Path) -> None:
    found = judged(tmp_path, kind="users", late=0.05)
    assert not found.client_bound  # nobody asked for a time
    assert found.requested_rate is None
    assert found.delay_p99 is None
    assert any("Closed users" in note for note in found.notes)


def test_few_requests_answers_of_other_lengths_and_no_usage_are_noted(tmp_path: Path) -> None:
    notes = "\n".join(judged(tmp_path, Server(drift=0.5)).notes)
    assert "Fewer than 1,000 requests" in notes
    assert "shorter than asked for" in notes
    silent = "\n".join(judged(tmp_path / "silent", Server(usage=False)).notes)
    assert "told no usage" in silent


def test_what_several_repeats_say_alike_is_said_once(tmp_path: Path) -> None:
    found = judged(tmp_path, repeats=3, cpu=0.97)
    busy = [reason for reason in found.reasons if "of a core" in reason]
    assert len(busy) == 1
    assert busy[0].startswith(("Repeat 1 (alike: 2, 3): ", "A process"))

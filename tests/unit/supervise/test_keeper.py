"""The keeper alone, as a real process: what it says, and that nothing below it survives."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vitalis_serve.supervise import keeper
from vitalis_serve.supervise.child import KEEPER


class Kept:
    """A keeper and our end of its socket."""

    def __init__(self, *argv: str) -> None:
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(10)
        self.lines = self.channel.makefile("r")
        words = [sys.executable, "-I", "-S", KEEPER, "keep", str(theirs.fileno()), "--", *argv]
        self.process = subprocess.Popen(words, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()

    def says(self) -> str:
        return self.lines.readline().strip()

    def tell(self, line: str) -> None:
        self.channel.sendall(line.encode() + b"\n")

    def close(self) -> None:
        self.lines.close()
        self.channel.close()
        self.process.wait(10)


@pytest.fixture
def keep() -> Iterator[type[Kept]]:
    made = []

    def start(*argv: str) -> Kept:
        made.append(Kept(*argv))
        return made[-1]

    yield start
    for kept in made:
        kept.close()


def shell(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9)])
def test_it_tells_how_its_child_ended(keep, script, code):
    kept = keep(*shell(script))
    assert kept.says().startswith("started ")
    assert kept.says() == f"exited {code}"
    assert kept.process.wait(5) == 0


def test_a_program_that_is_not_there_is_an_error(keep):
    kept = keep("/no/such/program")
    assert kept.says() == "error /no/such/program: No such file or directory"
    assert kept.process.wait(5) == 127


def test_stop_is_sigterm(keep, tmp_path):
    kept = keep(*shell(f"trap 'echo yes > {tmp_path}/told; exit 3' TERM; echo > {tmp_path}/up; sleep 100 & wait"))
    kept.says()
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    kept.tell("stop 10")
    assert kept.says() == "exited 3"
    assert (tmp_path / "told").exists()


def test_stop_is_sigkill_at_its_deadline(keep, tmp_path):
    kept = keep(*shell(f"trap '' TERM; echo > {tmp_path}/up; while :; do sleep 1; done"))
    kept.says()
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    began = time.monotonic()
    kept.tell("stop 0.3")
    assert kept.says() == "exited -9"
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("end", ["kill", "close", "child"])
def test_nothing_below_survives(keep, tmp_path, end):
    """Not in the group, not in a session of its own, not orphaned before, not stopped."""
    pids = tmp_path / "pids"
    kept = keep(
        *shell(
            f"sleep 100 & echo $! >> {pids}; setsid sleep 100 & echo $! >> {pids};"
            f"(setsid sh -c 'echo $$ >> {pids}; exec sleep 100' &); sh -c 'echo $$ >> {pids}; kill -STOP $$' & wait"
        )
    )
    child = int(kept.says().split()[1])
    while not pids.exists() or len(pids.read_text().split()) < 4:
        time.sleep(0.01)
    below = [int(pid) for pid in pids.read_text().split()]
    if end == "kill":
        kept.tell("kill")
    elif end == "child":
        os.kill(child, signal.SIGKILL)
    else:
        kept.channel.shutdown(socket.SHUT_RDWR)
    kept.process.wait(20)
    assert all(gone(pid) for pid in (child, *below))


def test_a_killed_keeper_takes_its_child_along(keep):
    kept = keep("sleep", "100")
    child = int(kept.says().split()[1])
    kept.process.kill()
    deadline = time.monotonic() + 5
    while not gone(child) and Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_does_not_mind_a_terminal_s_signals(keep):
    kept = keep("sleep", "100")
    child = int(kept.says().split()[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        kept.process.send_signal(number)
    kept.tell("kill")
    assert kept.says() == "exited -9"
    assert gone(child)


def test_its_child_has_every_signal_as_it_should(keep):
    """Ignored signals would be inherited through exec: the engine would never hear SIGTERM."""
    kept = keep("sleep", "100")
    child = int(kept.says().split()[1])
    status = dict(line.split(":\t") for line in Path(f"/proc/{child}/status").read_text().splitlines() if ":\t" in line)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        assert not int(status["SigIgn"], 16) >> (number - 1) & 1
        assert not int(status["SigBlk"], 16) >> (number - 1) & 1


def test_descendants_are_found_through_generations():
    child = subprocess.Popen(["sh", "-c", "sh -c 'sleep 100 & wait' & wait"], process_group=0)
    try:
        deadline = time.monotonic() + 5
        while len(keeper.descendants(child.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert child.pid in keeper.descendants(os.getpid())
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()

"""Processes that a killed run left behind: found by two marks in /proc and killed.

Every child carries `VITALIS_TREE=<tree>:<name>` in its environment, which its own children inherit. vLLM's
workers write their title over it, so each keeper's session is noted in a file as well: a session's number
stays taken while any member lives, so members of a noted session whose leader is gone are ours.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path

VARIABLE = "VITALIS_TREE"
SUFFIX = ".session"


def note_session(folder: Path, name: str, leader: int) -> None:
    """Remembers that `leader` and its session belong to child `name`. Best effort: a full disk is no reason
    to stop."""
    with contextlib.suppress(OSError):
        (folder / f"{name}{SUFFIX}").write_text(f"{leader} {_started(leader)} {_boot()}")


def forget_session(folder: Path, name: str) -> None:
    with contextlib.suppress(OSError):
        (folder / f"{name}{SUFFIX}").unlink()


def noted_sessions(folder: Path) -> set[int]:
    """Sessions of an earlier run, less those whose number now belongs to somebody else."""
    sessions = set()
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            leader, started, boot = path.read_text().split()
        except (OSError, ValueError):
            continue
        if boot == _boot() and _started(int(leader)) in (started, ""):
            sessions.add(int(leader))
    return sessions


def find(mark: str, sessions: Collection[int] = ()) -> list[int]:
    """Living processes with `mark` (`<tree>:` or `<tree>:<name>`) or in one of `sessions`; never our own
    line."""
    spared = _own_line()
    wanted = f"{VARIABLE}={mark}".encode()
    whole = b"" if mark.endswith(":") else b"\0"
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in spared:
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
            if stat[0] in (b"Z", b"X"):
                continue
            if (
                int(stat[3]) in sessions
                or b"\0" + wanted + whole in b"\0" + Path(f"/proc/{entry}/environ").read_bytes() + b"\0"
            ):
                found.append(int(entry))
        except (OSError, IndexError):
            continue  # ended while we looked, or somebody else's
    return found


async def sweep(mark: str, sessions: Collection[int] = (), *, seconds: float = 5) -> tuple[int, list[int]]:
    """SIGKILLs them until none is left; returns how many there were and the pids that would not go in
    time."""
    deadline = time.monotonic() + seconds
    killed: set[int] = set()
    while left := find(mark, sessions):
        if time.monotonic() >= deadline:
            return len(killed), left
        for pid in left:
            killed.add(pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.02)
    return len(killed), []


def _own_line() -> set[int]:
    line = {os.getpid()}
    pid = os.getpid()
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):
            break
        line.add(pid)
    return line


def _started(pid: int) -> str:
    """When it started, in clock ticks since boot; "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "-"

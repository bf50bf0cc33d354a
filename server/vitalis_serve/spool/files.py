"""The files of a spool folder: what they are called, whose they are, and whether anybody still writes them.

`<worker>-<start ms>-<pid>-<number>.spool`, made in full size and locked (flock) by the worker process that writes it
until it is full or the process has ended, however it ended. Numbers of one process go up, and every file holds all
that can be known of its requests together with the files after it. `.spare`: in the making, holds nothing.
"""

import contextlib
import fcntl
import os
import re
from pathlib import Path
from typing import Final

SUFFIX: Final = ".spool"
MAKING: Final = ".spare"
HOST_ID: Final = "host.id"  # in the folder: what control calls it
_NAME: Final = re.compile(r"(.+)-(\d+)-(\d+)-(\d{6,})\.spool")


def name_of(process: str, number: int) -> str:
    return f"{process}-{number:06d}{SUFFIX}"


def process_of(path: Path) -> str:
    """The worker process whose file that is: what the names of all its files begin with."""
    return path.name.rpartition("-")[0]


def files(folder: Path) -> list[Path]:
    """Every spool file, those of one process in the order in which it wrote them; empty where there is no folder.

    Whoever deletes files deletes those of one process in this order, or what `cuts` says of an earlier one is wrong.
    """
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if match := _NAME.fullmatch(name):
                worker, start, pid, number = match.groups()
                found.append((int(start), worker, int(pid), int(number), folder / name))
    return [entry[-1] for entry in sorted(found)]


def after(path: Path) -> list[Path]:
    """The files that the same process began later."""
    mine = process_of(path)
    ahead = [other for other in files(path.parent) if process_of(other) == mine]
    return ahead[ahead.index(path) + 1 :] if path in ahead else [other for other in ahead if other.name > path.name]


def is_finished(path: Path) -> bool:
    """Whether nobody will write there again: its writer is done with it or dead. True of a file that is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        # Shared, so that two who ask at once do not take each other for the writer.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def reclaim(folder: Path) -> None:
    """Deletes what dead processes had made ready and never used. Files with a record in them stay."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            path = folder / name
            if name.endswith((SUFFIX, SUFFIX + MAKING)):
                with contextlib.suppress(OSError):
                    if is_finished(path) and not _begun(path):
                        path.unlink(missing_ok=True)


def _begun(path: Path) -> bool:
    with open(path, "rb", buffering=0) as file:
        return any(file.read(8) or b"")

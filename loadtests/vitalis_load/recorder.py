"""Writes a repeat's folder while it is measured. Whole lines only: what a full disk cut is taken back."""

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import msgspec

from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.meter import Batch
from vitalis_load.records import RepeatEnd, RunInfo, Sample

FILES = ("requests", "gaps", "client", "samples")
RESERVED = ".reserved"  # a file that keeps room for end.json, which is to be written when the disk is full
_RESERVED_BYTES = 64 * 1024


class Recorder:
    """The only writer of `folder`, which it makes. Whatever it raises is a LoadFailure with CANNOT_WRITE."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                path = folder / f"{name}.jsonl"
                self._files[name] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._reserve = folder / RESERVED
            self._reserve.write_bytes(b"\0" * _RESERVED_BYTES)
        except OSError as error:
            self.close()
            raise _cannot(folder, error) from None

    def take(self, batch: Batch) -> None:
        """Appends what a process has handed over."""
        for name, lines in (("requests", batch.requests), ("gaps", batch.gaps), ("client", batch.client)):
            self._append(name, lines)

    def sample(self, sample: Sample) -> None:
        self._append("samples", msgspec.json.encode(sample) + b"\n")

    def end(self, end: RepeatEnd) -> None:
        """The last thing written; it also closes."""
        self.close()
        try:
            self._reserve.unlink(missing_ok=True)
            write_whole(self.folder / "end.json", end)
        except OSError as error:
            raise _cannot(self.folder, error) from None

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def _append(self, name: str, lines: bytes) -> None:
        if not lines or name not in self._files:
            return
        descriptor = self._files[name]
        before = os.fstat(descriptor).st_size
        try:
            written = 0
            while written < len(lines):
                written += os.write(descriptor, lines[written:])
        except OSError as error:
            # What fitted of the whole lines stays; a torn one would be counted as unread.
            whole = lines.rfind(b"\n", 0, written) + 1
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, before + whole)
            raise _cannot(self.folder, error) from None


def write_whole(path: Path, what: Any) -> None:
    """As indented JSON, at once or not at all. Raises OSError."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(what), indent=1) + b"\n")
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def make_run(out: Path, info: RunInfo) -> Path:
    """The run's folder below `out`, with run.json in it. Raises LoadFailure with CANNOT_WRITE."""
    folder = out / info.id
    try:
        folder.mkdir(parents=True)
        write_whole(folder / "run.json", info)
    except FileExistsError:
        raise LoadFailure(f"{folder} is there already: name another folder with --out", Exit.CANNOT_WRITE) from None
    except OSError as error:
        raise _cannot(folder, error) from None
    return folder


def _cannot(folder: Path, error: OSError) -> LoadFailure:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LoadFailure(
            f"the disk of {folder} is full: make room, or name another folder with --out", Exit.CANNOT_WRITE
        )
    return LoadFailure(
        f"{folder} cannot be written ({error.strerror}): name another folder with --out", Exit.CANNOT_WRITE
    )

"""What a search looks at and leaves behind: one measured load, and a journal from which it goes on after an
interruption."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from vitalis_load.errors import Exit, LoadFailure

Unit = Literal["requests/s", "users"]


class Point(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One load, measured: medians over the repeats. Times in milliseconds, None where no request gave one."""

    load: float  # requests per second asked for, or users
    offered_per_second: float = 0.0  # requests that were due
    requests_per_second: float = 0.0  # answered well, whether within the SLO or not
    tokens_per_second: float = 0.0  # of output, in the steady window
    goodput: float = 0.0  # good requests per second
    good_share: float = 0.0  # of all that were scheduled
    failed_share: float = 0.0
    ttft_p50_ms: float | None = None
    ttft_p99_ms: float | None = None
    tpot_p50_ms: float | None = None
    tpot_p99_ms: float | None = None
    e2e_p50_ms: float | None = None
    e2e_p99_ms: float | None = None
    slo_met: bool = True
    missed: list[str] = []  # which limits of the SLO, in words
    partial: str = ""  # why it is not all that was asked for, as a process of the load generator was lost
    client_bound: str = ""  # why the load generator, and not the server, set this figure; "": it did not
    spread: float = 0.0  # of goodput over the repeats: (largest - smallest) / median
    repeats: int = 1
    requests: int = 0
    run: str = ""  # its folder, relative to the search's


class Step(msgspec.Struct, frozen=True):
    """What to measure next."""

    load: float
    repeats: int = 1


class Journal:
    """JSON lines in the search's folder: a first one that says what is searched, then one for each thing learnt.

    Every line is on disk before the search goes on. A torn last line, from a kill, is taken away."""

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        """Opens or makes it. Raises LoadFailure where it belongs to another search or cannot be used."""
        self._path = path
        self.entries: list[dict[str, Any]] = []
        head = msgspec.to_builtins(dict(asked))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines, whole = _lines(path)
            if lines:
                _refuse_another(path, lines[0].get("asked"), head)
                self.entries = lines[1:]
                if whole < path.stat().st_size:
                    os.truncate(path, whole)
            else:
                path.unlink(missing_ok=True)
                self._write({"asked": head})
        except OSError as error:
            raise _unwritable(path, error) from None

    @property
    def resumed(self) -> bool:
        return bool(self.entries)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Raises LoadFailure where the disk does not take it."""
        made = dict(entry)
        try:
            self._write(made)
        except OSError as error:
            raise _unwritable(self._path, error) from None
        self.entries.append(msgspec.to_builtins(made))

    def _write(self, entry: Mapping[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines, and how many bytes they take."""
    lines: list[dict[str, Any]] = []
    whole = 0
    with contextlib.suppress(FileNotFoundError):
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                lines.append(msgspec.json.decode(line, type=dict[str, Any]))
            except msgspec.MsgspecError:
                raise LoadFailure(
                    f"{path}: line {number} is not what a search writes: move the folder away or choose another --out"
                ) from None
            whole += len(line)
    return lines, whole


def _refuse_another(path: Path, had: Any, wanted: Any) -> None:
    if had == wanted:
        return
    if not isinstance(had, dict):
        raise LoadFailure(f"{path} is no journal of a search: move the folder away or choose another --out")
    differing = sorted(key for key in {*had, *wanted} if had.get(key) != wanted.get(key))
    raise LoadFailure(
        f"{path.parent} holds a search with another {', '.join(differing)}: give the same options to go on with it,"
        " or another --out to begin anew"
    )


def _unwritable(path: Path, error: OSError) -> LoadFailure:
    return LoadFailure(
        f"{error.filename or path} cannot be written ({error.strerror}): free some space or choose another --out;"
        " what is there is kept, and the same command goes on from it",
        Exit.CANNOT_WRITE,
    )

"""The spool folder of this host as the ledger sees it: what of its files is not in the store yet. Blocks on the disk;
one call at a time.

`Undrained` knows how far the store has each file, hands out what comes next as a batch, and moves on when it is told
that the batch is stored. A file whose position is FINISHED has told everything, its cut requests too.
"""

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from vitalis_serve.control.files import publish, stage
from vitalis_serve.spool.files import HOST_ID
from vitalis_serve.spool.reader import Scan, cuts, files, is_finished, process_of, scan
from vitalis_serve.spool.record import Closed
from vitalis_serve.store.usage import DAY_MS, Mark

logger = logging.getLogger(__name__)

FINISHED: Final = 1 << 62  # beyond the end of any file
KEPT_SECONDS: Final = 120  # after its last write a file stays that long for who counts limits
_MOST_COUNTED: Final = 20_000
_MOST_TOKENS: Final = (1 << 40) - 1  # of a request; millions of such still have a sum within 63 bits
_MOST_MS: Final = (1 << 31) * DAY_MS - 1


class Batch(NamedTuple):
    """rows: by the columns of `usage`. closed: how many of them each file gave, by its name. more: there was no room
    for all that is there."""

    rows: list[dict[str, Any]]
    marks: list[Mark]
    closed: dict[str, int]
    cut: int
    torn: int
    more: bool


class Depth(NamedTuple):
    """What waits for the store. records: finished requests. oldest_seconds: since the first of them ended."""

    bytes: int
    records: int
    oldest_seconds: float


@dataclass(slots=True)
class _Tail:
    """What was counted of a file from its position on."""

    start: int
    end: int
    records: int = 0
    oldest: float = 0.0


class Undrained:
    """Positions are None until `knows` has told them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._host = ""
        self._positions: dict[str, int] = {}
        self._tails: dict[str, _Tail] = {}
        self._unreadable: set[str] = set()

    def prefix(self) -> str:
        """What the names of this folder's files begin with in the store, where several hosts may meet. Raises OSError
        where it can be neither read nor made."""
        if not self._host:
            self._host = _host_id(self._folder)
        return f"{self._host}/"

    def knows(self, positions: Mapping[str, int]) -> None:
        """How far the store has each file, by its name there."""
        prefix = self.prefix()
        self._positions = {name.removeprefix(prefix): position for name, position in positions.items()}

    def batch(self, most: int) -> Batch:
        """What comes next: about `most` records at most, the oldest files first. Changes nothing."""
        room = most
        batch = Batch([], [], {}, 0, 0, False)
        cut = torn = 0
        for path in files(self._folder):
            position = self._positions.get(path.name)
            if position == FINISHED:
                continue
            if room <= 0:
                return batch._replace(cut=cut, torn=torn, more=True)
            with self._reading(path):
                finished = is_finished(path)
                if not finished and not _anything(path, position or 0):
                    continue
                found = scan(path, position or 0, finished=finished, limit=room)
                done = finished and found.end
                lost = cuts(path) if done else []
                rows = [row(record) for record in (*found.records, *lost) if isinstance(record, Closed)]
                room -= len(found.records) + len(lost)
                # Opened ones alone are no reason to write to the store; they are read again.
                if rows or done or not found.end:
                    batch.rows.extend(rows)
                    after = FINISHED if done else found.position
                    batch.marks.append(Mark(self.prefix() + path.name, position, after))
                    batch.closed[path.name] = len(rows) - len(lost)
                    cut += len(lost)
                    torn += found.torn
        return batch._replace(cut=cut, torn=torn, more=room <= 0)

    def stored(self, batch: Batch) -> None:
        """The batch is in the store for good."""
        last = batch.rows[-1]["ended_ms"] / 1000 if batch.rows else 0.0
        for mark in batch.marks:
            name = mark.name.removeprefix(self.prefix())
            self._positions[name] = mark.after
            tail = self._tails.get(name)
            if tail is None or not tail.start <= mark.after <= tail.end:
                self._tails.pop(name, None)
            else:
                tail.start, tail.oldest = mark.after, last
                tail.records -= batch.closed[name]

    def count(self) -> bool:
        """Counts on what waits; about 20,000 records at most. Whether that was all."""
        room = _MOST_COUNTED
        for path in files(self._folder):
            position = self._positions.get(path.name, 0)
            if position == FINISHED:
                self._tails.pop(path.name, None)
                continue
            tail = self._tails.get(path.name)
            if tail is None or tail.start != position:
                tail = self._tails[path.name] = _Tail(position, position)
            if room <= 0:
                return False
            with self._reading(path):
                if _anything(path, tail.end):
                    found = scan(path, tail.end, limit=room)
                    _counted(tail, found)
                    room -= len(found.records)
        return True

    def depth(self, now: float) -> Depth:
        """As far as it was counted. now: Unix seconds."""
        tails = [tail for tail in self._tails.values() if tail.records]
        oldest = min((tail.oldest for tail in tails), default=now)
        return Depth(
            sum(tail.end - tail.start for tail in tails),
            sum(tail.records for tail in tails),
            max(0.0, now - oldest),
        )

    def nothing_waits(self) -> None:
        self._tails.clear()

    def unneeded(self, now: float, covered: Callable[[Path], bool]) -> list[Path]:
        """Files of which all is in the store and `covered` by the sums of who counts limits, and that nobody has
        written for a while. Of one process in their order: what one says of cut requests lies in the next. now: Unix
        seconds."""
        found: list[Path] = []
        kept: set[str] = set()
        for path in files(self._folder):
            process = process_of(path)
            drained = process not in kept and self._positions.get(path.name) == FINISHED
            try:
                if drained and covered(path) and now - path.stat().st_mtime >= KEPT_SECONDS:
                    found.append(path)
                else:
                    kept.add(process)
            except FileNotFoundError:
                continue
        return found

    def gone(self, there: set[str]) -> set[str]:
        """Names, as in the store, of known files that are not among those `there`."""
        return {self.prefix() + name for name in self._positions.keys() - there}

    def forgot(self, names: set[str]) -> None:
        for name in names:
            self._positions.pop(name.removeprefix(self.prefix()), None)

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """One file that cannot be read keeps no other waiting; it is tried again and again."""
        try:
            yield
            self._unreadable.discard(path.name)
        except FileNotFoundError:
            self._tails.pop(path.name, None)
        except OSError as error:
            if path.name not in self._unreadable:
                self._unreadable.add(path.name)
                logger.error("a spool file cannot be read", extra={"file": str(path), "reason": str(error)})


def row(closed: Closed) -> dict[str, Any]:
    """A record as the table `usage` has it. What an engine or a caller made up fits into every column."""
    ended_ms = _milliseconds(closed.ended)
    return {
        "id": closed.id.hex(),
        "began_ms": _milliseconds(closed.began),
        "ended_ms": ended_ms,
        "day": ended_ms // DAY_MS,
        "tenant": _text(closed.tenant),
        "key": _text(closed.key),
        "route": _text(closed.route),
        "model": _text(closed.model),
        "api": _text(closed.api),
        "class_": _text(closed.class_),
        "request_id": _text(closed.request_id),
        "stream": closed.stream,
        "outcome": _text(closed.outcome),
        "code": _text(closed.code),
        "status": max(0, min(closed.status, 999)),
        "prompt_tokens": _tokens(closed.prompt_tokens),
        "cached_tokens": _tokens(closed.cached_tokens),
        "completion_tokens": _tokens(closed.completion_tokens),
        "reasoning_tokens": _tokens(closed.reasoning_tokens),
        "prompt_estimated": closed.prompt_estimated,
        "completion_estimated": closed.completion_estimated,
    }


def _text(text: str) -> str:
    return text.replace("\0", "")  # PostgreSQL keeps every other character


def _tokens(count: int) -> int:
    return max(0, min(count, _MOST_TOKENS))


def _milliseconds(seconds: float) -> int:
    return int(max(0.0, min(seconds * 1000, _MOST_MS)))


def _anything(path: Path, position: int) -> bool:
    """Whether anything was written there yet: a look at eight bytes, many times a second at files that nobody uses."""
    with open(path, "rb", buffering=0) as file:
        return any(os.pread(file.fileno(), 8, position))


def _counted(tail: _Tail, found: Scan) -> None:
    ended = [record.ended for record in found.records if isinstance(record, Closed)]
    if ended and not tail.records:
        tail.oldest = ended[0]
    tail.records += len(ended)
    tail.end = found.position


def _host_id(folder: Path) -> str:
    path = folder / HOST_ID
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        found = path.read_text("ascii").strip()
        if len(found) == 16 and found.isalnum():
            return found
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = secrets.token_hex(8)
    publish(stage(path, f"{made}\n".encode()), path)
    return made

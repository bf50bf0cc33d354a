"""What spool files hold, and what became of the requests that nobody closed. Not for a hot path; blocks on the disk.

A file is read like this, `finished` being asked first, since a record may be written between two questions:

    finished = is_finished(path)
    found = scan(path, position, finished=finished)     # again from found.position while not found.end
    if finished and found.end: cut = cuts(path)         # then the file has told everything
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from vitalis_serve.spool.files import after, files, is_finished, process_of
from vitalis_serve.spool.record import Closed, Opened, Record, Torn, frames

__all__ = ["Scan", "cuts", "files", "is_finished", "process_of", "scan"]

_CHUNK: Final = 1 << 20
_HEAD: Final = 8


class Scan(NamedTuple):
    """records: in the order in which they were written, `Opened` of requests carried over from the file before too.
    position: where to go on, in bytes. torn: places in a finished file where something stood that is no record, most
    often a last one that was cut. end: nothing more is there, as yet in a file that is still written."""

    records: list[Record]
    position: int
    torn: int
    end: bool


def scan(path: Path, position: int = 0, *, finished: bool = False, limit: int = 10_000) -> Scan:
    """At most `limit` records from `position` on, which is 0 or what an earlier scan gave.

    finished: what `is_finished` said before. In a file that is still written half a record at the end is one that is
    being written: it is left for the next time. In a finished one it is skipped and counted, and so is a damaged one
    in the middle where the next one stands right behind it; else what follows is lost, which counts once.
    Raises FileNotFoundError where the file is gone, and OSError.
    """
    records: list[Record] = []
    torn = 0
    with open(path, "rb", buffering=0) as file:
        while True:
            content = os.pread(file.fileno(), _CHUNK, position)
            read = 0
            try:
                for read, record in frames(content):
                    records.append(record)
                    if len(records) >= limit:
                        return Scan(records, position + read, torn, end=False)
            except Torn as hole:
                if not read:
                    if not finished:
                        break
                    torn += 1
                    past = position + hole.past
                    position = past if hole.past and _stands(file.fileno(), past) else _size(file.fileno())
            else:
                if not read:
                    if finished and (left := _left(file.fileno(), position)):
                        torn += 1
                        position = left
                    break
            position += read
    return Scan(records, position, torn, end=True)


def cuts(path: Path) -> list[Closed]:
    """Requests that a finished file has opened and nobody closed: cut by the death of their worker. Charged as what
    they were expected to use, and said to be estimated.

    The same each time it is asked as long as the files that the process wrote after this one are there, so: delete
    files in the order of `files`, each after its cuts were dealt with. Reads the whole file, and those after it where
    it needs to. Raises FileNotFoundError where the file is gone, and ValueError where it is still being written.
    """
    if not is_finished(path):
        raise ValueError(f"{path} is still being written: nobody knows which of its requests were cut")
    opened: dict[bytes, Opened] = {}
    last = 0.0
    for record in _all(path):
        if isinstance(record, Opened):
            opened[record.id] = record
            last = max(last, record.at)
        else:
            opened.pop(record.id, None)
            last = max(last, record.ended)
    # A file is let go once all that is still open stands in the next.
    for later in after(path):
        if not opened:
            break
        try:
            for record in _all(later):
                opened.pop(record.id, None)
        except FileNotFoundError:
            continue
    return [_cut(record, last) for record in opened.values()]


def _cut(opened: Opened, last: float) -> Closed:
    return Closed(
        id=opened.id,
        began=opened.at,
        ended=max(opened.at, last),  # the file's last sign of life, whoever asks and whenever
        tenant=opened.tenant,
        key=opened.key,
        route=opened.route,
        model=opened.model,
        api=opened.api,
        class_=opened.class_,
        request_id=opened.request_id,
        stream=opened.stream,
        outcome="cut",
        code="worker_died",
        status=0,
        prompt_tokens=opened.prompt_tokens,
        cached_tokens=0,
        completion_tokens=opened.output_tokens,
        reasoning_tokens=0,
        prompt_estimated=True,
        completion_estimated=True,
    )


def _all(path: Path) -> Iterator[Record]:
    found = scan(path, finished=True)
    yield from found.records
    while not found.end:
        found = scan(path, found.position, finished=True)
        yield from found.records


def _stands(descriptor: int, position: int) -> bool:
    """Whether a whole record begins there."""
    try:
        return next(frames(os.pread(descriptor, _CHUNK, position)), None) is not None
    except Torn:
        return False


def _size(descriptor: int) -> int:
    return os.fstat(descriptor).st_size


def _left(descriptor: int, position: int) -> int:
    """The file's size if anything but zeros stands at or after `position`, else 0."""
    while content := os.pread(descriptor, _CHUNK, position):
        if content.count(0) < len(content):
            return _size(descriptor)
        position += len(content)
    return 0

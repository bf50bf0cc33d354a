"""A worker's side of the spool: what a request used, on local disk before its caller has the last byte.

The event loop writes (one pwrite a record, into a file that has its full size already); what can take long is the
thread's: making files, making them durable, deleting. A write is in the kernel's cache when it returns, which a killed
process does not take along; the thread calls fdatasync every tenth of a second, which is what a power failure can cost.
"""

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Final

from vitalis_serve.spool.files import MAKING, name_of, reclaim
from vitalis_serve.spool.record import MAX_FRAME_BYTES, Closed, Opened, frame

logger = logging.getLogger(__name__)

SPARES: Final = 2
SYNC_SECONDS: Final = 0.1
RETRY_SECONDS: Final = 1.0
STOP_SECONDS: Final = 2.0
QUIET_SECONDS: Final = 10.0  # between two lines about a disk that refuses to be written


class _Segment:
    """A file of full size that this process holds locked. `size` 0: it is written no more, whoever found that out.
    `dirty`: there is something that fdatasync has not seen."""

    __slots__ = ("descriptor", "dirty", "path", "size")

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.size = size
        self.dirty = False


class SpoolWriter:
    """One for each worker process, used by its event loop alone. No method raises for what a disk does.

    `unwritten`: records that could not be written and never will be. `errors`: writes, syncs and new files that
    failed, also where the record was then written elsewhere.
    """

    def __init__(self, folder: Path, worker: str, *, segment_bytes: int) -> None:
        """Blocks for as long as it takes to make the first files. Where they cannot be made there is no room, until
        they can: tried again each second."""
        self.unwritten = 0
        self.errors = 0
        self._folder = folder
        self._size = segment_bytes
        # Each open request may need a frame twice over in one file: its Opened, carried into it, and its Closed.
        self._most = segment_bytes // (2 * MAX_FRAME_BYTES)
        self._open: dict[bytes, bytes] = {}
        self._late: deque[bytes] = deque()
        self._segment = _Segment(folder, -1, 0)
        self._position = 0
        self._number = 0
        # What the thread and the event loop hand each other; appending and popping are atomic.
        self._spares: deque[_Segment] = deque()
        self._retired: deque[_Segment] = deque()
        self._held: list[_Segment] = []
        self._spoilt: deque[_Segment] = deque()
        self._wake = threading.Event()
        self._ending = False
        self._complained = False
        self._quiet_until = 0.0
        start = int(time.time() * 1000)
        worker = worker.replace("/", "_")
        while os.path.exists(folder / name_of(f"{worker}-{start}-{os.getpid()}", 1)):
            start += 1
        self._process = f"{worker}-{start}-{os.getpid()}"
        reclaim(folder)
        self._retry_at = 0.0
        self._make_spares(SPARES + 1)
        if self._spares:
            self._next()
        self._thread = threading.Thread(target=self._keep, name="spool", daemon=True)
        self._thread.start()

    @property
    def opened(self) -> int:
        """Requests that are open."""
        return len(self._open)

    @property
    def room(self) -> bool:
        """Whether one more request may be opened. Every open one has its room for its Closed already."""
        segment = self._segment
        many = len(self._open)
        if self._position + MAX_FRAME_BYTES * (many + 2) <= segment.size:
            return many < self._most
        if not segment.size and self._spares:
            self._next()
            return self._position + MAX_FRAME_BYTES * (many + 2) <= self._segment.size
        return bool(self._spares) and many + len(self._late) < self._most

    def open(self, opened: Opened) -> None:
        """The request of this id is about to be sent to an engine. Call where `room` was just True. On disk (in the
        sense of the module) when it returns; if its process dies before `close` it counts as cut."""
        record = frame(opened)
        many = len(self._open)
        if (
            self._position + MAX_FRAME_BYTES * (many + 2) > self._segment.size or many >= self._most
        ) and not self._make_way():
            self.unwritten += 1
            return
        self._open[opened.id] = record
        if not self._put(record):
            self._next()

    def close(self, closed: Closed) -> None:
        """The request has come to its end. On disk when it returns. Once for each `open`; without one it is written
        where that takes no open request's room."""
        record = frame(closed)
        if self._open.pop(closed.id, None) is None and (
            self._position + MAX_FRAME_BYTES * (len(self._open) + 1) > self._segment.size and not self._make_way()
        ):
            self.unwritten += 1
        elif not self._put(record):
            # Kept until there is a file that takes it. Should this process die first, its Opened is there.
            self._late.append(record)
            if not self._next() and self._ending:
                self._give_up_late()

    def stop(self) -> None:
        """Makes everything durable (waits 2 s for that at most) and lets go of the files. Requests still open count
        as cut from then on, and records that come later are not written."""
        if self._ending:
            return
        if self._late:
            self._next()
        self._ending = True
        self._wake.set()
        self._thread.join(STOP_SECONDS)
        self._give_up_late()
        unused = [*self._spares, *self._spoilt]
        used = [*self._retired, *self._held, self._segment]
        for waiting in (self._spares, self._spoilt, self._retired):
            waiting.clear()
        self._held.clear()
        self._segment = _Segment(self._folder, -1, 0)
        for segment in unused:
            with contextlib.suppress(OSError):
                segment.path.unlink(missing_ok=True)
        for segment in (*unused, *used):
            if segment.descriptor >= 0:
                with contextlib.suppress(OSError):
                    fcntl.flock(segment.descriptor, fcntl.LOCK_UN)
                    # A thread that hangs in the kernel would come back to whatever else got this number.
                    if not self._thread.is_alive():
                        os.close(segment.descriptor)

    def _give_up_late(self) -> None:
        self.unwritten += len(self._late)
        self._late.clear()

    def _put(self, record: bytes) -> bool:
        segment = self._segment
        if segment.size:
            try:
                written = os.pwrite(segment.descriptor, record, self._position)
            except OSError as error:
                self._give_up(segment, error.strerror)
                return False
            if written == len(record):
                self._position += written
                segment.dirty = True
                return True
            self._give_up(segment, "the disk took a part only")
        return False

    def _make_way(self) -> bool:
        many = len(self._open)
        return (
            many + len(self._late) < self._most
            and self._next()
            and self._position + MAX_FRAME_BYTES * (many + 2) <= self._segment.size
        )

    def _next(self) -> bool:
        """Goes on in a spare file, which gets what is still open and what waits. The one before is let go only then:
        whoever finds it unlocked finds in the next what is still alive of it."""
        while self._spares:
            try:
                segment = self._spares.popleft()
            except IndexError:
                break
            carried = b"".join(self._open.values())
            try:
                # Nobody counts an Opened, so a file that fails here can be thrown away; a Closed comes after.
                if carried and os.pwrite(segment.descriptor, carried, 0) < len(carried):
                    raise OSError(0, "the disk took a part only")
            except OSError as error:
                self._give_up(segment, error.strerror)
                self._spoilt.append(segment)
                continue
            segment.dirty = True
            self._held.append(self._segment)
            self._segment = segment
            self._position = len(carried)
            while self._late and self._put(self._late[0]):
                self._late.popleft()
            if not self._late:
                self._retired.extend(self._held)
                self._held.clear()
                self._wake.set()
                return True
        self._wake.set()
        return False

    def _give_up(self, segment: _Segment, why: str | None) -> None:
        segment.size = 0
        self.errors += 1
        now = time.monotonic()
        if now < self._quiet_until:
            return
        self._quiet_until = now + QUIET_SECONDS
        logger.warning("%s cannot be written (%s); another file is tried", segment.path, why)

    # From here on: the thread's.

    def _keep(self) -> None:
        checked = 0.0
        while not self._ending:
            self._wake.wait(SYNC_SECONDS)
            self._wake.clear()
            now = time.monotonic()
            try:
                self._sync(self._segment)
                self._let_go()
                if now - checked >= RETRY_SECONDS:
                    checked = now
                    self._look_for_deleted()
                if len(self._spares) < SPARES and now >= self._retry_at:
                    self._make_spares(SPARES)
            except OSError:  # a disk that refuses even to close a file
                self.errors += 1
                logger.exception("the spool's thread goes on")
        self._sync(self._segment)
        self._let_go()

    def _sync(self, segment: _Segment) -> None:
        if segment.dirty:
            segment.dirty = False
            try:
                os.fdatasync(segment.descriptor)
            except OSError as error:
                self._give_up(segment, error.strerror)

    def _let_go(self) -> None:
        while self._retired:
            segment = self._retired.popleft()
            if segment.descriptor >= 0:
                self._sync(segment)
                os.close(segment.descriptor)
        while self._spoilt:
            segment = self._spoilt.popleft()
            # Deleted before it is unlocked: nobody takes it for the file of a dead worker.
            with contextlib.suppress(OSError):
                segment.path.unlink(missing_ok=True)
            os.close(segment.descriptor)

    def _look_for_deleted(self) -> None:
        """Somebody may have cleared the folder to gain space; what is written into a deleted file helps nobody."""
        for segment in (self._segment, *tuple(self._spares)):
            if segment.size and not os.fstat(segment.descriptor).st_nlink:
                self._give_up(segment, "it was deleted")
                with contextlib.suppress(ValueError):
                    self._spares.remove(segment)
                    self._retired.append(segment)

    def _make_spares(self, count: int) -> None:
        while len(self._spares) < count:
            try:
                self._spares.append(self._make())
            except OSError as error:
                self.errors += 1
                self._retry_at = time.monotonic() + RETRY_SECONDS
                if not self._complained:
                    self._complained = True
                    logger.warning("no new file in %s (%s); tried again each second", self._folder, error.strerror)
                return
        if self._complained:
            self._complained = False
            logger.warning("new files can be made in %s again", self._folder)

    def _make(self) -> _Segment:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._number += 1
        path = self._folder / name_of(self._process, self._number)
        making = path.with_name(path.name + MAKING)
        descriptor = os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Nobody sees it under its name unless it is locked.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.posix_fallocate(descriptor, 0, self._size)
            os.fsync(descriptor)
            os.rename(making, path)
            self._sync_folder()
        except OSError:
            os.close(descriptor)
            for leftover in (making, path):
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)
            raise
        return _Segment(path, descriptor, self._size)

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

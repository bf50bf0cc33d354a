"""The access log: one JSON line per request, written by a thread, never blocking the event loop.

Records are kept in a bounded list; what does not fit is dropped and counted. Nothing of a body, no header and
no key is ever in a record: key ids only.
"""

import contextlib
import os
import sys
import threading
import time
from collections import deque
from typing import Final

import msgspec

FLUSH_SECONDS: Final = 0.25
MAX_WAITING: Final = 50_000
MAX_BYTES: Final = 64 << 20  # of one file; two older ones are kept


class Record(msgspec.Struct, omit_defaults=True):
    """Times in milliseconds. `outcome`: ok, client_gone, refused, engine_error or cut. Tokens as `usage.Usage` has
    them; `estimated`: at least one of the two sums is not the engine's own."""

    time: float
    request_id: str
    method: str
    path: str
    status: int
    outcome: str
    code: str = ""
    tenant: str = ""
    key: str = ""
    route: str = ""
    replica: str = ""
    stream: bool = False
    attempts: int = 0
    queue_ms: float = 0
    first_ms: float = 0
    total_ms: float = 0
    bytes_in: int = 0
    bytes_out: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False


class AccessLog:
    """`path`: "" writes nothing, "-" writes to standard error. Close it to write what is left."""

    def __init__(self, path: str, *, flush_seconds: float = FLUSH_SECONDS, max_bytes: int = MAX_BYTES) -> None:
        self.enabled = path != ""
        self.dropped = 0
        self._path = path
        self._flush_seconds = flush_seconds
        self._max_bytes = max_bytes
        self._waiting: deque[Record] = deque()
        self._stop = threading.Event()
        self._begun = threading.Event()  # a first record waits: the thread of an idle worker sleeps
        self._awake = False
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        if self.enabled:
            self._thread.start()

    def add(self, record: Record) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self.dropped += 1
            return
        self._waiting.append(record)
        if not self._awake:  # after the append, as the thread sleeps before it counts
            self._awake = True
            self._begun.set()

    def close(self) -> None:
        """Writes what waits, at most two seconds long (a disk that hangs must not keep a worker)."""
        self._stop.set()
        self._begun.set()
        if self.enabled:
            self._thread.join(2.0)

    def _run(self) -> None:
        encode = msgspec.json.Encoder().encode
        stopping = False
        while not stopping:
            self._begun.wait()
            self._begun.clear()
            stopping = self._stop.wait(self._flush_seconds)
            self._awake = False
            left = len(self._waiting)
            # The thread that encodes takes the interpreter from the event loop: a pause every few hundred
            # records keeps what a request waits for it below a millisecond.
            while left:
                count = min(left, 256)
                self._write(b"".join(encode(self._waiting.popleft()) + b"\n" for _ in range(count)), count)
                left -= count
                time.sleep(0)

    def _write(self, lines: bytes, records: int) -> None:
        try:
            if self._path == "-":
                sys.stderr.buffer.write(lines)
                sys.stderr.buffer.flush()
            else:
                # Opened each time, so that a log that was rotated away is begun anew.
                fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                with open(fd, "ab", buffering=0) as file:
                    file.write(lines)
                    full = os.fstat(fd).st_size > self._max_bytes
                if full:
                    self._rotate()
        except OSError:
            self.dropped += records

    def _rotate(self) -> None:
        """One file of `max_bytes` and two older ones. Several workers may come here at once: one of them wins."""
        for older, newer in ((".2", ".1"), (".1", "")):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._path + newer, self._path + older)

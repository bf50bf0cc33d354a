"""What a child writes to its standard output and error: kept in a bounded file, the last lines in memory."""

import contextlib
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

MAX_LINE_BYTES = 8192  # a line longer than this is cut into several


class Output:
    """`relay` gets every whole line as well. A full disk loses lines of the file, never the child."""

    def __init__(
        self,
        path: Path,
        relay: Callable[[str], None] | None = None,
        *,
        max_bytes: int = 16 << 20,
        keep: int = 3,
        last: int = 100,
    ) -> None:
        self._path = path
        self._relay = relay
        self._max_bytes = max_bytes
        self._keep = keep
        self._last: deque[str] = deque(maxlen=last)
        self._partial = b""
        self._fd = -1
        self._written = 0
        self.lost_bytes = 0

    def last_lines(self, count: int = 20) -> tuple[str, ...]:
        return tuple(self._last)[-count:]

    def clear(self) -> None:
        """Forgets the last lines: a new process has said nothing yet."""
        self._last.clear()
        self._partial = b""

    def feed(self, data: bytes) -> None:
        self._write(data)
        # Progress bars redraw with \r; each redraw counts as a line, or a download would be one endless line.
        *lines, self._partial = (self._partial + data).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._keep_line(line)
        while len(self._partial) > MAX_LINE_BYTES:
            self._keep_line(self._partial[:MAX_LINE_BYTES])
            self._partial = self._partial[MAX_LINE_BYTES:]

    def close(self) -> None:
        if self._partial:
            self._keep_line(self._partial)
            self._partial = b""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _keep_line(self, line: bytes) -> None:
        text = line[:MAX_LINE_BYTES].decode(errors="replace").rstrip()
        if not text:
            return
        self._last.append(text)
        if self._relay is not None:
            self._relay(text)

    def _write(self, data: bytes) -> None:
        try:
            if self._fd < 0 or self._written + len(data) > self._max_bytes:
                self._open()
            self._written += os.write(self._fd, data)
        except OSError:
            self.lost_bytes += len(data)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            for number in range(self._keep, 0, -1):
                older = f"{self._path}.{number - 1}" if number > 1 else str(self._path)
                with contextlib.suppress(FileNotFoundError):
                    os.replace(older, f"{self._path}.{number}")
        self._fd = os.open(self._path, flags, 0o600)
        self._written = os.fstat(self._fd).st_size

"""The log of requests: one JSON line each, written when it ends, for tests that compare what others counted.

Times are seconds of CLOCK_MONOTONIC, which all processes of one host share. Lines are gathered for one turn of the
event loop and written with one system call, to a file opened for appending.
"""

import os
from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode


class Journal:
    """Where finished requests are written. An empty path: nowhere."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if path else -1
        self._lines: list[bytes] = []

    @property
    def pending(self) -> bool:
        return bool(self._lines)

    def add(self, record: dict[str, Any]) -> None:
        if self._descriptor >= 0:
            self._lines.append(_encode(record))

    def flush(self) -> None:
        if self._lines:
            text = b"\n".join(self._lines) + b"\n"
            self._lines.clear()
            while text:
                text = text[os.write(self._descriptor, text) :]

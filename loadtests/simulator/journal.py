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
        self._records: list[dict[str, Any]] = []

    @property
    def pending(self) -> bool:
        return bool(self._records)

    def add(self, record: dict[str, Any]) -> None:
        """The record is read when the turn ends: what its exchange still writes in this turn is in it."""
        if self._descriptor >= 0:
            self._records.append(record)

    def flush(self) -> None:
        if self._records:
            text = b"\n".join(map(_encode, self._records)) + b"\n"
            self._records.clear()
            while text:
                text = text[os.write(self._descriptor, text) :]

"""Asking a running supervisor, over its Unix socket: newline-delimited JSON, one request a connection,
perhaps several answers, the last with `"done": true`. Synchronous: used by the command line and, in a thread,
by control."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class NotRunning(Exception):
    """No supervisor listens there, or it went away before it had answered."""


def request(path: Path | str, document: dict[str, Any], *, seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """Yields each answer as it comes; the last has `done`. `seconds` bounds each wait. Raises NotRunning."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(seconds)
        try:
            channel.connect(str(path))
            channel.sendall(json.dumps(document).encode() + b"\n")
            with channel.makefile("rb") as lines:
                for line in lines:
                    answer: dict[str, Any] = json.loads(line)
                    yield answer
                    if answer.get("done"):
                        return
        except (OSError, ValueError) as exc:
            raise NotRunning(f"no supervisor answers at {path} ({exc})") from exc
    raise NotRunning(f"the supervisor at {path} went away before it had finished")

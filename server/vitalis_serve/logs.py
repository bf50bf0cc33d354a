"""How this program logs: JSON lines for files and service managers, one human line each on a terminal.

Call sites use stdlib logging with a constant message, `%s` arguments, and fields by `extra`.
"""

import atexit
import contextlib
import json
import logging
import logging.handlers
import os
import queue
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
MAX_BYTES: Final = 16 << 20
KEEP: Final = 3
MAX_WAITING: Final = 10_000
LAST_SECONDS: Final = 2.0


class JsonLines(logging.Formatter):
    """One JSON object a record: time (UTC), level, logger, message, the fields of `extra`, the traceback if
    any."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        document |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str, ensure_ascii=False)


class HumanLines(logging.Formatter):
    """`12:34:56 message`, the level named only where it is worth a look."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = f"{clock} {level}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(path: Path | None = None, *, level: str = "INFO", terminal: bool | None = None) -> None:
    """Logs to standard error, for humans if it is a terminal, and as JSON lines to `path` (rotated, 0600).

    Raises OSError if `path` cannot be written.
    """
    screen = _Screen()
    human = sys.stderr.isatty() if terminal is None else terminal
    screen.setFormatter(HumanLines() if human else JsonLines())
    handlers: list[logging.Handler] = [screen]
    if path is not None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        file = logging.handlers.RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=KEEP)
        file.setFormatter(JsonLines())
        handlers.append(file)
    logging.raiseExceptions = False  # a full disk must not print a traceback for each line
    logging.basicConfig(level=level, handlers=[_behind_a_queue(handlers)], force=True)


class _Screen(logging.Handler):
    """Standard error without Python's buffers, whose lock a thread that hangs in a write would take to the grave."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            left = memoryview(f"{self.format(record)}\n".encode(errors="replace"))
            while left:
                left = left[os.write(2, left) :]


class _Queue(logging.handlers.QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # to a thread of ours: it may keep its fields and its traceback


def _behind_a_queue(handlers: list[logging.Handler]) -> logging.Handler:
    """Writes from a thread. A pipe that nobody reads or a disk that hangs costs lines, never the event loop."""
    waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_WAITING)

    def write() -> None:
        while (record := waiting.get()) is not None:
            for handler in handlers:
                handler.emit(record)  # not `handle`: its lock, held in a write that hangs, would hang the exit too

    thread = threading.Thread(target=write, name="log", daemon=True)
    thread.start()

    def finish() -> None:
        with contextlib.suppress(queue.Full):
            waiting.put_nowait(None)
            thread.join(LAST_SECONDS)

    atexit.register(finish)
    return _Queue(waiting)

"""A worker as the spool sees one: a process that opens and closes requests with the real writer until it is killed.

What it promised stands in its own log: an id with `o` before it was about to be opened, one with `c` was closed."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from vitalis_serve.spool.record import Closed, Opened
from vitalis_serve.spool.writer import SpoolWriter

DAY = 86_400


def opened(number: int, *, at: float = 1000.0, **fields: object) -> Opened:
    """A request expected to use 10 + 20 tokens."""
    values = {
        "id": number.to_bytes(16, "big"), "at": at, "tenant": "acme", "key": "k1", "route": "chat", "model": "tiny",
        "api": "chat", "class_": "standard", "request_id": f"r{number}", "stream": True, "prompt_tokens": 10,
        "output_tokens": 20,
    }  # fmt: skip
    return Opened(**{**values, **fields})  # type: ignore[arg-type]


def closed(number: int, *, ended: float = 1001.0, **fields: object) -> Closed:
    """A whole answer of 7 + 5 tokens."""
    values = {
        "id": number.to_bytes(16, "big"), "began": ended - 1, "ended": ended, "tenant": "acme", "key": "k1",
        "route": "chat", "model": "tiny", "api": "chat", "class_": "standard", "request_id": f"r{number}",
        "stream": True, "outcome": "ok", "code": "", "status": 200, "prompt_tokens": 7, "cached_tokens": 2,
        "completion_tokens": 5, "reasoning_tokens": 1, "prompt_estimated": False, "completion_estimated": False,
    }  # fmt: skip
    return Closed(**{**values, **fields})  # type: ignore[arg-type]


class Worker:
    """The process. `log`: ids that it was about to open, and ids that it closed."""

    def __init__(self, folder: Path, log: Path, name: str, *, a_second: int = 400) -> None:
        self._log = log
        self.process = subprocess.Popen([sys.executable, "-m", __name__, str(folder), str(log), name, str(a_second)])

    def log(self) -> tuple[Counter[str], Counter[str]]:
        return read_log(self._log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def read_log(path: Path) -> tuple[Counter[str], Counter[str]]:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return Counter(line[1:] for line in lines if line[0] == "o"), Counter(line[1:] for line in lines if line[0] == "c")


def main(folder: str, log: str, name: str, a_second: str) -> None:
    seed = random.Random(os.getpid())
    numbers = random.SystemRandom()
    writer = SpoolWriter(Path(folder), name, segment_bytes=1 << 16)
    told = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    running: list[int] = []
    while True:
        if len(running) < 15 and writer.room:
            number = numbers.getrandbits(128)
            os.write(told, f"o{number:032x}\n".encode())
            writer.open(opened(number, at=time.time()))
            running.append(number)
        if seed.random() < len(running) / 20:
            number = running.pop(seed.randrange(len(running)))
            writer.close(closed(number, ended=time.time()))
            os.write(told, f"c{number:032x}\n".encode())
        time.sleep(1 / int(a_second))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Records as a worker would write them, a process that writes them until it is killed, and a small ledger."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from vitalis_serve.spool.reader import cuts, files, is_finished, scan
from vitalis_serve.spool.record import Closed, Opened
from vitalis_serve.spool.spent import Spent
from vitalis_serve.spool.writer import SpoolWriter

ROOT = Path(__file__).parents[2]
SEGMENT = 64 << 10
NOW = 1_790_000_000.0
ID_BYTES = 16


def opened(identity: bytes, *, at: float = NOW, prompt: int = 100, output: int = 50, request_id: str = "r") -> Opened:
    return Opened(
        identity, at, "acme", "k1", "chat", "gpt-oss-20b", "chat", "standard", request_id, True, prompt, output
    )


def closed(identity: bytes, *, ended: float = NOW + 1, prompt: int = 101, completion: int = 7, key: str = "k1",
           outcome: str = "ok") -> Closed:  # fmt: skip
    return Closed(
        identity, NOW, ended, "acme", key, "chat", "gpt-oss-20b", "chat", "standard", "r", True, outcome, "", 200,
        prompt, 0, completion, 0, False, False,
    )  # fmt: skip


class Ledger:
    """What control does with a spool: each request once, by its id; a file goes when all of it is known for good."""

    def __init__(self, folder: Path, spent: Path) -> None:
        self.folder = folder
        self.spent = spent
        self.kept: dict[bytes, Closed] = {}
        self.torn = 0
        self._drained: dict[str, int] = {}

    def round(self, *, delete: bool = True) -> None:
        spent = Spent.read(self.spent)
        while not spent.advance(self.folder, limit=97):
            pass
        spent.write(self.spent, NOW)
        done = set()
        for path in files(self.folder):
            if self._drain(path) and delete and spent.covers(path):
                done.add(path)
        for path in files(self.folder):
            if path in done:
                path.unlink()

    def _drain(self, path: Path) -> bool:
        finished = is_finished(path)
        found = scan(path, self._drained.get(path.name, 0), finished=finished)
        self._drained[path.name] = found.position
        self.torn += found.torn
        for record in (*found.records, *(cuts(path) if finished and found.end else ())):
            if isinstance(record, Closed):
                self.kept.setdefault(record.id, record)
        return finished and found.end


class Child:
    """A process that opens and closes requests at random, and says so after each call has returned."""

    def __init__(self, folder: Path, worker: str, seed: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.spool", str(folder), worker, str(seed)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'server'}"},
            stdout=subprocess.PIPE,
        )
        self.said = b""

    def hear(self, count: int) -> None:
        """Until it has said at least that many things."""
        assert self.process.stdout
        while len(self.said) < count * (ID_BYTES + 1):
            heard = os.read(self.process.stdout.fileno(), 1 << 16)
            assert heard, "it ended by itself"
            self.said += heard

    def kill(self) -> None:
        assert self.process.stdout
        self.process.kill()
        while heard := os.read(self.process.stdout.fileno(), 1 << 16):
            self.said += heard
        self.process.stdout.close()
        self.process.wait()

    def of(self, kind: bytes) -> set[bytes]:
        step = ID_BYTES + 1
        whole = len(self.said) - len(self.said) % step
        return {self.said[at + 1 : at + step] for at in range(0, whole, step) if self.said[at : at + 1] == kind}


def main() -> None:
    folder, worker, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    chance = random.Random(seed)
    writer = SpoolWriter(folder, worker, segment_bytes=SEGMENT)
    running: list[bytes] = []
    while True:
        if running and (len(running) > 20 or chance.random() < 0.5):
            identity = running.pop(chance.randrange(len(running)))
            writer.close(closed(identity))
            os.write(1, b"c" + identity)
        elif writer.room:
            identity = chance.randbytes(ID_BYTES)
            running.append(identity)
            writer.open(opened(identity))
            os.write(1, b"o" + identity)
        else:
            time.sleep(0.001)


if __name__ == "__main__":
    main()

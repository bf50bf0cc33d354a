"""What one request's two records cost the event loop: `python tests/bench/spool.py`, microseconds of CPU.

The best of many short rounds is printed, so the figure holds on a busy machine.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server")]

from vitalis_serve.spool.reader import cuts, files, scan  # noqa: E402
from vitalis_serve.spool.record import Closed, Opened, frame  # noqa: E402
from vitalis_serve.spool.spent import seed  # noqa: E402
from vitalis_serve.spool.writer import SpoolWriter  # noqa: E402

ROUND = 500
ROUNDS = 60
Pair = tuple[Opened, Closed]


def pair(number: int) -> Pair:
    identity = number.to_bytes(16, "big")
    now = time.time()
    request_id = f"req-{number:032x}"
    return (
        Opened(identity, now, "acme", "k7f3a9c1", "gpt-oss-20b", "gpt-oss-20b", "chat", "standard", request_id, True,
               120, 300),
        Closed(identity, now, now, "acme", "k7f3a9c1", "gpt-oss-20b", "gpt-oss-20b", "chat", "standard", request_id,
               True, "ok", "", 200, 118, 96, 287, 40, False, False),
    )  # fmt: skip


def best(what: Callable[[Sequence[Pair]], None], before: Callable[[], object]) -> float:
    """Microseconds a request."""
    least = float("inf")
    for each in range(ROUNDS):
        pairs = [pair(each * ROUND + number) for number in range(ROUND)]
        before()
        start = time.thread_time()
        what(pairs)
        least = min(least, time.thread_time() - start)
    return least / ROUND * 1e6


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as where:
        folder = Path(where)
        writer = SpoolWriter(folder, "worker-0", segment_bytes=8 << 20)

        def wait() -> None:
            while not writer.room:
                time.sleep(0.01)

        def nothing() -> None: ...

        def write(pairs: Sequence[Pair]) -> None:
            for opened, closed in pairs:
                if writer.room:
                    writer.open(opened)
                    writer.close(closed)

        def encode(pairs: Sequence[Pair]) -> None:
            for opened, closed in pairs:
                frame(opened)
                frame(closed)

        both, encoding = best(write, wait), best(encode, nothing)
        size = len(frame(pair(1)[0])) + len(frame(pair(1)[1]))
        print(f"room, open and close: {both:5.2f} us, of which frames {encoding:4.2f} us; {size} bytes a request")
        # The open ones that a full file hands to the next, in one write of the event loop.
        for number in range(1000):
            writer.open(pair(1_000_000 + number)[0])
        most = 0.0
        for number in range(2_000_000, 2_050_000):
            opened, closed = pair(number)
            wait()
            start = time.thread_time()
            writer.open(opened)
            most = max(most, time.thread_time() - start)
            writer.close(closed)
        print(f"the longest open, with 1000 others carried into a new file: {most * 1e3:.2f} ms")
        assert not writer.unwritten and not writer.errors
        writer.stop()
        start = time.thread_time()
        count = sum(len(scan(path, finished=True, limit=1 << 20).records) for path in files(folder))
        print(f"scan: {(time.thread_time() - start) / count * 1e6:.2f} us a record")
        start = time.thread_time()
        found = sum(len(cuts(path)) for path in files(folder))
        print(f"cuts: {(time.thread_time() - start) * 1e3 / len(files(folder)):.0f} ms a file of 8 MiB ({found} found)")
        start = time.thread_time()
        seed(folder / "spent.json", folder, time.time())
        print(f"seed: {(time.thread_time() - start) / count * 1e6:.2f} us a record, where nothing was counted before")


if __name__ == "__main__":
    main()

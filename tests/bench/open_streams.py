"""What an open stream costs one worker: memory, descriptors and CPU, with thousands of them.

    python tests/bench/open_streams.py [--streams 9000] [--engines 4] [--clients 4] [--gap 4] [--seconds 10]
                                       [--body 2048] [--per-second 400] [--rounds 2] [--json FILE]

Opens that many streamed chats through one real worker to simulated engines that give each a token every `--gap`
seconds, and waits until all have had their first. Memory is the worker's own (`Pss` and `Private` of smaps_rollup)
over what it had before, after a warm-up. Then half of the clients leave, the others must go on and come to their
proper end, and what the worker has afterwards is printed. Memory that is free again stays with the process, as
Python's and the C library's allocators have it: that nothing is left behind is seen by the second round, which must
not need more than the first. Worker, engines and clients are processes of their own: a
stream costs the worker two descriptors and each of the others one, and 20,000 is a common hard limit of a process.
The kernel's socket buffers are not counted; they are empty but for events on their way.

Exit code 1 where a stream was lost.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server")]

import uvloop  # noqa: E402
from vitalis_serve.fleet import Replica, ReplicaState  # noqa: E402

from tests.bench.overhead import cpu_seconds  # noqa: E402
from tests.support import simulator  # noqa: E402
from tests.support.worker import KEY, MODEL, WorkerProcess, running_worker  # noqa: E402

# An engine takes all at once, and its steps hold whatever there is.
_ENGINE = ("--max-num-seqs", "20000", "--max-num-batched-tokens", "100000000", "--kv-cache-tokens", "1000000000",
           "--per-sequence-ms", "0", "--no-enable-prefix-caching")  # fmt: skip
_IDLE_SECONDS = 3  # so long the worker keeps connections to engines that nobody needs


def request(number: int, body_bytes: int, tokens: int) -> bytes:
    """A streamed chat whose body is so long, and like no other's."""
    body = {"model": MODEL, "stream": True, "max_tokens": tokens, "sim_output_tokens": tokens}
    words = f"{number} " * (body_bytes // len(f"{number} "))
    body["messages"] = [{"role": "user", "content": words[: max(8, body_bytes - len(json.dumps(body)) - 40)]}]
    document = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {len(document)}\r\n\r\n"
    )
    return head.encode() + document


class _Stream(asyncio.Protocol):
    """One client. `events`: data that came; `ended`: it came to its proper end."""

    __slots__ = ("ended", "events", "lost", "said", "transport")

    def __init__(self) -> None:
        self.events = 0
        self.said = self.ended = self.lost = False
        self.transport: asyncio.Transport = None  # type: ignore[assignment]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: {")
        self.said = self.said or b"data: [DONE]" in data
        if self.said and data.endswith(b"0\r\n\r\n"):
            self.ended = True
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = not self.ended


class _Clients:
    """The clients of one process, told what to do through a pipe."""

    def __init__(self, pipe: Connection, url: str, body_bytes: int, tokens: int) -> None:
        self._pipe, self._body_bytes, self._tokens = pipe, body_bytes, tokens
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._open: list[_Stream] = []
        self._left = 0

    async def run(self) -> None:
        loop, orders = asyncio.get_running_loop(), asyncio.Queue[Any]()
        loop.add_reader(self._pipe.fileno(), lambda: orders.put_nowait(self._pipe.recv()))
        while (order := await orders.get()) is not None:
            kind, *rest = order
            if kind == "open":
                await self._open_all(*rest)
            elif kind == "leave":
                self._leave(*rest)
            self._pipe.send(self._count())

    async def _open_all(self, first: int, count: int, per_second: float) -> None:
        loop, began = asyncio.get_running_loop(), time.monotonic()
        for number in range(first, first + count):
            await asyncio.sleep(began + (number - first) / per_second - time.monotonic())
            _, stream = await loop.create_connection(_Stream, self._host, self._port)
            stream.transport.write(request(number, self._body_bytes, self._tokens))
            self._open.append(stream)

    def _leave(self, share: float) -> None:
        for stream in self._open[: int(len(self._open) * share)]:
            stream.transport.abort()
            self._left += 1
        del self._open[: int(len(self._open) * share)]

    def _count(self) -> dict[str, int]:
        return {
            "open": sum(not (stream.ended or stream.lost) for stream in self._open),
            "begun": sum(stream.events > 1 for stream in self._open),  # the first is the role's
            "events": sum(stream.events for stream in self._open),
            "least": min((stream.events for stream in self._open), default=0),
            "ended": sum(stream.ended for stream in self._open),
            "lost": sum(stream.lost for stream in self._open),
        }


def _client_process(pipe: Connection, url: str, body_bytes: int, tokens: int) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Clients(pipe, url, body_bytes, tokens).run())


class Crowd:
    """All client processes."""

    def __init__(self, processes: int, url: str, body_bytes: int, tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client_process, args=(theirs, url, body_bytes, tokens), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def open(self, streams: int, per_second: float) -> dict[str, int]:
        each = -(-streams // len(self._pipes))
        shares = [min(each, streams - each * index) for index in range(len(self._pipes))]
        orders = [("open", each * index, share, per_second / len(self._pipes)) for index, share in enumerate(shares)]
        return self._tell(orders)

    def leave(self, share: float) -> dict[str, int]:
        return self._tell([("leave", share)] * len(self._pipes))

    def count(self) -> dict[str, int]:
        return self._tell([("count",)] * len(self._pipes))

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(10)

    def _tell(self, orders: list[tuple[Any, ...]]) -> dict[str, int]:
        for pipe, order in zip(self._pipes, orders, strict=True):
            pipe.send(order)
        answers = [pipe.recv() for pipe in self._pipes]
        total = {name: sum(answer[name] for answer in answers) for name in answers[0]}
        return total | {"least": min(answer["least"] for answer in answers if answer["open"] or answer["ended"])}


def memory(pid: int) -> dict[str, int]:
    """Of one process, in KiB: its proportional share, and what is its alone."""
    rows = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        rows[name[:-1]] = int(value)
    return {"pss": rows["Pss"], "private": rows["Private_Clean"] + rows["Private_Dirty"]}


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def wait(what: str, condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(0.5)


class Bench:
    """The rows of one run."""

    def __init__(self, given: argparse.Namespace, worker: WorkerProcess, tokens: int) -> None:
        self._given, self._worker, self._tokens = given, worker, tokens
        self.rows: list[dict[str, Any]] = []
        self.lost = 0

    def run(self) -> None:
        given, worker = self._given, self._worker
        warm = Crowd(1, worker.url, given.body, 3)
        warm.open(200, 200)
        wait("the warm-up", lambda: warm.count()["ended"] == 200, 10 * given.gap + 30)
        warm.close()
        time.sleep(_IDLE_SECONDS + 1)
        before, files = memory(worker.pid), descriptors(worker.pid)
        self._show(what="before", **before, descriptors=files)
        for _ in range(given.rounds):
            self._round(before, files)

    def _round(self, before: dict[str, int], files: int) -> None:
        given, worker = self._given, self._worker
        crowd = Crowd(given.clients, worker.url, given.body, self._tokens)
        began, cpu = time.monotonic(), cpu_seconds(worker.pid)
        crowd.open(given.streams, given.per_second)
        wait("every first token", lambda: crowd.count()["begun"] == given.streams, 60 + 5 * given.gap)
        took, cpu = time.monotonic() - began, cpu_seconds(worker.pid) - cpu
        self._show(
            what="opened", streams=given.streams, seconds=round(took, 1), cpu_us_each=round(cpu / given.streams * 1e6)
        )

        seen, cpu, began = crowd.count()["events"], cpu_seconds(worker.pid), time.monotonic()
        time.sleep(given.seconds)
        cpu, events = cpu_seconds(worker.pid) - cpu, crowd.count()["events"] - seen
        now, opened = memory(worker.pid), descriptors(worker.pid)
        self._show(
            what="open",
            **now,
            descriptors=opened,
            kib_each_pss=round((now["pss"] - before["pss"]) / given.streams, 1),
            kib_each_private=round((now["private"] - before["private"]) / given.streams, 1),
            descriptors_each=round((opened - files) / given.streams, 2),
            cpu_us_per_event=round(cpu / max(events, 1) * 1e6, 1),
            events_per_second=round(events / (time.monotonic() - began)),
        )

        half = crowd.leave(0.5)
        wait("going on without the half that left", lambda: crowd.count()["least"] > half["least"], 60 + 5 * given.gap)
        self._show(what="half left", **self._now(), stay=half["open"])
        wait("the end of all", lambda: crowd.count()["open"] == 0, 60 + (self._tokens + 5) * given.gap)
        end = crowd.count()
        crowd.close()
        time.sleep(_IDLE_SECONDS + 2)
        self._show(what="ended", **self._now(), whole=end["ended"], lost=end["lost"])
        self.lost += half["open"] - end["ended"]

    def _now(self) -> dict[str, int]:
        pid = self._worker.pid
        return {**memory(pid), "descriptors": descriptors(pid), "open_contexts": self._worker.in_flight()["count"]}

    def _show(self, **row: Any) -> None:
        self.rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--streams", type=int, default=9000)
    arguments.add_argument("--engines", type=int, default=4)
    arguments.add_argument("--clients", type=int, default=4, help="processes of clients")
    arguments.add_argument("--gap", type=float, default=4, help="seconds between a stream's tokens")
    arguments.add_argument("--seconds", type=float, default=10, help="how long all are open before half leave")
    arguments.add_argument("--body", type=int, default=2048, help="bytes of a request's body")
    arguments.add_argument("--per-second", type=float, default=400, help="streams opened a second")
    arguments.add_argument("--rounds", type=int, default=2, help="a second one shows what the first left behind")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < 2 * given.streams + 200:
        raise SystemExit(f"{given.streams} streams need {2 * given.streams + 200} descriptors; the limit is {hard}")
    # Enough to last until half have left and the others were seen to go on, on a machine that is busy.
    lasts = 2 * given.streams / given.per_second + given.seconds + 40
    tokens = int(lasts / given.gap) + 2
    gc.disable()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        engines = [
            ends.enter_context(
                simulator.started(
                    "--decode-step-ms", str(given.gap * 1000), *_ENGINE, uds=Path(folder) / f"{index}.sock"
                )
            )
            for index in range(given.engines)
        ]
        worker = ends.enter_context(
            running_worker(
                Path(folder) / "worker",
                routing="affinity",
                max_connections=given.streams + 100,
                upstream_idle_seconds=_IDLE_SECONDS,
            )
        )
        # The prompts that wait for their first token are many: these engines give none before their next step.
        worker.fleet(
            *(
                Replica(f"engine-{number}", engine.address, ReplicaState.READY, models=(MODEL,), slots=given.streams,
                        prefill_tokens=1_000_000_000, incarnation=1)
                for number, engine in enumerate(engines)
            )
        )  # fmt: skip
        bench = Bench(given, worker, tokens)
        bench.run()
        for engine in engines:
            if late := engine.state()["late_steps"]:
                print(f"an engine was late with {late} of its steps: the machine is too slow for this --gap")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    machine = f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}"
    print(f"{machine}, commit {commit.strip()}")
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "rows": bench.rows}, indent=1) + "\n")
    return int(bench.lost > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""Fairness and overload with real processes: `python tests/bench/fairness.py`.

Real workers and real simulated engines with preset sim-20b (design: 64 sequences, 20,000 prompt tokens/s, a step of
8 ms + 0.1 ms per sequence), streamed chats at Poisson times from a schedule made before, every client on its own
connection. The same scenarios in virtual time, for many seeds, are `python tests/simulation/figures.py`.

Printed beside each row: how late the client sent (p99) and the CPU that client, workers and engines took, in cores;
a client near one core measures itself.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server"), str(ROOT / "loadtests")]

import uvloop  # noqa: E402
from vitalis_serve.fleet import Replica, ReplicaState  # noqa: E402

from tests.simulation.world import CAPACITY, Draw, jain, quantile  # noqa: E402
from tests.support import simulator  # noqa: E402
from tests.support.worker import MODEL, WorkerProcess, running_worker, snapshot  # noqa: E402

SLO_TTFT, SLO_TPOT = 2.0, 0.040
WARM_SECONDS = 8.0
TENANTS = (*(f"victim-{i}" for i in range(4)), "neighbour", "sos")
ARRANGEMENTS = {"one worker": (1, 1), "three workers": (1, 3), "two gateways": (2, 1)}


@dataclass(slots=True, eq=False)
class Ask:
    at: float
    tenant: str
    prompt: int
    output: int
    sent: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    status: int = 0

    @property
    def ttft(self) -> float:
        """From when it should have been sent."""
        return self.first - self.at

    @property
    def good(self) -> bool:
        tpot = (self.ended - self.first) / (self.output - 1) if self.output > 1 else 0.0
        return self.ended > 0 and self.ttft <= SLO_TTFT and tpot <= SLO_TPOT


class _Client(asyncio.Protocol):
    """One streamed chat. The gateway sends no byte of an answer before its first token."""

    def __init__(self, ask: Ask, request: bytes) -> None:
        self._ask, self._request = ask, request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._ask.sent = time.monotonic()
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        ask, now = self._ask, time.monotonic()
        if not ask.status:
            ask.status = int(data[9:12])
            if ask.status == 200:
                ask.first = now
        if b"[DONE]" in data:
            ask.ended = now
        if ask.status != 200 or ask.ended:
            self._transport.close()


def key_of(tenant: str) -> str:
    return f"vts_{tenant.replace('-', ''):0<12}_0123456789abcdefghijklmnopqrstuv"


def request(ask: Ask, host: str) -> bytes:
    words = f"{random.getrandbits(64):x} ".ljust(max(20, ask.prompt * 4 - 200), "a")
    body = json.dumps(
        {
            "model": MODEL,
            "stream": True,
            "max_tokens": 4000,
            "sim_prompt_tokens": ask.prompt,
            "sim_output_tokens": ask.output,
            "messages": [{"role": "user", "content": words}],
        }
    ).encode()
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key_of(ask.tenant)}\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


async def play(asks: list[Ask], addresses: list[tuple[str, int]], seconds: float) -> None:
    """Sends all at their times. What has not ended some seconds after the last was sent stays as it is."""
    loop = asyncio.get_running_loop()
    begun = time.monotonic()
    opened: set[asyncio.Task[Any]] = set()
    for ask in sorted(asks, key=lambda ask: ask.at):
        ask.at += begun
        if (wait := ask.at - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        host, port = random.choice(addresses)
        raw = request(ask, f"{host}:{port}")
        task = loop.create_task(loop.create_connection(lambda a=ask, r=raw: _Client(a, r), host, port))  # type: ignore[misc]
        opened.add(task)
        task.add_done_callback(opened.discard)
    await asyncio.sleep(max(0.0, begun + seconds + 10 - time.monotonic()))


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Site:
    """One fleet behind gateways of so many workers."""

    def __init__(self, engines: list[simulator.Simulator], gateways: list[list[WorkerProcess]]) -> None:
        self.engines, self.gateways = engines, gateways
        self.addresses = [(worker.host, worker.port) for workers in gateways for worker in workers]

    def run(self, asks: list[Ask], seconds: float) -> str:
        """Returns what it cost."""
        workers = [worker.pid for each in self.gateways for worker in each]
        engines = [engine.process.pid for engine in self.engines]
        before = [sum(map(cpu, workers)), sum(map(cpu, engines))]
        own, begun = time.process_time(), time.monotonic()
        uvloop.run(play(asks, self.addresses, seconds))
        took = time.monotonic() - begun
        used = [sum(map(cpu, workers)) - before[0], sum(map(cpu, engines)) - before[1]]
        late = quantile((ask.sent - ask.at for ask in asks if ask.sent), 0.99)
        return (
            f"client {(time.process_time() - own) / took:.2f} workers {used[0] / took:.2f} "
            f"engines {used[1] / took:.2f} cores, sent {late * 1e3:.0f} ms late (p99)"
        )


@contextlib.contextmanager
def site(folder: Path, replicas: int, gateways: int, workers: int) -> Iterator[Site]:
    rows = [
        {
            "id": key_of(tenant).split("_")[1],
            "key": key_of(tenant),
            "tenant": tenant,
            "class": "emergency" if tenant == "sos" else "standard",
        }
        for tenant in TENANTS
    ]
    options = {
        "workers": workers, "gateways": gateways, "routing": "affinity", "reserved_share": 0.1, "overload_seconds": 1.0,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(simulator.started("--scheduling-policy", "priority", preset="sim-20b"))
            for _ in range(replicas)
        ]
        fleet = [
            Replica(f"engine-{i}", engine.address, ReplicaState.READY, (MODEL,), 64, 1, kv_tokens=400_000)
            for i, engine in enumerate(engines)
        ]
        made = [
            [
                stack.enter_context(
                    running_worker(
                        folder / f"{gateway}-{worker}",
                        document=snapshot(keys=rows),
                        worker=worker,
                        admission_socket=str(folder / f"{gateway}.sock"),
                        **options,
                    )
                )
                for worker in range(workers)
            ]
            for gateway in range(gateways)
        ]
        for each in made:
            for worker in each:
                worker.fleet(*fleet)
        time.sleep(1.5)  # they find each other
        yield Site(engines, made)


def steady(asks: list[Ask], seconds: float, tenant: str = "") -> list[Ask]:
    start = min(ask.at for ask in asks)
    return [a for a in asks if start + WARM_SECONDS <= a.at < start + seconds - 3 and a.tenant.startswith(tenant)]


def told(asks: list[Ask]) -> tuple[float, float, float]:
    """TTFT p50 and p99 in seconds, and the part that was refused."""
    firsts = [ask.ttft for ask in asks if ask.first]
    return quantile(firsts, 0.5), quantile(firsts, 0.99), sum(ask.status != 200 for ask in asks) / len(asks)


def stream(draw: Draw, tenant: str, rate: float, seconds: float) -> list[Ask]:
    return [Ask(r.at, tenant, r.prompt, r.output) for r in draw.stream(tenant, rate, seconds)]


def neighbours(at: Site, seed: int, seconds: float, times: float, load: float = 0.8) -> tuple[list[Ask], str]:
    draw, share = Draw(seed), load * CAPACITY * len(at.engines) / 5
    asks = [a for i in range(4) for a in stream(draw, f"victim-{i}", share, seconds)]
    asks += stream(draw, "neighbour", times * share, seconds)
    return asks, at.run(asks, seconds)


def overload(at: Site, seed: int, seconds: float, load: float, *, sos: bool = False) -> tuple[list[Ask], str]:
    """Five equal tenants at so many times what the engines can carry; and 5 % of that as emergencies."""
    draw, carried = Draw(seed), CAPACITY * len(at.engines)
    asks = [a for tenant in TENANTS[:5] for a in stream(draw, tenant, load * carried / 5, seconds)] if load else []
    if sos:
        asks += stream(draw, "sos", 0.05 * carried, seconds)
    return asks, at.run(asks, seconds)


def row(name: str, what: str, cost: str) -> None:
    print(f"{name:14} {what:100} [{cost}]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45, help="of each run")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="for the flooding neighbour")
    parser.add_argument("--only", choices=("neighbour", "emergency", "goodput"))
    given = parser.parse_args()
    seconds = given.seconds
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    print(f"{given.replicas} replicas of sim-20b, {seconds:g} s each, commit {commit.strip()}")
    for name, (gateways, workers) in ARRANGEMENTS.items():
        with tempfile.TemporaryDirectory() as folder, site(Path(folder), given.replicas, gateways, workers) as at:
            if given.only in (None, "neighbour"):
                ratios = []
                for seed in range(1, given.seeds + 1):
                    found = []
                    for times in (1, 10):
                        asks, cost = neighbours(at, seed, seconds, times)
                        p50, p99, refused = told(steady(asks, seconds, "victim"))
                        found.append(p99)
                        row(
                            name,
                            f"neighbour at {times}x its share, seed {seed}: victims' TTFT p50 {p50 * 1e3:.0f} ms, "
                            f"p99 {p99 * 1e3:.0f} ms, {refused:.1%} refused",
                            cost,
                        )
                    ratios.append(found[1] / found[0])
                print(f"{name:14} TTFT p99 over solo: {statistics.median(ratios):.2f}", flush=True)
            if given.only in (None, "emergency"):
                for load in (0, 10):
                    asks, cost = overload(at, 1, seconds, load, sos=True)
                    p50, p99, refused = told(steady(asks, seconds, "sos"))
                    row(
                        name,
                        f"emergency beside {load}x capacity: TTFT p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms, "
                        f"{refused:.1%} refused",
                        cost,
                    )
            if given.only in (None, "goodput"):
                goods = {}
                for load in (1.0, 1.2, 2.0):
                    asks, cost = overload(at, 3, seconds, load)
                    counted = steady(asks, seconds)
                    goods[load] = sum(ask.good for ask in counted) / (seconds - 3 - WARM_SECONDS)
                    served = [
                        sum(a.prompt + 2 * a.output for a in counted if a.ended and a.tenant == tenant)
                        for tenant in TENANTS[:5]
                    ]
                    row(name, f"{load}x offered: goodput {goods[load]:.2f}/s, Jain {jain(served):.3f}", cost)
                print(f"{name:14} goodput at 2x over the best: {goods[2.0] / max(goods.values()):.2f}", flush=True)


if __name__ == "__main__":
    main()

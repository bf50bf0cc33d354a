"""What the gateway costs: direct against gateway, in turns, in one run.

    python tests/bench/overhead.py [--seconds 3] [--rounds 3] [--json FILE]

A real worker process alone on one processor; the simulated engine and the load share the other. CPU time of the
worker per request and per event is the figure to quote: it holds on a busy machine better than rates do. Latency
is the median of rounds at one connection. Everything of the product is on: key, body policy, admission, metrics,
access log.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server")]

import uvloop  # noqa: E402

from tests.bench import driver  # noqa: E402
from tests.support import simulator  # noqa: E402
from tests.support.worker import KEY, MODEL, WorkerProcess, running_worker  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def load(url: str, connections: int, seconds: float, **shape: Any) -> driver.Load:
    request = driver.chat("bench", KEY, MODEL, **shape)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(driver.run(url, request, connections, seconds))


def latency(engine: str, worker: WorkerProcess, seconds: float, rounds: int) -> list[dict[str, Any]]:
    rows: dict[str, list[driver.Load]] = {"direct": [], "gateway": []}
    for _ in range(rounds):
        for name, url in (("direct", engine), ("gateway", worker.url)):
            rows[name].append(load(url, 1, seconds, stream=False, tokens=1))
    found: list[dict[str, Any]] = []
    for name, runs in rows.items():
        p50, p99 = (statistics.median(run.percentile(q) for run in runs) for q in (0.5, 0.99))
        failures = sum(run.failures for run in runs)
        row = {"what": "one connection", "way": name, "p50_ms": round(p50, 3), "p99_ms": round(p99, 3)}
        found.append({**row, "failures": failures})
    return found


def cost(worker: WorkerProcess, connections: int, seconds: float, rounds: int, **shape: Any) -> dict[str, Any]:
    each, rates, failures = [], [], 0
    for _ in range(rounds):
        before = cpu_seconds(worker.pid)
        run = load(worker.url, connections, seconds, **shape)
        units = run.events if shape["stream"] else run.requests
        each.append((cpu_seconds(worker.pid) - before) / max(units, 1) * 1e6)
        rates.append(units / run.seconds)
        failures += run.failures
    what = "event" if shape["stream"] else "request"
    if shape["stream"]:
        what += ", usage asked" if shape["usage"] else ", usage hidden"
    return {
        "what": what,
        "way": "gateway",
        "connections": connections,
        "cpu_us": round(statistics.median(each), 1),
        "per_second": round(statistics.median(rates)),
        "rss_mib": round(resident_kib(worker.pid) / 1024),
        "failures": failures,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=3)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    processors = sorted(os.sched_getaffinity(0))
    alone, shared = {processors[0]}, set(processors[1:]) or {processors[0]}
    rows: list[dict[str, Any]] = []

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)

    os.sched_setaffinity(0, shared)  # inherited by the simulator
    with tempfile.TemporaryDirectory() as folder, simulator.started("--max-num-seqs", "4096", preset="instant") as fast:
        os.sched_setaffinity(0, alone)
        with running_worker(Path(folder)) as worker:
            os.sched_setaffinity(0, shared)
            worker.serve(fast.address, slots=4096)
            for row in latency(fast.address, worker, given.seconds, given.rounds):
                show(row)
            show(cost(worker, 64, given.seconds, given.rounds, stream=False, tokens=1))
            with simulator.started(
                "--max-num-seqs", "4096", "--decode-step-ms", "10", "--per-sequence-ms", "0", preset="instant"
            ) as paced:
                worker.serve(paced.address, slots=4096)
                for connections in (100, 400):
                    for usage in (True, False):
                        show(cost(worker, connections, given.seconds, given.rounds, stream=True, usage=usage))
            contexts = worker.in_flight()["count"]
            print(f"open contexts afterwards: {contexts}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    python = platform.python_version()
    machine = f"{platform.machine()}, {len(processors)} processors, Python {python}, commit {commit.strip()}"
    print(machine)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

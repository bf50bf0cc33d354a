"""How true one process of the load generator measures, and how many events a second it can read before it does not.

    python tests/bench/load_client.py [--rates 500,1000] [--paced 2000,8000] [--seconds 5] [--repeats 3] [--json FILE]

For each rate a simulated engine gives that many tokens a second to streams of 20 ms a token, and one process with
gevent reads them as a load test does. The engine's own log tells when each token was written, by the same clock: what
the client measured at p50 and p99 is held against that. Where a simulated engine is too slow to keep a client busy,
`--paced` has one that does nothing but write. The median of the repeats is printed; in brackets the largest. `waited`
is the time that the client was ready and had no core: on a machine that others use, errors are theirs. `read` is how
late the client took an answer's first token. A request begins when the client says so (design section 11); how long
before the engine's word that is, `sending_*` in the JSON tells. Exit code 1 where, up to 2,000 events/s, an error is
above both 1 ms and 2 %.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "loadtests")]

TOKEN_SECONDS = 0.02
TOKENS = 100
PROMPT_TOKENS = 600
PREFILL_TOKENS_PER_SECOND = 20_000
LAG_SECONDS = 0.02  # how often the client's loop is probed
PACED_GROUP = 64  # streams that get their tokens at one moment, as of one engine
CLIENT_BOUND = 0.9  # of a core
LIMIT_SECONDS, LIMIT_SHARE, LIMIT_EVENTS = 0.001, 0.02, 2000


# -- the client: a process of the load environment


def drive(address: str, streams: int, seconds: float) -> dict[str, Any]:
    """Closed users on one connection each, for so long. Times by the monotonic clock, as the engine's log has them."""
    from gevent import monkey

    monkey.patch_all()
    import gevent
    from vitalis_load import client
    from vitalis_load import streams as answers
    from vitalis_load.histograms import Histogram
    from vitalis_load.wakes import Wakes

    gaps, lags, records = Histogram(), Histogram(), []
    wakes = None if os.environ.get("NO_WAKES") else Wakes()
    clock = time.monotonic
    began = clock() + TOKENS * TOKEN_SECONDS  # until then they begin, one after the other
    end = began + seconds
    state = {"running": True, "events": 0}

    def user(number: int) -> None:
        connection = client.Connection(address, wakes=wakes)
        gevent.sleep(number * TOKENS * TOKEN_SECONDS / streams)  # their beginnings are spread over an answer's time
        turn = 0
        while clock() < end:
            identity = f"{number}-{turn}"
            document = {"model": "gpt-oss-20b", "prompt": f"{identity} " + "x" * (4 * PROMPT_TOKENS), "stream": True,
                        "max_tokens": TOKENS, "ignore_eos": True}  # fmt: skip
            sent = client.request("completions", document, host="bench", headers={"x-request-id": identity})
            reader = answers.reader("completions", stream=True, on_gap=on_gap)
            now = clock()
            record = connection.ask(sent, reader, scheduled=now, deadline=now + 60, clock=clock)
            record.request_id = identity
            records.append(record)
            turn += 1

    def on_gap(gap: float, now: float) -> None:
        gaps.add(gap)
        state["events"] += began <= now < end

    def spend() -> tuple[float, float]:
        """Seconds of CPU, and of waiting for a core, while all of them go on."""
        gevent.sleep(max(0.0, began - clock()))
        cpu, wait = time.process_time(), waited()
        gevent.sleep(max(0.0, end - clock()))
        return time.process_time() - cpu, waited() - wait

    def watch() -> None:
        while state["running"]:
            before = clock()
            gevent.sleep(LAG_SECONDS)
            lags.add(max(0.0, clock() - before - LAG_SECONDS))

    watcher = gevent.spawn(watch)
    spender = gevent.spawn(spend)
    gevent.joinall([gevent.spawn(user, number) for number in range(streams)], raise_error=True)
    state["running"] = False
    watcher.join()
    cpu_seconds, wait_seconds = spender.get()
    import msgspec

    return {
        "records": [msgspec.to_builtins(record) for record in records],
        "gaps": gaps.encode(),
        "lag_p50": lags.percentile(50),
        "lag_p99": lags.percentile(99),
        "events": state["events"],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "wait_seconds": wait_seconds,
    }


def waited() -> float:
    """Seconds that this process was ready to run and had no core."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


# -- held against the engine's log


def measure(python: Path, rate: int, seconds: float, *, paced: bool = False) -> dict[str, Any]:
    """One rate, once: what the client said, what the engine did, and how far they are apart."""
    streams = max(1, round(rate * TOKEN_SECONDS * 1.03))  # a new request costs its first token's time
    with pacer() if paced else simulated() as (address, log):
        said = subprocess.run(
            [str(python), __file__, "--drive", address, str(streams), str(seconds)],
            capture_output=True, text=True, check=False, timeout=seconds * 4 + 60,
            env={**os.environ, "PYTHONPATH": str(ROOT / "loadtests")},
        )  # fmt: skip
        if said.returncode:
            raise SystemExit(f"the client ended with {said.returncode}: {said.stderr[-2000:]}")
        client = json.loads(said.stdout)
        truth = log(len(client["records"]))
    return {"rate": rate, "streams": streams, **compared(client, {one["x-request-id"]: one for one in truth})}


Engine = tuple[str, Callable[[int], list[dict[str, Any]]]]  # its address, and its log of so many answers


@contextlib.contextmanager
def simulated() -> Iterator[Engine]:
    from tests.support import simulator

    flags = (
        "--log-token-times", "--decode-step-ms", str(TOKEN_SECONDS * 1e3), "--per-sequence-ms", "0",
        "--prefill-tokens-per-second", str(PREFILL_TOKENS_PER_SECOND), "--max-num-seqs", "4096",
        "--max-num-batched-tokens", "65536", "--kv-cache-tokens", "100000000", "--no-enable-prefix-caching",
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as scratch,
        simulator.started(*flags, log=Path(scratch) / "log") as engine,
    ):
        yield engine.address, engine.wait_for_log


@contextlib.contextmanager
def pacer() -> Iterator[Engine]:
    script = Path(__file__).with_name("pacer.py")
    command = [sys.executable, str(script), str(TOKEN_SECONDS), str(TOKENS), str(PACED_GROUP)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = f"http://127.0.0.1:{process.stdout.readline().strip()}"

        def log(_: int) -> list[dict[str, Any]]:
            with urllib.request.urlopen(f"{address}/log") as answer:
                return [json.loads(line) for line in answer.read().splitlines()]

        try:
            yield address, log
        finally:
            process.stdin.close()


def compared(client: dict[str, Any], truth: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Seconds throughout. `*_error` is what was measured less what was."""
    from vitalis_load import metrics
    from vitalis_load.histograms import Histogram
    from vitalis_load.records import Record

    records = [Record(**record) for record in client["records"]]
    wrong = [f"{record.error} {record.detail}" for record in records if record.error]
    told = sum(record.completion_tokens or 0 for record in records)
    made = sum(truth[record.request_id]["completion_tokens"] for record in records)
    times = [truth[record.request_id]["written_times"] for record in records]
    first = [one[0] - record.sent for one, record in zip(times, records, strict=True)]
    gaps = metrics.spread(b - a for one in times for a, b in zip(one, one[1:], strict=False))
    ttft = metrics.spread(first)
    seen_ttft = metrics.spread(map(metrics.ttft, records))
    seen_gaps = metrics.spread_of(Histogram.decode(client["gaps"]))
    tpot = metrics.spread((one[-1] - one[0]) / (len(one) - 1) for one in times)
    seen_tpot = metrics.spread(map(metrics.tpot, records))
    reading = metrics.spread(
        record.first_token - one[0] for one, record in zip(times, records, strict=True) if record.first_token
    )
    sending = metrics.spread(truth[record.request_id]["arrived"] - record.sent for record in records)
    assert reading is not None
    assert sending is not None
    found: dict[str, Any] = {
        "reading_min": reading.min,
        "sending_min": sending.min,
        "reading_p50": reading.p50,
        "reading_p99": reading.p99,
        "sending_p50": sending.p50,
        "sending_p99": sending.p99,
        "requests": len(records),
        "failures": wrong[:3],
        "events": sum(record.chunks for record in records),
        "tokens_told": told,
        "tokens_made": made,
        "tokens_logged": sum(map(len, times)),
        "events_per_second": client["events"] / client["seconds"],
        "cpu": client["cpu_seconds"] / client["seconds"],
        "cpu_per_event": client["cpu_seconds"] / max(1, client["events"]),
        "waited": client["wait_seconds"] / client["seconds"],
        "lag_p50": client["lag_p50"],
        "lag_p99": client["lag_p99"],
    }
    for name, true, seen in (("ttft", ttft, seen_ttft), ("gap", gaps, seen_gaps), ("tpot", tpot, seen_tpot)):
        for share in ("p50", "p99"):
            is_, was = getattr(seen, share), getattr(true, share)
            found |= {f"{name}_{share}": was, f"{name}_{share}_error": is_ - was}
    return found


def off(found: dict[str, Any], name: str, share: str) -> bool:
    """Whether an error is above both limits."""
    error = abs(found[f"{name}_{share}_error"])
    return error > LIMIT_SECONDS and error > LIMIT_SHARE * found[f"{name}_{share}"]


def load_python() -> Path:
    made = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "environments.py"), "load"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Path(made.stdout.strip())


SHOWN = [(name, share) for name in ("ttft", "gap", "tpot") for share in ("p50", "p99")]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rates", default="500,1000,2000,3000", help="of the simulated engine")
    parser.add_argument("--paced", default="2000,4000,6000,8000,10000,12000", help="of one that only writes")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    python = load_python()
    print("errors in ms: what the client measured less what the engine's log says; median of the repeats (the largest)")
    titles = " ".join([f"{'read p50':>8}", *(f"{f'{name} {share}':>15}" for name, share in SHOWN)])
    print(f"{'engine':>9} {'asked':>6} {'events/s':>9} {'streams':>7} {'cpu':>5} {'us/event':>8} {'waited':>7} "
          f"{'lag p99':>8} {titles}")  # fmt: skip
    table, status, bound = [], 0, 0.0
    for paced, rate in [(False, int(rate)) for rate in options.rates.split(",") if rate] + [
        (True, int(rate)) for rate in options.paced.split(",") if rate
    ]:
        runs = [measure(python, rate, options.seconds, paced=paced) for _ in range(options.repeats)]
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "failures"}
        shown = []
        for name, share in SHOWN:
            key = f"{name}_{share}_error"
            worst = max((run[key] for run in runs), key=abs)
            mark = "!" if off(middle, name, share) else " "
            shown.append(f"{middle[key] * 1e3:7.2f} ({worst * 1e3:4.1f}){mark}")
        print(
            f"{'paced' if paced else 'simulated':>9} {rate:6} {middle['events_per_second']:9.0f} "
            f"{middle['streams']:7.0f} {middle['cpu']:5.2f} {middle['cpu_per_event'] * 1e6:8.0f} "
            f"{middle['waited']:7.1%} {middle['lag_p99'] * 1e3:8.2f} {middle['reading_p50'] * 1e3:8.2f} "
            f"{' '.join(shown)}",
            flush=True,
        )
        wrong = any(off(middle, name, share) for name, share in SHOWN)
        if any(run["failures"] for run in runs) or (wrong and rate <= LIMIT_EVENTS):
            status = 1
        if middle["cpu"] < CLIENT_BOUND and not wrong:
            bound = max(bound, middle["events_per_second"])
        table.append({"engine": "paced" if paced else "simulated", "rate": rate, "runs": runs})
    print(f"true within {LIMIT_SECONDS * 1e3:g} ms or {LIMIT_SHARE:.0%}, and not client-bound, up to {bound:.0f} "
          "events/s of one process")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return status


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        print(json.dumps(drive(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))))
        sys.exit(0)
    sys.exit(main())

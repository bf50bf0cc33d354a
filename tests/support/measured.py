"""Folders of runs that nobody ran: what a load test would have written down about a server of known behaviour, so that
reports can be made and compared without one. The same seed gives the same bytes."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from vitalis_load.histograms import Histogram
from vitalis_load.records import (
    ClientSecond,
    EngineSample,
    GapsOfSecond,
    GpuSample,
    Record,
    RepeatEnd,
    RunInfo,
    Sample,
)

BEGAN = 1_763_900_000.0


@dataclass
class Server:
    """What the imagined server does with a request."""

    prefill: float = 0.08  # seconds to the first token, alone
    step: float = 0.012  # seconds a token
    slots: int = 48
    jitter: float = 0.15
    failing: float = 0.0  # share of requests that fail
    drift: float = 1.0  # of the output length that was asked for
    engines: int = 1
    gpus: int = 0
    usage: bool = True


@dataclass
class Load:
    """What is asked of it."""

    rate: float = 12.0
    seconds: float = 40.0
    warmup: float = 5.0
    cooldown: float = 5.0
    tenants: tuple[str, ...] = ("acme",)
    classes: tuple[str, ...] = ("normal",)
    tokens: float = 60
    peak: float = 1.0  # the rate in the middle third, times
    late: float = 0.0002  # seconds that requests are sent late, on average
    cpu: float = 0.25
    lag: float = 0.001
    kind: str = "poisson"
    slo: dict[str, float] = field(default_factory=lambda: {"ttft_p99_ms": 2000.0, "tpot_p99_ms": 40.0})

    @property
    def whole(self) -> float:
        return self.warmup + self.seconds + self.cooldown


def write(
    folder: Path, server: Server, load: Load, *, repeats: int = 3, seed: int = 1, name: str = "short-chat",
    changes: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A whole run. `changes` are of RunInfo's fields."""
    folder.mkdir(parents=True, exist_ok=True)
    info = RunInfo(
        id=folder.name,
        scenario={
            "name": name,
            "about": "Short questions and short answers, streamed.",
            "arrivals": {"kind": load.kind, "rate": load.rate}
            if load.kind != "users"
            else {"kind": "users", "users": int(load.rate)},
            "shape": {"kind": "steady" if load.peak == 1 else "spike", "seconds": load.seconds},
            "warmup_seconds": load.warmup,
            "cooldown_seconds": load.cooldown,
            "repeats": repeats,
            "slo": load.slo,
            "expected": {
                "open": load.kind != "users",
                "seconds": load.whole,
                "window": [load.warmup, load.warmup + load.seconds],
            },
            "tasks": [{"name": "chat", "api": "chat", "weight": 1, "output": {"median": load.tokens}}],
        },
        scale="full",
        url="http://127.0.0.1:8000",
        model="gpt-oss-20b",
        repeats=repeats,
        processes=2,
        began_at=BEGAN,
        commit="0123456789ab",
        versions={"vitalis-load": "0.3.0", "vitalis-serve": "0.3.0", "vllm": "0.32.0", "python": "3.11.7"},
        machine={"cpu": "AMD EPYC", "cores": 16, "memory_bytes": 128 * 2**30, "kernel": "6.1", "gpus": []},
        target={"models": ["gpt-oss-20b"], "engine_options": {"max_num_seqs": server.slots}},
    )
    for key, value in (changes or {}).items():
        setattr(info, key, value)
    (folder / "run.json").write_bytes(msgspec.json.encode(info))
    for number in range(1, repeats + 1):
        _repeat(folder / f"repeat-{number}", server, load, random.Random(f"{seed}/{number}"), number)
    return folder


def lines(path: Path, items: Iterator[Any] | list[Any]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(item) + b"\n" for item in items))


def _repeat(folder: Path, server: Server, load: Load, dice: random.Random, number: int) -> None:
    folder.mkdir(exist_ok=True)
    records = sorted(_records(server, load, dice), key=lambda record: record.ended)
    end = max([load.whole, *(record.ended for record in records)])
    lines(folder / "requests.jsonl", records)
    lines(folder / "gaps.jsonl", _gaps(records, server, dice, end))
    lines(folder / "client.jsonl", _client(records, load, dice, end))
    lines(folder / "samples.jsonl", _samples(records, server, dice, end))
    finished = RepeatEnd(began_at=BEGAN + 60 * number, seconds=end)
    (folder / "end.json").write_bytes(msgspec.json.encode(finished))


def _records(server: Server, load: Load, dice: random.Random) -> Iterator[Record]:
    at = 0.0
    free = [0.0] * server.slots
    pace = dice.gauss(1, 0.01)
    while True:
        middle = load.warmup + load.seconds / 3 <= at < load.warmup + load.seconds * 2 / 3
        at += dice.expovariate(load.rate * (load.peak if middle else 1))
        if at >= load.whole:
            return
        sent = at + dice.expovariate(1 / load.late)
        tenant, klass = dice.choice(load.tenants), dice.choice(load.classes)
        base = {"task": "chat", "api": "chat", "tenant": tenant, "klass": klass, "scheduled": at, "sent": sent}
        base["process"] = dice.randrange(2)
        if dice.random() < server.failing:
            yield _failure(base, sent, dice)
            continue
        wanted = max(2, int(dice.lognormvariate(0, 0.6) * load.tokens))
        tokens = max(1, int(wanted * server.drift))
        slot = min(range(server.slots), key=free.__getitem__)
        begin = max(sent, free[slot])
        busy = sum(1 for until in free if until > begin) / server.slots
        first = begin + server.prefill * pace * dice.lognormvariate(0, server.jitter)
        step = server.step * pace * (1 + 0.6 * busy) * dice.lognormvariate(0, server.jitter / 3)
        last = first + step * (tokens - 1)
        free[slot] = last
        thought = int(tokens * 0.3)
        yield Record(
            **base,
            head=first - 0.002,
            first_token=first,
            first_output=first + step * thought,
            last_token=last,
            ended=last + 0.001,
            status=200,
            prompt_tokens=400 if server.usage else None,
            cached_tokens=96 if server.usage else None,
            completion_tokens=tokens if server.usage else None,
            reasoning_tokens=thought if server.usage else None,
            wanted_tokens=wanted,
            chunks=tokens,
            finish="stop",
        )


def _failure(base: dict[str, Any], sent: float, dice: random.Random) -> Record:
    if dice.random() < 0.7:
        detail = "Too many requests wait for a slot; try again in 2 s."
        return Record(
            **base, head=sent + 0.004, ended=sent + 0.005, status=429, error="http_429", detail=detail, retry_after=2
        )
    return Record(
        **base, head=sent + 0.05, first_token=sent + 0.1, last_token=sent + 0.4, ended=sent + 0.5, status=200,
        error="no_end", detail="the stream ended without its last event", chunks=12,
    )  # fmt: skip


def _gaps(records: list[Record], server: Server, dice: random.Random, end: float) -> Iterator[GapsOfSecond]:
    for second in range(int(end)):
        seen = Histogram()
        for record in records:
            if record.first_token is None or record.last_token is None or record.chunks < 2:
                continue
            if record.first_token <= second + 1 and record.last_token >= second:
                step = (record.last_token - record.first_token) / (record.chunks - 1)
                for _ in range(3):
                    seen.add(step * dice.lognormvariate(0, server.jitter), max(1, int(0.3 / max(step, 1e-3))))
        if seen.count:
            yield GapsOfSecond(at=second, process=second % 2, hdr=seen.encode())


def _client(records: list[Record], load: Load, dice: random.Random, end: float) -> Iterator[ClientSecond]:
    for second in range(int(end)):
        for process in (0, 1):
            mine = [record for record in records if record.process == process]
            yield ClientSecond(
                at=second,
                process=process,
                cpu=min(1.0, load.cpu * dice.uniform(0.9, 1.1)),
                loop_lag_ms=load.lag * 1000 * dice.uniform(0.5, 1.5),
                in_flight=sum(1 for record in mine if record.sent <= second < record.ended),
                started=sum(1 for record in mine if second <= record.sent < second + 1),
                ended=sum(1 for record in mine if second <= record.ended < second + 1),
                events=int(400 * dice.uniform(0.9, 1.1)),
            )


def _samples(records: list[Record], server: Server, dice: random.Random, end: float) -> Iterator[Sample]:
    generated = [1000.0] * server.engines
    queries = hits = 0.0
    for second in range(int(end) + 1):
        at = second + 0.25
        flying = [record for record in records if record.sent <= at < record.ended]
        waiting = [record for record in flying if record.head and at < record.head - server.prefill]
        running = len(flying) - len(waiting)
        engines = []
        for index in range(server.engines):
            generated[index] += running / server.engines / server.step / 1.3
            queries += 400
            hits += 96 * dice.uniform(0.8, 1.2)
            engines.append(
                EngineSample(
                    name=f"engine-{index}",
                    running=running // server.engines,
                    waiting=len(waiting) // server.engines,
                    kv_usage=min(1.0, running / server.slots * 0.7 * dice.uniform(0.95, 1.05)),
                    generation_tokens=generated[index],
                    prompt_tokens=400.0 * second,
                    cache_queries=queries,
                    cache_hits=hits,
                )
            )
        gateway = {"vitalis_in_flight": float(running), "vitalis_queued": float(len(waiting))}
        gpus = [GpuSample(index=i, utilisation=dice.uniform(0.85, 0.99), memory_bytes=120e9, power_watts=dice.uniform(520, 640)) for i in range(server.gpus)]  # fmt: skip # noqa: E501
        yield Sample(at=at, gateway=gateway, engines=engines, gpus=gpus)

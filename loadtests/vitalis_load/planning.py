"""How many replicas a traffic needs, by the simulator's own schedule in virtual time. Pure.

How it works: a first number comes from how much work a request is. Each number is tried with the same requests, in
repeats of other seeds, until one of them misses the SLO; upwards until a number holds, then downwards until one does
not. A request that has not ended a minute after the last one came counts as endless.
"""

import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
from simulator.calibration import Calibration
from simulator.options import Options
from simulator.speed import PRESETS
from simulator.virtual import HEADROOM, RESERVED, Fleet, Job

from vitalis_load.prompts import Shared
from vitalis_load.timelines import quantile
from vitalis_load.traffic import CLASSES, Task, Traffic

Tell = Callable[[str], None]

DRAIN_SECONDS = 60.0
_HOPELESS_SECONDS = 30.0  # of arrivals that wait at the gateway: it will not get better
_LEAST_REQUESTS = 1000  # for a p99


class Outcome(msgspec.Struct, kw_only=True):
    """What became of the traffic with so many replicas: the worst of the repeats that were tried. Milliseconds."""

    replicas: int
    holds: bool
    missed: list[str]  # which limits
    requests: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p99_ms: float
    e2e_p99_ms: float
    good_share: float
    goodput: float  # good requests a second
    tokens_per_second: float
    utilisation: float  # of the seats, on average
    busy: float  # share of the time in which a replica was at a step
    kv_peak: float
    cached_share: float
    preemptions: int
    queue_p99_ms: float  # at the gateway
    tasks: dict[str, float] = {}  # TTFT p99 by task, ms


class Planned(msgspec.Struct, kw_only=True):
    """`replicas`: the smallest number that holds, None where none up to the most does. `wanted`: with spare ones."""

    traffic: str
    rate: float
    replicas: int | None
    wanted: int | None
    outcomes: list[Outcome]
    impossible: str = ""  # why no number can hold
    assumptions: list[str] = []


@dataclass(slots=True)
class Setting:
    """What is planned with: the traffic, and an engine as far as it is known."""

    traffic: Traffic
    calibration: Calibration | None = None
    options: Options = field(init=False)
    overhead: float = field(init=False)

    def __post_init__(self) -> None:
        known = self.calibration
        fields = self.traffic.engine.over(known.engine if known else _NOTHING)
        self.overhead = known.overhead_seconds if known else 0.0
        self.options = Options(
            **fields,  # type: ignore[arg-type]
            speed=known.speed if known else PRESETS["sim-20b"],
            prefix_caching=self.traffic.engine.prefix_caching,
            scheduling_policy="priority",
        )


_NOTHING = Calibration(decode_step_seconds=0, per_sequence_seconds=0, prefill_tokens_per_second=0).engine


def plan(setting: Setting, tell: Tell) -> Planned:
    """Tries numbers of replicas until the smallest that holds is known."""
    traffic = setting.traffic
    outcomes: dict[int, Outcome] = {}
    impossible = _impossible(setting)

    def holds(count: int) -> bool:
        outcomes[count] = measure(setting, count, tell)
        return outcomes[count].holds

    number = max(1, min(traffic.most_replicas, math.floor(0.85 * traffic.planned_rate / capacity(setting))))
    found: int | None = None
    if not impossible:
        while not holds(number) and number < traffic.most_replicas:
            number = min(traffic.most_replicas, number + max(1, number // 8))
        found = number if outcomes[number].holds else None
    while found is not None and found > 1 and not (found - 1 in outcomes and not outcomes[found - 1].holds):
        if not holds(found - 1):
            break
        found -= 1
    return Planned(
        traffic=traffic.name,
        rate=traffic.planned_rate,
        replicas=found,
        wanted=None if found is None else found + traffic.spare,
        outcomes=[outcomes[count] for count in sorted(outcomes)],
        impossible=impossible,
    )


def capacity(setting: Setting) -> float:
    """Requests a second that one replica carries with all its seats in use, by arithmetic."""
    options, traffic = setting.options, setting.traffic
    total = sum(task.weight for task in traffic.tasks)
    prompt = sum(task.weight * task.prompt.tokens.mean for task in traffic.tasks) / total  # prefixes are in the cache
    context = sum(task.weight * (_prefix(task) + task.prompt.tokens.mean) for task in traffic.tasks) / total
    output = sum(task.weight * task.output.mean for task in traffic.tasks) / total
    held = prompt if options.prefix_caching else context
    seats = max(
        1.0, min(options.max_num_seqs * (1 - RESERVED), options.kv_cache_tokens * (1 - HEADROOM) / (held + output))
    )
    speed = options.speed
    step = speed.decode_step_seconds + seats * (
        speed.per_sequence_seconds + speed.per_context_token_seconds * (context + output / 2)
    )
    prefill = held / speed.prefill_tokens_per_second if speed.prefill_tokens_per_second else 0.0
    return float(1 / max(1e-9, prefill + output * step / seats))


def _impossible(setting: Setting) -> str:
    """Why no number of replicas can do it, or nothing."""
    speed, slo = setting.options.speed, setting.traffic.slo
    alone = 1000 * (speed.decode_step_seconds + speed.per_sequence_seconds)
    limit = slo.get("tpot_p99_ms", math.inf)
    if alone > limit:
        return f"a sequence alone takes {alone:.1f} ms a token, and {limit:g} are allowed: no number of replicas helps"
    return ""


def measure(setting: Setting, replicas: int, tell: Tell) -> Outcome:
    """The worst of the repeats; after one that misses the SLO no other is tried."""
    worst: Outcome | None = None
    for seed in range(1, setting.traffic.repeats + 1):
        one = _repeat(setting, replicas, seed, tell)
        if worst is None or not one.holds or one.ttft_p99_ms > worst.ttft_p99_ms:
            worst = one
        if not one.holds:
            break
    assert worst is not None
    return worst


def _repeat(setting: Setting, replicas: int, seed: int, tell: Tell) -> Outcome:
    traffic = setting.traffic
    start, end = traffic.warmup_seconds, traffic.warmup_seconds + measured_seconds(traffic)
    made = list(jobs(setting, end, seed))
    fleet = Fleet(replicas, setting.options)
    for now in fleet.run(made, end + DRAIN_SECONDS):
        tell(f"{replicas} replicas, repeat {seed}: {min(now, end):.0f} of {end:.0f} s")
        if len(fleet.waiting) > _HOPELESS_SECONDS * traffic.planned_rate:
            break
    return _outcome(setting, fleet, [job for job in made if start <= job.at < end], end - start)


def measured_seconds(traffic: Traffic) -> float:
    """As long as the traffic says, or as a p99 needs."""
    return max(traffic.seconds, min(3600.0, _LEAST_REQUESTS / traffic.planned_rate))


def jobs(setting: Setting, until: float, seed: int) -> Iterator[Job]:
    """Requests as they come, at random (Poisson). The same for every number of replicas."""
    traffic, options, draw = setting.traffic, setting.options, random.Random(seed)
    weights = [task.weight for task in traffic.tasks]
    now = 0.0
    while (now := now + draw.expovariate(traffic.planned_rate)) < until:
        at = draw.choices(range(len(weights)), weights)[0]
        task = traffic.tasks[at]
        prefix, group = _prefix(task), -1
        names: tuple[int, ...] = ()
        if isinstance(task.prompt, Shared):
            number = draw.randrange(task.prompt.groups)
            group = at * 1_000_000 + number
            blocks = range(prefix // options.block_tokens)
            names = tuple(hash((at, number, block)) for block in blocks) if options.prefix_caching else ()
        output = task.output.whole(draw)
        prompt = min(prefix + task.prompt.tokens.whole(draw), max(1, options.max_model_len - output))
        yield Job(now, prompt, output, rank=CLASSES.index(task.klass), kind=task.name, group=group, names=names)


def _prefix(task: Task) -> int:
    return task.prompt.prefix_tokens if isinstance(task.prompt, Shared) else 0


def _outcome(setting: Setting, fleet: Fleet, asked: list[Job], seconds: float) -> Outcome:
    slo, overhead = setting.traffic.slo, setting.overhead

    def high(values: Iterable[float], share: float = 0.99) -> float:
        return 1000 * quantile(sorted(values), share)

    ttfts = [job.ttft + overhead if job.first else math.inf for job in asked]
    tpots = [job.tpot if job.ended else math.inf for job in asked]
    e2es = [job.ended - job.at + overhead if job.ended else math.inf for job in asked]
    limits = [slo.get(f"{name}_ms", slo.get(f"{name}_p99_ms", math.inf)) / 1000 for name in ("ttft", "tpot", "e2e")]
    good = sum(
        bool(job.ended) and all(value <= limit for value, limit in zip(values, limits, strict=True))
        for job, *values in zip(asked, ttfts, tpots, e2es, strict=True)
    )
    by_task: dict[str, list[float]] = {}
    for job, ttft in zip(asked, ttfts, strict=True):
        by_task.setdefault(job.kind, []).append(ttft)
    found = {
        "ttft_p99_ms": high(ttfts), "tpot_p99_ms": high(tpots), "e2e_p99_ms": high(e2es),
        "good_share": good / max(1, len(asked)),
    }  # fmt: skip
    missed = [
        f"{name[:-7].upper()} p99" for name in ("ttft_p99_ms", "tpot_p99_ms", "e2e_p99_ms")
        if found[name] > slo.get(name, math.inf)
    ]  # fmt: skip
    if found["good_share"] < slo.get("min_good_share", 0):
        missed.append("good share")
    replicas, now = fleet.replicas, max(fleet.now, 1e-9)
    prompts = sum(job.prompt for job in asked if job.first)
    return Outcome(
        replicas=len(replicas),
        holds=not missed,
        missed=missed,
        requests=len(asked),
        ttft_p50_ms=high(ttfts, 0.5),
        goodput=good / seconds,
        tokens_per_second=sum(job.output for job in asked if job.ended) / seconds,
        utilisation=statistics.fmean(one.seat_seconds for one in replicas) / now / setting.options.max_num_seqs,
        busy=min(1.0, statistics.fmean(one.busy_seconds for one in replicas) / now),
        kv_peak=max(one.kv_peak for one in replicas),
        cached_share=sum(job.cached for job in asked) / prompts if prompts else 0.0,
        preemptions=sum(one.schedule.preemptions for one in replicas),
        queue_p99_ms=high(job.admitted - job.at if job.admitted else math.inf for job in asked),
        tasks={name: high(values) for name, values in by_task.items()},
        **found,
    )


def monotone(outcomes: Iterable[Outcome]) -> bool:
    """Whether more replicas never did worse: where not, chance decides between neighbours."""
    return all(not one.holds or other.holds for one, other in pairwise(outcomes))

"""The scenarios behind `test_overload.py`; as a command, their figures: `python tests/simulation/figures.py`."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # pytest brings its own path
    ROOT = Path(__file__).parents[2]
    sys.path[:0] = [str(ROOT), str(ROOT / "server"), str(ROOT / "loadtests")]

from vitalis_serve.gateway.admission import AdmissionOptions
from vitalis_serve.gateway.options import WorkerOptions
from vitalis_serve.gateway.seats import CLASSES, cost
from vitalis_serve.gateway.state import admission_options

from tests.simulation.world import CAPACITY, Draw, Request, World, goodput, in_window, jain, quantile, ttft_p99

VICTIMS = 4


@dataclass(frozen=True, slots=True)
class Seen:
    """How a group fared: seconds, and the share that got no first token."""

    ttft_p50: float
    ttft_p99: float
    refused: float


def seen(requests: Iterable[Request]) -> Seen:
    requests = list(requests)
    first = [r.ttft for r in requests if r.first]
    return Seen(quantile(first, 0.5), ttft_p99(requests), sum(bool(r.refused) for r in requests) / len(requests))


def neighbours(
    replicas: int, gateways: int, *, seed: int, workers: int = 1, load: float = 0.8, seconds: float = 100
) -> tuple[Seen, Seen]:
    """Four victims and a neighbour, all at their fair share of `load`; then the neighbour at ten times that."""
    solo, beside = (victims(replicas, gateways, times, seed, workers, load, seconds) for times in (1, 10))
    return solo, beside


def victims(
    replicas: int, gateways: int, times: float, seed: int, workers: int = 1, load: float = 0.8, seconds: float = 100
) -> Seen:
    """Beside a neighbour at so many times its fair share of `load`; they are at theirs."""
    draw = Draw(seed)
    share = load * CAPACITY * replicas / (VICTIMS + 1)
    asked = [r for i in range(VICTIMS) for r in draw.stream(f"victim-{i}", share, seconds)]
    asked += draw.stream("neighbour", times * share, seconds)
    World(replicas, gateways=gateways, workers=workers, seed=seed).run(asked, seconds)
    return seen(in_window(asked, 10, seconds - 5, "victim"))


def equality(gateways: int, *, workers: int = 1, estimate_error: float = 1.0, seconds: float = 100) -> float:
    """Jain's index of served tokens. `estimate_error`: outputs are taken to be so many times as long as they are."""
    draw = Draw(5)
    asked = []
    for i in range(8):
        asked += draw.stream(f"t{i}", (0.3 if i < 4 else 1.0) * CAPACITY * 2, seconds)
    if estimate_error != 1.0:
        for request in asked:
            request.estimate = max(1, int(request.output * estimate_error))
    World(2, gateways=gateways, workers=workers).run(asked, seconds)
    steady = [r for r in in_window(asked, 10, seconds - 10) if r.ended]
    return jain(sum(cost(r.prompt, r.output) for r in steady if r.tenant == f"t{i}") for i in range(8))


def emergency(replicas: int, times: float, *, gateways: int = 1, workers: int = 1, seconds: float = 60) -> Seen:
    draw = Draw(1)
    asked = draw.stream("sos", 0.05 * CAPACITY * replicas, seconds, class_="emergency")
    for class_ in CLASSES[1:]:
        if times:
            asked += draw.stream(class_, times * CAPACITY * replicas / 3, seconds, class_=class_)
    World(replicas, gateways=gateways, workers=workers).run(asked, seconds)
    return seen(in_window(asked, 5, seconds - 5, "sos"))


def offered(load: float, *, plain: bool = False, gateways: int = 1, workers: int = 1, seconds: float = 100) -> float:
    """Goodput in requests per second of two engines, at so many times what they can carry."""
    draw = Draw(3)
    asked = [r for i in range(8) for r in draw.stream(f"t{i}", load * CAPACITY * 2 / 8, seconds)]
    World(2, plain=plain, gateways=gateways, workers=workers).run(asked, seconds)
    return goodput(asked, 10, seconds - 10)


def retries(
    background: float, burst: int, *, replicas: int = 1, gateways: int = 1, workers: int = 1, seed: int = 3
) -> tuple[int, float]:
    """How many were refused at first, and which part of them got in when they came back once; of each replica, as
    it is shipped."""
    shipped = admission_options(WorkerOptions(name="", snapshot_path="", control_socket=""))
    draw = Draw(seed)
    asked = []
    for i in range(4):
        asked += draw.stream(f"t{i}", background / 4 * CAPACITY * replicas, 120, obeys=True)
        asked += draw.stream(f"t{i}", burst / 5 / 4 * replicas, 5, start=20, obeys=True)
    World(replicas, gateways=gateways, workers=workers, options=shipped, seed=seed).run(asked, 200)
    back = [r for r in asked if r.refused_first]
    return len(back), sum(r.first > 0 for r in back) / max(1, len(back))


def long_prompts(
    replicas: int,
    *,
    flood: bool,
    options: AdmissionOptions | None = None,
    gateways: int = 1,
    workers: int = 1,
    seconds: float = 100,
) -> Seen:
    """Four tenants at 40 % load together; a fifth sends 8,000-token prompts at twice what prefill can do."""
    draw = Draw(2)
    asked = [r for i in range(4) for r in draw.stream(f"victim-{i}", 0.1 * CAPACITY * replicas, seconds)]
    if flood:
        arrivals = draw.arrivals(5 * replicas, seconds)
        asked += [Request(at, "long", 8000, 20, affinity=draw.random.getrandbits(60)) for at in arrivals]
    World(replicas, options=options, gateways=gateways, workers=workers).run(asked, seconds)
    return seen(in_window(asked, 10, seconds - 5, "victim"))


def ms(value: float) -> str:
    return f"{value * 1e3:.0f} ms"


def main() -> None:
    print("one flooding tenant beside four victims: TTFT p99 solo, beside it, ratio; victims refused")
    for replicas, gateways, workers in ((1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 1, 3), (2, 2, 1), (4, 2, 1)):
        for load in (0.8, 0.9):
            for seed in (1, 2, 3):
                a, b = neighbours(replicas, gateways, workers=workers, seed=seed, load=load)
                print(
                    f"  {replicas} replicas, {gateways}x{workers} workers, load {load}, seed {seed}: {ms(a.ttft_p99)}, "
                    f"{ms(b.ttft_p99)}, {b.ttft_p99 / a.ttft_p99:.2f}; {b.refused:.1%} (solo {a.refused:.1%})"
                )
    for error in (1.0, 2.0, 0.5):
        each = ", ".join(
            f"{name} {equality(gateways, workers=workers, estimate_error=error):.4f}"
            for name, gateways, workers in (("one gateway", 1, 1), ("three workers", 1, 3), ("two gateways", 2, 1))
        )
        print(f"Jain's index of eight flooding tenants, outputs estimated at {error} of the truth: {each}")
    for replicas, gateways, workers in ((1, 1, 1), (2, 1, 1), (2, 1, 3), (2, 2, 1)):
        found = (emergency(replicas, times, gateways=gateways, workers=workers) for times in (0, 1, 10))
        print(
            f"emergency TTFT p50/p99, {replicas} replicas, {gateways}x{workers} workers, others at 0, 1, 10x:",
            ", ".join(f"{ms(s.ttft_p50)}/{ms(s.ttft_p99)} ({s.refused:.0%} refused)" for s in found),
        )
    for name, more in (
        ("admission", {}),
        ("three workers", {"workers": 3}),
        ("two gateways", {"gateways": 2}),
        ("plain engines", {"plain": True}),
    ):
        loads = {load: offered(load, **more) for load in (0.9, 1.0, 1.1, 1.3, 2.0, 3.0)}  # type: ignore[arg-type]
        best = max(loads.values())
        print(f"goodput, {name}:", ", ".join(f"{load}x {g:.1f}/s ({g / best:.2f})" for load, g in loads.items()))
    for background, burst in ((0.3, 300), (0.5, 300), (0.7, 200), (0.7, 250), (0.5, 1000)):
        for replicas, gateways, workers in ((1, 1, 1), (1, 1, 3), (2, 1, 1), (1, 2, 1), (2, 2, 1)):
            arranged = {"replicas": replicas, "gateways": gateways, "workers": workers}
            each = [retries(background, burst, seed=seed, **arranged) for seed in range(3, 9)]
            print(
                f"retry once as told, {replicas} replicas, {gateways}x{workers}, {background} and burst of {burst}:",
                ", ".join(f"{admitted:.1%} of {count}" for count, admitted in each),
            )
    for replicas, gateways, workers in ((1, 1, 1), (2, 1, 1), (2, 1, 3), (2, 2, 1)):
        no_cap = AdmissionOptions(prefill_seconds=1e6)
        found = [
            long_prompts(replicas, flood=False, gateways=gateways, workers=workers),
            long_prompts(replicas, flood=True, gateways=gateways, workers=workers),
            long_prompts(replicas, flood=True, gateways=gateways, workers=workers, options=no_cap),
        ]
        print(
            f"8k prompts, {replicas} replicas, {gateways}x{workers}: others' p50/p99 alone, beside, without cap:",
            ", ".join(f"{ms(s.ttft_p50)}/{ms(s.ttft_p99)}" for s in found),
        )


if __name__ == "__main__":
    main()

"""One load of a search, acted: the scenario at that load, the run, and the point that it makes."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from vitalis_load import result, runs, sweeping
from vitalis_load.arrivals import Constant, Poisson, Users
from vitalis_load.errors import LoadFailure
from vitalis_load.metrics import Verdict
from vitalis_load.result import Result, Sweep
from vitalis_load.scenario import Scenario
from vitalis_load.searching import Point, Step, Unit
from vitalis_load.shapes import Steady
from vitalis_load.sweeping import Bounds
from vitalis_load.target import Target

Progress = Callable[[str], None]


def unit_of(scenario: Scenario) -> Unit:
    """What its load is counted in. Raises LoadFailure where it has no single load that could be varied."""
    if isinstance(scenario.arrivals, Users):
        return "users"
    if isinstance(scenario.arrivals, Constant | Poisson) and not any(task.arrivals for task in scenario.tasks):
        return "requests/s"
    raise LoadFailure(
        f"scenario {scenario.name} has no single load to search over: it needs arrivals of kind users, constant or"
        " poisson for all of its tasks (short-chat, long-context and shared-prefix have)"
    )


def usual(scenario: Scenario) -> float:
    """The load that the scenario itself names."""
    arrivals = scenario.arrivals
    if isinstance(arrivals, Users):
        return float(arrivals.users)
    assert isinstance(arrivals, Constant | Poisson)
    return scenario.rate(arrivals)


def at(scenario: Scenario, load: float) -> Scenario:
    """The same at another load, which stays the same while it is measured."""
    arrivals = scenario.arrivals
    assert arrivals is not None
    other: dict[str, float] = {"users": round(load)} if isinstance(arrivals, Users) else {"rate": load}
    shape = Steady(seconds=scenario.measured_seconds)
    return scenario.model_copy(update={"arrivals": arrivals.model_copy(update=other), "shape": shape})


def measure(
    target: Target,
    scenario: Scenario,
    step: Step,
    *,
    out: Path,
    processes: int,
    scale: str,
    seed: int,
    progress: Progress,
    note: str = "",
) -> Point:
    """Runs the load and says what came of it. Raises LoadFailure as `runs.run` does."""
    folder = runs.run(
        target,
        at(scenario, step.load),
        out=out,
        repeats=step.repeats,
        processes=processes,
        scale=scale,
        seed=seed,
        progress=progress,
        note=note,
    )
    return point(result.load(folder), step.load, folder.name)


def point(made: Result, load: float, run: str) -> Point:
    """What a decision needs of a result. `run`: its folder, relative to the search's."""

    def figure(key: str) -> float | None:
        found = made.figures.get(key)
        return None if found is None else found.median

    def milliseconds(key: str) -> float | None:
        found = figure(key)
        return None if found is None else found * 1e3

    goodput = made.figures.get("goodput")
    return Point(
        load=load,
        offered_per_second=statistics.median(repeat.summary.offered_per_second for repeat in made.repeats),
        requests_per_second=figure("requests_per_second") or 0.0,
        tokens_per_second=figure("output_tokens_per_second") or 0.0,
        goodput=goodput.median if goodput else 0.0,
        good_share=figure("good_share") or 0.0,
        failed_share=figure("failed_share") or 0.0,
        ttft_p50_ms=milliseconds("ttft_p50"),
        ttft_p99_ms=milliseconds("ttft_p99"),
        tpot_p50_ms=milliseconds("tpot_p50"),
        tpot_p99_ms=milliseconds("tpot_p99"),
        e2e_p50_ms=milliseconds("e2e_p50"),
        e2e_p99_ms=milliseconds("e2e_p99"),
        slo_met=made.met,
        missed=[_missed(verdict) for verdict in made.verdicts if not verdict.ok],
        partial="; ".join(reason.rstrip(".") for reason in made.partial_reasons),
        client_bound="; ".join(reason.rstrip(".") for reason in made.honesty.reasons)
        if made.honesty.client_bound
        else "",
        spread=(goodput.max - goodput.min) / goodput.median if goodput and goodput.median else 0.0,
        repeats=len(made.repeats),
        requests=sum(repeat.summary.requests for repeat in made.repeats),
        run=run,
    )


def line(found: Point, unit: Unit) -> str:
    """One measured load, for a person."""
    ttft = "" if found.ttft_p99_ms is None else f", TTFT p99 {found.ttft_p99_ms:.0f} ms"
    tpot = "" if found.tpot_p99_ms is None else f", TPOT p99 {found.tpot_p99_ms:.1f} ms"
    failed = f", {found.failed_share:.1%} failed" if found.failed_share else ""
    missed = f"; missed: {', '.join(found.missed)}" if found.missed else ""
    bound = f"; client-bound: {found.client_bound}" if found.client_bound else ""
    bound += f"; partial: {found.partial}" if found.partial else ""
    return (
        f"{sweeping.show(found.load, unit)}: {found.tokens_per_second:.0f} output tokens/s,"
        f" {found.goodput:.3g} good requests/s{ttft}{tpot}{failed}{missed}{bound}"
    )


def curve(
    folder: Path,
    points: Sequence[Point],
    bounds: Bounds,
    *,
    identity: str,
    label: str,
    notes: Sequence[str] = (),
    partial: str = "",
    searched: bool = True,
) -> Sweep | None:
    """All that was measured as one curve, from the runs' own results. None where nothing was. `searched`: False where
    the loads were given, and nothing follows from where they end."""
    known = sweeping.latest(points)
    if not known:
        return None
    results = [result.load(folder / each.run) for each in known]
    found = sweeping.findings(points, bounds)
    return Sweep(
        id=identity,
        label=label,
        unit=bounds.unit,
        run=results[0].run,
        slo=results[0].slo,
        points=[result.point(each.load, made, run=each.run) for each, made in zip(known, results, strict=True)],
        saturation=found.saturation.load if found.saturation and found.saturated and searched else None,
        best=found.best.load if found.best and searched else None,
        conclusions=[*([found.said] if searched else []), *notes],
        partial=bool(partial),
        partial_reasons=[partial] if partial else [],
    )


def as_point(entry: object) -> Point:
    """Of a journal."""
    return msgspec.convert(entry, Point)


_UNITS = {"_ms": " ms", "share": "", "goodput": " requests/s", "second": " tokens/s"}


def _missed(verdict: Verdict) -> str:
    unit = next((unit for end, unit in _UNITS.items() if verdict.name.endswith(end)), "")
    words = verdict.name.removesuffix("_ms").replace("_", " ").replace("ttft", "TTFT").replace("tpot", "TPOT")
    whose = f"{verdict.task}: " if verdict.task else ""
    if verdict.why:
        return f"{whose}{words}: {verdict.why}"
    got = "none" if verdict.value is None else f"{verdict.value:.4g}{unit}"
    return f"{whose}{words} {got}, not {verdict.limit:.4g}{unit}"

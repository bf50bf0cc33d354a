"""Two results of the same load side by side: what differs by more than the same thing differs from itself.

Figures are compared by their means over the repeats: durations and rates by geometric ones, as noise is a share of
them, shares by plain ones. What counts as a difference is Student's interval for it at CONFIDENCE, of the variance
that both runs' repeats have together, and never less than the figure's own least (figures.Figure). Single repeats
tell nothing of noise: then it is taken to be ALONE of the figure, in tails TAIL_ALONE.
"""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import msgspec

from vitalis_load.errors import LoadFailure
from vitalis_load.estimates import Estimate, t_quantile
from vitalis_load.figures import FIGURES, Figure, Unit
from vitalis_load.result import Result

CONFIDENCE: Final = 0.99  # that two runs of the same server are not called different in a figure
ALONE: Final = 0.10
TAIL_ALONE: Final = 0.25
# What of a scenario may differ without its load being another: what it says of itself, what is asked of the server,
# how often it was run, and what only follows from the rest.
ASIDE: Final = ("about", "repeats", "slo", "expected")
_NEEDS_SLO: Final = ("goodput", "good_share")

Verdict = Literal["better", "worse", "same", ""]


class Difference(msgspec.Struct, kw_only=True):
    """One figure of both. `verdict` is of the second run, "" where none is given."""

    key: str
    title: str
    unit: Unit
    a: float  # means over the repeats
    b: float
    change: float | None  # b / a - 1; None for shares, and where one is 0
    noise: float  # the least difference upwards that would count, in the figure's unit
    verdict: Verdict
    judged: bool

    @property
    def said(self) -> str:
        """By how much the second differs, in words: in per cent, of shares in points of them."""
        return self._said(self.b - self.a, "+")

    @property
    def noise_said(self) -> str:
        return "±" + self._said(self.noise, "")

    def _said(self, gap: float, sign: str) -> str:
        if self.unit == "share":
            return f"{100 * gap:{sign}.2f} points"
        if self.change is None:
            return f"{gap:{sign}.3g}"
        share = gap / self.a
        return f"{share:{sign}.1%}" if share < 1 else f"×{1 + share:.3g}"


class Changed(msgspec.Struct):
    """Something that the runs do not have in common, as text; "" where one has no such thing."""

    what: str
    a: str
    b: str


class Comparison(msgspec.Struct, kw_only=True):
    schema: str = "vitalis-load-comparison/1"
    a: str  # ids of the runs
    b: str
    verdict: Literal["better", "worse", "mixed", "no difference"]
    sentences: list[str]  # what was found
    caveats: list[str]  # what stands in the way of believing it
    differences: list[Difference]
    changed: list[Changed]
    load_differs: bool

    @property
    def worse(self) -> bool:
        """Whether any judged figure of the second run is worse beyond noise."""
        return any(difference.verdict == "worse" for difference in self.differences)


def compare(a: Result, b: Result, *, anyway: bool = False) -> Comparison:
    """Of `b` against `a`. Raises LoadFailure where they were asked different things, unless `anyway`."""
    load = list(load_changes(a, b))
    if load and not anyway:
        told = "; ".join(f"{change.what}: {change.a or 'none'} against {change.b or 'none'}" for change in load[:5])
        more = f" and {len(load) - 5} more" if len(load) > 5 else ""
        raise LoadFailure(
            f"{a.run.id} and {b.run.id} were asked different things ({told}{more}), so their figures say nothing about "
            "the server: run the same scenario in the same scale twice, or give --anyway to see them side by side"
        )
    same_slo = a.slo == b.slo
    keys = [key for key in FIGURES if key in a.figures and key in b.figures]
    judged = [key for key in keys if FIGURES[key].judged and (same_slo or key not in _NEEDS_SLO)]
    differences = [_difference(FIGURES[key], a, b, key in judged) for key in keys]
    caveats = list(_caveats(a, b, same_slo))
    if load:
        caveats.insert(0, "Both were asked different things: what differs may be the load and not the server.")
    better = [difference for difference in differences if difference.verdict == "better"]
    worse = [difference for difference in differences if difference.verdict == "worse"]
    return Comparison(
        a=a.run.id,
        b=b.run.id,
        verdict="mixed" if better and worse else "better" if better else "worse" if worse else "no difference",
        sentences=list(_sentences(better, worse, len(judged))),
        caveats=caveats,
        differences=differences,
        changed=[*load, *_other_changes(a, b)],
        load_differs=bool(load),
    )


def load_changes(a: Result, b: Result) -> Iterator[Changed]:
    """What makes the load another one."""
    if a.run.scale != b.run.scale:
        yield Changed("scale", a.run.scale, b.run.scale)
    yield from _changes(_load(a), _load(b), "scenario.")


def _load(result: Result) -> dict[str, Any]:
    asked = {name: value for name, value in result.run.scenario.items() if name not in ASIDE}
    files = (result.run.scenario.get("expected") or {}).get("files")
    return asked if files is None else _without_paths(asked) | {"files": files}


def _without_paths(value: Any) -> Any:
    """A file is what is in it, wherever it lies."""
    if isinstance(value, Mapping):
        return {name: _without_paths(inner) for name, inner in value.items() if name != "path"}
    return [_without_paths(inner) for inner in value] if isinstance(value, list) else value


def _other_changes(a: Result, b: Result) -> Iterator[Changed]:
    names = ("commit", "model", "url", "processes", "versions", "machine", "target")
    for name in names:
        yield from _changes({name: getattr(a.run, name)}, {name: getattr(b.run, name)}, "")
    yield from _changes(
        {"slo": msgspec.to_builtins(a.slo)}, {"slo": msgspec.to_builtins(b.slo)}, ""
    )  # None is no limit, on both sides


def _changes(a: Mapping[str, Any], b: Mapping[str, Any], before: str) -> Iterator[Changed]:
    left, right = dict(_flat(a, before)), dict(_flat(b, before))
    for what in dict.fromkeys((*left, *right)):
        if left.get(what, "") != right.get(what, ""):
            yield Changed(what, left.get(what, ""), right.get(what, ""))


def _flat(values: Any, before: str) -> Iterator[tuple[str, str]]:
    """Every leaf by its path."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _flat(value, f"{before}{name}.")
    elif isinstance(values, (list, tuple)):
        for place, value in enumerate(values):
            yield from _flat(value, f"{before}{place}.")
    elif values is not None:
        yield before.rstrip("."), str(values)


def _difference(figure: Figure, a: Result, b: Result, judge: bool) -> Difference:
    first, second = a.figures[figure.key], b.figures[figure.key]
    ratio = figure.unit != "share" and min(*first.values, *second.values) > 0
    left, right, noise = _ratio(figure, first, second) if ratio else _plain(figure, first, second, a, b)
    gap = right - left
    verdict: Verdict = ""
    if judge:
        improved = gap < 0 if figure.better == "less" else gap > 0
        verdict = "same" if -_down(left, noise, ratio) <= gap <= noise else "better" if improved else "worse"
    return Difference(
        key=figure.key,
        title=figure.title,
        unit=figure.unit,
        a=left,
        b=right,
        change=gap / left if ratio else None,
        noise=noise,
        verdict=verdict,
        judged=judge,
    )


def _down(left: float, noise: float, ratio: bool) -> float:
    """How far down noise reaches that reaches up by `noise`: half is as far from the whole as double."""
    return left - left * left / (left + noise) if ratio and left > 0 else noise


def _ratio(figure: Figure, a: Estimate, b: Estimate) -> tuple[float, float, float]:
    """Both geometric means, and the noise above the first."""
    logs = [[math.log(value) for value in of.values] for of in (a, b)]
    left, right = (math.exp(statistics.fmean(each)) for each in logs)
    half = _interval(logs)
    if half is None:
        tail = figure.key.endswith(("_p99", "_p99_9", "_max"))
        half = math.log1p(TAIL_ALONE if tail else ALONE)
    return left, right, max(figure.least, figure.least_share * left, left * math.expm1(min(half, 20.0)))


def _plain(figure: Figure, first: Estimate, second: Estimate, a: Result, b: Result) -> tuple[float, float, float]:
    """Both means, and the noise; of shares at least what chance makes of so many requests."""
    half = _interval([first.values, second.values])
    if half is None:
        half = ALONE * abs(first.mean) if figure.unit != "share" else 0.0
    counts = [sum(result.figures["requests"].values) if "requests" in result.figures else 0.0 for result in (a, b)]
    if figure.unit == "share" and all(counts):
        whole = (first.mean * counts[0] + second.mean * counts[1]) / sum(counts)
        deviation = math.sqrt(max(0.0, whole * (1 - whole)) * (1 / counts[0] + 1 / counts[1]))
        half = max(half, t_quantile((1 + CONFIDENCE) / 2, max(1.0, sum(counts) - 2)) * deviation)
    return first.mean, second.mean, max(figure.least, figure.least_share * abs(first.mean), half)


def _interval(of: list[list[float]]) -> float | None:
    """Half the interval of the difference between the means of two samples; None where both are single."""
    freedom = sum(len(values) - 1 for values in of)
    if not freedom:
        return None
    squares = sum(sum((value - statistics.fmean(values)) ** 2 for value in values) for values in of)
    deviation = math.sqrt(squares / freedom * sum(1 / len(values) for values in of))
    return t_quantile((1 + CONFIDENCE) / 2, freedom) * deviation


def _caveats(a: Result, b: Result, same_slo: bool) -> Iterator[str]:
    for result in (a, b):
        if result.honesty.client_bound:
            yield f"{result.run.id} was client-bound: its figures say more about the load generator than the server."
        if result.partial:
            yield f"{result.run.id} is partial: {'; '.join(result.partial_reasons)}."
    if len(a.repeats) == len(b.repeats) == 1:
        yield (
            f"Both have one repeat, so noise is not known: differences below {ALONE:.0%} ({TAIL_ALONE:.0%} in tails) "
            "are not called any."
        )
    elif len(a.repeats) + len(b.repeats) < 6:
        yield "With fewer than three repeats each, only large differences can be told from noise."
    if not same_slo:
        yield "The SLOs differ, so goodput is not judged."
    drift = [a.figures.get("output_length"), b.figures.get("output_length")]
    if drift[0] and drift[1] and drift[0].mean and abs(drift[1].mean / drift[0].mean - 1) > 0.05:
        yield (
            f"Answers were {drift[1].mean / drift[0].mean - 1:+.0%} long in {b.run.id}: E2E and tokens/s change with "
            "their length, TTFT and TPOT hardly."
        )
    if a.run.target.get("seed") != b.run.target.get("seed"):
        yield "Their seeds differ, and so do times and lengths of requests: noise between repeats has none of that."
    if a.run.machine != b.run.machine:
        yield "The load generators ran on different machines."


def _sentences(better: list[Difference], worse: list[Difference], judged: int) -> Iterator[str]:
    for word, found in (("worse", worse), ("better", better)):
        if found:
            told = ", ".join(f"{each.title} {each.said}" for each in found)
            yield f"{word.capitalize()} beyond noise: {told}."
    if not better and not worse:
        yield f"None of the {judged} judged figures differs by more than the noise between repeats."

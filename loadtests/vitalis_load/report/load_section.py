"""Throughput against latency within one run."""

from collections.abc import Iterator

from vitalis_load.figures import FIGURES
from vitalis_load.report import numbers
from vitalis_load.report.curves import Curve, Spot, against
from vitalis_load.result import RepeatResult, Result

GROUP_SECONDS = 2.0  # a faint dot's, at least


def load_against_latency(result: Result) -> str:
    slo = result.slo
    plots = [
        _plot(result, "First token", "ttft", ("TTFT p50", "TTFT p99"), slo.ttft_p99_ms or slo.ttft_ms),
        _plot(result, "Each token after it", "tpot", ("TPOT p50", "TPOT p99"), slo.tpot_p99_ms or slo.tpot_ms),
    ]
    joined = "".join(plots)
    return f'<div class="plots wide">{joined}</div>' if joined else ""


def _plot(result: Result, title: str, name: str, names: tuple[str, str], limit_ms: float | None) -> str:
    curves = []
    for tone, (part, label) in enumerate(zip(("p50", "p99"), names, strict=True), 1):
        spots = [spot for repeat in result.repeats for spot in _moments(repeat, name, part)]
        spots += _repeats(result, f"{name}_{part}")
        if spots:
            curves.append(Curve(name=label, spots=spots, tone=str(tone), joined=False))
    limit = limit_ms / 1000 if limit_ms else None
    return against(title, curves, across="output tokens/s", up=name.upper(), limit=limit)


def _moments(repeat: RepeatResult, name: str, part: str) -> Iterator[Spot]:
    """Seconds of the window, a few together, so that there are requests in each."""
    series = getattr(repeat.timeline, f"{name}_{part}", None)
    if series is None:
        return
    width = repeat.timeline.bin_seconds
    group = max(1, round(GROUP_SECONDS / width))
    first, last = int(repeat.window.start / width), int(repeat.window.end / width)
    for start in range(first, last - group + 1, group):
        tokens = [
            value for value in repeat.timeline.output_tokens_per_second[start : start + group] if value is not None
        ]
        waits = [value for value in series[start : start + group] if value is not None]
        if tokens and waits:
            x, y = sum(tokens) / len(tokens), (max(waits) if part == "p99" else sorted(waits)[len(waits) // 2])
            about = (
                f"repeat {repeat.number}, {start * width:.0f} s: {numbers.digits(x)} tokens/s, "
                f"{name.upper()} {part} {numbers.seconds(y)}"
            )
            if y > 0:
                yield Spot(x=(x, x, x), y=(y, y, y), about=about, kind="faint")


def _repeats(result: Result, key: str) -> Iterator[Spot]:
    tokens, waits = result.figures.get("output_tokens_per_second"), result.figures.get(key)
    if tokens is None or waits is None or len(tokens.values) != len(waits.values):
        return
    for number, (x, y) in enumerate(zip(tokens.values, waits.values, strict=True), 1):
        about = f"repeat {number}: {numbers.digits(x)} tokens/s, {FIGURES[key].title} {numbers.seconds(y)}"
        if y > 0:
            yield Spot(x=(x, x, x), y=(y, y, y), about=about)

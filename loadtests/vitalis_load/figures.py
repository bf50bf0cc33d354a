"""The figures that results, comparisons and pages speak of: what each is called, its unit, and which way is better."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec

from vitalis_load.estimates import Estimate, estimate
from vitalis_load.metrics import Summary

Unit = Literal["s", "1/s", "share", "tokens", "count"]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    title: str
    unit: Unit
    path: str  # in Summary, steps separated by dots
    better: Literal["less", "more", ""] = ""
    judged: bool = False  # whether `compare` gives a verdict on it
    # Differences below the larger of both are never called one, whatever the repeats say.
    least_share: float = 0.02
    least: float = 0.0


def _times() -> Iterable[Figure]:
    names = {
        "ttft": ("TTFT", "p50", "p99"),
        "ttfo": ("TTFO",),
        "tpot": ("TPOT", "p50", "p99"),
        "gaps": ("gap between chunks", "p99"),
        "e2e": ("E2E", "p50", "p99"),
        "ttft_queued": ("TTFT from schedule",),
        "e2e_queued": ("E2E from schedule",),
        "schedule_delay": ("schedule delay",),
    }
    for name, (title, *judged) in names.items():
        for part in ("p50", "p90", "p95", "p99", "p99_9", "min", "max", "mean"):
            yield Figure(
                key=f"{name}_{part}",
                title=f"{title} {part.replace('_', '.')}",
                unit="s",
                path=f"{name}.{part}",
                better="less",
                judged=part in judged,
                least=0.0001 if name == "tpot" else 0.001,
            )


FIGURES: Final[Mapping[str, Figure]] = {
    figure.key: figure
    for figure in (
        Figure(
            key="output_tokens_per_second",
            title="output tokens/s",
            unit="1/s",
            path="output_tokens_per_second",
            better="more",
            judged=True,
        ),
        Figure(
            key="output_tokens_per_second_whole",
            title="output tokens/s, begin to end",
            unit="1/s",
            path="output_tokens_per_second_whole",
            better="more",
        ),
        Figure(
            key="total_tokens_per_second",
            title="prompt and output tokens/s",
            unit="1/s",
            path="total_tokens_per_second",
            better="more",
        ),
        Figure(
            key="tokens_per_second_per_user",
            title="tokens/s of one user",
            unit="1/s",
            path="tokens_per_second_per_user",
            better="more",
        ),
        Figure(key="requests_per_second", title="requests/s", unit="1/s", path="requests_per_second", better="more"),
        Figure(key="goodput", title="good requests/s", unit="1/s", path="goodput", better="more", judged=True),
        Figure(
            key="good_share", title="good of all", unit="share", path="good_share", better="more", judged=True,
            least_share=0, least=0.002,
        ),
        Figure(
            key="failed_share", title="failed of all", unit="share", path="failed_share", better="less", judged=True,
            least_share=0, least=0.002,
        ),
        *_times(),
        Figure(key="requests", title="requests", unit="count", path="requests"),
        Figure(key="output_length", title="output tokens of a request", unit="tokens", path="output_tokens.mean"),
        Figure(key="cached_share", title="prompt tokens from the prefix cache", unit="share", path="cached_share"),
        Figure(key="reasoning_share", title="output tokens that were reasoning", unit="share", path="reasoning_share"),
    )
}  # fmt: skip


def value(summary: Summary, figure: Figure) -> float | None:
    """What the summary says; None where it has no such figure."""
    found: Any = summary
    for step in figure.path.split("."):
        found = getattr(found, step, None)
    return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None


def over_repeats(summaries: Iterable[Summary]) -> dict[str, Estimate]:
    """Each figure over the repeats, without those that nobody had."""
    known = list(summaries)
    found = {key: estimate(value(summary, figure) for summary in known) for key, figure in FIGURES.items()}
    return {key: over for key, over in found.items() if over is not None}

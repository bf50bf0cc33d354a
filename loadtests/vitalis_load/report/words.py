"""An SLO's limits in words."""

from vitalis_load.metrics import Verdict
from vitalis_load.report import numbers

# Slo's field -> what it is called, its unit (of figures.Unit) once in seconds, the figure that it bounds
LIMITS = {
    "ttft_p99_ms": ("TTFT p99", "s", "ttft_p99"),
    "tpot_p99_ms": ("TPOT p99", "s", "tpot_p99"),
    "e2e_p99_ms": ("E2E p99", "s", "e2e_p99"),
    "failed_share": ("failed of all", "share", "failed_share"),
    "min_goodput": ("good requests/s", "1/s", "goodput"),
    "min_tokens_per_second": ("output tokens/s", "1/s", "output_tokens_per_second"),
    "min_good_share": ("good of all", "share", "good_share"),
}


def limit_of(name: str) -> str:
    """The key of the figure that the limit `name` bounds."""
    return LIMITS[name][2] if name in LIMITS else name


def limit_title(name: str) -> str:
    """What the limit `name` is called; as it is where it is no limit of a Slo."""
    return LIMITS[name][0] if name in LIMITS else name


def limit_words(verdict: Verdict) -> tuple[str, str, str]:
    """What it is called, what was asked for, what was measured."""
    title, unit, _ = LIMITS.get(verdict.name, (verdict.name, "", ""))
    title = f"{verdict.task}: {title}" if verdict.task else title
    factor = 0.001 if verdict.name.endswith("_ms") else 1.0
    sign = "at least" if verdict.name.startswith("min_") else "at most"
    limit = f"{sign} {numbers.tick(verdict.limit * factor, unit)}"
    return title, limit, numbers.of(None if verdict.value is None else verdict.value * factor, unit)


def missed(verdict: Verdict) -> str:
    """A sentence about a limit that was not kept."""
    title, limit, value = limit_words(verdict)
    if verdict.why:
        return f"{title}: {verdict.why}."
    return f"{title} was {value}, {limit} was asked for." if verdict.value is not None else f"{title} was not measured."

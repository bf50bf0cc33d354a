"""A result as a few lines for a terminal."""

from vitalis_load import figures
from vitalis_load.report import numbers
from vitalis_load.result import Result

SHOWN = (
    "output_tokens_per_second", "requests_per_second", "goodput", "good_share", "failed_share", "ttft_p50", "ttft_p99",
    "ttfo_p50", "tpot_p50", "tpot_p99", "gaps_p99", "e2e_p50", "e2e_p99", "schedule_delay_p99",
)  # fmt: skip


def text(result: Result) -> str:
    """What must be known first, figures over the repeats, limits, failures."""
    lines = []
    if result.honesty.client_bound:
        lines.append("CLIENT-BOUND: these figures are the load generator's, not the server's")
        lines += [f"  - {reason}" for reason in result.honesty.reasons]
    if result.partial:
        lines += ["PARTIAL:", *(f"  - {reason}" for reason in result.partial_reasons)]
    rows = [("", "median", "least", "most")]
    for key in SHOWN:
        found = result.figures.get(key)
        if found is not None:
            unit = figures.FIGURES[key].unit
            values = (found.median, found.min, found.max)
            title = figures.FIGURES[key].title
            rows.append((title, *(numbers.of(value, unit) for value in values)))  # type: ignore[arg-type]
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    for verdict in result.verdicts:
        value = "nothing measured" if verdict.value is None else f"{_plain(verdict.value)}"
        name = f"{verdict.task}: {verdict.name}" if verdict.task else verdict.name
        why = f" ({verdict.why})" if verdict.why else ""
        lines.append(f"SLO {name} {_plain(verdict.limit)}: {value} {'ok' if verdict.ok else 'MISSED'}{why}")
    for failure in result.failures:
        lines.append(f"failed: {failure.error} x {failure.count} ({numbers.share(failure.share)}): {failure.detail}")
    lines += [f"note: {note}" for note in result.honesty.notes]
    return "\n".join(lines)


def _plain(value: float) -> str:
    """Without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

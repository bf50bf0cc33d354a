"""How TTFT, TPOT, gaps and E2E are spread."""

from html import escape

from vitalis_load.report import numbers
from vitalis_load.report.curves import at, histogram, tail
from vitalis_load.result import Result

SHOWN = (
    ("ttft", "TTFT", "from sending to the first token of any kind"),
    ("tpot", "TPOT", "the time of each further token of a request"),
    ("gaps", "Gaps between chunks", "what a reader waits; a chunk may hold several tokens"),
    ("e2e", "E2E", "from sending to the end of the answer"),
    ("ttfo", "TTFO", "from sending to the first token that is not reasoning"),
)
TOLD = (0.5, 0.9, 0.99, 0.999)


def distributions(result: Result) -> str:
    cards = []
    for name, title, about in SHOWN:
        whole = result.distributions.get(name)
        if whole is None or (name == "ttfo" and not _reasons(result)):
            continue
        limit_ms = _limit(result, name)
        limit = limit_ms / 1000 if limit_ms else None
        repeats = [repeat.distributions[name] for repeat in result.repeats if name in repeat.distributions]
        told = "".join(
            f'<span class="key">p{share * 100:g} <b>{numbers.seconds(at(whole, share))}</b></span>'
            for share in TOLD
            if whole.count >= 1 / (1 - share)
        )
        cards.append(
            f'<figure class="plot"><figcaption><h4 title="{escape(about)}">{escape(title)}</h4>'
            f'<span class="legend">{told}<span class="key">{whole.count:,} {"gaps" if name == "gaps" else "requests"}'
            f"</span></span></figcaption>{histogram(title, whole, limit)}{tail(title, whole, repeats, limit)}</figure>"
        )
    return f'<div class="plots">{"".join(cards)}</div>' if cards else ""


def _reasons(result: Result) -> bool:
    """Whether TTFO is another thing than TTFT."""
    first, output = result.distributions.get("ttft"), result.distributions.get("ttfo")
    return first is not None and output is not None and first.values != output.values


def _limit(result: Result, name: str) -> float | None:
    slo = result.slo
    return {
        "ttft": slo.ttft_p99_ms or slo.ttft_ms,
        "tpot": slo.tpot_p99_ms or slo.tpot_ms,
        "e2e": slo.e2e_p99_ms or slo.e2e_ms,
    }.get(name)

"""Who got what, what failed, and how long the answers were."""

import statistics
from collections.abc import Mapping
from html import escape

from vitalis_load.metrics import Part
from vitalis_load.report import numbers, shell
from vitalis_load.report.curves import bars
from vitalis_load.result import Result

MEANINGS = {
    "client": "the load generator had no socket for it",
    "connect": "no connection could be made in time",
    "reset": "the connection broke",
    "timeout": "no end within the request's deadline",
    "stream_error": "an error event inside a 200",
    "no_end": "a stream that just ended",
    "garbled": "bytes that are not the API's",
}


def failures(result: Result) -> str:
    shown = bars({failure.error: float(failure.count) for failure in result.failures}, "bad")
    rows = []
    for failure in result.failures:
        who = ", ".join(f"{name or 'key’s own'} {count:,}" for name, count in failure.tenants.items())
        retry = f" Retry-After {numbers.seconds(failure.retry_after)}." if failure.retry_after is not None else ""
        words = failure.detail or MEANINGS.get(failure.error, "")
        rows.append(
            (
                f"<b>{escape(failure.error.replace('http_', 'HTTP '))}</b>",
                shown[failure.error],
                f"{failure.count:,}",
                numbers.share(failure.share),
                escape(who),
                f'<span class="words">{escape(words + retry)}</span>',
            )
        )
    return shell.table(("how", "", "#count", "#of all", "tenants", "what the first one said"), rows)


def parts(result: Result) -> str:
    """Medians over the repeats, of whatever there are several of."""
    found = []
    for title, name in (("Tenants", "by_tenant"), ("Tasks", "by_task"), ("Classes", "by_klass")):
        by: list[Mapping[str, Part]] = [getattr(repeat.summary, name) for repeat in result.repeats]
        keys = list(dict.fromkeys(key for each in by for key in each))
        if len(keys) > 1 or (name == "by_tenant" and keys and keys != [""]):
            found.append(f"<h3>{title}</h3>{_part_table(keys, by)}")
    return "".join(found)


def _part_table(keys: list[str], by: list[Mapping[str, Part]]) -> str:
    rates = {key: _median([each[key].output_tokens_per_second for each in by if key in each]) or 0.0 for key in keys}
    shown = bars(rates)
    rows = []
    for key in keys:
        had = [each[key] for each in by if key in each]
        times = []
        for name, part in (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50"), ("tpot", "p99"), ("e2e", "p99")):
            spreads = [getattr(each, name) for each in had]
            times.append(numbers.seconds(_median([getattr(spread, part) for spread in spreads if spread is not None])))
        failed = _median([each.failed_share for each in had if each.failed_share is not None])
        rows.append(
            (
                f"<b>{escape(key or 'key’s own')}</b>",
                f"{sum(each.requests for each in had):,}",
                shown[key],
                numbers.digits(rates[key]),
                numbers.share(_median([each.good_share for each in had if each.good_share is not None])),
                f'<span class="lost">{numbers.share(failed)}</span>' if failed else numbers.share(failed),
                *times,
            )
        )
    heads = (
        "", "#requests", "", "#output tokens/s", "#good", "#failed", "#TTFT p50", "#p99", "#TPOT p50", "#p99",
        "#E2E p99",
    )  # fmt: skip
    return shell.table(heads, rows)


def lengths(result: Result) -> str:
    rows = []
    for title, name in (
        ("prompt", "prompt_tokens"),
        ("answer, as asked for", "wanted_tokens"),
        ("answer", "output_tokens"),
    ):
        had = [lengths for repeat in result.repeats if (lengths := getattr(repeat.summary, name)) is not None]
        if had:
            rows.append(
                (
                    escape(title),
                    *(
                        numbers.of(_median([getattr(each, part) for each in had]), "tokens")
                        for part in ("mean", "p50", "p95")
                    ),
                    f"{sum(each.count for each in had):,}",
                )
            )
    summaries = [repeat.summary for repeat in result.repeats]
    shares = [
        (
            "longer or shorter than asked for",
            _median([s.output_drift for s in summaries if s.output_drift is not None]),
        ),
        ("prompt from the prefix cache", _median([s.cached_share for s in summaries if s.cached_share is not None])),
        ("answer that was reasoning", _median([s.reasoning_share for s in summaries if s.reasoning_share is not None])),
    ]
    told = [
        (name, f"{'+' if name[0] == 'l' and value > 0 else ''}{numbers.share(value)}")
        for name, value in shares
        if value is not None
    ]
    chunks = _median([s.tokens_per_chunk for s in summaries if s.tokens_per_chunk is not None])
    if chunks is not None:
        told.append(("tokens in a chunk", numbers.digits(chunks)))
    finishes: dict[str, int] = {}
    for summary in summaries:
        for finish, count in summary.finishes.items():
            finishes[finish or "none told"] = finishes.get(finish or "none told", 0) + count
    told.append(("finish reasons", ", ".join(f"{finish} {count:,}" for finish, count in finishes.items())))
    table = shell.table(("", "#mean", "#p50", "#p95", "#requests"), rows)
    return f'<div class="pair"><div>{table}</div><div>{shell.facts(told)}</div></div>' if rows else ""


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None

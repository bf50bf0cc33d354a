"""What Locust's own statistics show of a request: its usual row, and rows of TTFT, TTFO and TPOT beside it.

The rows beside it stay out of Locust's "Aggregated", which counts requests. `tokens` counts one for each token of
output, so that its requests/s are output tokens/s, and its times are TPOT.
"""

import re
import time
from typing import Any

import locust.stats

from vitalis_load import metrics
from vitalis_load.records import Record

_DIGITS = re.compile(r"[0-9a-f-]*\d[0-9a-f-]*")
MOST_CHARACTERS = 120


class Failed(Exception):
    """How a request failed, in Locust's list of failures."""


def finer_times() -> None:
    """Locust keeps times in whole milliseconds below 100; a TPOT of 3.4 ms would be 3."""
    locust.stats.bucket_response_time = _bucket


def _bucket(milliseconds: float) -> float:
    if milliseconds < 100:
        return round(milliseconds, 1)
    return round(milliseconds, -1 if milliseconds < 1000 else -2 if milliseconds < 10_000 else -3)


def show(environment: Any, record: Record) -> None:
    """Adds a request that ended; one that was cut short is in no row."""
    if record.unfinished:
        return
    name, tokens = record.task, record.completion_tokens or 0
    environment.events.request.fire(
        request_type=record.api,
        name=name,
        response_time=(record.ended - record.sent) * 1000,
        response_length=tokens,
        exception=Failed(_words(record)) if record.error else None,
    )
    if record.error:
        return
    stats = environment.stats
    tpot = metrics.tpot(record)
    for kind, seconds in (("TTFT", metrics.ttft(record)), ("TTFO", metrics.ttfo(record)), ("TPOT", tpot)):
        if seconds is not None:
            stats.get(name, kind).log(seconds * 1000, tokens)
    if tokens:
        _add_tokens(stats.get(name, "tokens"), tokens, (tpot or 0.0) * 1000)


def _add_tokens(entry: Any, tokens: int, milliseconds: float) -> None:
    """As if `log` had been called for each token."""
    entry.log(milliseconds, 0)
    more = tokens - 1
    entry.num_requests += more
    entry.total_response_time += milliseconds * more
    entry.response_times[_bucket(milliseconds)] += more
    entry.num_reqs_per_sec[int(time.time())] += more


def _words(record: Record) -> str:
    """The same for the same trouble: without the numbers that make each of them its own."""
    detail = _DIGITS.sub("#", record.detail)
    return f"{record.error}: {detail}"[:MOST_CHARACTERS] if detail else record.error

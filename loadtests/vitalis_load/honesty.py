"""Whether a run says something about the server, or about the load generator that asked it."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from vitalis_load.metrics import Summary, Window
from vitalis_load.reading import RepeatData
from vitalis_load.records import Record
from vitalis_load.timelines import busiest, quantile

# A process above this share of a core reads late what came in time.
CPU_FULL: Final = 0.9
# ... and so does one whose greenlets wait longer than the larger of these: seconds, share of the median TTFT.
LAG_SECONDS: Final = 0.020
# What is sent later than the larger of these after its schedule was not asked when it should have been.
DELAY_SECONDS: Final = 0.010
SHARE_OF_TTFT: Final = 0.05
# A single bad second is forgiven, more than this share of them is not.
BAD_SECONDS: Final = 0.10
ACHIEVED: Final = 0.98  # of the requested rate
REQUESTS_FOR_P99: Final = 1000
_FIGURES: Final = re.compile(r"\d[\d.,e+-]*( ms| s)?")
DRIFT: Final = 0.10  # of the mean output length against what was asked for


class Honesty(msgspec.Struct, kw_only=True):
    """What the load generator did, and what follows. Seconds, requests per second, shares of 0 to 1."""

    client_bound: bool
    reasons: list[str]  # why, in sentences
    notes: list[str]  # what else must be known when the figures are read
    open_loop: bool  # requests came when they were due, not when earlier ones were answered
    requests: int
    requested_rate: float | None  # None for closed users, who ask for none
    achieved_rate: float
    delay_p50: float | None
    delay_p99: float | None
    cpu_median: float | None  # of a core, of each second's busiest process
    cpu_max: float | None
    cpu_full_share: float | None  # of the seconds
    lag_p99: float | None
    lag_max: float | None
    lag_bad_share: float | None
    events_per_second: float | None  # the most that one process read in a second
    processes: int


def judge(repeat: RepeatData, scenario: dict[str, Any], window: Window, summary: Summary) -> Honesty:
    """One repeat. `scenario` as in RunInfo."""
    inside = [record for record in repeat.records if window.holds(record.scheduled)]
    seconds = max(window.seconds, 1e-9)
    expected = scenario.get("expected") or {}
    open_loop = bool(expected.get("open"))
    sent = sum(1 for record in inside if record.sent < window.end)
    delay = summary.schedule_delay if open_loop else None
    client = [second for second in repeat.client if window.holds(second.at)]
    cpu = sorted(busiest(client).values())
    lags = sorted(second.loop_lag_ms / 1000 for second in client)
    typical = summary.ttft.p50 if summary.ttft else 0.0
    lag_limit = max(LAG_SECONDS, SHARE_OF_TTFT * typical)
    verdict = Honesty(
        client_bound=False,
        reasons=[],
        notes=[],
        open_loop=open_loop,
        requests=len(inside),
        requested_rate=_requested(len(inside) / seconds, expected, repeat) if open_loop else None,
        achieved_rate=sent / seconds,
        delay_p50=delay.p50 if delay else None,
        delay_p99=delay.p99 if delay else None,
        cpu_median=quantile(cpu, 0.5) if cpu else None,
        cpu_max=cpu[-1] if cpu else None,
        cpu_full_share=_bad(used > CPU_FULL for used in cpu),
        lag_p99=quantile(lags, 0.99) if lags else None,
        lag_max=lags[-1] if lags else None,
        lag_bad_share=_bad(lag > lag_limit for lag in lags),
        events_per_second=max((float(second.events) for second in client), default=None),
        processes=len({second.process for second in repeat.client}) or 1,
    )
    verdict.reasons = [
        *_reasons(verdict, typical, lag_limit),
        *_undue(verdict, expected, repeat, window),
        *_without_socket(inside),
    ]
    verdict.client_bound = bool(verdict.reasons)
    verdict.notes = list(_notes(verdict, summary, repeat))
    return verdict


def _requested(due: float, expected: dict[str, Any], repeat: RepeatData) -> float:
    """What a lost process should have sent was due to nobody who could write it down."""
    lost = repeat.end is not None and repeat.end.lost_processes
    return max(due, expected.get("mean_rate") or 0.0) if lost else due


def over(verdicts: Sequence[Honesty], numbers: Sequence[int]) -> Honesty:
    """A whole run: bound where one repeat was; its worst delays, CPU and lag."""
    first = verdicts[0]
    return Honesty(
        client_bound=any(verdict.client_bound for verdict in verdicts),
        reasons=_together([verdict.reasons for verdict in verdicts], numbers),
        notes=_together([verdict.notes for verdict in verdicts], numbers),
        open_loop=first.open_loop,
        requests=sum(verdict.requests for verdict in verdicts),
        requested_rate=_mean([verdict.requested_rate for verdict in verdicts]),
        achieved_rate=_mean([verdict.achieved_rate for verdict in verdicts]) or 0.0,
        delay_p50=_worst([verdict.delay_p50 for verdict in verdicts]),
        delay_p99=_worst([verdict.delay_p99 for verdict in verdicts]),
        cpu_median=_worst([verdict.cpu_median for verdict in verdicts]),
        cpu_max=_worst([verdict.cpu_max for verdict in verdicts]),
        cpu_full_share=_worst([verdict.cpu_full_share for verdict in verdicts]),
        lag_p99=_worst([verdict.lag_p99 for verdict in verdicts]),
        lag_max=_worst([verdict.lag_max for verdict in verdicts]),
        lag_bad_share=_worst([verdict.lag_bad_share for verdict in verdicts]),
        events_per_second=_worst([verdict.events_per_second for verdict in verdicts]),
        processes=max(verdict.processes for verdict in verdicts),
    )


def _reasons(verdict: Honesty, typical: float, lag_limit: float) -> Sequence[str]:
    found = []
    if verdict.cpu_full_share is not None and verdict.cpu_full_share > BAD_SECONDS:
        found.append(
            f"A process of the load generator used more than {CPU_FULL:.0%} of a core in {verdict.cpu_full_share:.0%} "
            "of the seconds: give it more processes (--processes) or less load."
        )
    delay_limit = max(DELAY_SECONDS, SHARE_OF_TTFT * typical)
    if verdict.delay_p99 is not None and verdict.delay_p99 > delay_limit:
        found.append(
            f"Requests were sent late: {_ms(verdict.delay_p99)} after their schedule at p99, "
            f"and {_ms(delay_limit)} would be borne."
        )
    if verdict.lag_bad_share is not None and verdict.lag_bad_share > BAD_SECONDS:
        starved = verdict.cpu_median is not None and verdict.cpu_median < CPU_FULL / 2
        found.append(
            f"What had come waited more than {_ms(lag_limit)} to be read in {verdict.lag_bad_share:.0%} of the seconds"
            + (": other programs held this machine's cores." if starved else ".")
        )
    if verdict.requested_rate and verdict.achieved_rate < ACHIEVED * verdict.requested_rate:
        found.append(
            f"{verdict.achieved_rate:.4g} of the {verdict.requested_rate:.4g} requests/s that were due were sent in it."
        )
    return found


def _undue(verdict: Honesty, expected: dict[str, Any], repeat: RepeatData, window: Window) -> Sequence[str]:
    """Whether requests that the scenario has were never so much as due: nobody got to them."""
    asked = expected.get("mean_rate")
    whole = repeat.end is not None and repeat.end.complete and [window.start, window.end] == expected.get("window")
    if not asked or not whole:
        return []
    count = asked * window.seconds
    # by chance, too, there are more of them or less
    if verdict.requests >= ACHIEVED * count - 4 * math.sqrt(count):
        return []
    came = verdict.requests / window.seconds
    return [f"The scenario asks for {asked:.4g} requests/s, and the load generator came to {came:.4g}."]


def _without_socket(records: Sequence[Record]) -> Sequence[str]:
    details = [record.detail for record in records if record.error == "client"]
    if not details:
        return []
    count, first = len(details), details[0]
    return [f"{count:,} requests never left this machine ({first}): allow more open files (ulimit -n), or less load."]


def _notes(verdict: Honesty, summary: Summary, repeat: RepeatData) -> Sequence[str]:
    found = []
    if not verdict.open_loop:
        found.append(
            "Closed users wait for their answers: a slow server is asked less, so its slow moments count less than "
            "they would with people who come when they come."
        )
    if 0 < verdict.requests < REQUESTS_FOR_P99:
        found.append(
            f"Fewer than {REQUESTS_FOR_P99:,} requests in a repeat: its p99 is a few of them, its p99.9 the slowest."
        )
    if not verdict.requests:
        found.append("No request was due in the measured window.")
    if summary.unfinished:
        found.append(f"Still going when it ended, and neither good nor failed: {summary.unfinished:,} requests.")
    if summary.uncounted:
        found.append(
            f"{summary.uncounted:,} answers told no usage: their tokens are in none of the figures, "
            "and tokens/s is too low by them."
        )
    found.extend(_drift(summary))
    if repeat.unread:
        found.append(f"Torn lines of the run's files that are left out: {repeat.unread:,}.")
    if repeat.end is not None and repeat.end.lost_processes:
        lost = ", ".join(map(str, repeat.end.lost_processes))
        found.append(f"Processes of the load generator that were lost on the way: {lost}.")
    return found


def _drift(summary: Summary) -> Sequence[str]:
    wanted, got, drift = summary.wanted_tokens, summary.output_tokens, summary.output_drift
    if wanted is None or got is None or drift is None or abs(drift) <= DRIFT:
        return []
    direction = "shorter" if drift < 0 else "longer"
    said = f"({got.mean:.4g} tokens on average, {wanted.mean:.4g} wanted)"
    return [f"Answers were {abs(drift):.0%} {direction} than asked for {said}: compare only with runs like it."]


def _together(said: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[str]:
    """What several repeats said, once; of sentences that differ in their figures only, the first."""
    found: dict[str, list[tuple[str, int]]] = {}
    for sentences, number in zip(said, numbers, strict=True):
        for sentence in sentences:
            found.setdefault(_FIGURES.sub("", sentence), []).append((sentence, number))
    result = []
    for same in found.values():
        (first, number), *others = same
        if len(same) == len(said) and all(sentence == first for sentence, _ in others):
            result.append(first)
            continue
        alike = f" (alike: {', '.join(str(other) for _, other in others)})" if others else ""
        result.append(f"Repeat {number}{alike}: {first}")
    return result


def _bad(seconds: Iterable[bool]) -> float | None:
    """The share of them that were bad, of which a single one does not count; None where there are none."""
    known = list(seconds)
    bad = sum(known)
    return (bad / len(known) if bad > 1 else 0.0) if known else None


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _worst(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    had = [value for value in values if value is not None]
    return math.fsum(had) / len(had) if had else None

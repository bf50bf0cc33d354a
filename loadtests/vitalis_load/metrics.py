"""Every metric's definition. Pure: of records, a window and limits; all durations in seconds.

TTFT   from `sent`, connection included, to the first chunk of any kind: reasoning, content or part of a tool call.
TTFO   the same to the first chunk of content or of a tool call.
E2E    from `sent` to the API's last event.
TPOT   (E2E - TTFT) / (completion tokens - 1), tokens from usage; of streamed answers of two tokens and more.
       Harmony's markers are tokens that nobody sees; those before the first chunk make TPOT a little too small.
queued The same from `scheduled`: what a request cost that was due then, however late its client was.
gap    Between two chunks of an answer. A chunk may hold several tokens: a gap is what a reader waits, no time a token.

Latencies are of requests that did not fail; the failed ones stay in the denominator of every share and of goodput.
What was still going when the run ended is neither good nor failed, and stays in the denominator as well.
"""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from vitalis_load.histograms import Histogram, rank
from vitalis_load.records import Record

PERCENTILES = (50, 90, 95, 99, 99.9)


class Window(msgspec.Struct, frozen=True):
    """From `start` to before `end`, in seconds since the repeat began. A request belongs to it by `scheduled`."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return max(0.0, self.end - self.start)

    def holds(self, moment: float) -> bool:
        return self.start <= moment < self.end


class Slo(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is asked for; None: not asked. `*_p99_ms` bound the run; `ttft_ms`, `tpot_ms` and `e2e_ms` bound each
    request that counts as good, and are the p99's bounds where they are not given."""

    ttft_p99_ms: float | None = None
    tpot_p99_ms: float | None = None
    e2e_p99_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    failed_share: float | None = None  # at most, 0 to 1
    min_goodput: float | None = None  # good requests/s
    min_tokens_per_second: float | None = None
    min_good_share: float | None = None  # 0 to 1


class Spread(msgspec.Struct):
    """How durations are spread, in seconds. Percentiles by nearest rank."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    max: float


class Lengths(msgspec.Struct):
    """How lengths in tokens are spread."""

    count: int
    mean: float
    p50: float
    p95: float


class Part(msgspec.Struct, kw_only=True):
    """What one tenant, task or class got within the window."""

    requests: int
    succeeded: int
    failed: int
    unfinished: int
    failures: dict[str, int]
    good: int
    goodput: float  # good requests/s
    good_share: float | None  # of all that were due; None where none was
    failed_share: float | None
    output_tokens_per_second: float
    ttft: Spread | None
    tpot: Spread | None
    e2e: Spread | None


# Of whom nothing was asked.
NOTHING = Part(
    requests=0, succeeded=0, failed=0, unfinished=0, failures={}, good=0, goodput=0.0, good_share=None,
    failed_share=None, output_tokens_per_second=0.0, ttft=None, tpot=None, e2e=None,
)  # fmt: skip


class Summary(Part, kw_only=True):
    """One repeat. Rates are those of the window; `*_whole` of everything from the first byte sent to the last read."""

    window: Window
    uncounted: int  # succeeded, and the server did not say how many tokens
    offered_per_second: float  # requests that were due
    requests_per_second: float  # that ended well within the window
    total_tokens_per_second: float  # prompts' tokens too
    whole_seconds: float
    output_tokens_per_second_whole: float
    total_tokens_per_second_whole: float
    requests_per_second_whole: float
    tokens_per_second_per_user: float | None  # 1 / median TPOT
    tokens_per_chunk: float | None
    ttfo: Spread | None
    gaps: Spread | None
    ttft_queued: Spread | None
    e2e_queued: Spread | None
    schedule_delay: Spread | None
    head: Spread | None  # from `sent` to the response's head
    prompt_tokens: Lengths | None
    output_tokens: Lengths | None
    wanted_tokens: Lengths | None
    output_drift: float | None  # tokens that came over tokens wanted, less 1
    cached_share: float | None  # of prompt tokens; None where no server said
    reasoning_share: float | None  # of completion tokens
    finishes: dict[str, int]
    by_tenant: dict[str, Part]
    by_task: dict[str, Part]
    by_klass: dict[str, Part]


class Verdict(msgspec.Struct):
    """Whether one limit of an SLO was kept. `name` is Slo's; `value` in its unit, None where there was nothing."""

    name: str
    limit: float
    value: float | None
    ok: bool
    task: str = ""  # whose limit it is; "" for the run's
    why: str = ""  # a clause where it is not `value` that broke it


# -- of one request


def ttft(record: Record) -> float | None:
    return None if record.first_token is None else record.first_token - record.sent


def ttfo(record: Record) -> float | None:
    return None if record.first_output is None else record.first_output - record.sent


def e2e(record: Record) -> float:
    return record.ended - record.sent


def tpot(record: Record) -> float | None:
    """None where it makes no sense: a plain answer, no usage, one token, no end."""
    tokens = record.completion_tokens
    if record.first_token is None or tokens is None or tokens < 2 or record.unfinished or record.error:
        return None
    return (record.ended - record.first_token) / (tokens - 1)


def ttft_queued(record: Record) -> float | None:
    return None if record.first_token is None else record.first_token - record.scheduled


def e2e_queued(record: Record) -> float:
    return record.ended - record.scheduled


def schedule_delay(record: Record) -> float:
    """How late its client sent it."""
    return max(0.0, record.sent - record.scheduled)


def failed(record: Record) -> bool:
    return bool(record.error) and not record.unfinished


def succeeded(record: Record) -> bool:
    return not record.error and not record.unfinished


def good(record: Record, slo: Slo | None) -> bool:
    """Whether it ended as its API says it must, within the limits of each request. What cannot be known was not
    kept: TPOT of a streamed answer without usage. A stream without a visible token had its first at its end."""
    if not succeeded(record):
        return False
    if slo is None:
        return True
    first = e2e(record) if record.first_token is None else record.first_token - record.sent
    for limit, value in (
        (_either(slo.e2e_ms, slo.e2e_p99_ms), e2e(record)),
        (_either(slo.ttft_ms, slo.ttft_p99_ms) if record.stream else None, first),
    ):
        if limit is not None and value * 1e3 > limit:
            return False
    limit = _either(slo.tpot_ms, slo.tpot_p99_ms)
    if limit is None or not record.stream:
        return True
    if record.completion_tokens is None:
        return False
    each = tpot(record)
    return each is None or each * 1e3 <= limit


def _either(own: float | None, other: float | None) -> float | None:
    return other if own is None else own


# -- of tokens in time


def tokens_between(records: Iterable[Record], window: Window) -> tuple[float, float]:
    """Prompt and completion tokens within the window. An answer's tokens are spread evenly between its first and its
    last, a prompt's between `sent` and the first; of a plain answer both over the whole of it. Only answers that
    ended well have been counted by their server."""
    prompt = completion = 0.0
    for record in records:
        if record.completion_tokens is None or not succeeded(record):
            continue
        first, last = _output_span(record)
        completion += record.completion_tokens * _overlap(first, last, window)
        if record.prompt_tokens:
            until = record.ended if record.first_token is None else record.first_token
            prompt += record.prompt_tokens * _overlap(record.sent, until, window)
    return prompt, completion


def output_timeline(records: Iterable[Record], end: float, step: float = 1.0) -> list[float]:
    """Output tokens/s in each `step` seconds from 0 to `end`, spread as `tokens_between` spreads them."""
    bins = [0.0] * max(0, int(-(-end // step)))
    for record in records:
        if not record.completion_tokens or not succeeded(record):
            continue
        first, last = _output_span(record)
        for index in range(max(0, int(first // step)), min(len(bins), int(last // step) + 1)):
            bins[index] += record.completion_tokens * _overlap(first, last, Window(index * step, (index + 1) * step))
    return [tokens / step for tokens in bins]


def _output_span(record: Record) -> tuple[float, float]:
    if record.first_token is None or record.last_token is None:
        return record.sent, record.ended
    return record.first_token, record.last_token


def _overlap(start: float, end: float, window: Window) -> float:
    """Which share of the time from start to end lies within the window."""
    if end <= start:
        return 1.0 if window.holds(start) else 0.0
    return max(0.0, min(end, window.end) - max(start, window.start)) / (end - start)


# -- of many


def spread(values: Iterable[float | None]) -> Spread | None:
    """None where there is no value."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    count = len(ordered)
    p50, p90, p95, p99, p99_9 = (ordered[rank(share, count) - 1] for share in PERCENTILES)
    return Spread(
        count, sum(ordered) / count, ordered[0], p50=p50, p90=p90, p95=p95, p99=p99, p99_9=p99_9, max=ordered[-1]
    )


def spread_of(histogram: Histogram | None) -> Spread | None:
    """Of durations that were added up."""
    if histogram is None or not histogram.count:
        return None
    p50, p90, p95, p99, p99_9 = histogram.percentiles(*PERCENTILES)
    return Spread(
        histogram.count, histogram.mean(), histogram.minimum(), p50=p50, p90=p90, p95=p95, p99=p99, p99_9=p99_9,
        max=histogram.maximum(),
    )  # fmt: skip


def lengths(values: Iterable[int | None]) -> Lengths | None:
    """None where there is no value."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    count = len(ordered)
    return Lengths(count, sum(ordered) / count, ordered[rank(50, count) - 1], ordered[rank(95, count) - 1])


def counted(values: Iterable[str]) -> dict[str, int]:
    """How often each came, the most frequent first."""
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def summarise(records: Sequence[Record], gaps: Histogram | None, window: Window, slo: Slo | None = None) -> Summary:
    """`records` are all of the repeat, warm-up and cool-down too: their tokens count where they fall into the window.
    `gaps` are those that ended within the window."""
    mine = [record for record in records if window.holds(record.scheduled)]
    well = [record for record in mine if succeeded(record)]
    all_well = [record for record in records if succeeded(record)]
    seen = [record for record in mine if not failed(record)]
    prompt, completion = tokens_between(records, window)
    whole = _whole(records)
    whole_prompt = sum(record.prompt_tokens or 0 for record in all_well)
    whole_completion = sum(record.completion_tokens or 0 for record in all_well)
    part = _part(mine, completion, window, slo)
    tpots = part.tpot
    streamed = [record for record in well if record.chunks and record.completion_tokens]
    ended = sum(window.holds(record.ended) for record in all_well)
    return Summary(
        **msgspec.structs.asdict(part),
        window=window,
        uncounted=sum(record.completion_tokens is None for record in well),
        offered_per_second=_rate(len(mine), window.seconds),
        requests_per_second=_rate(ended, window.seconds),
        total_tokens_per_second=_rate(prompt + completion, window.seconds),
        whole_seconds=whole,
        output_tokens_per_second_whole=_rate(whole_completion, whole),
        total_tokens_per_second_whole=_rate(whole_prompt + whole_completion, whole),
        requests_per_second_whole=_rate(len(all_well), whole),
        tokens_per_second_per_user=1 / tpots.p50 if tpots is not None and tpots.p50 > 0 else None,
        tokens_per_chunk=_share(sum(r.completion_tokens or 0 for r in streamed), sum(r.chunks for r in streamed)),
        ttfo=spread(map(ttfo, seen)),
        gaps=spread_of(gaps),
        ttft_queued=spread(map(ttft_queued, seen)),
        e2e_queued=spread(map(e2e_queued, well)),
        schedule_delay=spread(map(schedule_delay, mine)),
        head=spread(None if record.head is None else record.head - record.sent for record in seen),
        prompt_tokens=lengths(record.prompt_tokens for record in well),
        output_tokens=lengths(record.completion_tokens for record in well),
        wanted_tokens=lengths(record.wanted_tokens for record in well),
        output_drift=_drift(well),
        cached_share=_cached_share(well),
        reasoning_share=_reasoning_share(well),
        finishes=counted(record.finish for record in well),
        by_tenant=_parts(mine, records, window, slo, lambda record: record.tenant),
        by_task=_parts(mine, records, window, slo, lambda record: record.task),
        by_klass=_parts(mine, records, window, slo, lambda record: record.klass),
    )


def check(summary: Part, slo: Slo) -> list[Verdict]:
    """One verdict for each limit, of a whole run or of a part. Where nothing was measured, nothing was kept.

    A request that failed kept no limit, and a p99 leaves out one request in a hundred: where more failed, it is missed
    whatever those say that were answered, but for who has said with `failed_share` how many may fail.
    """
    failing = summary.failed_share or 0.0
    broken = failing > 0.01 and slo.failed_share is None
    why = f"{failing:.1%} of all failed, more than a p99 leaves out" if broken else ""

    def p99(of: Spread | None) -> float | None:
        return None if of is None else of.p99 * 1e3

    verdicts = []
    for name, limit, value in (
        ("ttft_p99_ms", slo.ttft_p99_ms, p99(summary.ttft)),
        ("tpot_p99_ms", slo.tpot_p99_ms, p99(summary.tpot)),
        ("e2e_p99_ms", slo.e2e_p99_ms, p99(summary.e2e)),
    ):
        if limit is not None:
            verdicts.append(Verdict(name, limit, value, value is not None and value <= limit and not why, why=why))
    if slo.failed_share is not None:
        share = summary.failed_share
        verdicts.append(
            Verdict("failed_share", slo.failed_share, share, share is not None and share <= slo.failed_share)
        )
    for name, limit, value in (
        ("min_goodput", slo.min_goodput, summary.goodput if summary.requests else None),
        ("min_tokens_per_second", slo.min_tokens_per_second, summary.output_tokens_per_second),
        ("min_good_share", slo.min_good_share, summary.good_share),
    ):
        if limit is not None:
            verdicts.append(Verdict(name, limit, value, value is not None and value >= limit))
    return verdicts


def _part(mine: Sequence[Record], completion: float, window: Window, slo: Slo | None) -> Part:
    well = [record for record in mine if succeeded(record)]
    bad = [record for record in mine if failed(record)]
    fine = sum(good(record, slo) for record in well)
    return Part(
        requests=len(mine),
        succeeded=len(well),
        failed=len(bad),
        unfinished=len(mine) - len(well) - len(bad),
        failures=counted(record.error for record in bad),
        good=fine,
        goodput=_rate(fine, window.seconds),
        good_share=_share(fine, len(mine)),
        failed_share=_share(len(bad), len(mine)),
        output_tokens_per_second=_rate(completion, window.seconds),
        # an answer that was still going had its first token: without it the slowest would be left out
        ttft=spread(ttft(record) for record in mine if not failed(record)),
        tpot=spread(map(tpot, well)),
        e2e=spread(map(e2e, well)),
    )


def _parts(
    mine: Sequence[Record], records: Sequence[Record], window: Window, slo: Slo | None, name: Callable[[Record], str]
) -> dict[str, Part]:
    """By whatever `name` says. Tokens come from all records, as in the whole."""
    groups: dict[str, tuple[list[Record], list[Record]]] = {}
    for record in mine:
        groups.setdefault(name(record), ([], []))[0].append(record)
    for record in records:
        if name(record) in groups:
            groups[name(record)][1].append(record)
    return {
        key: _part(own, tokens_between(every, window)[1], window, slo) for key, (own, every) in sorted(groups.items())
    }


def _whole(records: Sequence[Record]) -> float:
    if not records:
        return 0.0
    return max(record.ended for record in records) - min(record.sent for record in records)


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _drift(well: Iterable[Record]) -> float | None:
    came = wanted = 0
    for record in well:
        if record.completion_tokens is not None and record.wanted_tokens:
            came += record.completion_tokens
            wanted += record.wanted_tokens
    return came / wanted - 1 if wanted else None


def _cached_share(well: Sequence[Record]) -> float | None:
    """Some servers leave the detail out where nothing was cached: of an API that said it once, no word is zero."""
    telling = {record.api for record in well if record.cached_tokens is not None}
    told = [record for record in well if record.api in telling and record.prompt_tokens is not None]
    return _share(sum(r.cached_tokens or 0 for r in told), sum(r.prompt_tokens or 0 for r in told))


def _reasoning_share(well: Iterable[Record]) -> float | None:
    told = [record for record in well if record.reasoning_tokens is not None and record.completion_tokens]
    return _share(sum(r.reasoning_tokens or 0 for r in told), sum(r.completion_tokens or 0 for r in told))

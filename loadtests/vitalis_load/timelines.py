"""What happened when, in bins of whole seconds: loads, latencies and what the other side said of itself."""

import math
from collections.abc import Callable, Iterable, Iterator

import msgspec

from vitalis_load import metrics
from vitalis_load.reading import RepeatData
from vitalis_load.records import ClientSecond, EngineSample, Record, Sample

BINS = 400  # at most; a soak of hours gets wide ones
Series = list[float | None]


class EngineTimeline(msgspec.Struct, kw_only=True):
    """One engine, by its own metrics."""

    running: Series  # requests
    waiting: Series
    kv_usage: Series  # 0 to 1
    tokens_per_second: Series  # generated
    cache_hits: Series  # share of the prompt tokens looked up in the bin
    preemptions: Series  # per second


class GpuTimeline(msgspec.Struct, kw_only=True):
    utilisation: Series  # 0 to 1
    memory_bytes: Series
    power_watts: Series


class Timeline(msgspec.Struct, kw_only=True):
    """Bin i is the seconds from i * bin_seconds; every series has a value, or None where there is none, for each bin.

    What is counted from requests is so by when it happened, not by when it was scheduled.
    """

    bin_seconds: float
    bins: int
    scheduled: Series  # requests per second
    started: Series
    ended: Series  # as they must
    failed: Series
    in_flight: Series  # mean of the bin
    output_tokens_per_second: Series  # each request's spread evenly from its first to its last token
    ttft_p50: Series  # of requests scheduled in the bin
    ttft_p99: Series
    tpot_p50: Series
    delay_max: Series  # how late a request was sent
    client_cpu: Series  # of a core, the busiest process
    client_lag: Series  # seconds, the worst process
    gateway: dict[str, Series]  # by metric: gauges as they are, totals as a rate per second
    engines: dict[str, EngineTimeline]
    gpus: dict[str, GpuTimeline]


def timeline(repeat: RepeatData) -> Timeline:
    """The whole repeat, with its warm-up and cool-down."""
    seconds = max(repeat.last_moment, repeat.end.seconds if repeat.end else 0.0, 1.0)
    bins = _Bins(seconds)
    records = repeat.records
    finished = [record for record in records if not record.unfinished]
    return Timeline(
        bin_seconds=bins.width,
        bins=bins.count,
        scheduled=bins.rate(record.scheduled for record in records),
        started=bins.rate(record.sent for record in records),
        ended=bins.rate(record.ended for record in finished if not metrics.failed(record)),
        failed=bins.rate(record.ended for record in finished if metrics.failed(record)),
        in_flight=bins.mean((record.sent, record.ended, record.ended - record.sent) for record in records),
        output_tokens_per_second=bins.mean(_tokens(records)),
        ttft_p50=bins.pick(_timed(records, metrics.ttft), _middle),
        ttft_p99=bins.pick(_timed(records, metrics.ttft), _tail),
        tpot_p50=bins.pick(_timed(records, metrics.tpot), _middle),
        delay_max=bins.pick(_timed(records, metrics.schedule_delay), max),
        client_cpu=bins.pick(((float(at), cpu) for at, cpu in busiest(repeat.client).items()), _mean),
        client_lag=bins.pick(((float(second.at), second.loop_lag_ms / 1000) for second in repeat.client), max),
        gateway=_gateway(repeat.samples, bins),
        engines=_engines(repeat.samples, bins),
        gpus=_gpus(repeat.samples, bins),
    )


class _Bins:
    def __init__(self, seconds: float) -> None:
        self.width = float(max(1, math.ceil(seconds / BINS)))
        self.count = max(1, math.ceil(seconds / self.width))

    def of(self, moment: float) -> int:
        return min(self.count - 1, max(0, int(moment / self.width)))

    def rate(self, moments: Iterable[float]) -> Series:
        counts = [0] * self.count
        for moment in moments:
            counts[self.of(moment)] += 1
        return [short(count / self.width) for count in counts]

    def mean(self, spans: Iterable[tuple[float, float, float]]) -> Series:
        """Of (start, end, amount), each amount spread evenly over its span: how much comes to a second of each bin."""
        edges = [0.0] * self.count  # what falls into bins that a span covers in part
        steps = [0.0] * (self.count + 1)  # rates that begin and end, of the bins that it covers whole
        for start, end, amount in spans:
            first, last = self.of(start), self.of(end)
            if first == last or end <= start:
                edges[last] += amount
                continue
            rate = amount / (end - start)
            edges[first] += rate * ((first + 1) * self.width - start)
            edges[last] += rate * (end - last * self.width)
            steps[first + 1] += rate
            steps[last] -= rate
        result: Series = []
        whole = 0.0
        for edge, step in zip(edges, steps, strict=False):
            whole += step
            result.append(short(max(0.0, edge / self.width + whole)))
        return result

    def pick(self, points: Iterable[tuple[float, float]], choose: Callable[[list[float]], float]) -> Series:
        found: list[list[float]] = [[] for _ in range(self.count)]
        for moment, value in points:
            found[self.of(moment)].append(value)
        return [short(choose(values)) if values else None for values in found]

    def growth(self, points: Iterable[tuple[float, float]]) -> Series:
        """How fast a total rose, per second. One that falls was reset by a restart: it rose by what it is since."""
        spans = []
        before: tuple[float, float] | None = None
        for moment, value in points:
            if before is not None:
                spans.append((before[0], moment, value - before[1] if value >= before[1] else value))
            before = (moment, value)
        if not spans:
            return [None] * self.count
        known = range(self.of(spans[0][0]), self.of(spans[-1][1]) + 1)
        return [value if i in known else None for i, value in enumerate(self.mean(spans))]


def _tokens(records: Iterable[Record]) -> Iterable[tuple[float, float, float]]:
    for record in records:
        if record.completion_tokens and metrics.succeeded(record):
            start, end = record.first_token, record.last_token
            if start is None or end is None:
                start, end = record.sent, record.ended
            yield start, end, float(record.completion_tokens)


def _timed(records: Iterable[Record], measure: Callable[[Record], float | None]) -> Iterable[tuple[float, float]]:
    for record in records:
        value = measure(record)
        if value is not None:
            yield record.scheduled, value


def _gateway(samples: list[Sample], bins: _Bins) -> dict[str, Series]:
    result = {}
    for name in sorted({name for sample in samples for name in sample.gateway}):
        points = [(sample.at, sample.gateway[name]) for sample in samples if name in sample.gateway]
        if name.endswith(("_total", "_count", "_sum")):
            result[name] = bins.growth(points)
        elif not name.endswith("_bucket"):
            result[name] = bins.pick(points, _last)
    return result


def _engines(samples: list[Sample], bins: _Bins) -> dict[str, EngineTimeline]:
    result = {}
    for name in sorted({engine.name for sample in samples for engine in sample.engines}):
        seen = [(sample.at, engine) for sample in samples for engine in sample.engines if engine.name == name]

        def gauge(take: Callable[[EngineSample], float], seen: list[tuple[float, EngineSample]] = seen) -> Series:
            return bins.pick(((at, take(engine)) for at, engine in seen), _last)

        def growth(take: Callable[[EngineSample], float], seen: list[tuple[float, EngineSample]] = seen) -> Series:
            return bins.growth((at, take(engine)) for at, engine in seen)

        looked_up = growth(lambda engine: engine.cache_queries)
        hits = growth(lambda engine: engine.cache_hits)
        result[name] = EngineTimeline(
            running=gauge(lambda engine: engine.running),
            waiting=gauge(lambda engine: engine.waiting),
            kv_usage=gauge(lambda engine: engine.kv_usage),
            tokens_per_second=growth(lambda engine: engine.generation_tokens),
            cache_hits=[
                short(min(1.0, (hit or 0.0) / queries)) if queries else None
                for hit, queries in zip(hits, looked_up, strict=True)
            ],
            preemptions=growth(lambda engine: engine.preemptions),
        )
    return result


def _gpus(samples: list[Sample], bins: _Bins) -> dict[str, GpuTimeline]:
    result = {}
    for index in sorted({gpu.index for sample in samples for gpu in sample.gpus}):
        seen = [(sample.at, gpu) for sample in samples for gpu in sample.gpus if gpu.index == index]
        result[str(index)] = GpuTimeline(
            utilisation=bins.pick(_known((at, gpu.utilisation) for at, gpu in seen), _mean),
            memory_bytes=bins.pick(_known((at, gpu.memory_bytes) for at, gpu in seen), max),
            power_watts=bins.pick(_known((at, gpu.power_watts) for at, gpu in seen), _mean),
        )
    return result


def _known(values: Iterable[tuple[float, float | None]]) -> Iterator[tuple[float, float]]:
    return ((at, value) for at, value in values if value is not None)


def busiest(client: Iterable[ClientSecond]) -> dict[int, float]:
    """Second -> CPU of the process that used most."""
    result: dict[int, float] = {}
    for second in client:
        result[second.at] = max(result.get(second.at, 0.0), second.cpu)
    return result


def short(value: float) -> float:
    """Six digits: nothing is measured better, and a page carries thousands of them."""
    return float(f"{value:.6g}")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _last(values: list[float]) -> float:
    return values[-1]


def _middle(values: list[float]) -> float:
    return quantile(sorted(values), 0.5)


def _tail(values: list[float]) -> float:
    return quantile(sorted(values), 0.99)


def quantile(ordered: list[float], share: float) -> float:
    """Of sorted values: the smallest that at least that share of them do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]

"""What happened when: a panel for each repeat, chosen without JavaScript, all its drawings over the same seconds."""

from collections.abc import Callable, Iterator, Sequence

from vitalis_load.report import numbers
from vitalis_load.report.axes import around, reaching
from vitalis_load.report.plots import Series, Trace, over_time
from vitalis_load.result import RepeatResult, Result
from vitalis_load.timelines import EngineTimeline, Timeline

MOST_PANELS = 6  # page.css has as many
MOST_ENGINES = 6
TONES = ("1", "2", "3", "4", "5", "6")


def timelines(result: Result) -> str:
    repeats = result.repeats[:MOST_PANELS]
    choices = "".join(
        f'<input class="choice" type="radio" name="repeat" id="repeat-{repeat.number}" '
        f'aria-label="repeat {repeat.number}"{" checked" if not place else ""}>'
        for place, repeat in enumerate(repeats)
    )
    labels = "".join(f'<label for="repeat-{repeat.number}">repeat {repeat.number}</label>' for repeat in repeats)
    panels = "".join(
        f'<div class="panel"><div class="plots">{_panel(result, repeat)}</div></div>' for repeat in repeats
    )
    return f'{choices}<div class="choices">{labels if len(repeats) > 1 else ""}</div>{panels}'


def _panel(result: Result, repeat: RepeatResult) -> str:
    line = repeat.timeline
    frame = _Frame(line, (repeat.window.start, repeat.window.end))
    return "".join((*_client_side(result, line, frame), *_server_side(line, frame), *_own(line, frame)))


class _Frame:
    """What all drawings of a panel share."""

    def __init__(self, line: Timeline, cut: tuple[float, float]) -> None:
        self._width = line.bin_seconds
        self._seconds = line.bin_seconds * line.bins
        self._cut = cut

    def __call__(self, title: str, unit: str, traces: Sequence[Trace], **more: object) -> str:
        return over_time(
            title, traces, unit=unit, bin_seconds=self._width, seconds=self._seconds, cut=self._cut,
            **more,  # type: ignore[arg-type]
        )  # fmt: skip


def _client_side(result: Result, line: Timeline, frame: _Frame) -> Iterator[str]:
    yield frame(
        "Requests per second",
        "1/s",
        [
            Trace(name="due", values=line.scheduled, tone="6", dashed=True),
            Trace(name="answered", values=line.ended, tone="1"),
            *([Trace(name="failed", values=line.failed, tone="bad")] if any(line.failed) else []),
        ],
    )
    yield frame("In flight", "", [Trace(name="requests", values=line.in_flight, tone="1", area=True)])
    engines = list(line.engines.values())
    yield frame(
        "Output tokens per second",
        "1/s",
        [
            Trace(name="clients", values=line.output_tokens_per_second, tone="1", area=True),
            *([Trace(name="engines say", values=_sum(engines, "tokens_per_second"), tone="2")] if engines else []),
        ],
    )
    waits = [value for value in (*line.ttft_p50, *line.ttft_p99) if value]
    if waits:
        limit_ms = result.slo.ttft_p99_ms or result.slo.ttft_ms
        yield frame(
            "TTFT",
            "s",
            [Trace(name="p50", values=line.ttft_p50, tone="1"), Trace(name="p99", values=line.ttft_p99, tone="2")],
            log=around(reaching(waits, limit_ms / 1000 if limit_ms else None), 0, 1),
            limit=(limit_ms / 1000, f"SLO {numbers.tick(limit_ms / 1000, 's')}") if limit_ms else None,
        )
    yield frame("TPOT", "s", [Trace(name="p50", values=line.tpot_p50, tone="1")])


def _server_side(line: Timeline, frame: _Frame) -> Iterator[str]:
    flying, queued = line.gateway.get("vitalis_in_flight"), line.gateway.get("vitalis_queued")
    traces = []
    if flying:
        traces.append(Trace(name="with an engine", values=flying, tone="1", area=True))
    if queued:
        traces.append(Trace(name="queued", values=queued, tone="2", area=True))
    yield frame("Gateway", "", traces)
    if not line.engines:
        return
    engines = list(line.engines.values())
    yield frame(
        "Engines' requests",
        "",
        [
            Trace(name="running", values=_sum(engines, "running"), tone="1", area=True),
            Trace(name="waiting", values=_sum(engines, "waiting"), tone="2", area=True),
        ],
    )
    yield frame("KV cache used", "share", _each(line, lambda engine: engine.kv_usage), top=1.0)
    yield frame("Prefix cache hits", "share", _each(line, lambda engine: engine.cache_hits), top=1.0)
    if len(engines) > 1:
        yield frame("Running, by engine", "", _each(line, lambda engine: engine.running))
    stopped = _sum(engines, "preemptions")
    if any(stopped):
        yield frame("Preemptions per second", "1/s", [Trace(name="all engines", values=stopped, tone="bad")])


def _own(line: Timeline, frame: _Frame) -> Iterator[str]:
    if line.gpus:
        gpus = list(line.gpus.items())[:MOST_ENGINES]
        for title, unit, take, factor, top in (
            ("GPU use", "share", "utilisation", 1.0, 1.0),
            ("GPU memory, GiB", "GiB", "memory_bytes", 2.0**-30, None),
            ("GPU power, W", "W", "power_watts", 1.0, None),
        ):
            traces = []
            for tone, (index, gpu) in zip(TONES, gpus, strict=False):
                values = [None if value is None else value * factor for value in getattr(gpu, take)]
                traces.append(Trace(name=f"GPU {index}", values=values, tone=tone))
            if any(value is not None for trace in traces for value in trace.values):
                yield frame(title, unit, traces, top=top)
    yield frame(
        "Load generator's CPU", "share", [Trace(name="of a core, busiest process", values=line.client_cpu)], top=1.0
    )
    yield frame(
        "Load generator's delays",
        "s",
        [
            Trace(name="sent late, most", values=line.delay_max, tone="1"),
            Trace(name="loop lag, most", values=line.client_lag, tone="3"),
        ],
    )


def _each(line: Timeline, take: Callable[[EngineTimeline], Series]) -> list[Trace]:
    """A line for each engine, or their span where there are too many to tell apart."""
    engines = list(line.engines.items())
    if len(engines) <= MOST_ENGINES:
        return [
            Trace(name=name, values=take(engine), tone=tone)
            for tone, (name, engine) in zip(TONES, engines, strict=False)
        ]
    columns = [
        [value for value in bin_ if value is not None]
        for bin_ in zip(*(take(engine) for _, engine in engines), strict=True)
    ]
    return [
        Trace(name="highest", values=[max(column, default=None) for column in columns], tone="1"),
        Trace(name="lowest", values=[min(column, default=None) for column in columns], tone="3"),
    ]


def _sum(engines: Sequence[EngineTimeline], name: str) -> Series:
    columns = zip(*(getattr(engine, name) for engine in engines), strict=True)
    return [
        sum(value for value in column if value is not None) if any(value is not None for value in column) else None
        for column in columns
    ]

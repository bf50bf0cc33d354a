"""Loads that were tried, as curves of throughput against latency."""

from collections.abc import Iterator, Sequence
from html import escape

from vitalis_load.estimates import Estimate
from vitalis_load.figures import FIGURES
from vitalis_load.report import configuration, numbers, shell
from vitalis_load.report.curves import Curve, Spot, against
from vitalis_load.report.words import limit_title
from vitalis_load.result import Sweep, SweepPoint

COLUMNS = (
    "requests_per_second", "output_tokens_per_second", "goodput", "good_share", "failed_share", "ttft_p50", "ttft_p99",
    "tpot_p50", "tpot_p99", "e2e_p99",
)  # fmt: skip


def body(sweeps: Sequence[Sweep], title: str, evidence: Sequence[str]) -> Iterator[str]:
    first = sweeps[0]
    said = "".join(f'<p class="lead">{escape(words)}</p>' for words in evidence)
    yield (
        f"<header><h1>{escape(title)}</h1>"
        f'<div class="where"><span><b>{escape(first.run.model)}</b> at {escape(first.run.url)}</span>'
        f"<span>{escape(str(first.run.scenario.get('name', '')))} ({escape(first.run.scale)})</span></div>"
        f"{said}</header>"
    )
    yield '<nav><div><a href="#curves">Curves</a><a href="#points">Points</a><a href="#configuration">Configuration</a>'
    yield f"{shell.save(f'{first.id}.json')}</div></nav><main>"
    yield from _banners(sweeps)
    yield shell.section(
        "curves", "Throughput against latency", _curves(sweeps),
        "Each point is a load, with the span of its repeats. Hollow ones miss the SLO; the ringed one has the best "
        "goodput.",
    )  # fmt: skip
    yield shell.section("points", "Points", "".join(_points(sweep, len(sweeps) > 1) for sweep in sweeps))
    yield shell.section(
        "configuration", "Configuration and versions", "".join(_configuration(sweep) for sweep in sweeps)
    )
    yield f"</main><footer>{escape(configuration.made_by(first.run))}</footer>"


def _banners(sweeps: Sequence[Sweep]) -> Iterator[str]:
    for sweep in sweeps:
        of = f"{sweep.label}: " if len(sweeps) > 1 and sweep.label else ""
        if sweep.partial:
            yield shell.banner("warn", f"{of}this sweep is partial.", sweep.partial_reasons)
        bound = [point for point in sweep.points if point.client_bound]
        if bound:
            loads = ", ".join(f"{point.load:g}" for point in bound)
            yield shell.banner("warn", f"{of}the load generator was the bottleneck at {loads} {sweep.unit}.")
        if sweep.conclusions:
            kind = "good" if sweep.best is not None else "note"
            first, *rest = sweep.conclusions
            yield shell.banner(kind, of + first, rest)


def _curves(sweeps: Sequence[Sweep]) -> str:
    slo = sweeps[0].slo
    plots = []
    for title, key, limit_ms in (
        ("First token", "ttft_p99", slo.ttft_p99_ms or slo.ttft_ms),
        ("Each token after it", "tpot_p99", slo.tpot_p99_ms or slo.tpot_ms),
        ("First token, typical", "ttft_p50", None),
        ("Whole answer", "e2e_p99", slo.e2e_p99_ms or slo.e2e_ms),
    ):
        curves = [
            Curve(name=sweep.label or "measured", spots=list(_spots(sweep, key)), tone=str(place % 6 + 1))
            for place, sweep in enumerate(sweeps)
        ]
        limit = limit_ms / 1000 if limit_ms else None
        plots.append(against(title, curves, across="output tokens/s", up=FIGURES[key].title, limit=limit))
    plots.append(_by_load(sweeps, "Good requests per second", "goodput"))
    plots.append(_by_load(sweeps, "Output tokens per second", "output_tokens_per_second"))
    return f'<div class="plots wide">{"".join(plots)}</div>'


def _by_load(sweeps: Sequence[Sweep], title: str, key: str) -> str:
    curves = []
    for place, sweep in enumerate(sweeps):
        spots = [
            Spot(
                x=(point.load, point.load, point.load),
                y=_three(over),
                about=_about(point, sweep),
                kind=_kind(point, sweep),
            )
            for point in sweep.points
            if (over := point.figures.get(key)) is not None
        ]
        curves.append(Curve(name=sweep.label or "measured", spots=spots, tone=str(place % 6 + 1)))
    figure = FIGURES[key]
    return against(title, curves, across=sweeps[0].unit, up=figure.title, up_unit=figure.unit, log=False)


def _spots(sweep: Sweep, key: str) -> Iterator[Spot]:
    for point in sweep.points:
        tokens, waits = point.figures.get("output_tokens_per_second"), point.figures.get(key)
        if tokens is not None and waits is not None and waits.min > 0:
            yield Spot(
                x=_three(tokens),
                y=_three(waits),
                about=_about(point, sweep),
                mark=f"{point.load:g}",
                kind=_kind(point, sweep),
            )


def _kind(point: SweepPoint, sweep: Sweep) -> str:
    if sweep.best is not None and point.load == sweep.best:
        return "best"
    return "" if point.met else "missed"


def _three(over: Estimate) -> tuple[float, float, float]:
    return over.min, over.median, over.max


def _about(point: SweepPoint, sweep: Sweep) -> str:
    told = [f"{point.load:g} {sweep.unit}"]
    told += [
        f"{FIGURES[key].title} {_cell(point, key)}"
        for key in ("output_tokens_per_second", "ttft_p99", "tpot_p99", "goodput")
        if key in point.figures
    ]
    return "\n".join(told)


def _points(sweep: Sweep, several: bool) -> str:
    rows = []
    for point in sweep.points:
        cells = [_cell(point, key) for key in COLUMNS]
        kept = (
            '<span class="kept">met</span>'
            if point.met
            else f'<span class="lost">missed</span> {escape(", ".join(limit_title(name) for name in point.missed))}'
        )
        remarks = [point.note, "client-bound" if point.client_bound else "", "partial" if point.partial else ""]
        best = " ★" if sweep.best is not None and point.load == sweep.best else ""
        words = f'<span class="words soft">{escape("; ".join(filter(None, remarks)))}</span>' if any(remarks) else ""
        rows.append((f"<b>{point.load:g}</b>{best}", *cells, kept, words))
    heads = (f"#load, {sweep.unit}", *(f"#{FIGURES[key].title}" for key in COLUMNS), "SLO", "")
    title = f"<h3>{escape(sweep.label)}</h3>" if several and sweep.label else ""
    return title + shell.table(heads, rows, kind="dense")


def _cell(point: SweepPoint, key: str) -> str:
    over = point.figures.get(key)
    return numbers.of(over.median if over else None, FIGURES[key].unit)


def _configuration(sweep: Sweep) -> str:
    title = f"<h3>{escape(sweep.label)}</h3>" if sweep.label else ""
    return title + configuration.of_run(sweep.run)

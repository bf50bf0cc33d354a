"""Two runs side by side."""

from collections.abc import Iterator
from html import escape

from vitalis_load.comparison import Comparison, Difference
from vitalis_load.figures import FIGURES
from vitalis_load.report import configuration, numbers, shell
from vitalis_load.report.axes import Axis, around
from vitalis_load.report.curves import at, tails
from vitalis_load.report.distribution_section import SHOWN
from vitalis_load.report.plots import Drawing, Trace, over_time
from vitalis_load.result import Result
from vitalis_load.timelines import Series

TITLES = {
    "better": ("good", "The second run is better."),
    "worse": ("bad", "The second run is worse."),
    "mixed": ("bad", "The second run is better in some figures and worse in others."),
    "no difference": ("note", "No difference beyond noise."),
}
WORDS = {"better": "kept", "worse": "lost", "same": "even"}
FAR = 0.5  # a change beyond is drawn at the edge


def body(a: Result, b: Result, found: Comparison) -> Iterator[str]:
    name = str(b.run.scenario.get("name", ""))
    yield (
        f"<header><h1>{escape(found.a)} <small>against</small> {escape(found.b)}</h1>"
        f'<div class="where"><span><b>{escape(name)}</b> ({escape(b.run.scale)})</span>'
        f"<span>{len(a.repeats)} and {len(b.repeats)} repeats</span><span>the second is judged</span></div></header>"
        '<nav><div><a href="#differences">Differences</a><a href="#distributions">Distributions</a>'
        f'<a href="#timelines">Timelines</a><a href="#changed">What else differs</a>'
        f"{shell.save(f'{found.a}-{found.b}.json')}</div></nav><main>"
    )
    yield shell.banner(*TITLES[found.verdict], found.sentences)
    if found.caveats:
        yield shell.banner("warn", "What stands in the way of believing it", found.caveats)
    yield shell.section(
        "differences", "Differences", _table([each for each in found.differences if each.judged]),
        "Means over the repeats. The grey bar is noise, from how the repeats of each run differ: two runs of the "
        "same server leave it once in a hundred times.",
    )  # fmt: skip
    yield shell.section("distributions", "Distributions", _distributions(a, b), "By percentile, all repeats together.")
    yield shell.section("timelines", "Timelines", _timelines(a, b), "The first repeats.")
    rows = [
        (escape(each.what), escape(each.a) or numbers.NONE, escape(each.b) or numbers.NONE) for each in found.changed
    ]
    yield shell.section("changed", "What else differs", shell.table(("", found.a, found.b), rows, kind="narrow"))
    rest = _table([each for each in found.differences if not each.judged], plain=True)
    yield shell.section("rest", "Figures without a verdict", rest)
    yield f"</main><footer>{escape(configuration.made_by(b.run))}</footer>"


def _table(differences: list[Difference], *, plain: bool = False) -> str:
    rows = []
    for each in differences:
        cells = [escape(each.title), numbers.of(each.a, each.unit), numbers.of(each.b, each.unit), each.said]
        if not plain:
            word = {"same": "no difference"}.get(each.verdict, each.verdict)
            kind = WORDS.get(each.verdict, "even")
            cells += [forest(each), each.noise_said, f'<span class="{kind}">{word}</span>']
        rows.append(cells)
    heads = ["", "#first", "#second", "#change"]
    return shell.table(heads if plain else [*heads, "worse or better by", "#noise", "verdict"], rows)


def forest(each: Difference) -> str:
    """The change as a dot over its noise, zero in the middle; the better side is always to the right."""
    drawing = Drawing(16, f"{each.title}: change and noise", width=220, left=0)
    scale = 1.0 if each.unit == "share" else abs(each.a)
    if not scale:
        return ""
    axis = Axis(-FAR, FAR, 6, 214)
    shown = (each.b - each.a) / scale * (-1 if FIGURES[each.key].better == "less" else 1)
    noise = each.noise / scale
    drawing.box(axis.place(-noise), 4, axis.place(noise), 12, "noise")
    drawing.line(axis.place(0), 1, axis.place(0), 15, "mark")
    tone = {"better": "tgood", "worse": "tbad"}.get(each.verdict, "t6")
    about = f"{each.said}, noise {each.noise_said}"
    drawing.line(axis.place(0), 8, axis.place(shown), 8, f"line {tone}")
    drawing.dot(axis.place(shown), 8, 4, f"dot {tone}", about)
    return str(drawing)


def _distributions(a: Result, b: Result) -> str:
    cards = []
    for name, title, about in SHOWN:
        first, second = a.distributions.get(name), b.distributions.get(name)
        if first is None or second is None:
            continue
        told = "".join(
            f'<span class="key t{tone}"><i></i>{escape(name)} p99 <b>{numbers.seconds(at(whole, 0.99))}</b></span>'
            for tone, name, whole in (("1", a.run.id, first), ("2", b.run.id, second))
        )
        cards.append(
            f'<figure class="plot"><figcaption><h4 title="{escape(about)}">{escape(title)}</h4>'
            f'<span class="legend">{told}</span></figcaption>{tails(title, (first, second))}</figure>'
        )
    return f'<div class="plots">{"".join(cards)}</div>' if cards else ""


def _timelines(a: Result, b: Result) -> str:
    first, second = a.repeats[0].timeline, b.repeats[0].timeline
    if first.bin_seconds != second.bin_seconds:
        return ""
    plots = []
    for title, name, unit in (
        ("Output tokens per second", "output_tokens_per_second", "1/s"),
        ("In flight", "in_flight", ""),
        ("TTFT p50", "ttft_p50", "s"),
        ("TPOT p50", "tpot_p50", "s"),
        ("Failed per second", "failed", "1/s"),
    ):
        series: list[Series] = [getattr(first, name), getattr(second, name)]
        if name == "failed" and not any(any(values) for values in series):
            continue
        traces = [
            Trace(name=run.run.id, values=values, tone=tone)
            for tone, run, values in zip(("1", "2"), (a, b), series, strict=True)
        ]
        had = [value for values in series for value in values if value]
        plots.append(
            over_time(
                title,
                traces,
                unit=unit,
                bin_seconds=first.bin_seconds,
                seconds=first.bin_seconds * max(first.bins, second.bins),
                cut=(a.repeats[0].window.start, a.repeats[0].window.end),
                log=around(had, 0, 1) if name == "ttft_p50" and had else None,
            )  # fmt: skip
        )
    return f'<div class="panel shown"><div class="plots">{"".join(plots)}</div></div>'

"""What a run's page shows, from what matters most to what is looked up."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from html import escape

from vitalis_load.figures import FIGURES
from vitalis_load.honesty import REQUESTS_FOR_P99
from vitalis_load.report import configuration, numbers, shell
from vitalis_load.report.distribution_section import distributions
from vitalis_load.report.load_section import load_against_latency
from vitalis_load.report.parts_section import failures, lengths, parts
from vitalis_load.report.plots import strip
from vitalis_load.report.timeline_section import timelines
from vitalis_load.report.words import limit_of, limit_words, missed
from vitalis_load.result import Result

TILES = (
    ("output_tokens_per_second", "tokens/s"),
    ("goodput", "requests/s"),
    ("ttft_p50", ""),
    ("ttft_p99", ""),
    ("tpot_p50", ""),
    ("tpot_p99", ""),
    ("e2e_p99", ""),
    ("failed_share", ""),
)
_LINKS = {
    "load": "Load",
    "distributions": "Distributions",
    "timelines": "Timelines",
    "failures": "Failures",
    "parts": "Tenants",
    "repeats": "Repeats",
    "generator": "Load generator",
    "configuration": "Configuration",
}


def body(result: Result) -> Iterator[str]:
    sections = [
        shell.section("slo", "SLO", _slo(result)),
        shell.section(
            "load", "Throughput against latency", load_against_latency(result),
            "Each faint dot is a few seconds of the run, each full one a repeat. Where dots rise without moving to the "
            "right, more load brings no more tokens, only longer waiting.",
        ),
        shell.section(
            "distributions", "Distributions", distributions(result),
            "All repeats together; the faint lines are the single repeats. Both show the same: how often each duration "
            "came, and by which percentile; each further nine takes as much room as the one before.",
        ),
        shell.section("timelines", "Timelines", timelines(result), "Shaded: warm-up and cool-down; not counted."),
        shell.section("failures", "Failures", failures(result), "They stay in the denominator of every share."),
        shell.section("parts", "Tenants, tasks and classes", parts(result)),
        shell.section("lengths", "Tokens", lengths(result), "As the server counted them in its usage, never chunks."),
        shell.section("repeats", "Repeats", _repeats(result), "The interval is that of the mean, at 95 %."),
        shell.section("generator", "The load generator itself", configuration.generator(result)),
        shell.section("configuration", "Configuration and versions", configuration.configuration(result)),
    ]  # fmt: skip
    yield _head(result)
    yield _navigation(result, sections)
    yield "<main>"
    yield from _banners(result)
    yield f'<div class="tiles">{"".join(_tiles(result))}</div>'
    if result.honesty.notes:
        yield shell.banner("note", "To be known when these figures are read", result.honesty.notes)
    yield from sections
    yield "</main>"
    yield f"<footer>{escape(configuration.made_by(result.run))}</footer>"


def _head(result: Result) -> str:
    run = result.run
    scenario = run.scenario
    began = datetime.fromtimestamp(run.began_at, UTC)
    where = [
        f"<b>{escape(run.model)}</b> at {escape(run.url)}",
        f"<time>{began:%Y-%m-%d %H:%M} UTC</time>",
        f"run {escape(run.id)}",
        f"commit {escape(_short(run.commit))}" if run.commit else "",
    ]
    about = str(scenario.get("about") or "")
    return (
        f"<header><h1>{escape(str(scenario.get('name', 'run')))} <small>{escape(run.scale)} · "
        f"{len(result.repeats)} {'repeats' if len(result.repeats) != 1 else 'repeat'}</small></h1>"
        f'<div class="where">{"".join(f"<span>{item}</span>" for item in where if item)}</div>'
        f'<p class="lead">{escape(lead(result))}</p>'
        + (f'<p class="about">{escape(about)}</p>' if about else "")
        + (f'<p class="about">{escape(run.note)}</p>' if run.note else "")
        + "</header>"
    )


def _short(commit: str) -> str:
    """As git abbreviates it, with the mark of changed files kept."""
    number, plus, rest = commit.partition("+")
    return number[:12] + plus + rest


def lead(result: Result) -> str:
    """The run in one sentence, of medians over its repeats."""

    def said(key: str, words: str) -> str:
        over = result.figures.get(key)
        return words.format(numbers.of(over.median, FIGURES[key].unit)) if over else ""

    told = [
        said("output_tokens_per_second", "{} output tokens/s"),
        said("requests_per_second", "{} requests/s answered"),
        said("ttft_p99", "the first token within {} for 99 of 100"),
        said("tpot_p50", "{} a token after it"),
        said("failed_share", "{} failed"),
    ]
    return ", ".join(part for part in told if part) + "."


def _navigation(result: Result, sections: Iterable[str]) -> str:
    there = "".join(sections)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in _LINKS.items() if f'id="{name}"' in there)
    return f"<nav><div>{links}{shell.save(f'{result.run.id}.json')}</div></nav>"


def _banners(result: Result) -> Iterator[str]:
    if result.honesty.client_bound:
        yield shell.banner(
            "bad",
            "The load generator was the bottleneck: these figures say more about it than about the server.",
            result.honesty.reasons,
        )
    if result.partial:
        yield shell.banner(
            "warn", "This run is partial: what was measured until then is shown.", result.partial_reasons
        )
    if result.verdicts:
        lost = [missed(verdict) for verdict in result.verdicts if not verdict.ok]
        if lost:
            yield shell.banner("bad", "The SLO is missed.", lost)
        else:
            yield shell.banner("good", "The SLO is met." + (" As far as this run can tell." if result.partial else ""))


def _tiles(result: Result) -> Iterator[str]:
    failing = {limit_of(verdict.name) for verdict in result.verdicts if not verdict.ok and not verdict.task}
    for key, unit in TILES:
        over = result.figures.get(key)
        if over is None:
            continue
        figure = FIGURES[key]
        number, _, own = numbers.of(over.median, figure.unit).partition(" ")
        several = len(over.values) > 1
        about = f"{numbers.span(over.values, figure.unit)} in {len(over.values)} repeats" if several else "one repeat"
        if key == "goodput" and (share := result.figures.get("good_share")):
            about = f"{numbers.share(share.median)} of all that were due"
        yield (
            f'<div class="tile{" missed" if key in failing else ""}"><h3>{escape(figure.title)}</h3>'
            f'<div class="value">{number} <small>{escape(unit or own)}</small></div>'
            f"{strip(over.values, figure.unit) if several else ''}<p>{escape(about)}</p></div>"
        )


def _slo(result: Result) -> str:
    rows = []
    for verdict in result.verdicts:
        name, limit, value = limit_words(verdict)
        kept = '<span class="kept">kept</span>' if verdict.ok else '<span class="lost">missed</span>'
        rows.append((escape(name), limit, value, kept))
    return shell.table(("", "limit", "#measured", ""), rows, kind="narrow")


def _repeats(result: Result) -> str:
    heads = ["", *(f"#{repeat.number}" for repeat in result.repeats), "#median", "#95 % interval"]
    rows = []
    # Of fewer than a thousand it is the largest one.
    few = min(repeat.summary.requests for repeat in result.repeats) < REQUESTS_FOR_P99
    left_out = ("_min", "_max", "_mean", "_p90", "_p95", *(("_p99_9",) if few else ()))
    for key, figure in FIGURES.items():
        over = result.figures.get(key)
        if over is None or key.endswith(left_out):
            continue
        values = [numbers.of(value, figure.unit) for value in over.values]
        if len(values) < len(result.repeats):
            values += [numbers.NONE] * (len(result.repeats) - len(values))
        between = numbers.NONE
        if over.low is not None and over.high is not None:
            low = max(0.0, over.low)
            between = numbers.span((low, over.high), figure.unit)
        rows.append((escape(figure.title), *values, f"<b>{numbers.of(over.median, figure.unit)}</b>", between))
    return shell.table(heads, rows)

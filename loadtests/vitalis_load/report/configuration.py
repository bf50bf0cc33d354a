"""What was run, where and with what; and what the load generator itself was doing."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import yaml

from vitalis_load import honesty
from vitalis_load.records import RunInfo
from vitalis_load.report import numbers, shell
from vitalis_load.result import Result


def configuration(result: Result) -> str:
    told = shell.facts(MEANINGS)
    return of_run(result.run) + f"<details><summary>What the figures mean</summary>{told}</details>"


def of_run(run: RunInfo) -> str:
    scenario = yaml.safe_dump(dict(run.scenario), sort_keys=False, allow_unicode=True, width=100)
    own = [
        ("scenario", f"{run.scenario.get('name', '')} ({run.scale})"),
        ("server", run.url),
        ("model", run.model),
        ("repeats", str(run.repeats)),
        ("load generator", f"{run.processes} {'processes' if run.processes != 1 else 'process'}"),
        ("commit", run.commit),
    ]
    return (
        f'<div class="pair"><div><h3>Run</h3>{shell.facts(own)}'
        f"<h3>Versions</h3>{shell.facts(run.versions.items())}</div>"
        f"<div><h3>Machine of the load generator</h3>{shell.facts(flat(run.machine))}"
        f"{_headed('Server', shell.facts(flat(run.target)))}</div></div>"
        f"<details><summary>The scenario, with every default</summary><pre>{escape(scenario)}</pre></details>"
    )


MEANINGS = (
    ("TTFT", "from sending, connection included, to the first token of any kind: reasoning, content or tool call"),
    ("TTFO", "the same to the first token of content or of a tool call"),
    ("TPOT", "(E2E - TTFT) / (output tokens - 1), tokens as the server counted them"),
    ("gap", "between two chunks of an answer; a chunk may hold several tokens"),
    ("E2E", "from sending to the API's last event"),
    ("from schedule", "the same from when the request was due: what it cost somebody who came then"),
    ("output tokens/s", "those of the window, each answer's spread evenly from its first token to its last"),
    ("good", "ended as the API says it must, within the SLO's limits for a request; of all that were due"),
    ("failed", "anything else, but for what was still going at the end"),
    ("median", "the middle one of the repeats"),
)  # fmt: skip


def generator(result: Result) -> str:
    """Its own figures beside what would be too much."""
    own = result.honesty
    of_ttft = f"{honesty.SHARE_OF_TTFT:.0%} of the median TTFT"
    lag = f"{numbers.seconds(honesty.LAG_SECONDS)}, or {of_ttft}"
    rows = []
    for title, value, limit in (
        (
            "requests due",
            _rate(own.requested_rate),
            "as the scenario says" if own.open_loop else "closed users ask for none",
        ),
        ("requests sent", _rate(own.achieved_rate), f"{honesty.ACHIEVED:.0%} of those due"),
        ("sent late, p50", numbers.seconds(own.delay_p50), ""),
        (
            "sent late, p99",
            numbers.seconds(own.delay_p99),
            f"{numbers.seconds(honesty.DELAY_SECONDS)}, or {of_ttft}",
        ),
        ("CPU of the busiest process, median", numbers.share(own.cpu_median), ""),
        (
            "seconds in which it was full",
            numbers.share(own.cpu_full_share),
            f"{honesty.BAD_SECONDS:.0%} above {honesty.CPU_FULL:.0%}",
        ),
        ("loop lag, p99", numbers.seconds(own.lag_p99), ""),
        (
            "seconds with too much lag",
            numbers.share(own.lag_bad_share),
            f"{honesty.BAD_SECONDS:.0%} above {lag}",
        ),
        ("most events read by one process", _rate(own.events_per_second), ""),
    ):
        rows.append((escape(title), value, f'<span class="soft">{escape(limit)}</span>'))
    verdict = (
        '<p class="about">The worst of all repeats, beside the bounds from which a run is called client-bound.</p>'
        if not own.client_bound
        else '<p class="about">The worst of all repeats. One of the bounds is broken: the run is client-bound.</p>'
    )
    return verdict + shell.table(("", "#measured", "bound"), rows)


def _rate(value: float | None) -> str:
    return numbers.NONE if value is None else f"{numbers.digits(value)}/s"


def made_by(run: RunInfo) -> str:
    version = run.versions.get("vitalis-load", "")
    return f"Made by vitalis-load{' ' + version if version else ''}. This page is one file and loads nothing."


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as names with dots; bytes as people read them."""
    for name, value in values.items():
        path = f"{before}{name}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}.")
        elif isinstance(value, (list, tuple)):
            yield path, "; ".join(_inner(item) for item in value)
        elif isinstance(value, bool):
            yield path, "yes" if value else "no"
        elif name.endswith("_bytes") and isinstance(value, (int, float)):
            yield path.removesuffix("_bytes"), numbers.size(float(value))
        elif value is not None:
            yield path, str(value)


def _inner(item: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in flat(item)) if isinstance(item, Mapping) else str(item)


def _headed(title: str, content: str) -> str:
    return f"<h3>{title}</h3>{content}" if content else ""

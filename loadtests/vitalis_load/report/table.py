"""Results at a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitalis_load.comparison import Comparison
from vitalis_load.figures import FIGURES
from vitalis_load.report import numbers
from vitalis_load.report.words import limit_words
from vitalis_load.result import Result

SHOWN = (
    "output_tokens_per_second", "requests_per_second", "goodput", "good_share", "failed_share", "ttft_p50", "ttft_p99",
    "tpot_p50", "tpot_p99", "gaps_p99", "e2e_p50", "e2e_p99", "schedule_delay_p99",
)  # fmt: skip
STYLES = {"better": "green", "worse": "bold red"}


def _console() -> Console:
    """As wide as the terminal; of a file or a pipe, wide enough that nothing is folded."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def result(made: Result) -> None:
    """What a run comes to: figures over the repeats, the SLO, and what stands in the way of believing them."""
    console = _console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("between repeats", justify="right")
    for key in SHOWN:
        over = made.figures.get(key)
        if over is not None:
            unit = FIGURES[key].unit
            span = numbers.span(over.values, unit) if len(over.values) > 1 else ""
            table.add_row(FIGURES[key].title, numbers.of(over.median, unit), span)
    console.print(table)
    for verdict in made.verdicts:
        title, limit, value = limit_words(verdict)
        style, word = ("green", "kept") if verdict.ok else ("bold red", "missed")
        console.print(Text.assemble(f"SLO: {title} {value}, {limit}: ", (word, style)))
    for failure in made.failures[:5]:
        told = f"failed: {failure.error} {failure.count:,} times ({numbers.share(failure.share)}) {failure.detail}"
        console.print(Text(told.rstrip(), style="red"))
    if made.honesty.client_bound:
        console.print(Text("The load generator was the bottleneck:", style="bold red"))
        for reason in made.honesty.reasons:
            console.print(Text(f"  {reason}"))
    for reason in made.partial_reasons:
        console.print(Text(f"Partial: {reason}.", style="yellow"))
    for note in made.honesty.notes:
        console.print(Text(f"Note: {note}"))


def comparison(found: Comparison) -> None:
    """Every judged figure of both, and what follows."""
    console = _console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in (found.a, found.b, "change", "noise"):
        table.add_column(title, justify="right")
    table.add_column("")
    for each in found.differences:
        if each.judged:
            word = {"same": "no difference", "": "not judged"}.get(each.verdict, each.verdict)
            table.add_row(
                each.title,
                numbers.of(each.a, each.unit),
                numbers.of(each.b, each.unit),
                each.said,
                each.noise_said,
                Text(word, style=STYLES.get(each.verdict, "")),
            )
    console.print(table)
    for sentence in found.sentences:
        console.print(Text(sentence, style="bold"))
    for caveat in found.caveats:
        console.print(Text(f"Beware: {caveat}", style="yellow"))
    for change in found.changed[:12]:
        console.print(Text(f"Differs: {change.what}: {change.a or 'none'} / {change.b or 'none'}"))

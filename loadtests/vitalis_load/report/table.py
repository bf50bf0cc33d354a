"""A comparison at a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitalis_load.comparison import Comparison
from vitalis_load.report import numbers

STYLES = {"better": "green", "worse": "bold red"}


def _console() -> Console:
    """As wide as the terminal; of a file or a pipe, wide enough that nothing is folded."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


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

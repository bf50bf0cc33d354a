"""`vitalis-load compare A B`: whether the second run is better or worse, beyond what repeats differ by themselves."""

from pathlib import Path
from typing import Annotated

import typer

from vitalis_load import comparison, result
from vitalis_load.errors import Exit
from vitalis_load.report import page, table


def compare(
    a: Annotated[Path, typer.Argument(help="The run to compare with: its folder or result.json.")],
    b: Annotated[Path, typer.Argument(help="The run that is judged.")],
    html: Annotated[Path | None, typer.Option(help="Draw both side by side on a page.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Also where they were asked different things.")] = False,
) -> None:
    """Compare two runs of the same scenario. Exit code 1 where the second is worse in any judged figure."""
    first, second = result.load(a), result.load(b)
    found = comparison.compare(first, second, anyway=anyway)
    table.comparison(found)
    if html is not None:
        page.write_comparison(first, second, found, html)
        print(f"page: {html}")
    if found.worse:
        raise SystemExit(Exit.MISSED)

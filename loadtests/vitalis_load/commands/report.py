"""`vitalis-load report RUN`: result.json and report.html of a run's folder, made again from what it wrote down."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vitalis_load import result as results
from vitalis_load import table
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.report import page


def report(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder, its result.json, or a sweep's folder or sweep.json.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Where the page goes; beside the result if not given.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of result.json instead.")] = False,
) -> None:
    """Make a run's result and page again, and print what they say. Exit code 1 where its SLO was missed."""
    if schema:
        sys.stdout.write(results.schema())
        return
    if run is None:
        raise LoadFailure("name the run's folder, as in `vitalis-load report results/RUN`", Exit.BAD_INPUT)
    if (run / "sweep.json").is_file() or run.name == "sweep.json":
        sweep = results.load_sweep(run)
        target = html or (run if run.is_dir() else run.parent) / "report.html"
        page.write_sweep([sweep], target)
        print(f"report: {target}")
        return
    made = results.write(run) if run.is_dir() and (run / "run.json").is_file() else results.load(run)
    target = html or (run if run.is_dir() else run.parent) / "report.html"
    page.write(made, target)
    print(f"{table.text(made)}\n\nreport: {target}")
    if not made.met:
        raise SystemExit(Exit.MISSED)

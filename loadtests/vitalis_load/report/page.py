"""The pages: a run, a sweep, a comparison. Each is one file that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from vitalis_load.comparison import Comparison
from vitalis_load.report import comparison_page, run_page, shell, sweep_page
from vitalis_load.result import Result, Sweep, whole


def write(result: Result, path: Path) -> None:
    """report.html of a run. Raises LoadFailure where it cannot be written."""
    whole(path, run(result))


def run(result: Result) -> bytes:
    """A run's page."""
    name = result.run.scenario.get("name", "a run")
    return shell.document(f"{name} · {result.run.id}", run_page.body(result), data=msgspec.json.encode(result))


def write_sweep(sweeps: Sequence[Sweep], path: Path, *, title: str = "", evidence: Sequence[str] = ()) -> None:
    """One page with a curve per sweep; `title` and `evidence` (paragraphs of plain text) stand above them. Raises
    LoadFailure where it cannot be written."""
    whole(path, sweep(sweeps, title=title, evidence=evidence))


def sweep(sweeps: Sequence[Sweep], *, title: str = "", evidence: Sequence[str] = ()) -> bytes:
    """The page of one or several sweeps."""
    name = title or f"Sweep of {sweeps[0].run.scenario.get('name', 'a scenario')}"
    return shell.document(name, sweep_page.body(sweeps, name, evidence), data=msgspec.json.encode(list(sweeps)))


def write_comparison(a: Result, b: Result, found: Comparison, path: Path) -> None:
    """The page of two runs. Raises LoadFailure where it cannot be written."""
    whole(path, comparison(a, b, found))


def comparison(a: Result, b: Result, found: Comparison) -> bytes:
    """The page of `b` against `a`."""
    title = f"{found.a} against {found.b}"
    return shell.document(title, comparison_page.body(a, b, found), data=msgspec.json.encode(found))

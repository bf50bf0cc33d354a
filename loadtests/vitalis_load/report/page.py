"""The pages: a run, a sweep, a comparison."""

from collections.abc import Sequence
from pathlib import Path

from vitalis_load.result import Result, Sweep


def write(result: Result, path: Path) -> None:
    """report.html of a run. Raises LoadFailure where it cannot be written."""
    raise NotImplementedError


def write_sweep(sweeps: Sequence[Sweep], path: Path, *, title: str = "", evidence: str = "") -> None:
    """One page with a curve per sweep; `title` and `evidence` (paragraphs of plain text) stand above them."""
    raise NotImplementedError

"""A whole run: what is asked is there, then each repeat as one headless Locust, then what came of it."""

from collections.abc import Callable
from pathlib import Path

from vitalis_load.scenario import Scenario
from vitalis_load.target import Target


def run(
    target: Target,
    scenario: Scenario,
    *,
    out: Path,
    repeats: int = 3,
    processes: int = 1,
    scale: str = "full",
    seed: int = 1,
    progress: Callable[[str], None] = print,
    warm: bool = True,
    note: str = "",
) -> Path:
    """Measures and returns the run's folder, made in `out`, with result.json and report.html in it.

    `progress` gets a line every few seconds. `warm`: ask a little before the first repeat. Raises LoadFailure:
    NO_TARGET before anything was measured; CANNOT_WRITE where the disk became full; INTERRUPTED after SIGINT, what was
    measured then being kept and its report made. `folder` of what is raised is the run's folder where there is one.
    """
    raise NotImplementedError

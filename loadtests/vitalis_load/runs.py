"""A whole run: what is asked is there, then each repeat as one headless Locust, then what came of it."""

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from vitalis_load import preflight, recorder, result, runfolder
from vitalis_load.child import Child
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.order import Order
from vitalis_load.prompts import Tokenisation
from vitalis_load.records import RepeatEnd
from vitalis_load.report import page
from vitalis_load.scenario import Scenario
from vitalis_load.target import Target


class RunFailure(LoadFailure):
    """Of a run that has begun: `folder` is where everything is that was measured."""

    def __init__(self, message: str, code: Exit, folder: Path) -> None:
        super().__init__(message, code)
        self.folder = folder


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
    counting: Tokenisation | None = None,
    note: str = "",
) -> Path:
    """Measures and returns the run's folder, made in `out`, with result.json and report.html in it.

    `progress` gets a line every few seconds. `warm`: ask a little before the first repeat, unless
    `counting` says how the model counts words, as `learn` has found it. Raises LoadFailure with
    NO_TARGET before anything was measured; RunFailure where the server went away between repeats (NO_TARGET), the disk
    became full (CANNOT_WRITE) or SIGINT came (INTERRUPTED): what was measured until then is kept and has its report.
    """
    out = Path(out).absolute()  # Locust runs in the run's folder
    progress(f"scenario {scenario.name} ({scale}): {repeats} x {scenario.seconds:.0f} s against {target.url}")
    target = preflight.watched(preflight.check(target, scenario, progress), progress)
    resolved = scenario.resolved()
    if counting is None:
        counting = _count(target, scenario, seed, progress) if warm else Tokenisation()
    order = Order(
        scenario=resolved, target=target, seed=seed, salt="", per_word=counting.per_word, overhead=counting.overhead,
        frames=dict(counting.frames),
    )  # fmt: skip
    folder = runfolder.begin(order, out, scale=scale, processes=processes, repeats=repeats, note=note)
    ended: LoadFailure | None = None
    for number in range(1, repeats + 1):
        mine = msgspec.structs.replace(
            order, folder=str(folder / f"repeat-{number}"), salt=f"{folder.name}/{number}", seed=seed
        )
        ended = _repeat(mine, number, repeats, processes, progress)
        if ended is not None:
            break
    try:
        page.write(result.write(folder), folder / "report.html")
    except LoadFailure as failure:
        ended = ended or failure
    except KeyboardInterrupt:
        ended = LoadFailure("interrupted", Exit.INTERRUPTED)
    if ended is not None:
        raise RunFailure(_sentence(ended, folder), ended.code, folder)
    return folder


def learn(target: Target, scenario: Scenario, *, seed: int, progress: Callable[[str], None]) -> Tokenisation:
    """What `run` would ask before it measures, for several runs that shall ask the same. Raises LoadFailure."""
    return _count(preflight.check(target, scenario, progress), scenario, seed, progress)


def _count(target: Target, scenario: Scenario, seed: int, progress: Callable[[str], None]) -> Tokenisation:
    plan = scenario.plan(seed, salt=f"warm-up-{time.time_ns():x}", model=target.model)
    return preflight.warm(target, scenario, plan, progress)


def _repeat(
    order: Order, number: int, repeats: int, processes: int, progress: Callable[[str], None]
) -> LoadFailure | None:
    """One repeat. Returns why the run ends here, if it does."""
    folder = Path(order.folder)
    label = f"repeat {number} of {repeats}: " if repeats > 1 else ""
    failure: LoadFailure | None
    began = time.time()
    try:
        folder.mkdir()
        if number > 1:
            preflight.check(order.target, order.scenario_made())
        failure = Child(order, processes, lambda line: progress(label + line)).run()
    except KeyboardInterrupt:
        failure = LoadFailure("interrupted", Exit.INTERRUPTED)
    except OSError as error:
        return LoadFailure(f"{folder} cannot be made ({error.strerror})", Exit.CANNOT_WRITE)
    except LoadFailure as error:
        failure = error
    if not (folder / "end.json").exists():
        _write_end(folder, began, failure.message if failure is not None else "it ended without a word")
    return failure


def _write_end(folder: Path, began: float, reason: str) -> None:
    """For a repeat that could not write its own. How long it lasted is what its records say."""
    end = RepeatEnd(began_at=began, seconds=0.0, complete=False, reason=reason)
    try:
        (folder / recorder.RESERVED).unlink(missing_ok=True)
        recorder.write_whole(folder / "end.json", end)
    except OSError:
        return  # the disk is full; a missing end says the same


def _sentence(failure: LoadFailure, folder: Path) -> str:
    if failure.code == Exit.CANNOT_WRITE:
        return f"{failure.message}; what was measured until then is kept: `vitalis-load report {folder}` shows it"
    if not (folder / "report.html").is_file():
        return f"{failure.message}; nothing was measured"
    return f"{failure.message}; what was measured until then is kept: {folder / 'report.html'}"

"""What the commands that measure many runs are given on their command lines, and what that comes to."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vitalis_load import options, scenario
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.result import Sweep, store
from vitalis_load.scenario import Scenario

RESULTS = Path("results")

Url = Annotated[str, typer.Option(help="http://HOST:PORT; default: the server that runs on --data-folder")]
KeyFile = Annotated[str, typer.Option(help="a file with the key; default: the data folder's first key")]
KeyEnv = Annotated[str, typer.Option(help="the variable with the key")]
DataFolder = Annotated[str, typer.Option(help="of a running vitalis-serve on this host")]
Keys = Annotated[list[str] | None, typer.Option(metavar="TENANT=VARIABLE", help="a tenant's own key")]
Model = Annotated[str, typer.Option(help="default: the first that the key may use")]
Scale = Annotated[str, typer.Option(help="full or small")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="another value in the scenario")]
SloOption = Annotated[list[str] | None, typer.Option("--slo", metavar="NAME=VALUE", help="such as ttft_p99_ms=2000")]
Out = Annotated[Path | None, typer.Option(help="folder; one with an unfinished search is gone on with")]
Processes = Annotated[int, typer.Option(min=1, help="of the load generator")]
Seed = Annotated[int, typer.Option(help="fixes when requests come and how long they are")]
Config = Annotated[Path | None, typer.Option(help="vitalis-serve's configuration; default: its own")]
Serve = Annotated[str, typer.Option(help="the command vitalis-serve; default: this checkout's, else on PATH")]
StartSeconds = Annotated[float, typer.Option(help="longest time for the engines to become ready")]


def asked_scenario(name: str, scale: str, changes: list[str] | None, slo: list[str] | None) -> Scenario:
    """Raises LoadFailure for what is wrong with it."""
    limits = options.pairs(slo or [], "--slo", "ttft_p99_ms=2000")
    overrides = options.overrides(changes or []) | {f"slo.{field}": value for field, value in limits.items()}
    return scenario.load(name, scale=scale, overrides=overrides)


def folder(out: Path | None, kind: str) -> Path:
    """Where all of it goes, as an absolute path."""
    return (out or RESULTS / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()


@contextmanager
def kept(where: Path) -> Iterator[None]:
    """Says how to go on, whatever ended it. SIGTERM ends it as Ctrl-C does."""
    end_in_order()
    try:
        yield
    except LoadFailure as failure:
        words = failure.message if failure.code != Exit.INTERRUPTED else "interrupted"
        raise LoadFailure(
            f"{words}; what was measured is in {where}: give --out {where} to go on", failure.code
        ) from None
    except KeyboardInterrupt:
        raise LoadFailure(
            f"interrupted; what was measured is in {where}: give --out {where} to go on", Exit.INTERRUPTED
        ) from None


def end_in_order() -> None:
    """SIGTERM, and a terminal that goes away (unless nohup has it ignored), end this as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupted)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _interrupted)


def report(curves: list[Sweep], where: Path, *, title: str, evidence: str = "") -> Path:
    """The page with these curves; beside it each as JSON. Raises LoadFailure where they cannot be written."""
    from vitalis_load.report import page

    for index, each in enumerate(curves):
        store(each, where / ("sweep.json" if len(curves) == 1 else f"curves/{index:02d}.json"))
    path = where / "report.html"
    page.write_sweep(curves, path, title=title, evidence=evidence.splitlines())
    return path


def say(text: str) -> None:
    print(text, flush=True)


def within(text: str) -> None:
    """What a single run of many says."""
    say(f"    {text}")


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt

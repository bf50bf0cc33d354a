"""`vitalis-load plan`: how many replicas a described traffic needs, without an engine."""

import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from simulator.calibration import Calibration, Unusable
from simulator.calibration import load as load_calibration

from vitalis_load import planning, traffic
from vitalis_load.assumptions import assumptions
from vitalis_load.commands import given
from vitalis_load.commands.scenarios import assignments
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.planning import Outcome, Planned, Setting

_TELL_SECONDS = 3.0
_COLUMNS = ("replicas", "seats used", "KV peak", "TTFT p50", "TTFT p99", "TPOT p99", "goodput/s", "tokens/s", "SLO")


def plan(
    traffic_file: Annotated[
        Path, typer.Option("--traffic", metavar="FILE", help="YAML: what comes, and what must hold")
    ],
    calibration: Annotated[Path | None, typer.Option(help="of an engine; see `python -m simulator calibrate`")] = None,
    slo: given.SloOption = None,
    change: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="such as rate=40")] = None,
    output: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="the whole answer as JSON")] = None,
) -> None:
    """Say how many replicas a described traffic needs, with what is assumed."""
    limits = {f"slo.{name}": value for name, value in assignments(slo or []).items()}
    setting = Setting(traffic.load(traffic_file, {**assignments(change or []), **limits}), _calibration(calibration))
    found = planning.plan(setting, _teller())
    found.assumptions = assumptions(setting)
    _show(found, setting)
    if output is not None:
        try:
            output.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
        except OSError as error:
            raise LoadFailure(f"{output} cannot be written ({error.strerror})", Exit.CANNOT_WRITE) from None
    if found.replicas is None:
        raise typer.Exit(Exit.MISSED)


def _calibration(path: Path | None) -> Calibration | None:
    try:
        return None if path is None else load_calibration(path)
    except Unusable as error:
        raise LoadFailure(str(error)) from None


def _teller() -> planning.Tell:
    """A line now and then, on standard error."""
    last = time.monotonic()

    def tell(line: str) -> None:
        nonlocal last
        if time.monotonic() - last > _TELL_SECONDS:
            last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return tell


def _show(found: Planned, setting: Setting) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"Traffic {found.traffic}: {found.rate:.4g} requests/s. Assumed:")
    for line in found.assumptions:
        console.print(f"  - {line}", soft_wrap=True, markup=False)
    if found.outcomes:
        console.print(_table(found.outcomes))
    console.print(_verdict(found, setting), soft_wrap=True, markup=False)


def _table(outcomes: list[Outcome]) -> Table:
    table = Table()
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "SLO" else "right")
    for one in outcomes:
        table.add_row(
            str(one.replicas), f"{one.utilisation:.0%}", f"{one.kv_peak:.0%}", _milliseconds(one.ttft_p50_ms),
            _milliseconds(one.ttft_p99_ms), _milliseconds(one.tpot_p99_ms), f"{one.goodput:.1f} ({one.good_share:.1%})",
            f"{one.tokens_per_second:.0f}", "holds" if one.holds else "misses " + ", ".join(one.missed),
        )  # fmt: skip
    return table


def _milliseconds(value: float) -> str:
    if value == float("inf"):
        return "no end"
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{value:.0f} ms"


def _verdict(found: Planned, setting: Setting) -> str:
    if found.replicas is None:
        most = setting.traffic.most_replicas
        return found.impossible or f"not even {most} replicas hold this SLO"
    plural = "replica holds" if found.replicas == 1 else "replicas hold"
    text = f"{found.replicas} {plural} the SLO at {found.rate:.4g} requests/s"
    if setting.traffic.spare:
        text += f"; with {setting.traffic.spare} to spare: {found.wanted}"
    return text + "." + ("" if planning.monotone(found.outcomes) else " Neighbours differ by chance: take one more.")

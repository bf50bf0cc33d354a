"""`vitalis-load sweep`: where a running server saturates, and the best goodput it gives under an SLO."""

from typing import Annotated

import typer

from vitalis_load import loads, options, sweeping
from vitalis_load.commands import given
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.searching import Journal, Point
from vitalis_load.sweeping import Bounds


def sweep(
    scenario: Annotated[str, typer.Argument(help="a name, or a file")] = "short-chat",
    url: given.Url = "",
    key_file: given.KeyFile = "",
    key_env: given.KeyEnv = "",
    keys: given.Keys = None,
    data_folder: given.DataFolder = options.DATA_FOLDER,
    model: given.Model = "",
    scale: given.Scale = "full",
    change: given.Set = None,
    slo: given.SloOption = None,
    first: Annotated[float, typer.Option(min=0, help="load to begin with; 0: a quarter of the scenario's own")] = 0,
    least: Annotated[float, typer.Option(min=0, help="lowest load; 0: an eighth of the first")] = 0,
    most: Annotated[float, typer.Option(help="highest load")] = 100_000,
    growth: Annotated[float, typer.Option(help="times the load, while it holds")] = 2.0,
    precision: Annotated[float, typer.Option(help="how near the load that fails may be to the one that holds")] = 0.1,
    points: Annotated[int, typer.Option(min=1, help="at most so many loads")] = 14,
    repeats: Annotated[int, typer.Option(min=1, help="of the best load, which is measured again at the end")] = 3,
    processes: given.Processes = 1,
    seed: given.Seed = 1,
    label: Annotated[str, typer.Option(help="the curve's name in the report")] = "",
    out: given.Out = None,
) -> None:
    """Raise the load until the SLO is missed, find the best that holds, and draw throughput against latency."""
    if growth <= 1:
        raise LoadFailure(f"--growth {growth:g}: must be above 1, or the load never grows")
    asked = given.asked_scenario(scenario, scale, change, slo)
    unit = loads.unit_of(asked)
    target = options.target(
        asked, url=url, model=model, key_file=key_file, key_env=key_env, keys=keys or (), data_folder=data_folder
    )
    if lacking := options.without_own_key(asked, target):
        given.say(f"tenants {', '.join(lacking)} have no keys of their own: they are not told apart (--keys)")
    begin = first or max(loads.usual(asked) / 4, 1.0 if unit == "users" else 0.0)
    bounds = Bounds(
        unit=unit, first=begin, most=max(most, begin), least=least, growth=growth, precision=precision, points=points,
        confirm=repeats,
    )  # fmt: skip
    where = given.folder(out, f"sweep-{asked.name}")
    asked_for = {"scenario": asked.resolved(), "scale": scale, "seed": seed, "url": target.url}
    journal = Journal(where / "journal.jsonl", asked_for)
    known = [loads.as_point(entry["point"]) for entry in journal.entries]
    if journal.resumed:
        given.say(f"going on with {where}: {len(known)} loads were measured")
    partial = ""
    try:
        with given.kept(where):
            while step := sweeping.next_step(known, bounds):
                again = ", again in full" if step.repeats > 1 else ""
                given.say(f"load {len(known) + 1}: {sweeping.show(step.load, unit)}{again}")
                found = loads.measure(
                    target, asked, step, out=where / "runs", processes=processes, scale=scale, seed=seed,
                    progress=given.within,
                )  # fmt: skip
                known.append(found)
                journal.add({"point": found})
                given.say(f"  {loads.line(found, unit)}")
    except BaseException:
        partial = "it was ended before it was done"
        raise
    finally:
        curve = loads.curve(
            where / "runs", known, bounds, identity=where.name, label=label or asked.name, partial=partial
        )
        if curve is not None:
            path = given.report([curve], where, title=f"Sweep: {asked.name}")
            given.say(f"\n{_table(known, bounds)}\n\n{curve.conclusions[0]}\nreport: {path}")
    if sweeping.best(known, bounds) is None:
        raise typer.Exit(Exit.MISSED)


def _table(known: list[Point], bounds: Bounds) -> str:
    return "\n".join(loads.line(found, bounds.unit) for found in sweeping.latest(known))

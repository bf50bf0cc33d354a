"""`vitalis-load run`: a scenario against a server, a table on the terminal, a report beside what was measured."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from vitalis_load import options, result, runs, scenario, table, tenants
from vitalis_load.commands import given
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.result import Result

RESULTS = Path("results")


def run(
    name: Annotated[str, typer.Argument(metavar="SCENARIO", help="a name (`vitalis-load scenarios`), or a YAML file")],
    url: Annotated[str, typer.Option(help="http://HOST:PORT; default: the server that runs on --data-folder")] = "",
    key_file: Annotated[str, typer.Option(help="a file with the key; default: the data folder's first key")] = "",
    key_env: Annotated[str, typer.Option(help="the variable with the key")] = "",
    keys: Annotated[list[str] | None, typer.Option(metavar="TENANT=VARIABLE", help="a tenant's own key")] = None,
    make_keys: Annotated[
        bool, typer.Option("--make-keys", help="tenants and keys for the scenario's, taken back at the end")
    ] = False,
    data_folder: Annotated[str, typer.Option(help="of a running vitalis-serve on this host")] = options.DATA_FOLDER,
    model: Annotated[str, typer.Option(help="default: the first that the server has")] = "",
    direct: Annotated[bool, typer.Option("--direct", help="an engine at --url, no gateway")] = False,
    metrics_url: Annotated[str, typer.Option(help="the address of the gateway's control, for its metrics")] = "",
    metrics_token_env: Annotated[str, typer.Option(help="the variable with control's token")] = "",
    engine: Annotated[list[str] | None, typer.Option(metavar="NAME=ADDRESS", help="an engine's metrics")] = None,
    scale: Annotated[str, typer.Option(help="full, or small for a CPU")] = "full",
    processes: Annotated[int, typer.Option(min=1, help="of the load generator")] = 1,
    repeats: Annotated[int, typer.Option(min=0, help="0: as the scenario says")] = 0,
    seconds: Annotated[float, typer.Option(min=0, help="that are measured; 0: as the scenario says")] = 0,
    change: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="such as capacity=5")] = None,
    slo: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="such as ttft_p99_ms=2000")] = None,
    seed: Annotated[int, typer.Option(help="fixes when requests come and how long they are")] = 1,
    out: Annotated[Path, typer.Option(help="the run's folder is made in it")] = RESULTS,
    note: Annotated[str, typer.Option(help="a sentence for the report")] = "",
    warm: Annotated[bool, typer.Option("--warm/--no-warm", help="ask a little before the first repeat")] = True,
) -> None:
    """Measure a server under a scenario. Exit code 1 where an SLO was missed."""
    given.end_in_order()
    changes = options.overrides(change or [])
    changes |= {f"slo.{name}": value for name, value in options.pairs(slo or [], "--slo", "ttft_p99_ms=2000").items()}
    if seconds:
        changes["shape.seconds"] = str(seconds)
    asked = scenario.load(name, scale=scale, overrides=changes)
    target = options.target(
        asked, url=url, model=model, key_file=key_file, key_env=key_env, keys=keys or (), data_folder=data_folder,
        metrics_url=metrics_url, metrics_token_env=metrics_token_env, engines=engine or (), direct=direct,
    )  # fmt: skip
    for label in options.without_own_key(asked, target) if not make_keys else ():
        say(
            f"tenant {label} has no key of its own and uses the run's, so tenants are not told apart: give one with "
            f"--keys {label}=VARIABLE or in {asked.credential(label).env}, or let --make-keys make some"
        )
    try:
        with tenants.with_keys(target, asked, say) if make_keys else contextlib.nullcontext(target) as keyed:
            folder = runs.run(
                keyed, asked, out=out, repeats=repeats or asked.repeats, processes=processes, scale=scale, seed=seed,
                progress=say, warm=warm, note=note,
            )  # fmt: skip
    except runs.RunFailure as failure:
        if (failure.folder / "result.json").is_file():
            show(failure.folder)
        raise
    except KeyboardInterrupt:
        raise LoadFailure("interrupted", Exit.INTERRUPTED) from None
    made = show(folder)
    if not made.met:
        raise LoadFailure("an SLO was missed", Exit.MISSED)
    if not any(repeat.summary.requests for repeat in made.repeats):
        raise LoadFailure("no request was due in what was measured: less warm-up, or measure longer", Exit.MISSED)
    if made.partial:
        raise LoadFailure(f"the run is partial: {'; '.join(made.partial_reasons)}", Exit.MISSED)


def show(folder: Path) -> Result:
    """Prints the result, and returns it."""
    made = result.load(folder)
    print(f"\n{table.text(made)}\n\nreport: {folder / 'report.html'}", flush=True)
    return made


def say(line: str) -> None:
    print(line, flush=True)

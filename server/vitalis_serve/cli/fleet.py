"""`vitalis-serve fleet`: asks the running supervisor over its command socket; `explain` asks control."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vitalis_serve.cli.failure import fail
from vitalis_serve.cli.numbers import whole
from vitalis_serve.control import client as control
from vitalis_serve.settings import load
from vitalis_serve.supervise.commands import NotRunning, request
from vitalis_serve.supervise.folders import run_folder

CONFIG_HELP = "The configuration file; default: $VITALIS_CONFIG, else config/gpt-oss.yaml."
Config = Annotated[Path | None, typer.Option("--config", envvar="VITALIS_CONFIG", help=CONFIG_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

commands = typer.Typer(no_args_is_help=True, help="See and change the running fleet.")


def register(app: typer.Typer) -> None:
    app.add_typer(commands, name="fleet")


@commands.command()
def status(config: Config = None, as_json: Json = False) -> None:
    """Every process of the tree and what it is doing."""
    answer = _ask(config, {"command": "status"})
    if as_json:
        print(json.dumps({name: value for name, value in answer.items() if name not in ("done", "ok")}, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("NAME", "KIND", "STATE", "PID", "RESTARTS", "UP", "DETAIL"):
        table.add_column(title, overflow="fold")
    for child in answer["children"]:
        up = _duration(child["uptime_seconds"])
        pid = "" if child["pid"] is None else str(child["pid"])
        row = (child["name"], child["kind"], child["state"], pid, str(child["restarts"]), up, child["detail"])
        table.add_row(*row)
    console = Console()
    console.print(table, markup=False)
    console.print(f"gateway {_place(answer['gateway'])}   control {_place(answer['control'])}", markup=False)


@commands.command()
def scale(
    replicas: Annotated[str, typer.Argument(help="How many replicas there are to be, 0 to 1024.")],
    config: Config = None,
) -> None:
    """Start or drain replicas until there are so many; kept over restarts."""
    _order(config, {"command": "scale", "replicas": whole("REPLICAS", replicas, 0, 1024, "`fleet scale 2`")})


@commands.command()
def drain(replica: Annotated[str, typer.Argument(help="For example engine-0.")], config: Config = None) -> None:
    """No new requests there, let what runs end, stop it; it stays stopped until restarted."""
    _order(config, {"command": "drain", "replica": replica})


@commands.command()
def restart(
    replica: Annotated[str | None, typer.Argument(help="For example engine-0; all, in turn, if left out.")] = None,
    config: Config = None,
) -> None:
    """Drain, stop and start replicas, one at a time."""
    _order(config, {"command": "restart", "replica": replica})


@commands.command()
def explain(
    model: Annotated[str, typer.Option(help="The route that a request would name.")],
    tenant: Annotated[str, typer.Option(help="Whose request it would be.")] = "",
    class_: Annotated[str, typer.Option("--class", help="Of its key: emergency, interactive, standard, batch.")] = (
        "standard"
    ),
    prompt: Annotated[str | None, typer.Option(help="Its first user message; kept nowhere.")] = None,
    session: Annotated[str, typer.Option(help="Its x-session-id.")] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Which replica a chat would get just now, and why. Changes nothing."""
    wanted: dict[str, Any] = {"model": model, "tenant": tenant, "class": class_, "session": session}
    if prompt is not None:
        wanted["body"] = {"messages": [{"role": "user", "content": prompt}]}
    try:
        answer = control.Client.of_folder(load(config, os.environ).data_folder).call("POST", "/v1/explain", wanted)
    except control.NotRunning as exc:
        fail(str(exc))
    except control.Refused as exc:
        fail(str(exc), 2 if exc.status == 400 else 1)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    fallback = ", a fallback" if answer["fallback"] else ""
    console = Console()
    console.print(f"{answer['chosen'] or 'no replica now'}: {answer['reason']}", markup=False)
    console.print(
        f"route {answer['route']}   model {answer['model']}{fallback}   class {answer['class']}   "
        f"policy {answer['policy']}   waiting {answer['queued']}",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for title in ("PLACE", "REPLICA", "WHY HERE", "LACKS"):
        table.add_column(title, overflow="fold")
    for line in answer["ranking"]:
        table.add_row(str(line["place"]), line["replica"], line["why_here"], line["lacks"] or "-")
    console.print(table, markup=False)


def _order(config: Path | None, command: dict[str, Any]) -> None:
    print(_ask(config, command)["message"])


def _ask(config: Path | None, command: dict[str, Any]) -> dict[str, Any]:
    """The last answer; progress goes to standard error. Exits with 1 and one sentence where it fails."""
    data_folder = load(config, os.environ).data_folder
    answer: dict[str, Any] = {}
    try:
        for answer in request(run_folder(data_folder) / "supervisor.sock", command):
            if not answer["done"]:
                typer.echo(answer["message"], err=True)
    except NotRunning as exc:
        fail(f"nothing runs on the data folder {data_folder} ({exc}): start it with `vitalis-serve up`")
    if not answer["ok"]:
        fail(answer["message"])
    return answer


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _place(address: dict[str, Any]) -> str:
    return f"{address['host']}:{address['port']}" if address.get("port") else "-"

"""`tenants` and `keys`: through control's HTTP API on this machine, with the token of the data folder."""

import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from vitalis_serve.cli.failure import fail
from vitalis_serve.cli.numbers import whole
from vitalis_serve.control.client import Client, NotRunning, Refused

MOST_DAYS = 3660  # control's own limit

Config = Annotated[
    Path | None,
    typer.Option("--config", help="The configuration file (default config/gpt-oss.yaml, or VITALIS_CONFIG)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

tenants = typer.Typer(help="Who keys belong to: a product, a team, a customer.", no_args_is_help=True)
keys = typer.Typer(help="Credentials of tenants.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds `tenants` and `keys`."""
    app.add_typer(tenants, name="tenants")
    app.add_typer(keys, name="keys")


@tenants.command("create")
def create_tenant(
    name: str, notes: Annotated[str, typer.Option(help="For people to read.")] = "", config: Config = None
) -> None:
    """Make a tenant."""
    with _control(config) as (client, _):
        made = client.call("POST", "/v1/tenants", {"name": name, "notes": notes})
    print(f"tenant {made['name']} made; next: vitalis-serve keys create --tenant {made['name']}")


@tenants.command("list")
def list_tenants(as_json: AsJson = False, config: Config = None) -> None:
    """List all tenants."""
    with _control(config) as (client, _):
        found = client.call("GET", "/v1/tenants")["tenants"]
    _print(found, as_json, ("name", "status", "created_at", "notes"))


@tenants.command("revoke")
def revoke_tenant(name: str, config: Config = None) -> None:
    """Close a tenant: none of its keys opens anything any more."""
    with _control(config) as (client, _):
        changed = client.call("DELETE", f"/v1/tenants/{quote(name, safe='')}")
    print(f"tenant {changed['name']} revoked, {_force(changed)}")


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Whose key it is.")],
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    class_: Annotated[str, typer.Option("--class", help="emergency, interactive, standard or batch.")] = "standard",
    scopes: Annotated[str, typer.Option(help="Of inference, debug, metrics, admin; commas between.")] = "inference",
    routes: Annotated[str, typer.Option(help="Routes it may use, commas between; * for all.")] = "*",
    expires_in: Annotated[
        str | None, typer.Option(metavar="DAYS", help=f"Days until it expires, 1 to {MOST_DAYS}; default: never.")
    ] = None,
    notes: Annotated[str, typer.Option(help="For people to read.")] = "",
    output: Annotated[Path | None, typer.Option(help="Write the key there (0600) instead of showing it.")] = None,
    config: Config = None,
) -> None:
    """Make a key. It is shown once, on a terminal; else it is written to a private file."""
    wanted = {
        "tenant": tenant,
        "name": name,
        "class": class_,
        "scopes": _words(scopes),
        "routes": _words(routes),
        "notes": notes,
        "expires_in_seconds": None if expires_in is None else _days(expires_in) * 86_400,
    }
    with _control(config) as (client, data_folder), key_outlet(data_folder, output) as outlet:
        made = client.call("POST", "/v1/keys", wanted)
        print(outlet.deliver(made["id"], made["key"]))
    sys.stderr.write(f"key {made['id']} of tenant {made['tenant']}, {_force(made)}\n")


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """List keys, revoked and expired ones among them. Secrets are not known to anyone."""
    with _control(config) as (client, _):
        query = "" if tenant is None else f"?tenant={quote(tenant, safe='')}"
        found = client.call("GET", f"/v1/keys{query}")["keys"]
    columns = ("id", "tenant", "name", "class", "status", "scopes", "routes", "created_at", "expires_at")
    _print(found, as_json, columns)


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(metavar="ID")], config: Config = None) -> None:
    """Close a key: the id is the part of it between the underscores."""
    with _control(config) as (client, _):
        changed = client.call("DELETE", f"/v1/keys/{quote(key_id, safe='')}")
    key = f"key {changed['id']} of tenant {changed['tenant']}"
    if changed["already_revoked"]:
        print(f"{key} was revoked already, on {_cell('revoked_at', changed['revoked_at'])} UTC")
    else:
        print(f"{key} revoked, {_force(changed)}")


class KeyOutlet:
    """Where a new key goes: a terminal, or a file that is there, private and writable before the key is
    made."""

    def __init__(self, staged: Path | None, folder: Path, wanted: Path | None) -> None:
        self._staged = staged
        self._folder = folder
        self._wanted = wanted

    def deliver(self, key_id: str, key: str) -> str:
        """What to print: the key itself, or the path of the file that holds it."""
        if self._staged is None:
            return key
        self._staged.write_text(f"{key}\n", "ascii")
        path = self._wanted or self._folder / f"key-{key_id}"
        if path != self._staged:
            self._staged.rename(path)
        return str(path)


@contextmanager
def key_outlet(data_folder: Path, output: Path | None = None) -> Iterator[KeyOutlet]:
    """Prepares the place for a key that is about to be made: a key that nobody could read would be lost.

    Ends the command (exit code 1) where the file cannot be made; an existing `output` is never overwritten.
    """
    if output is None and sys.stdout.isatty():
        yield KeyOutlet(None, data_folder, None)
        return
    staged = output or data_folder / f".key-{secrets.token_hex(6)}"
    try:
        os.close(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        fail(f"the file {staged} for the key cannot be made ({error.strerror}): name another with --output")
    try:
        yield KeyOutlet(staged, data_folder, output)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


@contextmanager
def _control(config: Path | None) -> Iterator[tuple[Client, Path]]:
    """The running control and its data folder. What it refuses ends the command with its sentence."""
    from vitalis_serve.settings import load

    data_folder = load(config, os.environ).data_folder
    try:
        yield Client.of_folder(data_folder), data_folder
    except NotRunning as error:
        fail(str(error))
    except Refused as error:
        fail(str(error), 2 if error.status == 400 else 1)


def _force(changed: dict[str, Any]) -> str:
    return "in force" if changed["applied"] else "in force as soon as every worker has acknowledged it"


def _days(text: str) -> int:
    return whole("--expires-in", text, 1, MOST_DAYS, "--expires-in 90 for ninety days")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _print(rows: list[dict[str, Any]], as_json: bool, columns: tuple[str, ...]) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    cells = [[_cell(column, row[column]) for column in columns] for row in rows]
    table = [[column.removesuffix("_at") for column in columns], *cells]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "never" if column == "expires_at" else "-"
    if column.endswith("_at"):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M")
    return ",".join(value) if isinstance(value, list) else str(value) or "-"

"""`vitalis-serve keys`."""

import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from vitalis_serve.cli.asking import AsJson, Config, cell, control, force, show
from vitalis_serve.cli.failure import fail
from vitalis_serve.cli.limits import Concurrent, Limit, PerDay, PerMonth, asked, told
from vitalis_serve.cli.numbers import duration, whole
from vitalis_serve.cli.outlet import secret_outlet

MOST_DAYS = 3660  # control's own limits
MOST_OVERLAP_DAYS = 366

KeyId = Annotated[str, typer.Argument(metavar="ID", help="The part of it between the underscores.")]

keys = typer.Typer(help="Credentials of tenants.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds `keys`."""
    app.add_typer(keys, name="keys")


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
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent: Concurrent = None,
    tokens_per_day: PerDay = None,
    tokens_per_month: PerMonth = None,
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
        "limits": asked(requests_per_minute, tokens_per_minute, concurrent, tokens_per_day, tokens_per_month),
    }
    with control(config) as (client, data_folder), secret_outlet(data_folder, output) as outlet:
        made = client.call("POST", "/v1/keys", wanted)
        print(outlet.deliver(f"key-{made['id']}", made["key"]))
    limited = told(made["limits"])
    within = f" with {limited}" if limited else ""
    sys.stderr.write(f"key {made['id']} of tenant {made['tenant']}{within}, {force(made)}\n")


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """List keys, revoked and expired ones among them. Secrets are not known to anyone."""
    with control(config) as (client, _):
        query = "" if tenant is None else f"?tenant={quote(tenant, safe='')}"
        found = client.call("GET", f"/v1/keys{query}")["keys"]
    columns = (
        "id",
        "tenant",
        "name",
        "class",
        "status",
        "scopes",
        "routes",
        "created_at",
        "expires_at",
        "last_used_at",
    )
    show(found, as_json, columns)


@keys.command("rotate")
def rotate_key(
    key_id: KeyId,
    overlap: Annotated[
        str,
        typer.Option("--overlap", "--for", metavar="TIME", help="So long the old secret opens too, e.g. 24h or 0s."),
    ] = "24h",
    output: Annotated[Path | None, typer.Option(help="Write the new key there (0600) instead of showing it.")] = None,
    config: Config = None,
) -> None:
    """Give a key another secret, while the one before still opens; rotating again meanwhile ends that one.

    The new one is shown once, on a terminal; else it is written to a private file."""
    seconds = duration("--overlap", overlap, MOST_OVERLAP_DAYS * 86_400, "--overlap 24h")
    with control(config) as (client, data_folder), secret_outlet(data_folder, output) as outlet:
        made = client.call("POST", f"{_of(key_id)}/rotate", {"overlap_seconds": seconds})
        print(outlet.deliver(f"key-{made['id']}", made["key"]))
    until = made["old_until"]
    old = (
        "the old one opens nothing now" if until is None else f"the old one opens until {cell('old_until', until)} UTC"
    )
    sys.stderr.write(f"key {made['id']} of tenant {made['tenant']} has a new secret, {force(made)}; {old}\n")


@keys.command("change")
def change_key(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    class_: Annotated[str | None, typer.Option("--class", help="emergency, interactive, standard or batch.")] = None,
    scopes: Annotated[str | None, typer.Option(help="Of inference, debug, metrics, admin; commas between.")] = None,
    routes: Annotated[str | None, typer.Option(help="Routes it may use, commas between; * for all.")] = None,
    expires_in: Annotated[
        str | None, typer.Option(metavar="DAYS", help=f"Days from now, 1 to {MOST_DAYS}; or never, or now.")
    ] = None,
    notes: Annotated[str | None, typer.Option(help="For people to read.")] = None,
    config: Config = None,
) -> None:
    """Change what a key may do, or when it expires. What is left out stays as it is."""
    wanted: dict[str, Any] = {"name": name, "class": class_, "notes": notes}
    wanted |= {"scopes": scopes and _words(scopes), "routes": routes and _words(routes)}
    wanted = {field: value for field, value in wanted.items() if value is not None}
    if expires_in is not None:
        words = {"never": None, "now": 0}
        wanted["expires_in_seconds"] = words[expires_in] if expires_in in words else _days(expires_in) * 86_400
    with control(config) as (client, _):
        changed = client.call("PATCH", _of(key_id), wanted)
    print(f"key {changed['id']} of tenant {changed['tenant']} changed, {force(changed)}")


@keys.command("import")
def import_keys(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML: lists tenants, keys and limits.")],
    output: Annotated[Path | None, typer.Option(help="Write new keys there (0600) instead of showing them.")] = None,
    skip_existing: Annotated[bool, typer.Option(help="Leave what is there already as it is.")] = False,
    config: Config = None,
) -> None:
    """Add tenants, keys and limits from a file: all of them, or none where a row is wrong.

    New secrets are shown once, on a terminal; else they are written to a private file."""
    try:
        content = file.read_bytes()
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}", 2)
    with control(config) as (client, data_folder), secret_outlet(data_folder, output) as outlet:
        made = client.call("POST", f"/v1/import?skip_existing={str(skip_existing).lower()}", content)
        lines = [f"{row['tenant']}\t{row['name']}\t{row['key']}" for row in made["secrets"]]
        if lines:
            print(outlet.deliver("keys", "\n".join(lines)))
        else:
            outlet.nothing()
    counts = ", ".join(f"{made[what]} {what}" for what in ("tenants", "keys", "limits"))
    skipped = f"; {made['skipped']} rows were there already" if skip_existing else ""
    sys.stderr.write(f"imported {counts}, {force(made)}{skipped}\n")


@keys.command("revoke")
def revoke_key(key_id: KeyId, config: Config = None) -> None:
    """Close a key: the id is the part of it between the underscores."""
    with control(config) as (client, _):
        changed = client.call("DELETE", _of(key_id))
    key = f"key {changed['id']} of tenant {changed['tenant']}"
    if changed["already_revoked"]:
        print(f"{key} was revoked already, on {cell('revoked_at', changed['revoked_at'])} UTC")
    else:
        print(f"{key} revoked, {force(changed)}")


def _of(key_id: str) -> str:
    return f"/v1/keys/{quote(key_id, safe='')}"


def _days(text: str) -> int:
    return whole("--expires-in", text, 1, MOST_DAYS, "--expires-in 90 for ninety days")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]

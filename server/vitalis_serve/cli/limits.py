"""`vitalis-serve limits`."""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from vitalis_serve.cli.asking import AsJson, Config, control, force, show
from vitalis_serve.errors import ConfigurationError

MOST = 10**15  # control's own limit
FIELDS = ("requests_per_minute", "tokens_per_minute", "concurrent", "tokens_per_day", "tokens_per_month")

Kind = Annotated[str, typer.Argument(metavar="KIND", help="key, tenant or route.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the tenant or route; the id of the key.")]

limits = typer.Typer(help="What a key, a tenant or a route may use.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds `limits`."""
    app.add_typer(limits, name="limits")


@limits.command("set")
def set_limits(
    kind: Kind,
    name: Name,
    requests_per_minute: Annotated[str | None, typer.Option(metavar="N|none")] = None,
    tokens_per_minute: Annotated[str | None, typer.Option(metavar="N|none")] = None,
    concurrent: Annotated[str | None, typer.Option(metavar="N|none", help="Requests at once.")] = None,
    tokens_per_day: Annotated[str | None, typer.Option(metavar="N|none", help="Days are UTC.")] = None,
    tokens_per_month: Annotated[str | None, typer.Option(metavar="N|none", help="Months are UTC.")] = None,
    config: Config = None,
) -> None:
    """Set some limits; none lifts one, those left out stay as they are."""
    texts = (requests_per_minute, tokens_per_minute, concurrent, tokens_per_day, tokens_per_month)
    given = {field: text for field, text in zip(FIELDS, texts, strict=True) if text is not None}
    if not given:
        raise ConfigurationError(f"give at least one of {', '.join(map(_option, FIELDS))}")
    wanted = {field: _limit(field, text) for field, text in given.items()}
    with control(config) as (client, _):
        print(_told(client.call("PATCH", _of(kind, name), wanted)))


@limits.command("list")
def list_limits(as_json: AsJson = False, config: Config = None) -> None:
    """List all limits."""
    with control(config) as (client, _):
        found = client.call("GET", "/v1/limits")["limits"]
    show(found, as_json, ("kind", "name", *FIELDS))


@limits.command("clear")
def clear_limits(kind: Kind, name: Name, config: Config = None) -> None:
    """Lift all limits of a key, a tenant or a route."""
    with control(config) as (client, _):
        print(_told(client.call("DELETE", _of(kind, name))))


def _of(kind: str, name: str) -> str:
    return f"/v1/limits/{quote(kind, safe='')}/{quote(name, safe='')}"


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _limit(field: str, text: str) -> int | None:
    if text == "none":
        return None
    if text.isascii() and text.isdigit() and len(text) < 20 and 1 <= int(text) <= MOST:
        return int(text)
    raise ConfigurationError(
        f"{_option(field)} {text[:40]!r}: give a whole number from 1 to {MOST}, or none for no limit of this kind; to "
        "shut someone out, revoke the key or tenant"
    )


def _told(changed: dict[str, Any]) -> str:
    given = [f"{field.replace('_', ' ')} {changed[field]}" for field in FIELDS if changed[field] is not None]
    return f"limits of {changed['kind']} {changed['name']}: {', '.join(given) or 'none'}; {force(changed)}"

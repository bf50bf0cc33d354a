"""`vitalis-serve limits`, and the options of other commands that say limits."""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from vitalis_serve.cli.asking import AsJson, Config, control, force, show
from vitalis_serve.errors import ConfigurationError

MOST = 10**15  # control's own limit
FIELDS = ("requests_per_minute", "tokens_per_minute", "concurrent", "tokens_per_day", "tokens_per_month")

Kind = Annotated[str, typer.Argument(metavar="KIND", help="key, tenant or route.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the tenant or route; the id of the key.")]

# The options of FIELDS, in their order; None: not given.
Limit = Annotated[str | None, typer.Option(metavar="N|none")]
Concurrent = Annotated[str | None, typer.Option(metavar="N|none", help="Requests at once.")]
PerDay = Annotated[str | None, typer.Option(metavar="N|none", help="Days are UTC.")]
PerMonth = Annotated[str | None, typer.Option(metavar="N|none", help="Months are UTC.")]

limits = typer.Typer(help="What a key, a tenant or a route may use.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds `limits`."""
    app.add_typer(limits, name="limits")


@limits.command("set")
def set_limits(
    kind: Kind,
    name: Name,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent: Concurrent = None,
    tokens_per_day: PerDay = None,
    tokens_per_month: PerMonth = None,
    config: Config = None,
) -> None:
    """Set some limits; none lifts one, those left out stay as they are."""
    wanted = asked(requests_per_minute, tokens_per_minute, concurrent, tokens_per_day, tokens_per_month)
    if not wanted:
        raise ConfigurationError(f"give at least one of {', '.join(map(_option, FIELDS))}")
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


def asked(*texts: str | None) -> dict[str, int | None]:
    """What was given of the options of FIELDS, as control takes it. Raises ConfigurationError."""
    return {field: _limit(field, text) for field, text in zip(FIELDS, texts, strict=True) if text is not None}


def told(given: dict[str, int | None]) -> str:
    """Limits in words; "" where there are none."""
    return ", ".join(f"{field.replace('_', ' ')} {given[field]}" for field in FIELDS if given[field] is not None)


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
    return f"limits of {changed['kind']} {changed['name']}: {told(changed) or 'none'}; {force(changed)}"

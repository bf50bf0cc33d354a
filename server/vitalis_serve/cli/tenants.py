"""`vitalis-serve tenants`."""

from typing import Annotated
from urllib.parse import quote

import typer

from vitalis_serve.cli.asking import AsJson, Config, control, force, show
from vitalis_serve.cli.limits import Concurrent, Limit, PerDay, PerMonth, asked, told

tenants = typer.Typer(help="Who keys belong to: a product, a team, a customer.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds `tenants`."""
    app.add_typer(tenants, name="tenants")


@tenants.command("create")
def create_tenant(
    name: str,
    notes: Annotated[str, typer.Option(help="For people to read.")] = "",
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent: Concurrent = None,
    tokens_per_day: PerDay = None,
    tokens_per_month: PerMonth = None,
    config: Config = None,
) -> None:
    """Make a tenant."""
    limits = asked(requests_per_minute, tokens_per_minute, concurrent, tokens_per_day, tokens_per_month)
    with control(config) as (client, _):
        made = client.call("POST", "/v1/tenants", {"name": name, "notes": notes, "limits": limits})
    limited = told(made["limits"])
    within = f" with {limited}" if limited else ""
    print(f"tenant {made['name']} made{within}; next: vitalis-serve keys create --tenant {made['name']}")


@tenants.command("list")
def list_tenants(as_json: AsJson = False, config: Config = None) -> None:
    """List all tenants."""
    with control(config) as (client, _):
        found = client.call("GET", "/v1/tenants")["tenants"]
    show(found, as_json, ("name", "status", "created_at", "notes"))


@tenants.command("revoke")
def revoke_tenant(name: str, config: Config = None) -> None:
    """Close a tenant: none of its keys opens anything any more."""
    with control(config) as (client, _):
        changed = client.call("DELETE", f"/v1/tenants/{quote(name, safe='')}")
    print(f"tenant {changed['name']} revoked, {force(changed)}")

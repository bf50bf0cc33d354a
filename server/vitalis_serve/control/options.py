"""What control is told at its start, as one JSON document: `vitalis_serve.main` writes it and
`control/process.py` reads it. Plain types only: whoever starts control needs none of what control imports."""

from typing import Any

import msgspec


class RouteOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A public model name and the engine model behind it. `policy`: what else holds for the route, as the workers
    read it (`gateway/keys.py`); control only passes it on."""

    name: str
    model: str
    policy: dict[str, Any] = {}


class ControlOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Paths are absolute; their folders exist and are 0700. Port 0 lets the system choose: the address really
    listened on is in the file `address_path`, one line (`http://127.0.0.1:8081`), while control runs.

    workers: how many workers there should be: a change is in force when so many have acknowledged it.
    supervisor_socket: where fleet commands go; "" when control runs without a supervisor.
    cache_groups: tenants that share a prefix cache, by the group's name; a tenant is in one group at most.
    tenant_weights: shares of the fair queue of tenants that have another than 1.
    database_url: "" for SQLite at `database_path`.
    database_seconds: how long the store may take to answer at start.
    spool_folder: where workers leave the records of what was used; "" where nothing is recorded.
    spent_path: the sums of this day and month, for the owner of limits (`spool/spent.py`).
    keep_days, keep_daily_days: of single records of use, and of their sums by day; 0 for ever.
    issuers: each as `settings.schema.Issuer` dumps it, by alias.
    limits_redis_url: where limits are counted; "" on this host.
    apply_seconds: how long a change waits for the workers before it answers with `"applied": false`.
    collect_seconds: how long a scrape waits for the workers' reports.
    """

    database_path: str  # <data_folder>/vitalis.db
    snapshot_path: str  # <data_folder>/snapshot.json
    token_path: str  # <data_folder>/control.token
    cache_secret_path: str  # <data_folder>/cache.secret
    address_path: str  # <data_folder>/control.address
    control_socket: str  # run/control.sock
    supervisor_socket: str = ""  # run/supervisor.sock
    host: str = "127.0.0.1"
    port: int = 8081
    workers: int = 0
    routes: tuple[RouteOptions, ...] = ()
    cache_groups: dict[str, tuple[str, ...]] = {}
    tenant_weights: dict[str, float] = {}
    database_url: str = ""
    database_seconds: float = 5.0
    spool_folder: str = ""
    spent_path: str = ""
    keep_days: int = 90
    keep_daily_days: int = 0
    issuers: tuple[dict[str, Any], ...] = ()
    limits_redis_url: str = ""
    apply_seconds: float = 1.0
    collect_seconds: float = 1.0

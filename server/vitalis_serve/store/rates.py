"""Limits as the store keeps them: of a key (by its id), a tenant or a route (by its name).

Functions take the connection of a `Change`, so that limits change in one transaction with the rest.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, NamedTuple

from sqlalchemy import and_, bindparam, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from vitalis_serve.store import tables

KINDS: Final = ("key", "tenant", "route")


class Subject(NamedTuple):
    """Whose limits: `kind` is of KINDS."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Rates:
    """Limits of one subject, each above 0; None: no limit of that kind."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None

    def given(self) -> dict[str, int]:
        """Those that limit anything."""
        return {name: value for name, value in asdict(self).items() if value is not None}


async def read_rates(connection: AsyncConnection) -> dict[Subject, Rates]:
    """All there are, by kind and name."""
    rows = await connection.execute(select(tables.rates).order_by(tables.rates.c.kind, tables.rates.c.name))
    found = {}
    for row in rows.mappings():
        values = dict(row)
        subject = Subject(values.pop("kind"), values.pop("name"))
        found[subject] = Rates(**values)
    return found


async def write_rates(connection: AsyncConnection, wanted: Mapping[Subject, Rates]) -> None:
    """Replaces the limits of these subjects, and lifts them where none is given."""
    if not wanted:
        return
    here = and_(tables.rates.c.kind == bindparam("of_kind"), tables.rates.c.name == bindparam("of_name"))
    await connection.execute(delete(tables.rates).where(here), [{"of_kind": k, "of_name": n} for k, n in wanted])
    rows = [
        {"kind": subject.kind, "name": subject.name, **asdict(rates)}
        for subject, rates in wanted.items()
        if rates.given()
    ]
    if rows:
        await connection.execute(insert(tables.rates), rows)

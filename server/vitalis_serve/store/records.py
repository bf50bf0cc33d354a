"""Rows of the store as the rest of control sees them, and the changes that can be made to them.

A change is one transaction: the rows, the audit row that tells of them, and the next snapshot version.
"""

import difflib
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sqlalchemy import RowMapping, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from vitalis_serve.errors import ServeError
from vitalis_serve.store import tables
from vitalis_serve.store.database import open_database, store_errors, writing

CLASSES: Final = ("emergency", "interactive", "standard", "batch")
SCOPES: Final = ("inference", "debug", "metrics", "admin")
ACTIVE: Final = "active"
DISABLED: Final = "disabled"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who keys belong to. status: active or disabled; created_at in Unix seconds."""

    name: str
    created_at: int
    status: str = ACTIVE
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Key:
    """A credential as it may be kept: without its secret. Times in Unix seconds, None for never."""

    id: str
    tenant: str
    digest: str
    created_at: int
    name: str = ""
    class_: str = "standard"
    scopes: tuple[str, ...] = ("inference",)
    routes: tuple[str, ...] = ("*",)
    notes: str = ""
    expires_at: int | None = None
    revoked_at: int | None = None
    old_digest: str | None = None  # of the secret before the last rotation, which opens until `old_until`
    old_until: int | None = None
    last_used_at: int | None = None


@dataclass(frozen=True, slots=True)
class Act:
    """One row of the audit table: who did what to what, when (Unix seconds), from where."""

    at: int
    who: str
    action: str
    subject: str
    origin: str
    details: dict[str, Any] = field(default_factory=dict)
    id: int = 0


@dataclass(frozen=True, slots=True)
class Contents:
    """What workers need to know: all tenants, and the keys that open something."""

    tenants: tuple[Tenant, ...]
    keys: tuple[Key, ...]


class Store:
    """The open store. Every method raises ServeError (`storage_full`, `store_unavailable`) where it cannot do
    its work, and has then changed nothing."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @classmethod
    async def open(cls, path: Path, url: str = "", seconds: float = 5) -> "Store":
        """Opens and migrates: SQLite at `path`, or the PostgreSQL at `url`, which has `seconds` to answer. Raises
        StartError."""
        return cls(await open_database(path, url, seconds))

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def change(self) -> AsyncIterator["Change"]:
        """A transaction: committed at the end of the block; nothing of it happened if the block raises."""
        with store_errors():
            async with writing(self._engine) as connection:
                yield Change(connection)

    async def check(self) -> None:
        """Raises ServeError if the store does not answer."""
        with store_errors():
            async with self._engine.connect() as connection:
                await connection.execute(select(tables.state.c.snapshot_version))

    async def contents(self) -> tuple[int, Contents]:
        """The version last published and what belongs in a snapshot now, from one moment."""
        with store_errors():
            async with self._engine.connect() as connection, connection.begin():
                change = Change(connection)
                return await change.version(), await change.contents()

    async def tenants(self) -> list[Tenant]:
        with store_errors():
            async with self._engine.connect() as connection:
                return await Change(connection).tenants()

    async def keys(self, tenant: str | None = None) -> list[Key]:
        """All keys, or those of one tenant, oldest first, revoked and expired ones among them."""
        statement = select(tables.keys).order_by(tables.keys.c.created_at, tables.keys.c.id)
        if tenant is not None:
            statement = statement.where(tables.keys.c.tenant == tenant)
        with store_errors():
            async with self._engine.connect() as connection:
                return [_key(row) for row in (await connection.execute(statement)).mappings()]

    async def acts(self, limit: int, before: int | None = None) -> list[Act]:
        """The newest `limit` rows of the audit table, newest first; only those with an id below `before`."""
        statement = select(tables.audit).order_by(tables.audit.c.id.desc()).limit(limit)
        if before is not None:
            statement = statement.where(tables.audit.c.id < before)
        with store_errors():
            async with self._engine.connect() as connection:
                return [Act(**row) for row in (await connection.execute(statement)).mappings()]


class Change:
    """What can be done within one transaction of the store."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def tenants(self) -> list[Tenant]:
        rows = await self._connection.execute(select(tables.tenants).order_by(tables.tenants.c.name))
        return [Tenant(**row) for row in rows.mappings()]

    async def contents(self) -> Contents:
        owners = await self.tenants()
        statement = (
            select(tables.keys)
            .join(tables.tenants, tables.tenants.c.name == tables.keys.c.tenant)
            .where(tables.keys.c.revoked_at.is_(None), tables.tenants.c.status == ACTIVE)
            .order_by(tables.keys.c.id)
        )
        rows = await self._connection.execute(statement)
        return Contents(tuple(owners), tuple(_key(row) for row in rows.mappings()))

    async def version(self) -> int:
        """The snapshot version last published."""
        found: int = (await self._connection.execute(select(tables.state.c.snapshot_version))).scalar_one()
        return found

    async def next_version(self, above: int = 0) -> int:
        """Counts one on, and beyond `above`. Versions never go back, whatever becomes of the rows."""
        version = max(await self.version(), above) + 1
        await self._connection.execute(update(tables.state).values(snapshot_version=version))
        return version

    async def record(self, act: Act) -> None:
        """Adds a row to the audit table."""
        await self._connection.execute(
            insert(tables.audit).values(
                at=act.at,
                who=act.who,
                action=act.action,
                subject=act.subject,
                origin=act.origin,
                details=act.details,
            )
        )

    async def add_tenant(self, tenant: Tenant) -> None:
        """Raises ServeError `already_exists`: a name is given once, a disabled tenant keeps its own."""
        present = await self._connection.execute(
            select(tables.tenants.c.status).where(tables.tenants.c.name == tenant.name)
        )
        status = present.scalar()
        if status is not None:
            state = "already exists" if status == ACTIVE else "existed and was revoked; names are not given twice"
            raise ServeError("already_exists", f"tenant {tenant.name!r} {state}: choose another name", param="name")
        await self._connection.execute(
            insert(tables.tenants).values(
                name=tenant.name, status=tenant.status, notes=tenant.notes, created_at=tenant.created_at
            )
        )

    async def disable_tenant(self, name: str) -> Tenant:
        """Its keys stop opening anything. Raises ServeError `tenant_not_found`. Twice is as good as once."""
        tenant = await self.tenant(name)
        await self._connection.execute(
            update(tables.tenants).where(tables.tenants.c.name == name).values(status=DISABLED)
        )
        return Tenant(tenant.name, tenant.created_at, DISABLED, tenant.notes)

    async def tenant(self, name: str) -> Tenant:
        """Raises ServeError `tenant_not_found`, naming the nearest tenant there is."""
        tenants = {tenant.name: tenant for tenant in await self.tenants()}
        if name not in tenants:
            raise ServeError("tenant_not_found", f"there is no tenant {name!r}{nearest(name, tenants)}", param="tenant")
        return tenants[name]

    async def add_key(self, key: Key) -> None:
        """Raises ServeError `tenant_not_found`, or `already_exists` if the tenant is disabled."""
        tenant = await self.tenant(key.tenant)
        if tenant.status != ACTIVE:
            raise ServeError("tenant_disabled", f"tenant {key.tenant!r} was revoked: it gets no new keys")
        await self._connection.execute(
            insert(tables.keys).values(
                id=key.id,
                tenant=key.tenant,
                name=key.name,
                digest=key.digest,
                class_=key.class_,
                scopes=list(key.scopes),
                routes=list(key.routes),
                notes=key.notes,
                created_at=key.created_at,
                expires_at=key.expires_at,
                revoked_at=key.revoked_at,
            )
        )

    async def revoke_key(self, key_id: str, now: int) -> tuple[Key, bool]:
        """The key, and whether it was revoked before: it then keeps its first time. Raises ServeError
        `key_not_found`."""
        this = tables.keys.c.id == key_id
        row = (await self._connection.execute(select(tables.keys).where(this))).mappings().one_or_none()
        if row is None:
            ids = (await self._connection.execute(select(tables.keys.c.id))).scalars().all()
            raise ServeError("key_not_found", f"there is no key {key_id!r}{nearest(key_id, ids)}", param="id")
        key = _key(row)
        if key.revoked_at is not None:
            return key, True
        await self._connection.execute(update(tables.keys).where(this).values(revoked_at=now))
        return replace(key, revoked_at=now), False


def nearest(word: str, known: Iterable[str]) -> str:
    """What to add to "there is no X": the nearest of what there is, or all of it if that is a short list."""
    choices: Sequence[str] = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    if not choices:
        return ": there is none yet"
    return f"; there are: {', '.join(choices)}" if len(choices) <= 8 else ""


def _key(row: RowMapping) -> Key:
    fields = dict(row)
    fields["class_"] = fields.pop("class")  # a word that Python keeps for itself
    return Key(**{**fields, "scopes": tuple(row["scopes"]), "routes": tuple(row["routes"])})

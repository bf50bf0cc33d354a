"""Rows of the store as the rest of control sees them, and the changes that can be made to them.

A change is one transaction: the rows, the audit row that tells of them, and the next snapshot version.
"""

import difflib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sqlalchemy import RowMapping, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from vitalis_serve.errors import ServeError
from vitalis_serve.store import tables
from vitalis_serve.store.database import open_database, store_errors, writing
from vitalis_serve.store.rates import Rates, Subject, read_rates, write_rates
from vitalis_serve.store.usage import Usage

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
    """What workers need to know: all tenants, the keys that open something, everyone's limits; and the secret behind
    tenants' salts, where the store has one."""

    tenants: tuple[Tenant, ...]
    keys: tuple[Key, ...]
    rates: Mapping[Subject, Rates] = field(default_factory=dict)
    cache_secret: str | None = None


class Store:
    """The open store. Every method raises ServeError (`storage_full`, `store_unavailable`) where it cannot do
    its work, and has then changed nothing."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.usage = Usage(engine)

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

    @asynccontextmanager
    async def reading(self) -> AsyncIterator["Change"]:
        """For what changes nothing: it waits for no writer."""
        with store_errors():
            async with self._engine.connect() as connection:
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

    async def version(self) -> int:
        """The version last published, by this control or by another one on the same store."""
        with store_errors():
            async with self._engine.connect() as connection:
                return await Change(connection).version()

    async def tenants(self) -> list[Tenant]:
        with store_errors():
            async with self._engine.connect() as connection:
                return await Change(connection).tenants()

    async def keys(self, tenant: str | None = None) -> list[Key]:
        """All keys, or those of one tenant, oldest first, revoked and expired ones among them. Raises ServeError
        `tenant_not_found`."""
        with store_errors():
            async with self._engine.connect() as connection:
                change = Change(connection)
                if tenant is not None:
                    await change.tenant(tenant)
                return await change.keys(tenant)

    async def rates(self) -> dict[Subject, Rates]:
        """All limits, by kind and name."""
        with store_errors():
            async with self._engine.connect() as connection:
                return await read_rates(connection)

    async def acts(self, limit: int, before: int | None = None) -> list[Act]:
        """The newest `limit` rows of the audit table, newest first; only those with an id below `before`."""
        statement = select(tables.audit).order_by(tables.audit.c.id.desc()).limit(limit)
        if before is not None:
            statement = statement.where(tables.audit.c.id < before)
        with store_errors():
            async with self._engine.connect() as connection:
                return [Act(**row) for row in (await connection.execute(statement)).mappings()]


class Change:
    """What can be done within one transaction of the store. `connection`: for what has a file of its own."""

    def __init__(self, connection: AsyncConnection) -> None:
        self.connection = connection

    async def alone(self) -> None:
        """Waits until no other control changes anything, and lets none until this transaction ends: what is read from
        here on holds until then. SQLite's writers are alone anyway."""
        await self.connection.execute(select(tables.state.c.id).with_for_update())

    async def tenants(self) -> list[Tenant]:
        rows = await self.connection.execute(select(tables.tenants).order_by(tables.tenants.c.name))
        return [Tenant(**row) for row in rows.mappings()]

    async def contents(self) -> Contents:
        owners = await self.tenants()
        statement = (
            select(tables.keys)
            .join(tables.tenants, tables.tenants.c.name == tables.keys.c.tenant)
            .where(tables.keys.c.revoked_at.is_(None), tables.tenants.c.status == ACTIVE)
            .order_by(tables.keys.c.id)
        )
        rows = await self.connection.execute(statement)
        keys = tuple(_key(row) for row in rows.mappings())
        secret = (await self.connection.execute(select(tables.state.c.cache_secret))).scalar_one()
        return Contents(tuple(owners), keys, await read_rates(self.connection), secret)

    async def share_cache_secret(self, secret: str) -> None:
        """Keeps it for all that use this store, unless there is one already."""
        unset = tables.state.c.cache_secret.is_(None)
        await self.connection.execute(update(tables.state).where(unset).values(cache_secret=secret))

    async def version(self) -> int:
        """The snapshot version last published."""
        found: int = (await self.connection.execute(select(tables.state.c.snapshot_version))).scalar_one()
        return found

    async def next_version(self, above: int = 0) -> int:
        """Counts one on, and beyond `above`. Versions never go back, whatever becomes of the rows."""
        version = max(await self.version(), above) + 1
        await self.connection.execute(update(tables.state).values(snapshot_version=version))
        return version

    async def record(self, *acts: Act) -> None:
        """Adds rows to the audit table."""
        rows = [{name: value for name, value in asdict(act).items() if name != "id"} for act in acts]
        if rows:
            await self.connection.execute(insert(tables.audit), rows)

    async def add_tenant(self, tenant: Tenant) -> None:
        """Raises ServeError `already_exists`: a name is given once, a disabled tenant keeps its own."""
        present = await self.connection.execute(
            select(tables.tenants.c.status).where(tables.tenants.c.name == tenant.name)
        )
        status = present.scalar()
        if status is not None:
            state = "already exists" if status == ACTIVE else "existed and was revoked; names are not given twice"
            raise ServeError("already_exists", f"tenant {tenant.name!r} {state}: choose another name", param="name")
        await self.add_tenants([tenant])

    async def add_tenants(self, tenants: Sequence[Tenant]) -> None:
        """Those of which it is known already that none is there."""
        if tenants:
            await self.connection.execute(insert(tables.tenants), [asdict(tenant) for tenant in tenants])

    async def disable_tenant(self, name: str) -> Tenant:
        """Its keys stop opening anything. Raises ServeError `tenant_not_found`. Twice is as good as once."""
        tenant = await self.tenant(name)
        await self.connection.execute(
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
        """Raises ServeError `tenant_not_found`, or `tenant_disabled`."""
        tenant = await self.tenant(key.tenant)
        if tenant.status != ACTIVE:
            raise ServeError("tenant_disabled", f"tenant {key.tenant!r} was revoked: it gets no new keys")
        await self.add_keys([key])

    async def add_keys(self, keys: Sequence[Key]) -> None:
        """Those of which it is known already that they may be added."""
        rows = [{**asdict(key), "scopes": list(key.scopes), "routes": list(key.routes)} for key in keys]
        if rows:
            await self.connection.execute(insert(tables.keys), rows)

    async def keys(self, tenant: str | None = None) -> list[Key]:
        """As `Store.keys`; of a tenant that is not there it has none."""
        statement = select(tables.keys).order_by(tables.keys.c.created_at, tables.keys.c.id)
        if tenant is not None:
            statement = statement.where(tables.keys.c.tenant == tenant)
        return [_key(row) for row in (await self.connection.execute(statement)).mappings()]

    async def key(self, key_id: str) -> Key:
        """Raises ServeError `key_not_found`, naming the nearest key there is."""
        row = None
        if key_id.isascii() and key_id.isalnum():  # there are characters that PostgreSQL cannot even be asked for
            this = tables.keys.c.id == key_id
            row = (await self.connection.execute(select(tables.keys).where(this))).mappings().one_or_none()
        if row is None:
            ids = (await self.connection.execute(select(tables.keys.c.id))).scalars().all()
            raise ServeError("key_not_found", f"there is no key {key_id[:64]!r}{nearest(key_id[:64], ids)}", param="id")
        return _key(row)

    async def open_key(self, key_id: str) -> Key:
        """As `key`; raises `key_closed` too, where it was revoked."""
        key = await self.key(key_id)
        if key.revoked_at is not None:
            raise ServeError("key_closed", f"key {key_id!r} was revoked, for good: make a new one", param="id")
        return key

    async def rotate_key(self, key_id: str, digest: str, now: int, overlap: int) -> Key:
        """Gives it another secret; the one before opens for `overlap` seconds more, the one before that no longer.

        Raises ServeError `key_not_found`, or `key_closed` where it opens nothing."""
        key = await self.open_key(key_id)
        if key.expires_at is not None and key.expires_at <= now:
            raise ServeError("key_closed", f"key {key_id!r} has expired: give it another expiry first", param="id")
        old = (key.digest, now + overlap) if overlap else (None, None)
        return await self._set_key(key, {"digest": digest, "old_digest": old[0], "old_until": old[1]})

    async def change_key(self, key_id: str, values: Mapping[str, Any]) -> Key:
        """Sets fields of a key by their names. Raises ServeError `key_not_found`, or `key_closed` if it was revoked."""
        return await self._set_key(await self.open_key(key_id), values)

    async def revoke_key(self, key_id: str, now: int) -> tuple[Key, bool]:
        """The key, and whether it was revoked before: it then keeps its first time. Raises ServeError
        `key_not_found`."""
        key = await self.key(key_id)
        if key.revoked_at is not None:
            return key, True
        return await self._set_key(key, {"revoked_at": now}), False

    async def _set_key(self, key: Key, values: Mapping[str, Any]) -> Key:
        if values:
            plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            await self.connection.execute(update(tables.keys).where(tables.keys.c.id == key.id).values(plain))
        return replace(key, **values)

    async def rates(self) -> dict[Subject, Rates]:
        """All limits, by kind and name."""
        return await read_rates(self.connection)

    async def set_rates(self, wanted: Mapping[Subject, Rates]) -> None:
        """Replaces the limits of these subjects, and lifts them where none is given."""
        await write_rates(self.connection, wanted)


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

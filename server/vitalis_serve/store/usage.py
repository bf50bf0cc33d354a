"""The ledger in the store: single requests, their sums by day, and up to where each spool file is in it.

How it works: rows and the mark of the file that they came from are one transaction, and a mark moves only from
where it was thought to be. So a batch is in the store once, whoever was killed when. Roll-up moves rows into the sums a
few thousand at a time, each time in one transaction: at every moment a request is in one of the two tables, so they
are simply added up, and a record that comes late for a day long summed up is moved there the next time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    bindparam,
    case,
    delete,
    func,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from vitalis_serve.store.database import store_errors, writing
from vitalis_serve.store.tables import keys, spool_files, usage, usage_daily

DAY_MS: Final = 86_400_000
GROUPS: Final = ("day", "tenant", "key", "route")
TOKENS: Final = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
COUNTS: Final = ("requests", "failed", "estimated", *TOKENS)
SUCCEEDED: Final = ("ok", "client_gone")  # the outcomes that are not failures


class Mark(NamedTuple):
    """A spool file's position: what it is before a batch (None: not known to the store), and what it is after."""

    name: str
    before: int | None
    after: int


class Moved(Exception):
    """A mark is not where it was thought to be: somebody else drained the file, or a commit was not heard of."""


@dataclass(frozen=True, slots=True)
class Range:
    """Whose requests of which days (since 1970-01-01, both included); None: all."""

    first: int
    last: int
    tenant: str | None = None
    key: str | None = None
    route: str | None = None


class Usage:
    """Methods raise ServeError (`storage_full`, `store_unavailable`) where the store cannot do its work, and have then
    changed nothing - or, where only the answer to a commit was lost, everything."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    # Filling it

    async def positions(self, prefix: str) -> dict[str, tuple[int, int]]:
        """Of each spool file whose name begins so: its position, and when that was written (Unix seconds)."""
        statement = select(spool_files).where(spool_files.c.name.startswith(prefix, autoescape=True))
        with store_errors():
            async with self._engine.connect() as connection:
                rows = (await connection.execute(statement)).mappings()
                return {row["name"]: (row["position"], row["updated_at"]) for row in rows}

    async def add(self, rows: Sequence[Mapping[str, Any]], marks: Sequence[Mark], now: int) -> int:
        """Stores requests (by the table's columns), their keys' last use, and the marks: all or nothing. Those with an
        id that is there already are left out. Returns how many were new. Raises Moved."""
        with store_errors():
            async with writing(self._engine) as connection:
                for mark in sorted(marks):
                    await _move(connection, mark, now)
                if not rows:
                    return 0
                statement = _insert(connection, usage).on_conflict_do_nothing(index_elements=["id"])
                new = (await connection.execute(statement.returning(usage.c.id), [dict(row) for row in rows])).all()
                await _touch(connection, rows)
                return len(new)

    async def forget(self, names: Sequence[str]) -> None:
        """Drops the marks of files that are gone and never come back."""
        with store_errors():
            async with writing(self._engine) as connection:
                await connection.execute(delete(spool_files).where(spool_files.c.name.in_(names)))

    async def forget_before(self, at: int) -> None:
        """Drops the marks that have not moved since `at`, of whatever host: some never come back."""
        with store_errors():
            async with writing(self._engine) as connection:
                await connection.execute(delete(spool_files).where(spool_files.c.updated_at < at))

    # Keeping it small

    async def roll_up(self, before: int, most: int = 2000) -> int:
        """Moves up to `most` single rows of days before `before` into the sums; returns how many. 0: none is left."""
        # A row that another host moves just now is its own: nobody waits, and none is counted twice.
        old = select(usage.c.id).where(usage.c.day < before).limit(most).with_for_update(skip_locked=True)
        with store_errors():
            async with writing(self._engine) as connection:
                ids = (await connection.execute(old)).scalars().all()
                if not ids:
                    return 0
                these = usage.c.id.in_(ids)
                groups = [usage.c[name] for name in GROUPS]
                # In order, so that two hosts never wait for each other's rows crosswise.
                summed = select(*groups, *_counts()).where(these).group_by(*groups).order_by(*groups)
                adding = _insert(connection, usage_daily).from_select([*GROUPS, *COUNTS], summed)
                added = {name: usage_daily.c[name] + adding.excluded[name] for name in COUNTS}
                await connection.execute(adding.on_conflict_do_update(index_elements=list(GROUPS), set_=added))
                await connection.execute(delete(usage).where(these))
                return len(ids)

    async def drop_sums(self, before: int) -> int:
        """Drops the sums of days before `before`; returns how many rows that were."""
        with store_errors():
            async with writing(self._engine) as connection:
                gone = await connection.execute(delete(usage_daily).where(usage_daily.c.day < before))
                return int(gone.rowcount)

    # Asking it

    async def sums(self, wanted: Range, by: Sequence[str], most: int) -> list[dict[str, Any]]:
        """One row for each group (`by`: of GROUPS) that has any request, with COUNTS; at most `most`, in the order of
        the groups."""
        single = [usage.c[name] for name in by]
        daily = [usage_daily.c[name] for name in by]
        sums = [func.sum(usage_daily.c[name]).label(name) for name in COUNTS]
        both = union_all(
            _matching(select(*single, *_counts()), usage, wanted).group_by(*single),
            _matching(select(*daily, *sums), usage_daily, wanted).group_by(*daily),
        ).subquery()
        groups = [both.c[name] for name in by]
        statement = (
            select(*groups, *(func.sum(both.c[name]).label(name) for name in COUNTS))
            .group_by(*groups)
            .order_by(*groups)
            .limit(most)
        )
        with store_errors():
            async with self._engine.connect() as connection:
                rows = (await connection.execute(statement)).mappings()
                # Of nothing at all SQL makes one row of NULLs where there is nothing to group by.
                found = [dict(row) for row in rows if row["requests"]]
        # A sum of BIGINTs is a Decimal in PostgreSQL.
        return [{**row, **{name: int(row[name]) for name in COUNTS}} for row in found]

    async def requests(
        self, wanted: Range, most: int, before: tuple[int, str] | None = None, request_id: str | None = None
    ) -> list[dict[str, Any]]:
        """Single requests that are not rolled up yet, by the names of the database, newest end first; only those behind
        `before` (the ended_ms and id of the last one seen)."""
        statement = _filtered(select(usage), usage, wanted).where(
            usage.c.ended_ms >= wanted.first * DAY_MS, usage.c.ended_ms < (wanted.last + 1) * DAY_MS
        )
        if before is not None:
            at, last = before
            statement = statement.where(
                usage.c.ended_ms <= at, or_(usage.c.ended_ms < at, and_(usage.c.ended_ms == at, usage.c.id < last))
            )
        if request_id is not None:
            statement = statement.where(usage.c.request_id == request_id)
        statement = statement.order_by(usage.c.ended_ms.desc(), usage.c.id.desc()).limit(most)
        with store_errors():
            async with self._engine.connect() as connection:
                return [dict(row) for row in (await connection.execute(statement)).mappings()]


def _insert(connection: AsyncConnection, table: Any) -> Any:
    """An INSERT that can say ON CONFLICT: both databases can, each in its own dialect."""
    return (postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert)(table)


async def _move(connection: AsyncConnection, mark: Mark, now: int) -> None:
    values = {"position": mark.after, "updated_at": now}
    if mark.before is None:
        statement = _insert(connection, spool_files).values(name=mark.name, **values)
        moved = await connection.execute(statement.on_conflict_do_nothing(index_elements=["name"]))
    else:
        this = and_(spool_files.c.name == mark.name, spool_files.c.position == mark.before)
        moved = await connection.execute(update(spool_files).where(this).values(**values))
    if moved.rowcount != 1:
        raise Moved(mark.name)


async def _touch(connection: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Moves the keys' last use on, never back."""
    used: dict[str, int] = {}
    for row in rows:
        used[row["key"]] = max(used.get(row["key"], 0), row["ended_ms"] // 1000)
    at: Any = bindparam("used_at")
    older = or_(keys.c.last_used_at.is_(None), keys.c.last_used_at < at)
    statement = update(keys).where(keys.c.id == bindparam("key_id"), older).values(last_used_at=at)
    # In order, so that two hosts never wait for each other's rows crosswise.
    await connection.execute(statement, [{"key_id": key, "used_at": used[key]} for key in sorted(used)])


def _counts() -> list[ColumnElement[Any]]:
    """COUNTS over the single rows."""
    failed = case((usage.c.outcome.in_(SUCCEEDED), 0), else_=1)
    estimated = case((or_(usage.c.prompt_estimated, usage.c.completion_estimated), 1), else_=0)
    return [
        func.count().label("requests"),
        func.sum(failed).label("failed"),
        func.sum(estimated).label("estimated"),
        *(func.sum(usage.c[name]).label(name) for name in TOKENS),
    ]


def _matching(statement: Select[Any], table: Any, wanted: Range) -> Select[Any]:
    return _filtered(statement, table, wanted).where(table.c.day >= wanted.first, table.c.day <= wanted.last)


def _filtered(statement: Select[Any], table: Any, wanted: Range) -> Select[Any]:
    for name in ("tenant", "key", "route"):
        value = getattr(wanted, name)
        if value is not None:
            statement = statement.where(table.c[name] == value)
    return statement

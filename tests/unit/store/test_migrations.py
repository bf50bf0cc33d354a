"""The way to the schema and back, with data in it, on both kinds of store; and the version before on the newest one."""

import asyncio
import re
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from vitalis_serve import __version__
from vitalis_serve.errors import StartError
from vitalis_serve.store import tables
from vitalis_serve.store.database import open_database, sqlite_engine, writing
from vitalis_serve.store.postgres import postgres_engine
from vitalis_serve.store.records import Store, Tenant

from tests.support.stores import Place

STEPS = ("0001", "0002", "0003", "0004", "0005", "0006")
ADDS_COLUMNS = ("0003", "0006")
# The oldest version that knows each step. 0.1.0 knew two.
NEEDS = dict.fromkeys(STEPS[:2], "0.1.0") | dict.fromkeys(STEPS[2:], "0.2.0")
# What each step made, with a row in it: table, columns, values.
MADE = {
    "0001": [
        ("tenants", "name, status, notes, created_at", "'acme', 'active', 'näh', 1000"),
        (
            "keys",
            "id, tenant, name, digest, class, scopes, routes, notes, created_at, expires_at",
            "'k1', 'acme', 'n', 'd1', 'batch', '[\"debug\"]', '[]', '', 1, 4102444800",
        ),
    ],
    "0002": [
        ("audit", "at, who, action, subject, origin, details", "5, 'me', 'key.create', 'k1', 'here', '{\"a\": 1}'")
    ],
    "0003": [("keys", "old_digest, old_until, last_used_at", "'d0', 4102444800, 77")],
    "0004": [("rates", "kind, name, requests_per_minute, tokens_per_day", "'tenant', 'acme', 60, 5000000000")],
    "0005": [
        (
            "usage",
            (
                "id, began_ms, ended_ms, day, tenant, key, route, model, api, class, request_id, stream, outcome, "
                "code, status, prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, prompt_estimated, "
                "completion_estimated"
            ),
            (
                "'00ff', 1760000000000, 1760000000500, 20370, 'acme', 'k1', 'chat', 'tiny', 'chat', 'batch', 'r', "
                "true, 'ok', '', 200, 5, 1, 7, 2, false, true"
            ),
        ),
        (
            "usage_daily",
            (
                "day, tenant, key, route, requests, failed, estimated, prompt_tokens, cached_tokens, "
                "completion_tokens, reasoning_tokens"
            ),
            "20000, 'acme', 'k1', 'chat', 3, 1, 0, 9000000000, 0, 4, 0",
        ),
        ("spool_files", "name, position, updated_at", "'worker-0-1-2-000001.spool', 4096, 1000"),
    ],
    "0006": [("state", "cache_secret", "'vcs_x'")],
}


Rows = dict[str, list[tuple[Any, ...]]]


def fill(place: Place, revision: str) -> None:
    """The rows of one step; where it only added columns, they are set in the row that is there."""
    for table, columns, values in MADE[revision]:
        if revision in ADDS_COLUMNS:
            pairs = zip(columns.split(", "), values.split(", "), strict=True)
            place.run(f"UPDATE {table} SET {', '.join(f'{column} = {value}' for column, value in pairs)}")
        else:
            place.run(f"INSERT INTO {table} ({columns}) VALUES ({values})")


def contents(place: Place, revision: str) -> Rows:
    """What the steps up to `revision` made, as it is now."""
    steps = STEPS[: STEPS.index(revision) + 1]
    return {
        f"{step} {table}": [tuple(map(str, row)) for row in place.run(f"SELECT {columns} FROM {table}")]
        for step in steps
        for table, columns, _ in MADE[step]
    }


def revision_of(place: Place) -> str:
    return str(place.run("SELECT version_num FROM alembic_version")[0][0])


async def nothing(_engine: AsyncEngine) -> None:
    """Opening and closing is all."""


def test_schema_after_migrations_is_the_one_of_tables(place: Place) -> None:
    """Alembic finds nothing to add, drop or alter; after a way down and up again neither."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    async def work(engine: AsyncEngine) -> Any:
        async with engine.connect() as connection:
            return await connection.run_sync(
                lambda c: compare_metadata(MigrationContext.configure(c, opts={"compare_type": True}), tables.metadata)
            )

    assert place.with_engine(work) == []
    place.migrate(STEPS[0])
    assert place.with_engine(work) == []


def test_every_step_up_and_down_keeps_the_rows(place: Place) -> None:
    """Rows are put in as soon as there is a place for them; each step up leaves those of the steps before as they
    are, and so does each step down, which takes only its own."""
    for revision in STEPS:
        place.migrate(revision)
        before = contents(place, STEPS[STEPS.index(revision) - 1]) if revision != STEPS[0] else {}
        fill(place, revision)
        after = contents(place, revision)
        assert {name: rows for name, rows in after.items() if name in before} == before
        assert all(rows and None not in rows[0] for rows in after.values())
    place.run("UPDATE state SET snapshot_version = 41")
    place.with_engine(nothing)
    assert contents(place, STEPS[-1]) == after
    for revision in reversed(STEPS[:-1]):
        place.migrate(revision)
        kept = contents(place, revision)
        assert kept == {name: after[name] for name in kept}
        assert place.run("SELECT id, snapshot_version, needs_program FROM state") == [(1, 41, NEEDS[revision])]
    assert place.tables() == {"tenants", "keys", "state", "alembic_version"}
    place.with_engine(nothing)
    assert revision_of(place) == STEPS[-1]
    assert contents(place, STEPS[0]) == {name: rows for name, rows in after.items() if name.startswith(STEPS[0])}


def test_down_to_nothing_leaves_an_empty_database(place: Place) -> None:
    for revision in STEPS:
        place.migrate(revision)
        fill(place, revision)
    place.migrate("base")
    assert place.tables() == {"alembic_version"}


def test_failed_migration_leaves_nothing_behind(place: Place) -> None:
    """A table in the way of the second step: the first is not in force either."""
    place.run("CREATE TABLE audit (x INTEGER)")
    with pytest.raises(StartError, match="audit"):
        place.with_engine(nothing)
    assert place.tables() == {"audit"}


def test_opening_twice_changes_nothing(place: Place) -> None:
    place.with_engine(nothing)
    for revision in STEPS:
        fill(place, revision)
    before = contents(place, STEPS[-1])
    place.with_engine(nothing)
    assert contents(place, STEPS[-1]) == before


def test_the_store_says_which_version_knows_each_step(place: Place) -> None:
    """So that one that does not asks for a newer one, never for itself."""
    for revision in STEPS:
        place.migrate(revision)
        assert place.run("SELECT needs_program FROM state") == [(NEEDS[revision],)]
    assert tuple(map(int, NEEDS[STEPS[-1]].split("."))) <= tuple(map(int, __version__.split(".")))


def test_newer_schema_is_refused_where_it_needs_a_newer_version(place: Place) -> None:
    place.with_engine(nothing)
    major, minor, patch = map(int, __version__.split("."))
    for needs in ("7.2.0", f"{major}.{minor}.{patch + 1}", f"{major}.{minor + 10}.0", f"{__version__}.1", "next"):
        place.run("UPDATE alembic_version SET version_num = '0099'", f"UPDATE state SET needs_program = '{needs}'")
        with pytest.raises(StartError, match=rf"schema 0099.*needs vitalis-serve {re.escape(needs)} or newer"):
            place.with_engine(nothing)
        assert revision_of(place) == "0099"


def test_newer_schema_of_unknown_need_is_refused(place: Place) -> None:
    place.with_engine(nothing)
    place.run("UPDATE alembic_version SET version_num = '0099'", "DROP TABLE state")
    with pytest.raises(StartError, match=r"schema 0099.*needs a newer vitalis-serve"):
        place.with_engine(nothing)


@pytest.mark.parametrize("needs", ["0.0.9", "0.1.0", __version__])
def test_newer_schema_that_this_program_understands_is_served_and_left_alone(place: Place, needs: str) -> None:
    """During an upgrade the version before may be started once more."""
    place.with_engine(nothing)
    place.run(
        "UPDATE alembic_version SET version_num = '0099'",
        f"UPDATE state SET needs_program = '{needs}', snapshot_version = 7",
        "ALTER TABLE tenants ADD COLUMN colour TEXT",
    )

    async def work(store: Store) -> int:
        async with store.change() as change:
            await change.add_tenant(Tenant("acme", 1))
            return await change.next_version()

    assert place.with_store(work) == 8
    assert revision_of(place) == "0099"
    assert place.run("SELECT needs_program FROM state") == [(needs,)]


# What version 0.1.0 said to its store before there was more than its first two steps: the statements of its
# store/records.py, with values in place.
VERSION_BEFORE = (
    "INSERT INTO tenants (name, status, notes, created_at) VALUES ('umbrella', 'active', '', 3)",
    "SELECT tenants.status FROM tenants WHERE tenants.name = 'umbrella'",
    (
        "INSERT INTO keys (id, tenant, name, digest, class, scopes, routes, notes, created_at, expires_at, revoked_at) "
        "VALUES ('k2', 'umbrella', '', 'd2', 'standard', '[\"inference\"]', '[\"*\"]', '', 3, NULL, NULL)"
    ),
    "INSERT INTO audit (at, who, action, subject, origin, details) VALUES (3, 'x', 'key.create', 'k2', 'y', '{}')",
    "UPDATE state SET snapshot_version = 42",
    "UPDATE keys SET revoked_at = 5 WHERE keys.id = 'k2'",
    "UPDATE tenants SET status = 'disabled' WHERE tenants.name = 'umbrella'",
)
VERSION_BEFORE_READS = {
    "SELECT state.snapshot_version FROM state": [(42,)],
    "SELECT tenants.name, tenants.status, tenants.notes, tenants.created_at FROM tenants ORDER BY tenants.name": [
        ("acme", "active", "näh", 1000),
        ("umbrella", "disabled", "", 3),
    ],
    "SELECT keys.id, keys.tenant, keys.name, keys.digest, keys.class, keys.scopes, keys.routes, keys.notes, "
    "keys.created_at, keys.expires_at, keys.revoked_at FROM keys JOIN tenants ON tenants.name = keys.tenant "
    "WHERE keys.revoked_at IS NULL AND tenants.status = 'active' ORDER BY keys.id": [
        ("k1", "acme", "n", "d1", "batch", '["debug"]', "[]", "", 1, 4102444800, None)
    ],
    "SELECT audit.subject, audit.details FROM audit WHERE audit.id < 99 ORDER BY audit.id DESC LIMIT 1": [("k2", "{}")],
}


def test_version_before_works_on_the_newest_schema(place: Place) -> None:
    """Two versions may run at once during an upgrade: what one writes, the other reads."""
    place.with_engine(nothing)
    for revision in STEPS:
        fill(place, revision)
    place.run(*VERSION_BEFORE)
    for statement, rows in VERSION_BEFORE_READS.items():
        assert place.run(statement) == rows

    async def work(store: Store) -> list[tuple[Any, ...]]:
        return [(key.id, key.revoked_at, key.old_digest, key.last_used_at) for key in await store.keys()]

    assert place.with_store(work) == [("k1", None, "d0", 77), ("k2", 5, None, None)]


def test_program_that_was_running_before_a_migration_goes_on_after_it(place: Place) -> None:
    """Its connections, and what PostgreSQL has prepared on them, are from before."""
    place.migrate("0002")
    fill(place, "0001")

    async def run() -> list[list[Any]]:
        engine = postgres_engine(place.url, 5) if place.url else sqlite_engine(place.path)
        seen = []
        try:
            for newer in (False, True):
                if newer:
                    await (await open_database(place.path, place.url)).dispose()
                async with writing(engine) as connection:
                    seen.append((await connection.execute(text("SELECT id, notes FROM keys"))).all())
                    seen.append((await connection.execute(text("SELECT snapshot_version FROM state"))).all())
                    await connection.execute(text("UPDATE keys SET notes = 'changed'"))
        finally:
            await engine.dispose()
        return [[tuple(row) for row in rows] for rows in seen]

    assert asyncio.run(run()) == [[("k1", "")], [(0,)], [("k1", "changed")], [(0,)]]


def test_two_that_migrate_at_once_do_it_once(place: Place) -> None:
    """Several controls start on one new PostgreSQL (or two programs on one file): all of them open it."""

    async def run() -> None:
        opened = await asyncio.gather(*(open_database(place.path, place.url) for _ in range(4)))
        for engine in opened:
            await engine.dispose()

    asyncio.run(run())
    assert revision_of(place) == STEPS[-1]
    assert place.run("SELECT count(*) FROM state") == [(1,)]

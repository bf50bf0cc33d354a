"""Opening, migrating and refusing a store, on real SQLite files."""

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from vitalis_serve.errors import StartError
from vitalis_serve.store import tables
from vitalis_serve.store.database import migrate, open_database, writing


def with_database(path: Path, work: Callable[[AsyncEngine], Any]) -> Any:
    async def run() -> Any:
        engine = await open_database(path)
        try:
            return await work(engine)
        finally:
            await engine.dispose()

    return asyncio.run(run())


def to_revision(path: Path, revision: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with writing(engine) as connection:
            await connection.run_sync(migrate, revision)

    with_database(path, work)


def rows(path: Path, statement: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as connection:
        found = connection.execute(statement).fetchall()
    connection.close()
    return found


def fill(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO tenants VALUES ('acme', 'active', 'note', 1000)")
        connection.execute(
            "INSERT INTO keys VALUES ('k1', 'acme', 'n', 'd1', 'batch', '[\"debug\"]', '[]', '', 1, 2, NULL, NULL, NULL, NULL)"
        )
        connection.execute("UPDATE state SET snapshot_version = 41")
    connection.close()


TENANTS, KEYS = "SELECT * FROM tenants", "SELECT id, tenant, digest, scopes, expires_at FROM keys"


def nothing(engine: AsyncEngine) -> Any:
    return asyncio.sleep(0)


def test_schema_after_migrations_is_the_one_of_tables(tmp_path: Path) -> None:
    """Migrations and tables.py describe the same schema: Alembic finds nothing to add or drop."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    async def work(engine: AsyncEngine) -> Any:
        async with engine.connect() as connection:
            return await connection.run_sync(lambda c: compare_metadata(MigrationContext.configure(c), tables.metadata))

    assert with_database(tmp_path / "v.db", work) == []


def test_opening_twice_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "v.db"
    with_database(path, nothing)
    fill(path)
    before = rows(path, TENANTS), rows(path, KEYS)
    with_database(path, nothing)
    assert (rows(path, TENANTS), rows(path, KEYS)) == before


def test_migration_down_and_up_keeps_tenants_and_keys(tmp_path: Path) -> None:
    """The audit step goes and comes back; tenants, keys and the counter do not notice."""
    path = tmp_path / "v.db"
    with_database(path, nothing)
    fill(path)
    before = rows(path, TENANTS), rows(path, KEYS)
    to_revision(path, "0001")
    assert rows(path, "SELECT name FROM sqlite_master WHERE name = 'audit'") == []
    assert (rows(path, TENANTS), rows(path, KEYS)) == before
    with_database(path, nothing)
    assert rows(path, "SELECT version_num FROM alembic_version") == [("0006",)]
    assert (rows(path, TENANTS), rows(path, KEYS)) == before
    assert rows(path, "SELECT snapshot_version, needs_program FROM state") == [(41, "0.1.0")]


def test_migration_down_to_nothing_leaves_an_empty_database(tmp_path: Path) -> None:
    path = tmp_path / "v.db"
    with_database(path, nothing)
    fill(path)
    to_revision(path, "base")
    left = rows(path, "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    assert left == [("alembic_version",)]


def test_failed_migration_leaves_nothing_behind(tmp_path: Path) -> None:
    """A table in the way of the second step: the first is not in force either."""
    path = tmp_path / "v.db"
    rows(path, "CREATE TABLE audit (x)")
    with pytest.raises(StartError, match="audit"):
        with_database(path, nothing)
    assert rows(path, "SELECT name FROM sqlite_master WHERE type = 'table'") == [("audit",)]


def test_newer_schema_is_refused_with_the_version_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "v.db"
    with_database(path, nothing)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0099'")
        connection.execute("UPDATE state SET needs_program = '7.2.0'")
    connection.close()
    with pytest.raises(StartError, match=r"schema 0099.*needs vitalis-serve 7\.2\.0 or newer"):
        with_database(path, nothing)
    assert rows(path, "SELECT version_num FROM alembic_version") == [("0099",)]


def test_database_is_in_wal_mode(tmp_path: Path) -> None:
    path = tmp_path / "v.db"
    with_database(path, nothing)
    assert rows(path, "PRAGMA journal_mode") == [("wal",)]


def test_file_that_is_no_database_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "v.db"
    path.write_text("this is no database, but long enough to be read as the header of one " * 20)
    with pytest.raises(StartError, match=r"v\.db cannot be opened: file is not a database"):
        with_database(path, nothing)


def test_folder_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"gone/v\.db cannot be opened: unable to open"):
        with_database(tmp_path / "gone" / "v.db", nothing)

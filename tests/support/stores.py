"""Both kinds of store, for tests that must hold on either: an empty one, and raw SQL beside the program."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from vitalis_serve.store.database import migrate, open_database, sqlite_engine, writing
from vitalis_serve.store.postgres import postgres_engine
from vitalis_serve.store.records import Store

from tests.support import postgres

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a store is: SQLite at `path` where `url` is empty."""

    path: Path
    url: str = ""

    def options(self) -> dict[str, str]:
        """For `tests.support.control.Control`."""
        return {"database_path": str(self.path), "database_url": self.url}

    def with_store(self, work: Callable[[Store], Awaitable[T]]) -> T:
        """The result of `work` with the open store, which is closed afterwards."""

        async def run() -> T:
            store = await Store.open(self.path, self.url)
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(run())

    def with_engine(self, work: Callable[[AsyncEngine], Awaitable[T]]) -> T:
        """The same one layer below."""

        async def run() -> T:
            engine = await open_database(self.path, self.url)
            try:
                return await work(engine)
            finally:
                await engine.dispose()

        return asyncio.run(run())

    def migrate(self, revision: str) -> None:
        """From whichever schema there is, without passing the newest, as opening would."""

        async def run() -> None:
            engine = postgres_engine(self.url, 5) if self.url else sqlite_engine(self.path)
            try:
                async with writing(engine) as connection:
                    await connection.run_sync(migrate, revision)
            finally:
                await engine.dispose()

        asyncio.run(run())

    def run(self, *statements: str) -> list[tuple[Any, ...]]:
        """Each as a transaction of its own, by the driver alone. Returns the last one's rows."""
        if self.url:
            return postgres.query(self.url, *statements)
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys=ON")
            rows: list[tuple[Any, ...]] = []
            for statement in statements:
                rows = connection.execute(statement).fetchall()
            return rows

    def tables(self) -> set[str]:
        """Their names."""
        if self.url:
            found = self.run("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'")
        else:
            found = self.run("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        return {name for (name,) in found}


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty store, once of each kind."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else ""
    return Place(tmp_path / "v.db", url)

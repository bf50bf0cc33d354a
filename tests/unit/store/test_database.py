"""Opening and refusing a store in a SQLite file. What holds for both kinds of store is in `test_migrations.py`."""

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from vitalis_serve.errors import StartError

from tests.support.stores import Place


async def nothing(_engine: AsyncEngine) -> None:
    """Opening and closing is all."""


def test_database_is_in_wal_mode(tmp_path: Path) -> None:
    place = Place(tmp_path / "v.db")
    place.with_engine(nothing)
    assert place.run("PRAGMA journal_mode") == [("wal",)]


def test_file_that_is_no_database_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "v.db"
    path.write_text("this is no database, but long enough to be read as the header of one " * 20)
    with pytest.raises(StartError, match=r"v\.db cannot be opened: file is not a database"):
        Place(path).with_engine(nothing)


def test_folder_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"gone/v\.db cannot be opened: unable to open"):
        Place(tmp_path / "gone" / "v.db").with_engine(nothing)


def test_file_that_another_holds_is_refused_by_name(tmp_path: Path) -> None:
    place = Place(tmp_path / "v.db")
    place.with_engine(nothing)
    holder = sqlite3.connect(place.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(StartError, match=r"v\.db cannot be opened: database is locked; check .* no other program"):
            place.with_engine(nothing)
    finally:
        holder.close()

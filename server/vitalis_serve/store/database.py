"""Opening the store: connection settings, migrations, and where a database's errors become ours.

How it works: SQLite's driver would begin transactions when it sees fit, so it is set to begin none, and
each transaction of ours says how it begins. Writers say BEGIN IMMEDIATE: they wait for the lock at their
start (the busy timeout) and never find out at their first write that someone else was faster.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import alembic.command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from vitalis_serve import __version__
from vitalis_serve.errors import ServeError, StartError
from vitalis_serve.store import tables

BUSY_SECONDS: Final = 2
MIGRATIONS: Final = Path(__file__).parent / "migrations"


async def open_database(path: Path, url: str = "", seconds: float = 5) -> AsyncEngine:
    """The store at `path`, made if it is not there, or the PostgreSQL at `url`, with the schema of this program.

    Raises StartError where it cannot be opened, read or migrated, or was made by a newer program.
    """
    if url:
        raise StartError("PostgreSQL is not there yet")
    with start_errors(path):
        await asyncio.to_thread(_try_opening, path)
    engine = _engine(path)
    try:
        with start_errors(path):
            async with writing(engine) as connection:
                await connection.run_sync(migrate)
    except BaseException:
        await engine.dispose()
        raise
    return engine


def migrate(connection: Connection, revision: str = "head") -> None:
    """Brings the schema to `revision`, up or down, inside the caller's transaction.

    Raises StartError if the schema is one that this program does not know.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision: script.module for script in scripts.walk_revisions()}
    present = MigrationContext.configure(connection).get_current_revision()
    if present is not None and present not in known:
        raise StartError(_newer(connection, present))
    wanted = scripts.get_current_head() if revision == "head" else revision
    if present == wanted:
        return
    if present is None or (wanted is not None and wanted != "base" and wanted > present):
        alembic.command.upgrade(config, revision)
    else:
        alembic.command.downgrade(config, revision)
    if wanted is not None and wanted != "base":
        needs = known[wanted].needs_program
        connection.execute(update(tables.state).values(needs_program=needs))


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction that may write: committed at the end of the block, or nothing of it happened."""
    async with engine.connect() as connection:
        await connection.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        async with connection.begin():
            yield connection


@contextmanager
def store_errors() -> Iterator[None]:
    """Turns what a database says at run time into ServeErrors: `storage_full` or `store_unavailable`."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        code = _sqlite_code(error)
        if code in _FULL:
            raise ServeError(
                "storage_full",
                f"the store has no room left on its disk ({_reason(error)}); nothing was changed",
            ) from error
        raise ServeError(
            "store_unavailable", f"the store cannot be used now ({_reason(error)}); nothing was changed"
        ) from error


@contextmanager
def start_errors(path: Path) -> Iterator[None]:
    """Turns what a database says at start into a StartError that names the file."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise StartError(
            f"the store {path} cannot be opened: {_reason(error)}; check that its folder exists on a local "
            "disk with room, that this user may write there, and that no other program holds the file"
        ) from error


# A write past RLIMIT_FSIZE or a quota is reported as an input/output error, not as "full".
_FULL: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE})


def _try_opening(path: Path) -> None:
    """Fails as opening would. aiosqlite, when it cannot open a file, leaves a thread behind that may outlive the
    event loop and end in a traceback."""
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def _engine(path: Path) -> AsyncEngine:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}", connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine.sync_engine, "connect", _connected)
    event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _connected(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a revocation that was answered must outlive a power failure
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


def _newer(connection: Connection, revision: str) -> str:
    try:
        needs = connection.execute(text("SELECT needs_program FROM state WHERE id = 1")).scalar()
    except DBAPIError:
        needs = None
    program = f"vitalis-serve {needs} or newer" if needs else "a newer vitalis-serve"
    return (
        f"the store has schema {revision}, which this vitalis-serve {__version__} does not know; it needs "
        f"{program}: run that version, or restore the copy of the store from before the upgrade"
    )


def _sqlite_code(error: BaseException) -> int | None:
    origin = getattr(error, "orig", None) or error
    # SQLAlchemy's asyncio layer wraps the driver's exception once more.
    for candidate in (origin, getattr(origin, "__cause__", None)):
        code = getattr(candidate, "sqlite_errorcode", None)
        if isinstance(code, int):
            return code
    return None


def _reason(error: BaseException) -> str:
    return str(getattr(error, "orig", None) or error)

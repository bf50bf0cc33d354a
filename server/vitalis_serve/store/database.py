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
from vitalis_serve.store.postgres import (
    MIGRATING,
    Unreachable,
    described,
    postgres_engine,
    take_turn,
    wait_until_answering,
)

BUSY_SECONDS: Final = 2
MIGRATIONS: Final = Path(__file__).parent / "migrations"


async def open_database(path: Path, url: str = "", seconds: float = 5) -> AsyncEngine:
    """The store at `path`, made if it is not there, or the PostgreSQL at `url`, with the schema of this program or a
    newer one that this program can work with.

    Raises StartError where it cannot be opened, read or migrated, where PostgreSQL does not answer within `seconds`,
    or where the schema is too new.
    """
    if url:
        await wait_until_answering(url, seconds)
        with start_errors(described(url), _POSTGRES_REMEDY):
            await _migrated(postgres_engine(url, seconds, MIGRATING), keep=False)
        return postgres_engine(url, seconds)
    with start_errors(str(path), _SQLITE_REMEDY):
        await asyncio.to_thread(_try_opening, path)
        return await _migrated(sqlite_engine(path), keep=True)


async def _migrated(engine: AsyncEngine, *, keep: bool) -> AsyncEngine:
    try:
        async with writing(engine) as connection:
            await connection.run_sync(migrate)
    except BaseException:
        await engine.dispose()
        raise
    if not keep:
        await engine.dispose()
    return engine


def migrate(connection: Connection, revision: str = "head") -> None:
    """Brings the schema to `revision`, up or down, inside the caller's transaction.

    A schema that this program does not know stays as it is, if whoever made it says that this program understands it
    too: during an upgrade the version before may be started once more. Otherwise raises StartError.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision: script.module for script in scripts.walk_revisions()}
    present = MigrationContext.configure(connection).get_current_revision()
    if present is not None and present not in known:
        _refuse_if_too_new(connection, present)
        return
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
    """One transaction that may write, alone among those that do: committed at the end of the block, or nothing of it
    happened. Raises Unsettled where the connection was lost while it was committed."""
    sqlite = engine.dialect.name == "sqlite"
    async with engine.connect() as connection:
        if sqlite:
            await connection.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        else:
            # A snapshot of the moment before its turn would be too old.
            await connection.execution_options(isolation_level="READ COMMITTED")
        async with connection.begin() as transaction:
            if not sqlite:
                await take_turn(connection)
            yield connection
            try:
                await transaction.commit()
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise Unsettled(_reason(error)) from error
                raise


class Unsettled(SQLAlchemyError):
    """Whether a transaction was committed is not known."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Turns what a database says at run time into ServeErrors: `storage_full`, `store_unavailable`, or
    `invalid_request` for a value that PostgreSQL cannot keep."""
    try:
        yield
    except Unsettled as error:
        raise ServeError(
            "store_unavailable",
            f"the store was lost while it made the change ({error}): look whether it was made before you repeat it",
        ) from error
    except (SQLAlchemyError, sqlite3.Error) as error:
        reason = _reason(error)
        state = _sqlstate(error)
        if _sqlite_code(error) in _FULL or state == _DISK_FULL:
            raise ServeError(
                "storage_full", f"the store has no room left on its disk ({reason}); nothing was changed"
            ) from error
        if state[:2] == _DATA_EXCEPTION:
            raise ServeError(
                "invalid_request", f"the store cannot keep one of the values ({reason}); nothing was changed"
            ) from error
        raise ServeError(
            "store_unavailable", f"the store cannot be used now ({reason}); nothing was changed"
        ) from error


@contextmanager
def start_errors(place: str, remedy: str) -> Iterator[None]:
    """Turns what a database says at start into a StartError that names the place."""
    try:
        yield
    except Unreachable as error:
        raise StartError(f"the store at {place} cannot be opened: {error.reason}; {error.remedy}") from error
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise StartError(f"the store {place} cannot be opened: {_reason(error)}; {remedy}") from error


_SQLITE_REMEDY: Final = (
    "check that its folder exists on a local disk with room, that this user may write there, and that no other "
    "program holds the file"
)
_POSTGRES_REMEDY: Final = (
    "check that the user of store.url owns the database, or may create tables in it, and that no one holds its tables"
)
_DISK_FULL: Final = "53100"
_DATA_EXCEPTION: Final = "22"

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


def sqlite_engine(path: Path) -> AsyncEngine:
    """Opens the file when it is first used, and leaves its schema as it is."""
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


def _refuse_if_too_new(connection: Connection, revision: str) -> None:
    try:
        needs = connection.execute(text("SELECT needs_program FROM state WHERE id = 1")).scalar()
    except DBAPIError:
        needs = None
    if needs and _numbers(str(needs)) <= _numbers(__version__):
        return
    program = f"vitalis-serve {needs} or newer" if needs else "a newer vitalis-serve"
    raise StartError(
        f"the store has schema {revision}, which this vitalis-serve {__version__} does not know; it needs "
        f"{program}: run that version, or restore the copy of the store from before the upgrade"
    )


def _numbers(version: str) -> tuple[float, ...]:
    """What is no number is newer than any."""
    return tuple(int(word) if word.isdecimal() else float("inf") for word in version.split("."))


def _sqlite_code(error: BaseException) -> int | None:
    origin = getattr(error, "orig", None) or error
    # SQLAlchemy's asyncio layer wraps the driver's exception once more.
    for candidate in (origin, getattr(origin, "__cause__", None)):
        code = getattr(candidate, "sqlite_errorcode", None)
        if isinstance(code, int):
            return code
    return None


def _sqlstate(error: BaseException) -> str:
    """PostgreSQL's five characters; "" if it said nothing."""
    return str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")


def _reason(error: BaseException) -> str:
    origin = getattr(error, "orig", None)
    # Behind SQLAlchemy's asyncio layer stands the driver's own exception, whose first argument is one sentence; what
    # it prints beyond that may quote rows.
    cause = origin.__cause__ if isinstance(origin, BaseException) and hasattr(origin, "sqlstate") else None
    if cause is not None and cause.args:
        return str(cause.args[0])
    return str(origin or error)

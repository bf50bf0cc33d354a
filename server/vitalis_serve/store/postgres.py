"""PostgreSQL: how it is reached, and what keeps work with it from waiting for ever.

How it works: by settings of each connection the server itself ends what takes too long. A server that is frozen or
cut off cannot do that, so every connection has a guard: one that lay in the pool must answer a ping before it is
lent, and one that is lent, or being closed, for longer than the server would allow is dropped on our side. Whoever
waits on it is then told that the connection is gone.

Readers see one moment (REPEATABLE READ). Writers go one after the other, as with SQLite: each takes the same lock
at its start (`take_turn`), so that no two of them count the same version.
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit
from weakref import WeakKeyDictionary

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.exc import InvalidatePoolError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from vitalis_serve.errors import StartError

PING_SECONDS: Final = 2
CLOSE_SECONDS: Final = 2
RETRY_SECONDS: Final = 0.2
CONNECTIONS: Final = 8
_TURN: Final = 0x7669_7461  # of pg_advisory_xact_lock, which knows numbers only
_PASSING: Final = frozenset({"57P03", "53300"})  # starting up or shutting down; too many clients
_REMEDIES: Final = {
    "28P01": "check the user and the password in store.url",
    "28000": "check the user in store.url and that pg_hba.conf there lets it in",
    "3D000": "create the database there, owned by this user, or correct its name in store.url",
}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take, in seconds. `lock_seconds`: waiting for another's lock; `statement_seconds`: one
    statement, 0 for any time; `whole_seconds`: all that is done with a connection before it is given back."""

    lock_seconds: float = 2
    statement_seconds: float = 30
    whole_seconds: float = 45


# A new version's control may find another in the middle of a migration of large tables.
MIGRATING: Final = Patience(lock_seconds=120, statement_seconds=0, whole_seconds=1800)
SERVING: Final = Patience()


class Unreachable(SQLAlchemyError):
    """No connection can be made. `passing`: it may well be possible in a moment."""

    def __init__(self, place: str, reason: str, remedy: str, *, passing: bool) -> None:
        self.remedy = remedy
        self.reason = reason
        self.passing = passing
        super().__init__(f"PostgreSQL ({place}): {reason}")


def described(url: str) -> str:
    """Where a URL leads and as whom, without its password. Raises StartError if it cannot be understood."""
    if (place := _place(url)) is None:
        raise StartError(
            "store.url cannot be understood: write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with every "
            "character of the password that is not a letter or a digit as %XX (an @ is %40, a / is %2F)"
        )
    return place


def postgres_engine(url: str, seconds: float, patience: Patience = SERVING) -> AsyncEngine:
    """Connects when it is first used. `seconds`: how long a connection may take to be made."""
    place = described(url)
    guard = _Guard(patience.whole_seconds)

    async def connect() -> Any:
        return guard.watched(await _connected(url, place, seconds, _settings(patience)), seconds)

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        isolation_level="REPEATABLE READ",
        pool_size=CONNECTIONS // 2,
        max_overflow=CONNECTIONS // 2,
        pool_timeout=seconds,
    )
    errors: Any = engine.dialect.loaded_dbapi.Error

    @event.listens_for(engine.sync_engine, "checkout")
    def lent(connection: Any, record: Any, _proxy: Any) -> None:
        if "lent" in record.info:
            guard.arm(connection.driver_connection, PING_SECONDS)
            try:
                connection.ping()
            except errors as error:
                raise InvalidatePoolError from error
        record.info["lent"] = True
        guard.arm(connection.driver_connection, patience.whole_seconds)

    @event.listens_for(engine.sync_engine, "checkin")
    def given_back(connection: Any, _record: Any) -> None:
        if connection is not None:
            guard.disarm(connection.driver_connection)

    @event.listens_for(engine.sync_engine, "close")
    def closing(connection: Any, _record: Any) -> None:
        guard.arm(connection.driver_connection, CLOSE_SECONDS)

    return engine


async def wait_until_answering(url: str, seconds: float) -> None:
    """Returns when a connection could be made; one that is just starting gets its time. Raises StartError, at the
    latest after `seconds`."""
    place = described(url)
    clock = asyncio.get_running_loop().time
    deadline = clock() + seconds
    while True:
        try:
            connection = await _connected(url, place, max(deadline - clock(), 0.01), {})
        except Unreachable as error:
            if error.passing and clock() + RETRY_SECONDS < deadline:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            raise StartError(f"the store at {place} cannot be opened: {error.reason}; {error.remedy}") from error
        connection.terminate()
        return


async def take_turn(connection: AsyncConnection) -> None:
    """Waits until no other transaction that took its turn is under way; until the end of this one no other begins."""
    await connection.execute(text(f"SELECT pg_advisory_xact_lock({_TURN})"))


class _Guard:
    """Drops connections on which something takes longer than it may."""

    def __init__(self, whole_seconds: float) -> None:
        self._timers: WeakKeyDictionary[Any, asyncio.TimerHandle] = WeakKeyDictionary()
        self._whole_seconds = whole_seconds

    def watched(self, connection: Any, seconds: float) -> Any:
        """From its first moment: much is asked over it before it is lent."""
        self.arm(connection, seconds)
        return connection

    def arm(self, connection: Any, seconds: float) -> None:
        self.disarm(connection)
        drop: Callable[[], None] = connection.terminate
        self._timers[connection] = asyncio.get_running_loop().call_later(seconds, drop)

    def disarm(self, connection: Any) -> None:
        timer = self._timers.pop(connection, None)
        if timer is not None:
            timer.cancel()


async def _connected(url: str, place: str, seconds: float, settings: dict[str, str]) -> Any:
    try:
        return await asyncpg.connect(url, timeout=seconds, server_settings=settings)
    except TimeoutError as error:
        remedy = "check that PostgreSQL runs there and that nothing between here and there holds back its answers"
        # Not again: it had all the time there was.
        raise Unreachable(place, f"no answer within {seconds:.2g} s", remedy, passing=False) from error
    except OSError as error:
        remedy = "check that PostgreSQL runs there and takes connections from this host"
        passing = not isinstance(error, (ssl.SSLError, PermissionError))
        raise Unreachable(place, _words(error), remedy, passing=passing) from error
    except asyncpg.PostgresConnectionError as error:
        remedy = "check that what listens there is PostgreSQL, and its log"
        raise Unreachable(place, "the connection was closed while it was made", remedy, passing=True) from error
    except asyncpg.PostgresError as error:
        state = error.sqlstate or ""
        remedy = _REMEDIES.get(state, "see PostgreSQL's log")
        raise Unreachable(place, str(error.args[0]), remedy, passing=state in _PASSING) from error
    except (asyncpg.InterfaceError, asyncpg.InternalClientError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else ""
        if not said or any(secret in said for secret in _secrets(url)):
            said = type(error).__name__
        remedy = "check the options in store.url, and that what listens there is PostgreSQL"
        raise Unreachable(place, said, remedy, passing=False) from error


def _words(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"its name is not known ({error.strerror})"
    # The driver puts the addresses it tried into the text of a refused connection; what it made up has no number.
    if error.errno is None or isinstance(error, ssl.SSLError):
        return str(error) or type(error).__name__
    return os.strerror(error.errno)


def _secrets(url: str) -> set[str]:
    parts = urlsplit(url)
    said = parts.netloc.rpartition("@")[0].partition(":")[2]
    query = parse_qs(parts.query)
    found = {said, unquote(said), _only(query, "password"), _only(query, "sslpassword"), url}
    return found - {""}


def _settings(patience: Patience) -> dict[str, str]:
    def milliseconds(seconds: float) -> str:
        return str(round(seconds * 1000))

    return {
        "application_name": "vitalis-serve",
        "lock_timeout": milliseconds(patience.lock_seconds),
        "statement_timeout": milliseconds(patience.statement_seconds),
        "idle_in_transaction_session_timeout": milliseconds(min(patience.whole_seconds, 30)),
    }


def _place(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
    except ValueError:
        return None
    # An @ anywhere else belongs to a password that was not encoded, and what stands around it may be told to none.
    if parts.scheme not in ("postgres", "postgresql") or url.count("@") > ("@" in parts.netloc) or parts.fragment:
        return None
    hosts = _hosts(parts, query)
    if hosts is None:
        return None
    user = unquote(parts.netloc.rpartition("@")[0].partition(":")[0]) or _only(query, "user")
    database = unquote(parts.path.removeprefix("/")) or _only(query, "dbname") or _only(query, "database") or user
    return ", ".join(filter(None, (hosts, f"database {database}" * bool(database), f"user {user}" * bool(user))))


def _hosts(parts: SplitResult, query: dict[str, list[str]]) -> str | None:
    said = []
    ports = _only(query, "port")
    for one in filter(None, (parts.netloc.rpartition("@")[2] or _only(query, "host")).split(",")):
        host, port = unquote(one), ""
        if not host.startswith("/") and (":" in host.rpartition("]")[2]):
            host, _, port = host.rpartition(":")
        port = port or ports
        if port and not port.replace(",", "").isdecimal():
            return None
        said.append(f"{'socket in ' * host.startswith('/')}{host} port {port or 5432}")
    return ", ".join(said) or "this host"


def _only(query: dict[str, list[str]], name: str) -> str:
    return query.get(name, [""])[-1]

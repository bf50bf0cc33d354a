"""What PostgreSQL does that a file does not: refuse, be away, be slow, be shared. Each test has a real one."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from vitalis_serve.errors import ServeError, StartError
from vitalis_serve.store.database import store_errors, writing
from vitalis_serve.store.postgres import Patience, described, postgres_engine
from vitalis_serve.store.records import Act, Store, Tenant

from tests.support.postgres import Postgres, query
from tests.support.stores import Place

SLEEPING = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(20)' AND state = 'active'"
SECRET = "p@ss/w:rd#1?&%41"


def opened(url: str, work: Callable[[Store], Awaitable[Any]], seconds: float = 5) -> Any:
    async def run() -> Any:
        store = await Store.open(Path("unused"), url, seconds)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def not_opened(url: str, seconds: float = 5) -> str:
    """The sentence of the refusal, which neither shows the secret nor takes much longer than it may."""
    began = time.monotonic()
    with pytest.raises(StartError) as caught:
        opened(url, lambda store: store.check(), seconds)
    assert time.monotonic() - began < seconds + 15
    assert "p@ss" not in str(caught.value)
    assert "p%40ss" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[int]:
    """A port on which something else listens: it says `answer` to whoever comes and closes, or (None) nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    with client:
                        client.recv(1000)
                        client.sendall(answer or b"")

        thread = threading.Thread(target=serve, daemon=True)
        if answer is not None:
            thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)


async def add(store: Store, name: str) -> int:
    async with store.change() as change:
        await change.add_tenant(Tenant(name, 1))
        return await change.next_version()


async def names(store: Store) -> list[str]:
    return [tenant.name for tenant in await store.tenants()]


# Opening it


def test_password_with_special_characters_opens(postgres: Postgres, postgres_url: str) -> None:
    database = postgres_url.split("@/")[1].split("?")[0]
    postgres.run(
        "DROP ROLE IF EXISTS guarded", f"CREATE ROLE guarded LOGIN SUPERUSER PASSWORD '{SECRET}'", database=database
    )
    good = postgres.url(database, "guarded", SECRET)
    assert opened(good, lambda store: add(store, "acme")) == 1
    said = not_opened(postgres.url(database, "guarded", SECRET + "x"))
    assert f"database {database}, user guarded cannot be opened: password authentication failed" in said
    assert f"socket in {postgres.folder} port 5432" in said
    assert "check the user and the password in store.url" in said


def test_database_that_is_not_there_is_named(postgres: Postgres) -> None:
    said = not_opened(postgres.url("nowhere"))
    assert 'database "nowhere" does not exist; create the database there' in said


def test_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    said = not_opened(f"postgresql://me:p%40ss@/db?host={tmp_path}&port=77", 0.3)
    assert f"the store at socket in {tmp_path} port 77, database db, user me cannot be opened" in said
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    said = not_opened(f"postgresql://me:p%40ss@127.0.0.1:{port}/db", 0.3)
    assert f"127.0.0.1 port {port}, database db, user me cannot be opened: Connection refused; check that Postg" in said
    said = not_opened("postgresql://me:p%40ss@no-such-host.invalid/db", 0.3)
    assert "no-such-host.invalid port 5432, database db, user me cannot be opened: " in said


def test_server_that_never_answers_is_named_in_time() -> None:
    with listening(None) as port:
        said = not_opened(f"postgresql://me:p%40ss@127.0.0.1:{port}/db", 0.5)
    assert f"127.0.0.1 port {port}, database db, user me cannot be opened: no answer within 0.5 s" in said


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR unknown command\r\n", b"", b"N" * 40])
def test_what_is_no_postgresql_is_named(answer: bytes) -> None:
    with listening(answer) as port:
        said = not_opened(f"postgresql://me:p%40ss@127.0.0.1:{port}/db", 0.5)
    assert f"127.0.0.1 port {port}, database db, user me cannot be opened: " in said
    assert "PostgreSQL" in said.split("opened: ")[1]


def test_tls_where_there_is_none_is_named() -> None:
    with listening(b"N") as port:
        said = not_opened(f"postgresql://me:p%40ss@127.0.0.1:{port}/db?sslmode=require", 0.3)
    assert "rejected SSL upgrade" in said


def test_option_that_the_driver_cannot_use_is_named() -> None:
    said = not_opened("postgresql://me:p%40ss@127.0.0.1:1/db?sslmode=perhaps", 0.3)
    assert "cannot be opened: `sslmode` parameter must be one of" in said


def test_server_that_is_just_starting_gets_its_time(postgres: Postgres, postgres_url: str) -> None:
    postgres.stop()
    starting = threading.Timer(0.5, postgres.start)
    starting.start()
    try:
        assert opened(postgres_url, names, 60) == []
    finally:
        starting.join()


def test_user_without_rights_is_told_what_it_needs(postgres: Postgres, postgres_url: str) -> None:
    database = postgres_url.split("@/")[1].split("?")[0]
    postgres.run("DROP ROLE IF EXISTS stranger", "CREATE ROLE stranger LOGIN")
    said = not_opened(postgres.url(database, "stranger"))
    assert "permission denied for schema public; check that the user of store.url owns the database" in said


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:p@ss@host/db",
        "postgresql://me:p@ss/x@host/db",
        "postgresql://me:pa/p@ss@host/db",
        "postgresql://me:p%40ss#1@host/db",
        "postgresql://me:p%40ss?1@host/db",
        "postgresql://me:p%40ss",
        "postgresql://me:p%40ss@host:port/db",
    ],
)
def test_url_that_cannot_be_understood_is_refused_without_repeating_it(url: str) -> None:
    assert "store.url cannot be understood: write postgresql://USER:PASSWORD@HOST:PORT/DATABASE" in not_opened(url)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://u:p%40ss@h1:5433/db", "h1 port 5433, database db, user u"),
        ("postgres://u:p:q@h1/db", "h1 port 5432, database db, user u"),
        ("postgresql:///db?host=/run/x&user=me", "socket in /run/x port 5432, database db, user me"),
        ("postgresql://%2Frun%2Fx/db", "socket in /run/x port 5432, database db"),
        ("postgresql://u@h1,h2:5433/db", "h1 port 5432, h2 port 5433, database db, user u"),
        ("postgresql://u@[::1]:77/?dbname=d&password=p", "[::1] port 77, database d, user u"),
        ("postgresql://u@h", "h port 5432, database u, user u"),
    ],
)
def test_place_is_described_without_the_password(url: str, place: str) -> None:
    assert described(url) == place


# Away, and back


def test_restart_between_two_uses_is_not_noticed(postgres: Postgres, postgres_url: str) -> None:
    async def work(store: Store) -> list[str]:
        await asyncio.gather(*(store.check() for _ in range(3)))  # several connections lie ready
        await add(store, "acme")
        await asyncio.to_thread(postgres.restart)
        await add(store, "umbrella")
        return await names(store)

    assert opened(postgres_url, work) == ["acme", "umbrella"]


def test_killed_server_is_an_error_and_comes_back(postgres: Postgres, postgres_url: str) -> None:
    async def work(store: Store) -> list[str]:
        await add(store, "acme")

        async def interrupted() -> None:
            async with store.change() as change:
                await change.add_tenant(Tenant("lost", 1))
                await asyncio.to_thread(postgres.kill)
                await change.next_version()

        with pytest.raises(ServeError) as caught:
            await interrupted()
        assert caught.value.code == "store_unavailable"
        assert caught.value.message.endswith("nothing was changed")
        with pytest.raises(ServeError, match="PostgreSQL .*cannot|PostgreSQL .socket in"):
            await store.check()
        await asyncio.to_thread(postgres.start)
        await add(store, "umbrella")
        return await names(store)

    assert opened(postgres_url, work, 0.5) == ["acme", "umbrella"]


def test_frozen_server_is_given_up_and_used_again(postgres: Postgres, postgres_url: str) -> None:
    """Neither a connection from the pool nor a new one is waited for."""

    async def work(store: Store) -> list[str]:
        await add(store, "acme")
        with postgres.frozen():
            began = time.monotonic()
            with pytest.raises(ServeError, match="no answer within"):
                await store.check()
            assert time.monotonic() - began < 15
        await add(store, "umbrella")
        return await names(store)

    assert opened(postgres_url, work, 0.5) == ["acme", "umbrella"]


def test_freeze_in_the_middle_of_a_change_ends_it(postgres: Postgres, postgres_url: str) -> None:
    async def run() -> None:
        engine = postgres_engine(postgres_url, 5, Patience(whole_seconds=1))

        async def change(frozen: contextlib.ExitStack) -> None:
            with store_errors():
                async with writing(engine) as connection:
                    await connection.execute(text("CREATE TABLE lost (x INTEGER)"))
                    frozen.enter_context(postgres.frozen())
                    await connection.execute(text("SELECT 1"))

        with contextlib.ExitStack() as frozen:
            with pytest.raises(ServeError) as caught:
                await change(frozen)
            assert caught.value.code == "store_unavailable"
            await engine.dispose()

    opened(postgres_url, names)
    asyncio.run(run())
    assert "lost" not in Place(Path("unused"), postgres_url).tables()


def test_closing_does_not_wait_for_a_frozen_server(postgres: Postgres, postgres_url: str) -> None:
    async def run() -> None:
        store = await Store.open(Path("unused"), postgres_url)
        await store.check()
        with postgres.frozen():
            await asyncio.wait_for(store.close(), 30)

    asyncio.run(run())


def test_lost_answer_to_a_commit_is_not_called_unchanged(postgres_url: str) -> None:
    """A trigger that runs within the commit ends the connection."""

    async def work(store: Store) -> ServeError:
        await asyncio.to_thread(
            query,
            postgres_url,
            "CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$",
            "CREATE CONSTRAINT TRIGGER cut AFTER INSERT ON tenants DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION cut()",
        )
        with pytest.raises(ServeError) as caught:
            await add(store, "acme")
        await store.check()
        return caught.value

    error = opened(postgres_url, work)
    assert error.code == "store_unavailable"
    assert "look whether it was made" in error.message
    assert "nothing was changed" not in error.message


# Slow, full, shared


def test_change_waits_for_another_no_longer_than_it_may(postgres_url: str) -> None:
    async def work(store: Store) -> ServeError:
        other = postgres_engine(postgres_url, 5)
        async with writing(other):
            with pytest.raises(ServeError) as caught:
                await add(store, "acme")
            await store.check()  # readers wait for none
        await other.dispose()
        await add(store, "umbrella")
        return caught.value

    error = opened(postgres_url, work)
    assert (error.code, "lock timeout" in error.message) == ("store_unavailable", True)


def test_statement_that_takes_too_long_is_ended(postgres_url: str) -> None:
    async def run() -> None:
        engine = postgres_engine(postgres_url, 5, Patience(statement_seconds=0.2))
        with pytest.raises(ServeError, match="statement timeout"), store_errors():
            async with engine.connect() as connection:
                await connection.execute(text("SELECT pg_sleep(60)"))
        await engine.dispose()

    asyncio.run(run())


def test_full_disk_is_told_as_such_and_nothing_changed(postgres_url: str) -> None:
    """PostgreSQL's own error for it, from a trigger."""

    async def work(store: Store) -> list[str]:
        with pytest.raises(ServeError) as caught:
            await change_and_record(store)
        assert caught.value.code == "storage_full"
        return await names(store)

    async def change_and_record(store: Store) -> None:
        async with store.change() as change:
            await change.add_tenant(Tenant("acme", 1))
            await change.record(Act(1, "me", "tenant.create", "acme", "here"))

    opened(postgres_url, names)
    query(
        postgres_url,
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$",
        "CREATE TRIGGER full_disk BEFORE INSERT ON audit FOR EACH ROW EXECUTE FUNCTION full_disk()",
    )
    assert opened(postgres_url, work) == []


def test_value_that_cannot_be_kept_is_the_callers_fault(postgres_url: str) -> None:
    async def work(store: Store) -> tuple[int, str]:
        with pytest.raises(ServeError) as caught:
            await change_notes(store)
        return caught.value.status, caught.value.code

    async def change_notes(store: Store) -> None:
        async with store.change() as change:
            await change.add_tenant(Tenant("acme", 1, notes="a\0b"))

    assert opened(postgres_url, work) == (400, "invalid_request")


def test_versions_of_several_controls_are_all_different(postgres_url: str) -> None:
    """Each change sees those before it, from whichever control, and every reader sees a whole one."""

    async def run() -> None:
        stores = [await Store.open(Path("unused"), postgres_url) for _ in range(3)]
        wrong = []

        async def read(store: Store) -> None:
            for _ in range(30):
                version, contents = await store.contents()
                if len(contents.tenants) != version:
                    wrong.append((version, len(contents.tenants)))

        async def write(number: int) -> list[int]:
            return [await add(stores[number], f"t-{number}-{n}") for n in range(15)]

        versions, *_ = await asyncio.gather(asyncio.gather(*map(write, range(3))), *(read(store) for store in stores))
        assert sorted(sum(versions, [])) == list(range(1, 46))
        assert wrong == []
        for store in stores:
            await store.close()

    asyncio.run(run())


def test_same_name_from_two_controls_is_given_once(postgres_url: str) -> None:
    async def run() -> list[Any]:
        stores = [await Store.open(Path("unused"), postgres_url) for _ in range(4)]
        try:
            return await asyncio.gather(*(add(store, "acme") for store in stores), return_exceptions=True)
        finally:
            for store in stores:
                await store.close()

    outcomes = asyncio.run(run())
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [1]
    assert {outcome.code for outcome in outcomes if isinstance(outcome, ServeError)} == {"already_exists"}


def test_change_that_its_caller_gives_up_leaves_nothing(postgres_url: str) -> None:
    """The task is cancelled in the middle of a statement; the next change has its turn at once."""

    async def slow() -> None:
        engine = postgres_engine(postgres_url, 5)
        try:
            async with writing(engine) as connection:
                await connection.execute(text("INSERT INTO tenants VALUES ('lost', 'active', '', 1)"))
                await connection.execute(text("SELECT pg_sleep(20)"))
        finally:
            await engine.dispose()

    async def work(store: Store) -> list[str]:
        task = asyncio.create_task(slow())
        while not await asyncio.to_thread(query, postgres_url, SLEEPING):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await add(store, "acme")
        return await names(store)

    assert opened(postgres_url, work) == ["acme"]

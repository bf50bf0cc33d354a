"""A real PostgreSQL on a Unix socket of its own, for tests: one a session, with a fresh database for each test.

    def test_x(postgres_url: str): ...               # postgresql://..., an empty database
    def test_y(postgres: Postgres): postgres.restart()

It refuses to run as root, so root starts it as another user. Nothing waits for the disk: what is committed outlives
kill -9, but not a power failure. Where it is not installed, the tests that ask for it are skipped, and fail under CI.
"""

import asyncio
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest

from tests.support.missing import missing

SECONDS = 60
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "40",
    "shared_buffers": "16MB",
    "max_wal_size": "128MB",
    "autovacuum": "off",
    "logging_collector": "off",
}
# Waits for the end of our side of a pipe. The folder itself lies in one where only its owner may remove it.
GUARD = 'read line; pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null) && kill -QUIT "$pid"; rm -rf "$1"/*'
# With a password where a test wants one, without one elsewhere.
ACCESS = "local all guarded scram-sha-256\nlocal all all trust\n"


def binaries() -> Path | None:
    """The folder of the newest installed `initdb` and `postgres`."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    found.sort(key=lambda folder: [int(part) for part in folder.parent.name.split(".") if part.isdecimal()])
    on_path = shutil.which("initdb")
    return found[-1] if found else Path(on_path).resolve().parent if on_path else None


class Postgres:
    """A server with its data in a folder of its own. `folder` also holds its socket."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._numbers = itertools.count()
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path is short
        self._as: dict[str, Any] = {"cwd": self.folder}
        if os.geteuid() == 0:
            user = next(user for user in pwd.getpwall() if user.pw_name in ("postgres", "nobody"))
            self._as |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        self.folder.chmod(0o755)
        data = self.folder / "data"
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"]},
            **self._as,
        )
        (data / "pg_hba.conf").write_text(ACCESS)
        # Should this process be killed, nobody else would end the server.
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, "guard", self.folder], stdin=subprocess.PIPE, start_new_session=True, **self._as
        )
        self.start()

    def start(self) -> None:
        """Returns when it takes connections."""
        options = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self.folder / "data", "-k", self.folder, *options],
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                start_new_session=True,  # Ctrl-C is ours to handle
                **self._as,
            )
        deadline = time.monotonic() + SECONDS
        while True:
            assert self._process.poll() is None, (self.folder / "log").read_text()
            try:
                self.run("SELECT 1")
                return
            except (OSError, asyncpg.PostgresError):
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.02)

    def stop(self) -> None:
        """At once, as an operator would: those who are connected are cut off."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(SECONDS)

    def kill(self) -> None:
        """kill -9 of the whole cluster; `start` finds what a crash leaves."""
        pids = self._pids()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self._process.wait(SECONDS)
        deadline = time.monotonic() + SECONDS
        while any(map(_lives, pids)):  # they hold the memory without which a new server refuses to start
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def restart(self) -> None:
        self.stop()
        self.start()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Connections stay open and new ones are taken by the kernel, but nothing answers."""
        pids = self._pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def remove(self) -> None:
        if self._process.poll() is None:
            self.kill()
        self._guard.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str, user: str = "tests", password: str = "") -> str:
        secret = f":{quote(password, safe='')}" if password else ""
        return f"postgresql://{user}{secret}@/{database}?host={self.folder}"

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name} STRATEGY wal_log")
        return self.url(name)

    def drop(self, url: str) -> None:
        """Of a URL that `database` has made, whoever is still connected."""
        name = url.partition("@/")[2].partition("?")[0]
        self.run(f"DROP DATABASE {name} WITH (FORCE)")

    def run(self, *statements: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Each as a transaction of its own, without us. Returns the last one's rows."""
        return query(self.url(database), *statements)

    def _pids(self) -> list[int]:
        """The first process first: it would replace the others."""
        first = self._process.pid
        try:
            children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        except FileNotFoundError:
            children = []
        return [first, *map(int, children)]


def query(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """Runs statements on any database, each as a transaction of its own. Returns the last one's rows."""

    async def work() -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(url, timeout=SECONDS)
        try:
            rows: list[Any] = []
            for statement in statements:
                rows = await connection.fetch(statement)
            return [tuple(row) for row in rows]
        finally:
            await connection.close()

    return asyncio.run(work())


def _lives(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # of a zombie there is none
    except OSError:
        return False


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The session's server. Whoever stops it starts it again."""
    programs = binaries()
    if programs is None:
        missing("no initdb in /usr/lib/postgresql/*/bin or on PATH: apt-get install postgresql")
    server = Postgres(programs)
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    """An empty database of the test's own."""
    url = postgres.database()
    yield url
    postgres.drop(url)

"""A real redis-server as a child, in a folder of its own, on a Unix socket.

    with redis.started(folder) as server:
        server.freeze()
        ...

Where none is installed, tests that ask for one are skipped, unless CI is set: then they fail.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.support.missing import missing

SECONDS = 10
MISSING = "no redis-server on this machine (Debian: apt-get install redis-server)"


def program() -> str:
    found = shutil.which("redis-server")
    if found is None:
        missing(MISSING)
    return found


class RedisServer:
    """`url` for clients; `password` "" for none. Nothing is kept on disk: started again, it is empty."""

    def __init__(self, folder: Path, *, password: str = "", port: int = 0, cluster: bool = False) -> None:
        self.password = password
        self.port = port
        self._cluster = cluster
        self._folder = folder
        self._socket = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._argv = [
            program(), "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(self._socket), "--save", "",
            "--appendonly", "no", "--dir", str(folder), "--logfile", str(folder / "redis.log"),
            "--maxmemory-policy", "noeviction", *(["--requirepass", password] if password else []),
            *(["--cluster-enabled", "yes", "--cluster-port", str(free_port())] if cluster else []),
        ]  # fmt: skip

    @property
    def url(self) -> str:
        return self.url_with(self.password)

    def url_with(self, password: str) -> str:
        known = f":{password}@" if password else ""
        return f"redis://{known}127.0.0.1:{self.port}/0" if self.port else f"unix://{known}{self._socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> "Redis":
        """A blocking client; to be closed."""
        return Redis.from_url(self.url, decode_responses=True, protocol=2)

    def start(self) -> None:
        assert self._process is None
        self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            self._argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(RedisConnectionError), self.client() as client:
                client.ping()
                if self._cluster:
                    client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
                break
            log = self._folder / "redis.log"
            said = log.read_text() if log.exists() else ""
            assert self._process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.01)
        if self._cluster:
            with self.client() as client:
                while client.cluster("info")["cluster_state"] != "ok":
                    assert time.monotonic() < deadline
                    time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL: every connection is cut, and all data gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(SECONDS)
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP. It takes connections and bytes, and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def fill(self) -> None:
        """No room for anything more, until `empty`: it refuses what would need some."""
        with self.client() as client:
            client.config_set("maxmemory", "1mb")
            with contextlib.suppress(Exception):
                for n in range(100):
                    client.set(f"ballast:{n}", "x" * 100_000)

    def empty(self) -> None:
        with self.client() as client:
            client.config_set("maxmemory", "0")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def started(folder: Path, *, password: str = "", cluster: bool = False) -> Iterator[RedisServer]:
    """On a Unix socket. cluster: of this one, which has all slots."""
    server = RedisServer(folder, password=password, port=free_port() if cluster else 0, cluster=cluster)
    server.start()
    try:
        yield server
    finally:
        server.kill()

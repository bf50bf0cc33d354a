"""A real control process on a folder of its own, and the two that talk to it: a supervisor and workers.

The test plays the supervisor on the inherited channel, so it knows without polling when control is ready."""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vitalis_serve.control.client import Client

SECONDS = 15


class Channel:
    """Newline-delimited JSON over a socket, with a thread that reads. `received` ends with None at EOF."""

    def __init__(self, channel: socket.socket) -> None:
        self.received: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._socket = channel
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def send(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def expect(self, kind: str, seconds: float = SECONDS) -> dict[str, Any]:
        """The next message of a kind; others before it are dropped."""
        while True:
            message = self.received.get(timeout=seconds)
            assert message is not None, f"closed before {kind}"
            if message["type"] == kind:
                return message

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(SECONDS)
        self._socket.close()

    def _read(self) -> None:
        with self._socket.makefile("rb") as lines, suppress(OSError):
            for line in lines:
                self.took(json.loads(line))
        self.received.put(None)

    def took(self, message: dict[str, Any]) -> None:
        self.received.put(message)


class Worker(Channel):
    """A worker as control sees one: says hello, acknowledges snapshots, reports metrics."""

    def __init__(self, path: str, name: str = "worker-0", version: int = 0, acknowledge: bool = True) -> None:
        self.acknowledge = acknowledge
        self.report: dict[str, Any] = {"counters": [], "gauges": [], "histograms": []}
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel.connect(path)
        super().__init__(channel)
        self.send({"type": "hello", "worker": name, "pid": os.getpid(), "version": version})

    def took(self, message: dict[str, Any]) -> None:
        # Known to the test before it is acknowledged: what control calls applied must be here already.
        super().took(message)
        if message["type"] == "snapshot" and self.acknowledge:
            self.send({"type": "applied", "version": message["version"]})
        if message["type"] == "collect":
            self.send({"type": "metrics", "id": message["id"], "values": self.report})

    def snapshot(self, seconds: float = SECONDS) -> dict[str, Any]:
        """The body of the next snapshot pushed."""
        body: dict[str, Any] = self.expect("snapshot", seconds)["body"]
        return body


def control_options(folder: Path) -> dict[str, Any]:
    """Options with every file in `folder` and a port that the system chooses."""
    return {
        "database_path": str(folder / "vitalis.db"),
        "snapshot_path": str(folder / "snapshot.json"),
        "token_path": str(folder / "control.token"),
        "cache_secret_path": str(folder / "cache.secret"),
        "address_path": str(folder / "control.address"),
        "control_socket": str(folder / "control.sock"),
        "port": 0,
        "routes": [{"name": "chat", "model": "tiny"}, {"name": "reason", "model": "tiny"}],
    }


class Control:
    """One run of control. `folder` may be that of an earlier run; `program` starts it in another way."""

    def __init__(self, folder: Path, program: str = "", **options: Any) -> None:
        self.folder = folder
        self.options = {**control_options(folder), **options}
        options_path = folder / "control.json"
        options_path.write_text(json.dumps(self.options))
        start = ["-c", program] if program else ["-m", "vitalis_serve.control.process"]
        ours, theirs = socket.socketpair()
        self.log_path = folder / "control.log"
        with theirs, self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *start, str(options_path)],
                env={**os.environ, "VITALIS_SUPERVISOR_FD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stderr=log,
            )
        self.supervisor = Channel(ours)

    def wait_ready(self) -> "Control":
        try:
            self.supervisor.expect("ready")
        except BaseException:
            self.stop()
            print(self.log_path.read_text())
            raise
        self.address = (self.folder / "control.address").read_text().strip()
        self.token = (self.folder / "control.token").read_text().strip()
        self.client = Client(self.address, self.token)
        return self

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self.client.call(method, path, body)

    def worker(self, **fields: Any) -> Worker:
        return Worker(self.options["control_socket"], **fields)

    def snapshot(self) -> dict[str, Any]:
        """The one on disk."""
        document: dict[str, Any] = json.loads((self.folder / "snapshot.json").read_text())
        return document

    def stop(self) -> int:
        """Asks it to stop; returns its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            self.supervisor.close()


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Control]:
    """A control that is ready, and gone afterwards."""
    control = Control(folder, **options).wait_ready()
    try:
        yield control
    finally:
        control.stop()

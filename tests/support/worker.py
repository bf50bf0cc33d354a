"""A real worker process without a supervisor around it: the test plays the supervisor on its socket pair."""

import contextlib
import hashlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from vitalis_serve.fleet import Fleet, Replica, ReplicaState
from vitalis_serve.gateway.options import WorkerOptions

SERVER = Path(__file__).resolve().parents[2] / "server"
KEY = "vts_testkey00000_0123456789abcdefghijklmnopqrstuv"
MODEL = "gpt-oss-20b"
# A session that is at home on engine-0, then engine-1, then engine-2 (tests/unit/gateway/test_routing.py says so).
SESSION = "home-599"
# For it engine-0 first, and every slot for every class: what most tests are about is something else.
# Trouble is made on purpose, and much of it.
PREDICTABLE = {
    "routing": "session", "reserved_share": 0.0, "overload_seconds": 0.0, "breaker_failures": 1_000_000,
    "retries_at_least": 1_000_000,
}  # fmt: skip


def snapshot(
    version: int = 1,
    keys: list[dict[str, Any]] | None = None,
    routes: dict[str, str] | None = None,
    *,
    tenants: Sequence[dict[str, Any]] = (),
    route_rates: dict[str, Any] | None = None,
    issuers: Sequence[dict[str, Any]] = (),
) -> bytes:
    """A snapshot with KEY in it; `keys` replaces that, each with "key" in clear. `route_rates`: each route's limits."""
    rows = []
    for row in keys if keys is not None else [{"id": "testkey00000", "key": KEY, "tenant": "test"}]:
        row = dict(row)
        row["digest"] = hashlib.sha256(row.pop("key").encode()).hexdigest()
        rows.append({"scopes": ["inference"], "routes": ["*"], "class": "standard", "expires_at": None, **row})
    document = {
        "version": version,
        "tenants": list(tenants),
        "keys": rows,
        "routes": [{"name": n, "model": m, "rates": route_rates} for n, m in (routes or {MODEL: MODEL}).items()],
        "issuers": list(issuers),
    }
    return json.dumps(document).encode()


class WorkerProcess:
    def __init__(self, folder: Path, data: socket.socket, options: dict[str, Any]) -> None:
        self.folder = folder
        self.host, self.port = data.getsockname()[:2]
        self.url = f"http://{self.host}:{self.port}"
        self.access_log = folder / "access.jsonl"
        self._options = options
        self.name = f"worker-{options.get('worker', 0)}"
        self._data = data
        self._version = 0
        self._says: queue.Queue[dict[str, Any]] = queue.Queue()
        self._read = 0  # bytes of the access log
        self._records: list[dict[str, Any]] = []
        self.start()

    def start(self) -> None:
        document = WorkerOptions(
            name=self.name,
            snapshot_path=str(self.folder / "snapshot.json"),
            control_socket=str(self.folder / "control.sock"),
            access_log_path=str(self.access_log),
            **PREDICTABLE | self._options,
        )
        path = self.folder / f"{self.name}.json"
        path.write_bytes(msgspec.json.encode(document))
        ours, theirs = socket.socketpair()
        self._line = ours
        with open(self.folder / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vitalis_serve.gateway.worker", str(path)],
                env={
                    **os.environ,
                    "PYTHONPATH": str(SERVER),
                    "VITALIS_DATA_FD": str(self._data.fileno()),
                    "VITALIS_SUPERVISOR_FD": str(theirs.fileno()),
                },
                pass_fds=[self._data.fileno(), theirs.fileno()],
                stdout=log,
                stderr=log,
            )
        theirs.close()
        threading.Thread(target=self._listen, args=(ours, self._says), daemon=True).start()
        self.hear("ready")

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text()

    def _listen(self, line: socket.socket, says: queue.Queue[dict[str, Any]]) -> None:
        with contextlib.suppress(OSError), line.makefile("rb") as file:
            for text in file:
                message = json.loads(text)
                if message["type"] != "heartbeat":
                    says.put(message)

    def say(self, message: dict[str, Any]) -> None:
        self._line.sendall(json.dumps(message).encode() + b"\n")

    def hear(self, kind: str, seconds: float = 10) -> dict[str, Any]:
        """The next message of this kind; others before it are dropped."""
        while True:
            try:
                message = self._says.get(timeout=seconds)
            except queue.Empty:
                raise AssertionError(f"the worker did not say {kind}:\n{self.log()}") from None
            if message["type"] == kind:
                return message

    def in_flight(self) -> dict[str, Any]:
        """{"count": open contexts, "replicas": {name: in flight}}; also proves that earlier messages were handled."""
        self.say({"type": "in_flight?"})
        return self.hear("in_flight")

    def fleet(self, *replicas: Replica) -> None:
        self._version += 1
        self.say({"type": "fleet", **Fleet(self._version, replicas).to_json()})
        self.in_flight()

    def serve(self, *addresses: str, slots: int = 64, models: tuple[str, ...] = (MODEL,)) -> None:
        """Every address a ready replica named engine-0, engine-1 ..."""
        self.fleet(
            *(
                Replica(f"engine-{i}", address, ReplicaState.READY, models=models, slots=slots, incarnation=1)
                for i, address in enumerate(addresses)
            )
        )

    def records(self) -> list[dict[str, Any]]:
        """The access log so far. Only what is new is read: tests poll it, and some make thousands of records."""
        if self.access_log.exists():
            with self.access_log.open("rb") as log:
                log.seek(self._read)
                whole, end, _ = log.read().rpartition(b"\n")
            self._read += len(whole) + len(end)
            self._records += [json.loads(line) for line in whole.splitlines()]
        return [*self._records]

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """After `kill`; it has no fleet yet."""
        self._line.close()
        self._says = queue.Queue()
        self._version = 0
        self.start()

    def stop(self) -> None:
        self.kill()
        self._line.close()


@contextlib.contextmanager
def running_worker(folder: Path, *, document: bytes | None = None, **options: Any) -> Iterator[WorkerProcess]:
    """A worker on a free loopback port with KEY in force and no engines yet. `send_buffer`: that of its sockets to
    clients, in bytes, in place of the system's own that grows to megabytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "snapshot.json").write_bytes(document if document is not None else snapshot())
    with socket.create_server(("127.0.0.1", options.pop("port", 0)), backlog=4096) as data:
        if (size := options.pop("send_buffer", None)) is not None:
            data.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)  # what it accepts has it too
        worker = WorkerProcess(folder, data, options)
        try:
            yield worker
        finally:
            worker.stop()

"""A whole tree for tests: the real supervisor over tiny engines and workers. As a script it is the supervisor process
(`python tree.py OPTIONS.json`); `Tree` is the test's side of it."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vitalis_serve.errors import ConfigurationError, StartError
from vitalis_serve.supervise import folders, orphans
from vitalis_serve.supervise.attendant import AttendantSpec
from vitalis_serve.supervise.commands import NotRunning, request
from vitalis_serve.supervise.lifecycle import Policy
from vitalis_serve.supervise.replica import Answer, Listing, ReplicaSpec, Sight
from vitalis_serve.supervise.supervisor import Supervisor, SupervisorOptions

HERE = Path(__file__).parent
SERVER = HERE.parent.parent / "server"


class TinyProber:
    def __init__(self, path: str) -> None:
        self.path = path

    async def exchange(self, line: str, deadline: float) -> str:
        async with asyncio.timeout_at(deadline):
            reader, writer = await asyncio.open_unix_connection(self.path)
            try:
                writer.write(line.encode() + b"\n")
                return (await reader.readline()).decode().strip()
            finally:
                writer.close()

    async def models(self, deadline: float) -> Listing:
        return Listing(("tiny",))

    async def answers(self, model: str, deadline: float) -> Answer:
        try:
            right = await self.exchange("ask", deadline) == "right"
        except TimeoutError:
            return Answer("no answer in time")
        except OSError as exc:
            return Answer(repr(exc), refused=True)
        return Answer() if right else Answer("a wrong answer", refused=True)

    async def look(self, deadline: float) -> Sight:
        try:
            requests, counter = (await self.exchange("look", deadline)).split()
        except TimeoutError:
            return Sight(False, reason="no answer in time")
        except (OSError, ValueError) as exc:
            return Sight(False, refused=True, reason=repr(exc))
        return Sight(True, int(requests), int(counter))


def run_supervisor(options: dict[str, Any]) -> None:
    logging.basicConfig(level="INFO", format="%(message)s")
    data_folder = Path(options["data_folder"])
    try:
        run = folders.prepare(data_folder)
    except StartError as exc:
        print(exc, flush=True)
        sys.exit(3)
    log = data_folder / "log"
    policy = Policy(**options["policy"])

    def make(index: int) -> ReplicaSpec:
        if index >= options["most_replicas"]:
            raise ConfigurationError(f"no room for replica {index}")
        name = f"engine-{index}"
        path = str(run / f"{name}.sock")
        argv = (sys.executable, str(HERE / "tiny_engine.py"), path, *options["engine_flags"])
        return ReplicaSpec(
            name, f"unix:{path}", ("tiny",), 4, TinyProber(path), policy, probe_seconds=0.1, argv=argv,
            environment=dict(os.environ), remedy=lambda lines: "Buy more memory." if "oom" in lines else None,
        )  # fmt: skip

    def attendant(name: str, kind: Any) -> AttendantSpec:
        argv = (sys.executable, str(HERE / "tiny_worker.py"), name, str(log), *options[f"{kind}_flags"])
        return AttendantSpec(name, kind, argv, dict(os.environ))

    async def main() -> None:
        supervisor = Supervisor(
            SupervisorOptions(
                data_folder,
                run,
                "127.0.0.1",
                options["port"],
                options["replicas"],
                settle_seconds=options["settle_seconds"],
                drain_seconds=policy.drain_seconds,
                stop_seconds=policy.stop_seconds,
                workers=(attendant("worker-0", "worker"),),
                control=attendant("control", "control"),
            )
        )

        async def companion() -> None:
            supervisor.open_fleet(make)

        await supervisor.run(companion)

    try:
        asyncio.run(main())
    except (StartError, ConfigurationError) as exc:
        print(exc, flush=True)
        sys.exit(3 if isinstance(exc, StartError) else 2)


class Tree:
    """Starts and asks one; `stop` at the end of every test, which also proves that nothing is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_folder = folder / "var"
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "supervisor.log"

    def start(self, *, wait: bool = True, **options: Any) -> "Tree":
        document = {
            "data_folder": str(self.data_folder), "port": 0, "replicas": 1, "most_replicas": 4, "settle_seconds": 0,
            "engine_flags": [], "worker_flags": [], "control_flags": [], **options,
            "policy": {"backoff_first_seconds": 0.1, "backoff_max_seconds": 0.2, "stop_seconds": 2, "drain_seconds": 5,
                       "hung_seconds": 2, "tries": 3, "steady_seconds": 60, "start_seconds": 20,
                       **options.get("policy", {})},
        }  # fmt: skip
        path = self.folder / "options.json"
        path.write_text(json.dumps(document))
        environment = {**os.environ, "PYTHONPATH": str(SERVER)}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__)), str(path)],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.until(lambda: self.states() and set(self.states().values()) == {"ready"})
        return self

    @property
    def socket(self) -> Path:
        return folders.run_folder(self.data_folder) / "supervisor.sock"

    def order(self, **command: Any) -> dict[str, Any]:
        return list(request(self.socket, command, seconds=30))[-1]

    def status(self) -> dict[str, Any]:
        return self.order(command="status")

    def states(self) -> dict[str, str]:
        """Of the replicas; nothing if nobody answers."""
        with contextlib.suppress(NotRunning):
            return {r["name"]: r["state"] for r in self.status()["fleet"]["replicas"]}
        return {}

    def child(self, name: str) -> dict[str, Any]:
        return next(c for c in self.status()["children"] if c["name"] == name)

    def replica(self, name: str = "engine-0") -> dict[str, Any]:
        return next(r for r in self.status()["fleet"]["replicas"] if r["name"] == name)

    def engine(self, line: str, name: str = "engine-0") -> str:
        path = str(folders.run_folder(self.data_folder) / f"{name}.sock")

        async def exchange() -> str:
            return await TinyProber(path).exchange(line, asyncio.get_running_loop().time() + 5)

        return asyncio.run(exchange())

    def told(self, name: str = "worker-0") -> list[str]:
        path = self.data_folder / "log" / f"{name}.told"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def fleets(self, name: str = "worker-0") -> list[dict[str, Any]]:
        path = self.data_folder / "log" / f"{name}.fleets"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def in_flight(self, **counts: int) -> None:
        path = self.data_folder / "log" / "in_flight.json"
        trial = path.with_suffix(".new")
        trial.write_text(json.dumps({k.replace("_", "-"): n for k, n in counts.items() if n}))
        trial.replace(path)

    def pids(self) -> list[int]:
        """Every process that carries this tree's mark."""
        if not self.data_folder.is_dir():
            return []  # never made, and nothing was started
        return orphans.find(f"{folders.tree_mark(self.data_folder)}:")

    def until(self, wanted: Callable[[], Any], seconds: float = 15) -> Any:
        """Polls what only the outside can see; fails with the supervisor's log."""
        deadline = time.monotonic() + seconds
        while not (found := wanted()):
            assert time.monotonic() < deadline, f"not in {seconds} s; the log:\n{self.log.read_text()}"
            time.sleep(0.02)
        return found

    def wait(self, seconds: float = 20) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
        self.until(lambda: not self.pids(), 5)


@contextlib.contextmanager
def tree(folder: Path) -> Iterator[Tree]:
    made = Tree(folder)
    try:
        yield made
    finally:
        made.stop()


if __name__ == "__main__":
    run_supervisor(json.loads(Path(sys.argv[1]).read_text()))

"""A real `vitalis-serve gateway` before simulated engines on Unix sockets, and what must hold when all have left."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from vitalis_serve.control.client import Client
from vitalis_serve.gateway.seats import CLASSES

from tests.support import engines, gateway, simulator
from tests.support.engines import ROOT, Stack

ENGINES = 3
GAUGES = ("vitalis_open_contexts", "vitalis_in_flight", "vitalis_queued", "vitalis_body_bytes",
          "vitalis_client_connections")  # fmt: skip
SETTINGS = {
    "ENGINES_PROBE_SECONDS": "0.2", "ENGINES_HUNG_SECONDS": "5",
    "GATEWAY_QUEUE_MAX_REQUESTS": "12", "GATEWAY_QUEUE_MAX_SECONDS": "3", "GATEWAY_HEADER_SECONDS": "2",
    "GATEWAY_BODY_SECONDS": "2", "GATEWAY_DEADLINES_CONNECT_SECONDS": "1",
    "GATEWAY_DEADLINES_FIRST_TOKEN_SECONDS": "2", "GATEWAY_DEADLINES_IDLE_SECONDS": "2",
    "GATEWAY_DEADLINES_TOTAL_SECONDS": "20",
}  # fmt: skip


class Site:
    """The gateway (`stack`) and its engines, which keep their addresses when they are killed and started again."""

    def __init__(self, folder: Path, step_ms: float, slots: int) -> None:
        self._flags = ("--decode-step-ms", str(step_ms))
        self.sockets = [folder / f"{index}.sock" for index in range(ENGINES)]
        self.engines = [simulator.start(*self._flags, uds=path) for path in self.sockets]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("VITALIS_")}
        environ |= {
            "PYTHONPATH": str(ROOT / "server"), "VITALIS_CONFIG": str(ROOT / "config" / "gpt-oss.yaml"),
            "VITALIS_DATA_FOLDER": str(folder / "var"), "VITALIS_GATEWAY_HOST": "127.0.0.1",
            "VITALIS_GATEWAY_PORT": "0", "VITALIS_CONTROL_PORT": "0",
            **{f"VITALIS_{name}": value for name, value in SETTINGS.items()}, "VITALIS_ENGINES_SLOTS": str(slots),
        }  # fmt: skip
        where = [word for path in self.sockets for word in ("--engine", f"unix:{path}")]
        argv = (sys.executable, "-P", "-m", "vitalis_serve", "gateway", *where, "--model", gateway.MODEL)
        self.stack = Stack(folder, environ, argv)
        self.keys: list[str] = []  # of several tenants, and of every class

    def make_keys(self) -> None:
        """One tenant's for each class, and the first key."""
        control = Client.of_folder(self.stack.data)
        for class_ in CLASSES:
            control.call("POST", "/v1/tenants", {"name": f"soak-{class_}"})
            made = control.call("POST", "/v1/keys", {"tenant": f"soak-{class_}", "class": class_})
            self.keys.append(made["key"])
        self.keys.append(self.stack.key)

    def restart(self, index: int, dead_seconds: float) -> None:
        """SIGKILL, and after a while the same engine at the same address."""
        self.engines[index].kill()
        self.engines[index].stop()
        time.sleep(dead_seconds)
        self.engines[index] = simulator.start(*self._flags, uds=self.sockets[index])

    def processes(self) -> dict[str, int]:
        """The gateway's own, by name."""
        assert self.stack.process is not None
        children = {
            child["name"]: child["pid"] for child in self.stack.status()["children"] if child["kind"] != "engine"
        }
        return {"supervisor": self.stack.process.pid, **children}

    def descriptors(self) -> dict[str, int]:
        """Of each process, without the worker's kept-alive connections to engines."""
        found = {name: len(open_files(pid)) for name, pid in self.processes().items()}
        found["worker-0"] -= int(self.stack.metrics().get("vitalis_upstream_connections", 0))
        return found

    def quiet(self, before: dict[str, int]) -> None:
        """Nothing is left of any request, here or in the engines, and no traceback was ever written."""
        engines.until(lambda: not any(self.gauges().values()), 30, "every gauge zero", every=0.2)
        for engine in self.engines:
            engine.wait_for(lambda state: not state["running"] and not state["waiting"], 30)
        least: dict[str, int] = {}  # a probe of the supervisor's, or our own question, may be open in any one look

        def back() -> bool:
            for name, count in self.descriptors().items():
                least[name] = min(count, least.get(name, count))
            return all(least[name] <= before[name] for name in before)

        try:
            engines.until(back, 30, "descriptors", every=0.5)
        except AssertionError:
            opened = {name: open_files(pid) for name, pid in self.processes().items()}
            raise AssertionError(f"descriptors: {before} before, {least} now: {opened}") from None
        for path in [self.stack.folder / "terminal.log", *(self.stack.data / "log").glob("*.log")]:
            assert "Traceback" not in path.read_text(), path.read_text()[-4000:]

    def gauges(self) -> dict[str, float]:
        said = self.stack.metrics()
        return {name: said[name] for name in GAUGES}


def open_files(pid: int) -> list[str]:
    """What its descriptors are, as /proc writes it."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(path))
    return sorted(found)


@contextlib.contextmanager
def site(folder: Path, step_ms: float, slots: int = 4) -> Iterator[Site]:
    made = Site(folder, step_ms, slots)
    try:
        made.stack.start()
        made.stack.wait_ready(ENGINES, 60)
        terminal = folder / "terminal.log"
        engines.until(lambda: "Ready. Try it:" in terminal.read_text(), 60, "the first key")
        made.make_keys()
        yield made
    finally:
        with contextlib.ExitStack() as ends:
            for engine in made.engines:
                ends.callback(engine.stop)
            if made.stack.process is not None:
                ends.callback(made.stack.stop)

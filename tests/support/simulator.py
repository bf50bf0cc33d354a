"""The simulated engine as a real child process, for tests that need an engine they can command.

    with simulator.started(preset="instant") as engine:
        engine.misbehave("cut", point="chunk", after_events=3, requests=1)
        ...
        engine.wait_for(lambda state: state["aborts"] == 1)

Control calls go over a listener of their own, so an engine that refuses or is silent can still be reached.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.support import client

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 20
# the environment of a child that imports the simulator
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "loadtests")}


def command(*flags: str) -> list[str]:
    """The argv of a simulated engine; its environment needs `ENVIRONMENT`."""
    return [sys.executable, "-m", "simulator", *flags]


@dataclass
class Simulator:
    """A running simulated engine. `address` is "http://host:port" or "unix:/path", as the fleet writes addresses."""

    process: subprocess.Popen[str]  # not of an attached one
    address: str
    control: str
    log_path: Path | None
    output: list[str] = field(default_factory=list)

    @property
    def host_port(self) -> tuple[str, int]:
        """Of a TCP address."""
        parts = urlsplit(self.address)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def call(self, method: str, path: str, document: Any = None) -> tuple[int, bytes]:
        """One request over the control listener."""
        body = b"" if document is None else json.dumps(document).encode()
        answer = client.ask(self.control, client.request(method, path, body), seconds=10)
        return answer.status, answer.body

    def misbehave(self, kind: str, **parameters: Any) -> None:
        """Adds a rule; see loadtests/simulator/rules.py for kinds and parameters. Raises where there is none such."""
        status, body = self.call("POST", "/sim/misbehave", {"kind": kind, **parameters})
        assert status == 200, body.decode()

    def reset(self) -> None:
        """Takes every rule away; a closed port is open again when this returns."""
        status, body = self.call("POST", "/sim/reset")
        assert status == 200, body.decode()

    def state(self) -> dict[str, Any]:
        """Its own counts: connections, requests, aborts, running, waiting, tokens."""
        return dict(json.loads(self.call("GET", "/sim/state")[1]))

    def metrics(self) -> dict[str, float]:
        """vLLM's metrics page as {'name{labels}': value}."""
        page = self.call("GET", "/metrics")[1].decode()
        lines = [line.rpartition(" ") for line in page.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 5) -> dict[str, Any]:
        """Its state, once that satisfies the condition; fails with the last state after the deadline."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.state()
            if condition(state):
                return state
            assert time.monotonic() < deadline, f"not within {seconds} s; last: {state}"
            time.sleep(0.005)

    def log(self) -> list[dict[str, Any]]:
        """The records of ended requests, in the order in which they ended."""
        assert self.log_path is not None
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]

    def wait_for_log(self, records: int, seconds: float = 5) -> list[dict[str, Any]]:
        """The log, once it has that many records."""
        deadline = time.monotonic() + seconds
        while len(log := self.log()) < records:
            assert time.monotonic() < deadline, f"{len(log)} records, not {records}, within {seconds} s"
            time.sleep(0.005)
        return log

    def wait_until_listening(self) -> str:
        """Its address, once the port is open; for one started with `wait=False`."""
        self.address = self.address or _announced(self, "listening on ")
        return self.address

    def kill(self) -> None:
        """SIGKILL, and its end awaited."""
        self.process.kill()
        self.process.wait(timeout=10)

    def stop(self) -> int:
        """SIGTERM, SIGKILL after 5 s; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
        code = self.process.wait(timeout=10)
        if self.process.stdout is not None and not self.process.stdout.closed:
            self.output += self.process.stdout.read().splitlines()
            self.process.stdout.close()
        return code


def start(
    *flags: str, preset: str = "instant", uds: Path | None = None, log: Path | None = None, wait: bool = True
) -> Simulator:
    """Starts a simulated engine on a free port (or `uds`). `wait=False` returns once its control listener is up."""
    where = ["--uds", str(uds)] if uds else ["--host", "127.0.0.1", "--port", "0"]
    argv = command(
        *where, "--control", "127.0.0.1:0", "--preset", preset, *(["--log", str(log)] if log else []), *flags
    )
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}, cwd=ROOT
    )  # fmt: skip
    engine = Simulator(process, "", "", log)
    engine.control = _announced(engine, "control on ")
    if wait:
        engine.address = _announced(engine, "listening on ")
    return engine


def attach(address: str, log: Path | None = None) -> Simulator:
    """Control over a simulated engine that somebody else (a supervisor) started and will stop, through `address`:
    its control listener's if it was given one (`--control`), else its own, which a misbehaviour may have closed."""
    engine = Simulator.__new__(Simulator)
    engine.address, engine.control, engine.log_path, engine.output = address, address, log, []
    return engine


@contextlib.contextmanager
def started(
    *flags: str, preset: str = "instant", uds: Path | None = None, log: Path | None = None
) -> Iterator[Simulator]:
    """A simulated engine for the length of a with-block; it is gone at its end."""
    engine = start(*flags, preset=preset, uds=uds, log=log)
    try:
        yield engine
    finally:
        engine.stop()


def _announced(engine: Simulator, words: str) -> str:
    """The rest of the line on its standard output that begins so; a child that dies first fails the test."""
    assert engine.process.stdout is not None
    for line in engine.process.stdout:
        engine.output.append(line.rstrip("\n"))
        if line.startswith(words):
            return line[len(words) :].strip()
    code = engine.process.wait(timeout=START_SECONDS)
    engine.process.stdout.close()
    raise AssertionError(f"the simulated engine ended with code {code} before it said {words!r}: {engine.output}")

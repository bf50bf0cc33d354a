"""Real engines for tests: the whole tree as `vitalis-serve up` starts it.

    with engines.stack(profile="cpu-tiny", replicas=2) as tree:
        tree.openai().chat.completions.create(...)

Everything is reached as a user reaches it: the data port with official clients and the first key, control with its
token, the supervisor by its socket; engines' own metrics by their Unix sockets.
"""

import contextlib
import functools
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from vitalis_serve.engines.environment import cache_folder
from vitalis_serve.supervise.commands import NotRunning, request

from tests.support import client

ROOT = Path(__file__).resolve().parents[2]
# Two replicas loading at once on two busy cores took 95 s; building a model before that, minutes.
START_SECONDS = 900
ENGINE_PYTHONS = ("3.11", "3.12", "3.13")  # deploy/environments.py's
STOP_SECONDS = 60


class NotHere(Exception):
    """This machine cannot run real engines; says why."""


def engine_python() -> Path:
    """The CPU engine environment's, made on first use. Raises NotHere where the platform cannot have it; where it can,
    and under CI everywhere, the test fails: a run is not green without the real engine."""
    python, problem = _engine_environment()
    if python is not None:
        return python
    if os.environ.get("CI") or _can_have_engines():
        pytest.fail(problem, pytrace=False)
    raise NotHere(problem)


def _can_have_engines() -> bool:
    """What the engine's lock is made for."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return own in ENGINE_PYTHONS or any(shutil.which(f"python{version}") for version in ENGINE_PYTHONS)


@functools.cache
def _engine_environment() -> tuple[Path | None, str]:
    """Its Python, or None and why there is none. Tried once: a build that fails can take minutes each time."""
    try:
        made = subprocess.run(
            [sys.executable, str(ROOT / "deploy" / "environments.py"), "engine-cpu"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, "the engine environment was not made within 30 min"
    if made.returncode:
        last = "\n".join(made.stderr.strip().splitlines()[-12:])
        return None, f"no engine environment: {last}"
    return Path(made.stdout.strip()), ""


def until(condition: Callable[[], Any], seconds: float, what: str, *, every: float = 0.02) -> Any:
    """The first true value of `condition`; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(every)
    return value


def samples(text: str) -> dict[str, float]:
    """Prometheus text as sums by metric name, whatever the labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> set[int]:
    """Every process below `pid`, itself included."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _last_lines(path: Path, count: int, width: int = 240) -> str:
    lines = path.read_text(errors="replace").splitlines()[-count:]
    return "\n".join(line if len(line) <= width else f"{line[:width]} …" for line in lines)


@dataclass
class Engine:
    """One engine's own HTTP surface, past the gateway."""

    socket: Path

    def http(self) -> httpx.Client:
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://engine", timeout=120)

    def _metrics(self) -> str:
        """Without a client library: making an httpx client takes 36 ms of CPU, which is long where 200 ms count."""
        with client.connect(f"unix:{self.socket}") as wire:
            wire.send(client.get("/metrics", {"connection": "close"}))
            return wire.read_response(seconds=30).body.decode()

    def metrics(self) -> dict[str, float]:
        return samples(self._metrics())

    def running(self) -> float:
        return self.metrics()["vllm:num_requests_running"]

    def generated(self) -> float:
        return self.metrics()["vllm:generation_tokens_total"]

    def aborted(self) -> float:
        """vLLM's own counter of aborts, which does not move when clients leave."""
        return sum(
            float(line.rpartition(" ")[2])
            for line in self._metrics().splitlines()
            if line.startswith("vllm:request_success_total{") and 'finished_reason="abort"' in line
        )


@dataclass
class Stack:
    """A running `vitalis-serve up`. Its data folder holds everything it writes, the log of its terminal included."""

    folder: Path
    environ: Mapping[str, str]
    command: tuple[str, ...] = (sys.executable, "-P", "-m", "vitalis_serve", "up")
    started_in: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    opened: list[Any] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.folder / "var"

    def start(self, **settings: Any) -> None:
        """`settings`, as `stack` has them, are this start's and the later ones'."""
        vars(self).pop("address", None)
        self.environ = {**self.environ, **variables(settings)}
        with (self.folder / "terminal.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environ), cwd=self.started_in or self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def log(self) -> str:
        """The last lines of its terminal and of each engine, cut to what a failure's report can hold."""
        logs = [self.folder / "terminal.log", *sorted((self.data / "log").glob("engine-*.log"))]
        return "\n".join(f"--- {path.name}\n{_last_lines(path, 40 if path is logs[0] else 15)}" for path in logs)

    def status(self) -> dict[str, Any]:
        """The supervisor's answer; an empty mapping while it does not answer."""
        try:
            *_, answer = request(self.run / "supervisor.sock", {"command": "status"}, seconds=10)
        except NotRunning:
            return {}
        return answer

    @property
    def run(self) -> Path:
        from vitalis_serve.supervise.folders import run_folder

        return run_folder(self.data, self.environ)

    def states(self) -> dict[str, str]:
        return {r["name"]: r["state"] for r in self.status().get("fleet", {}).get("replicas", [])}

    def pids(self, kind: str) -> dict[str, int]:
        return {c["name"]: c["pid"] for c in self.status()["children"] if c["kind"] == kind and c["pid"]}

    def wait_ready(self, replicas: int, seconds: float = START_SECONDS) -> None:
        """Until so many replicas are ready; the logs are in the failure."""

        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log()}"
            states = self.states()
            assert "failed" not in states.values(), f"{states}:\n{self.log()}"
            return sum(state == "ready" for state in states.values()) == replicas

        try:
            until(ready, seconds, f"{replicas} replicas ready", every=0.25)
        except AssertionError as late:
            raise AssertionError(f"{late}; {self.states()}\n{self.log()}") from None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.status()['gateway']['port']}"

    @functools.cached_property
    def address(self) -> tuple[str, int]:
        """The data port, which stays the same as long as the supervisor lives."""
        return "127.0.0.1", int(self.status()["gateway"]["port"])

    @property
    def key(self) -> str:
        return (self.data / "first-key").read_text().strip()

    def openai(self, **options: Any) -> openai.OpenAI:
        made = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key, **{"max_retries": 0, "timeout": 120} | options
        )
        self.opened.append(made)
        return made

    def anthropic(self, **options: Any) -> anthropic.Anthropic:
        made = anthropic.Anthropic(base_url=self.url, api_key=self.key, **{"max_retries": 0, "timeout": 120} | options)
        self.opened.append(made)
        return made

    def http(self) -> httpx.Client:
        """The data port with the first key, without any client's manners."""
        made = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=120)
        self.opened.append(made)
        return made

    def metrics(self) -> dict[str, float]:
        """Control's /metrics, once it listens: a test before may have killed it, and it comes back at another port."""
        token = (self.data / "control.token").read_text().strip()
        asked = client.get("/metrics", {"authorization": f"Bearer {token}"})

        def ask() -> Any:
            control = self.status()["control"]
            with contextlib.suppress(ConnectionRefusedError):
                return client.ask(f"http://{control['host']}:{control['port']}", asked, 30)
            return None

        answer = until(ask, 30, "control answers")
        assert answer.status == 200, answer.body
        return samples(answer.body.decode())

    def engines(self) -> list[Engine]:
        replicas = self.status()["fleet"]["replicas"]
        return [Engine(Path(r["address"].removeprefix("unix:"))) for r in replicas]

    def total(self, measure: Callable[[Engine], float]) -> float:
        return sum(measure(engine) for engine in self.engines())

    def idle(self, seconds: float = 60) -> None:
        """Waits until nothing runs in any engine."""
        until(lambda: self.total(Engine.running) == 0, seconds, "engines idle", every=0.1)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stops it as its terminal would; its exit code."""
        for opened in self.opened:
            opened.close()
        self.opened.clear()
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in descendants(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"it did not stop within {STOP_SECONDS} s:\n{self.log()}") from None


def variables(settings: Mapping[str, Any]) -> dict[str, str]:
    """As the environment has them."""
    return {f"VITALIS_{name.upper()}": str(value) for name, value in settings.items()}


@contextlib.contextmanager
def stack(make: str = "", **settings: Any) -> Iterator[Stack]:
    """A whole tree on free ports, stopped at the end; with `make`, started by that target of the Makefile. `settings`
    are VITALIS_ variables by their lower-case names (`profile`, `engines_replicas`, ...). See `engine_python`."""
    python = engine_python()
    with tempfile.TemporaryDirectory(prefix="vitalis-vllm-") as scratch:
        folder = Path(scratch)
        environ = {key: value for key, value in os.environ.items() if not key.startswith("VITALIS_")}
        environ |= {
            "PYTHONPATH": str(ROOT / "server"),
            "VITALIS_CACHE": str(cache_folder(os.environ)),
            "VITALIS_CONFIG": str(ROOT / "config" / "gpt-oss.yaml"),
            "VITALIS_DATA_FOLDER": str(folder / "var"),
            "VITALIS_ENGINE_PYTHON": str(python),
            "VITALIS_GATEWAY_HOST": "127.0.0.1",
            "VITALIS_GATEWAY_PORT": "0",
            "VITALIS_CONTROL_PORT": "0",
            **variables(settings),
        }
        tree = Stack(folder, environ)
        if make:
            tree.command = ("make", "--no-print-directory", make, f"PYTHON={sys.executable}")
            tree.started_in = ROOT
        tree.start()
        try:
            yield tree
        finally:
            if tree.process is not None:
                tree.stop()

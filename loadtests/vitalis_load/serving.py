"""A vitalis-serve of our own: started on free ports with a data folder of its own, asked what is in force, watched
until its engines are ready, stopped. It is started as a person would, by its command line and variables."""

import contextlib
import ctypes
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import psutil

from vitalis_load import discovery
from vitalis_load.errors import LoadFailure
from vitalis_load.program import Program, surroundings
from vitalis_load.target import Target

PR_SET_PDEATHSIG: Final = 1  # Linux's
PROGRESS_SECONDS: Final = 10
STOP_SECONDS: Final = 90
TAKES_REQUESTS: Final = ("ready", "busy")

Progress = Callable[[str], None]


class StartFailed(Exception):
    """It did not become ready; one sentence why."""


class Serving:
    """One such tree of processes, from `start` to the end of the with-block."""

    def __init__(self, program: Program, log: Path, *, words: Sequence[str] = ("up",), **variables: str) -> None:
        """`log` is where its terminal's output stays. `variables`: VITALIS_ ones, over those of this process."""
        self._program, self._log, self._words = program, log, tuple(words)
        self._scratch = tempfile.TemporaryDirectory(prefix="vitalis-load-")
        self.data = Path(self._scratch.name) / "var"
        self.environ = {
            **surroundings(),
            "VITALIS_DATA_FOLDER": str(self.data),
            "VITALIS_GATEWAY_HOST": "127.0.0.1",
            "VITALIS_GATEWAY_PORT": "0",
            "VITALIS_CONTROL_PORT": "0",
            # One try: what cannot start now will not after a pause.
            "VITALIS_ENGINES_RESTART_TRIES": "1",
            **variables,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._engines: dict[str, int | None] = {}

    def __enter__(self) -> "Serving":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._program.argv(*self._words), env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C is for us: it is stopped in order, after the load
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._keep_logs()
        self._scratch.cleanup()

    def wait(self, replicas: int, seconds: float, progress: Progress) -> None:
        """Until so many engines are ready. Raises StartFailed."""
        began = said = time.monotonic()
        while True:
            now = time.monotonic()
            if not self.alive:
                raise StartFailed(self._why() or "it ended at once")
            known = self._replicas()
            states = [replica.state for replica in known]
            if sum(state in TAKES_REQUESTS for state in states) >= replicas and self._key.exists():
                self._engines = self._engine_processes()
                return
            if failed := [replica for replica in known if replica.state == "failed"]:
                raise StartFailed(failed[0].detail or self._why() or "an engine could not be started")
            if now - began > seconds:
                raise StartFailed(f"not ready within {seconds:.0f} s (engines: {', '.join(states) or 'none'})")
            if now - said >= PROGRESS_SECONDS:
                progress(f"  starting: {now - began:.0f} s, engines {', '.join(states) or 'not there yet'}")
                said = now
            time.sleep(0.2)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def target(self, model: str = "") -> Target:
        return discovery.find(self.data, key=self._key.read_text().strip(), model=model)

    def check(self) -> None:
        """Raises StartFailed where an engine has ended since `wait`, even if another was started in its place."""
        if not self.alive or self._engine_processes() != self._engines:
            detail = next((replica.detail for replica in self._replicas() if replica.detail), "")
            raise StartFailed(f"the engine ended under load: {detail or self._why() or 'it said nothing'}")

    def status(self) -> discovery.Status:
        return discovery.status(self.data)

    @property
    def _key(self) -> Path:
        return self.data / discovery.FIRST_KEY

    def _engine_processes(self) -> dict[str, int | None]:
        with contextlib.suppress(LoadFailure):
            return {child.name: child.pid for child in self.status().children if child.kind == "engine"}
        return {}

    def _replicas(self) -> list[discovery.Replica]:
        """None while it does not answer."""
        with contextlib.suppress(LoadFailure):
            return self.status().fleet.replicas
        return []

    def _why(self) -> str:
        """The last thing that reads like a reason."""
        for path in [self._log, *sorted((self.data / "log").glob("engine-*.log"))]:
            with contextlib.suppress(OSError):
                for line in reversed(path.read_text(errors="replace").splitlines()[-200:]):
                    if words := _reason(line):
                        return words
        return ""

    def _stop(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            tree = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            for child in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            self._process.wait()

    def _keep_logs(self) -> None:
        """Of the engines: why one died is nowhere else."""
        for path in (self.data / "log").glob("engine-*.log"):
            with contextlib.suppress(OSError):
                shutil.copy(path, self._log.parent / path.name)


def _end_with_parent() -> None:
    """In the child, before it runs: if we are killed, it is told to end, and no engine is left on a card."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _reason(line: str) -> str:
    """What a line of a log says went wrong; "" where it says nothing of the kind."""
    with contextlib.suppress(ValueError, AttributeError):
        entry = json.loads(line)
        bad = entry.get("level") in ("error", "warning") or entry.get("state") == "failed"
        return str(entry.get("detail") or entry.get("message", ""))[:300] if bad else ""
    words = line.strip()
    return words[:300] if words.startswith("vitalis-serve:") or "Error" in words else ""

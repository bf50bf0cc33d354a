"""A vitalis-serve of our own: started on free ports with a data folder of its own, asked what is in force, watched
until its engines are ready, stopped. It is started as a person would, by its command line and variables."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from vitalis_load import discovery
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.target import Target

REPOSITORY: Final = Path(__file__).resolve().parents[2]
PROGRESS_SECONDS: Final = 10
STOP_SECONDS: Final = 90
ASK_SECONDS: Final = 60
# Below these everything is ours to set where configurations are compared.
SEARCHED: Final = ("VITALIS_PROFILE", "VITALIS_ENGINES_", "VITALIS_GATEWAY_QUEUE_")

Progress = Callable[[str], None]


class StartFailed(Exception):
    """It did not become ready; one sentence why."""


class InForce(msgspec.Struct, frozen=True):
    """What `check-config` says."""

    profile: str
    files: list[str]  # the configuration, then the profile where there is one
    settings: dict[str, Any]

    @property
    def replicas(self) -> int:
        return int(self.settings["engines"]["replicas"])

    def value(self, path: str) -> Any:
        """Of "engines.slots" or "engines.engine_args.max-num-seqs"; None where nothing says."""
        found: Any = self.settings
        for name in path.split(".", 2):
            found = found.get(name) if isinstance(found, dict) else None
        return found


class Program(msgspec.Struct, frozen=True):
    """vitalis-serve as it is called here. `config`: "" for its own default."""

    command: tuple[str, ...]
    config: str = ""

    @classmethod
    def of(cls, command: str, config: Path | None) -> "Program":
        """`command` in a shell's words; "" for this checkout's, else the one on PATH. Raises LoadFailure."""
        words = tuple(shlex.split(command))
        if not words:
            own = REPOSITORY / ".venv" / "bin" / "vitalis-serve"
            found = str(own) if own.exists() else shutil.which("vitalis-serve")
            if found is None:
                raise LoadFailure(
                    f"there is no vitalis-serve to start ({own} is not there, nor one on PATH): run `make serve` once,"
                    " or give --serve"
                )
            words = (found,)
        elif shutil.which(words[0]) is None:
            raise LoadFailure(f"--serve: {words[0]} cannot be run: give vitalis-serve's path")
        if config is not None and not config.is_file():
            raise LoadFailure(f"--config: there is no file {config}")
        return cls(words, str(config.absolute()) if config else "")

    def argv(self, *words: str) -> list[str]:
        return [*self.command, *words, *(["--config", self.config] if self.config else [])]

    def in_force(self, environ: Mapping[str, str]) -> InForce:
        """Raises LoadFailure with the program's own words."""
        document = self._json(environ, "check-config", "--json")
        return InForce(document["profile"]["name"], document["files"], document["settings"])

    def status(self, environ: Mapping[str, str]) -> dict[str, Any]:
        return self._json(environ, "fleet", "status", "--json")

    def _json(self, environ: Mapping[str, str], *words: str) -> dict[str, Any]:
        argv = self.argv(*words)
        try:
            done = subprocess.run(
                argv, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=ASK_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LoadFailure(f"{shlex.join(argv)} did not answer ({error})") from None
        try:
            return dict(json.loads(done.stdout))
        except ValueError:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise LoadFailure(f"{shlex.join(argv)}: {said}") from None


class Serving:
    """One such tree of processes, from `start` to the end of the with-block."""

    def __init__(self, program: Program, log: Path, *, words: Sequence[str] = ("up",), **variables: str) -> None:
        """`log` is where its terminal's output stays. `variables`: VITALIS_ ones, over those of this process."""
        self._program, self._log, self._words = program, log, tuple(words)
        self._scratch = tempfile.TemporaryDirectory(prefix="vitalis-load-")
        self.data = Path(self._scratch.name) / "var"
        self.environ = {
            **self.surroundings(),
            "VITALIS_DATA_FOLDER": str(self.data),
            "VITALIS_GATEWAY_HOST": "127.0.0.1",
            "VITALIS_GATEWAY_PORT": "0",
            "VITALIS_CONTROL_PORT": "0",
            # One try: what cannot start now will not after a pause.
            "VITALIS_ENGINES_RESTART_TRIES": "1",
            **variables,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def surroundings() -> dict[str, str]:
        """This process's variables, without the key of another tree."""
        return {name: value for name, value in os.environ.items() if name != "VITALIS_KEY"}

    def __enter__(self) -> "Serving":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._program.argv(*self._words), env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C is for us: it is stopped in order, after the load
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._keep_logs()
        self._scratch.cleanup()

    def wait(self, replicas: int, seconds: float, progress: Progress) -> None:
        """Until so many engines are ready. Raises StartFailed."""
        began = said = time.monotonic()
        states: list[str] = []
        asked = 0.0
        while True:
            now = time.monotonic()
            if not self.alive:
                raise StartFailed(self._why() or "it ended at once")
            # A start takes seconds to minutes, and asking takes a process.
            if now - asked > min(5.0, max(1.0, (now - began) / 10)) and self._greeted(now - began):
                states, asked = self._states(), time.monotonic()
                if states.count("ready") + states.count("busy") >= replicas:
                    return
                if "failed" in states:
                    raise StartFailed(self._why() or "an engine could not be started")
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
        return discovery.find(self.data, key=(self.data / discovery.FIRST_KEY).read_text().strip(), model=model)

    def failed(self) -> bool:
        """Whether an engine ended and will not come again."""
        return "failed" in self._states()

    def status(self) -> dict[str, Any]:
        return self._program.status(self.environ)

    def _greeted(self, waited: float) -> bool:
        """Whether asking is worth it: it says so when the first engine answers, and it can fail before."""
        return b"Ready. Try it:" in self._log.read_bytes() or waited > PROGRESS_SECONDS

    def _states(self) -> list[str]:
        with contextlib.suppress(LoadFailure, KeyError):
            return [str(replica["state"]) for replica in self.status()["fleet"]["replicas"]]
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


def gateway_processes(status: Mapping[str, Any]) -> list[psutil.Process]:
    """Supervisor, workers and control with what they started, without the engines: what stands between clients and
    engines. Raises LoadFailure where they are not this machine's."""
    children = [child["pid"] for child in status["children"] if child["kind"] != "engine" and child["pid"]]
    try:
        found = [psutil.Process(pid) for pid in [status["pid"], *children]]
        return found + [below for process in found[1:] for below in process.children(recursive=True)]
    except psutil.Error as error:
        raise LoadFailure(f"the gateway's processes cannot be looked at ({error})", Exit.NO_TARGET) from None


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """What they took until now. Raises LoadFailure where one has ended: a difference would mean nothing."""
    try:
        return float(sum(sum(process.cpu_times()[:2]) for process in processes))
    except psutil.Error as error:
        raise LoadFailure(f"a process of the gateway ended while it was measured ({error})", Exit.NO_TARGET) from None


def third_of_cores() -> int:
    """What of a machine the load generator may take beside engine and gateway."""
    return max(1, len(os.sched_getaffinity(0)) // 3)


def refuse_variables(environ: Mapping[str, str]) -> None:
    """Variables win over profiles: with one of these every candidate would be the same."""
    found = [name for name in environ if name.startswith(SEARCHED) and environ[name]]
    if found:
        raise LoadFailure(
            f"{', '.join(sorted(found))} is set and would win over every configuration that is tried: put it into a"
            " profile or the configuration file, and unset it"
        )


def _reason(line: str) -> str:
    """What a line of a log says went wrong; "" where it says nothing of the kind."""
    with contextlib.suppress(ValueError, AttributeError):
        entry = json.loads(line)
        bad = entry.get("level") in ("error", "warning") or entry.get("state") == "failed"
        return str(entry.get("detail") or entry.get("message", ""))[:300] if bad else ""
    words = line.strip()
    return words[:300] if words.startswith("vitalis-serve:") or "Error" in words else ""

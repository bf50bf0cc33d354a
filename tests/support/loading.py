"""`vitalis-load` and Locust in their own environment, as child processes.

with loading.started(load_python, "run", "short-chat", "--url", ...) as load:
    load.until(lambda: "sent" in load.said())
    load.process.send_signal(signal.SIGINT)
    assert load.ended() == 130
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.missing import missing

ROOT = Path(__file__).parents[2]
SECONDS = 60  # for anything to happen on a busy machine


@pytest.fixture(scope="session")
def load_python() -> Path:
    """The Python of the load tests' environment, made if it is not there yet."""
    made = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "environments.py"), "load"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        missing(f"the load tests' environment cannot be made: {made.stderr.strip()[-400:]}")
    return Path(made.stdout.strip().splitlines()[-1])


def environment(**more: str) -> dict[str, str]:
    """Of a child: nothing of the caller's that it would take for its own."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("VITALIS_", "LOCUST_", "PYTEST_"))
    }
    return {**kept, "PYTHONPATH": str(ROOT / "loadtests"), "PYTHONUNBUFFERED": "1", "COLUMNS": "200", **more}


@dataclass
class Load:
    """A running command. `out` has what it says."""

    process: "subprocess.Popen[bytes]"
    out: Path

    def said(self) -> str:
        return self.out.read_text()

    def until(self, wanted: Callable[[], object], seconds: float = SECONDS) -> None:
        """Polls; fails when it takes too long, or the command has ended before."""
        deadline = time.monotonic() + seconds
        while not wanted():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said()}"
            assert time.monotonic() < deadline, f"not in {seconds} s:\n{self.said()}"
            time.sleep(0.05)

    def ended(self, seconds: float = SECONDS) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.said()}") from None


def heeding() -> None:
    """Whoever runs the tests in the background of a script has SIGINT ignored, and what is ignored stays so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def started(python: Path, *words: str, out: Path, module: str = "vitalis_load", **variables: str) -> Iterator[Load]:
    """`vitalis-load WORDS`, or another module of that environment; its whole group is gone at the end."""
    with out.open("wb") as said:
        process = subprocess.Popen(
            [str(python), "-m", module, *words], env=environment(**variables), stdout=said, stderr=said,
            stdin=subprocess.DEVNULL, cwd=out.parent, start_new_session=True, preexec_fn=heeding,
        )  # fmt: skip
    try:
        yield Load(process, out)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def command(python: Path, *words: str, cwd: Path, seconds: float = SECONDS, **variables: str) -> Any:
    """`vitalis-load WORDS` to its end: a CompletedProcess with text."""
    return subprocess.run(
        [str(python), "-m", "vitalis_load", *words], env=environment(**variables), cwd=cwd, capture_output=True,
        text=True, timeout=seconds, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    """Of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_folder(out: Path) -> Path:
    """The only run in `out`."""
    found = [folder for folder in out.iterdir() if (folder / "run.json").exists()]
    assert len(found) == 1, found
    return found[0]

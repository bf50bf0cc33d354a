"""A real process told to end before it serves: at whatever moment, quietly, with its code, and nothing left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vitalis_serve.supervise import folders, orphans

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("VITALIS_")},
    "PYTHONPATH": str(ROOT / "server"),
}
MOMENTS = (0, 0.05, 0.15, 0.3, 0.5, 0.7, 1.0, 1.5)


@pytest.fixture
def var(tmp_path: Path) -> Path:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")  # a model that takes its time
    python.chmod(0o755)
    document = {
        "profile": "plain",
        "data_folder": str(tmp_path / "var"),
        "gateway": {"host": "127.0.0.1", "port": 0},
        "control": {"port": 0},
        "model": {"name": "tiny", "build": "gpt-oss-tiny"},
        "engines": {"device": "cpu", "engine_python": str(python)},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(document))
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "plain.yaml").write_text("{}")
    return tmp_path / "var"


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of an engine that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def ended_by(number: int, moment: float, var: Path, *words: str) -> tuple[int, str]:
    """The exit code and the output of a command that gets a signal `moment` seconds after its first line of ours."""
    argv = [sys.executable, "-P", "-m", "vitalis_serve", *words, "--config", str(var.parent / "c.yaml")]
    environ = {**ENVIRONMENT, "VITALIS_CACHE": str(var.parent / "cache")}
    with subprocess.Popen(
        argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=as_from_a_terminal,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 30
            # Before that the interpreter is on its own. SIGHUP is the last one taken.
            while not catches(process.pid, signal.SIGHUP):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(moment)
            process.send_signal(number)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, said


def as_from_a_terminal() -> None:
    """Whoever runs the tests in the background of a script has SIGINT ignored, and what is ignored stays so."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def left(var: Path) -> list[str]:
    if not var.exists():
        return []
    run = folders.run_folder(var)
    files = [path for pattern in ("*.sock", "lock", f"*{orphans.SUFFIX}") for path in run.glob(pattern)]
    files += var.glob("lock")
    return [str(path) for path in files] + [str(pid) for pid in orphans.find(f"{folders.tree_mark(var)}:")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", [("up",), ("gateway", "--engine", "http://127.0.0.1:1", "--model", "m")])
def test_a_start_is_interrupted_without_a_trace(var: Path, number: signal.Signals, words: tuple[str, ...]) -> None:
    codes = []
    for moment in MOMENTS:
        code, said = ended_by(number, moment, var, *words)
        assert "Traceback" not in said, f"after {moment} s: {said}"
        assert "Error" not in said, f"after {moment} s: {said}"
        # 0: it was far enough to be stopped in order.
        assert code in (128 + number, 0), f"after {moment} s: {code}, {said}"
        assert left(var) == [], f"after {moment} s"
        codes.append(code)
    assert codes[0] == 128 + number


def test_asking_a_silent_engine_is_interrupted_without_a_trace(var: Path, silent: str) -> None:
    for moment in (0.9, 1.3, 3):
        code, said = ended_by(signal.SIGINT, moment, var, "gateway", "--engine", silent)
        assert "Traceback" not in said, f"after {moment} s: {said}"
        # 0: it runs while the engine is asked, and was stopped in order.
        assert code in (130, 0), f"after {moment} s: {code}, {said}"
        assert left(var) == [], f"after {moment} s"


def test_asking_again_and_again_to_the_very_end_is_no_fault(var: Path) -> None:
    argv = [sys.executable, "-P", "-m", "vitalis_serve", "gateway", "--engine", "http://127.0.0.1:1", "--model", "m"]
    with subprocess.Popen(
        [*argv, "--config", str(var.parent / "c.yaml")],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stderr is not None
            # Control has answered, so everything runs.
            assert process.stdout is not None
            assert "first key" in process.stdout.readline()
            while process.poll() is None:
                process.send_signal(signal.SIGINT)
                time.sleep(0.001)
            said = process.stderr.read()
        finally:
            process.kill()
    assert "Traceback" not in said
    assert process.returncode == 0
    assert left(var) == []


def test_what_is_ignored_stays_ignored(var: Path) -> None:
    words = [sys.executable, "-P", "-m", "vitalis_serve", "check-config", "--config", str(var.parent / "c.yaml")]
    # As `nohup` starts it.
    argv = [
        sys.executable,
        "-c",
        f"import os, signal; signal.signal(1, signal.SIG_IGN); os.execv({words[0]!r}, {words})",
    ]
    with subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        while not catches(process.pid, signal.SIGTERM):
            time.sleep(0.001)
        process.send_signal(signal.SIGHUP)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "profile" in said

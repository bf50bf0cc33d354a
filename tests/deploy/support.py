"""What the tests of deploy/ share: its files, read plainly, and the outside tools that check them."""

import inspect
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vitalis_serve.settings import load
from vitalis_serve.supervise import orphans
from vitalis_serve.supervise.replicas import STOP_MARGIN_SECONDS
from vitalis_serve.supervise.supervisor import CONTROL_LEAVE_SECONDS, DRAIN_MARGIN_SECONDS, WORKER_LEAVE_SECONDS

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
DOCKERFILES = sorted(path for path in DEPLOY.glob("docker/Dockerfile.*") if path.suffix != ".dockerignore")
COMPOSE_FILES = sorted(DEPLOY.glob("compose/*.yaml"))
UNIT = DEPLOY / "systemd" / "vitalis-serve.service"
ENGINES = ("engine-cpu", "engine-cuda")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, the rest of it), comments dropped and continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(name, " ".join(rest.split())) for name, rest in pairs]


def profiles() -> list[str]:
    return sorted(path.stem for path in (REPOSITORY / "config" / "profiles").glob("*.yaml"))


def longest_stop_seconds() -> int:
    """The longest an orderly stop can take under any shipped profile: what is configured, and every step's margin."""
    configured = 0.0
    for name in profiles():
        settings = load(REPOSITORY / "config" / "gpt-oss.yaml", {"VITALIS_PROFILE": name})
        shutdown = settings.shutdown
        configured = max(configured, shutdown.settle_seconds + shutdown.drain_seconds + settings.engines.stop_seconds)
    sweep = inspect.signature(orphans.sweep).parameters["seconds"].default
    margins = DRAIN_MARGIN_SECONDS + WORKER_LEAVE_SECONDS + STOP_MARGIN_SECONDS + CONTROL_LEAVE_SECONDS + sweep
    return math.ceil(configured + margins)


def seconds(duration: str) -> int:
    """Compose's durations: 90s, 2m, 1m30s."""
    units = {"h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+)([hms])", duration)
    assert "".join(number + unit for number, unit in parts) == duration, duration
    return sum(int(number) * units[unit] for number, unit in parts)


def tool(name: str) -> str:
    """The path of a tool that the development environment's lock holds, beside this Python or on PATH. The test fails
    where it is not: skipped, it would look as if it had passed."""
    found = _found(name)
    if found is None:
        pytest.fail(f"{name} is missing from the development environment: run `make environments`", pytrace=False)
    return found


def machine_tool(name: str, where: str) -> str:
    """The path of a tool that a machine may lack; skips the test with the reason where it does."""
    found = _found(name)
    if found is None:
        pytest.skip(f"{name} is not on this machine ({where})")
    return found


def _found(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def passes(*argv: str, **variables: str) -> None:
    """Runs a checker and fails with what it said."""
    ran = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/nonexistent", **variables},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def command_exists(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`vitalis-serve WORDS` is a command with these options: asked by putting --help behind them."""
    from vitalis_serve.cli import main

    assert main([*words, "--help"]) == 0, capsys.readouterr().err
    assert "Usage: vitalis-serve " + words[0] in capsys.readouterr().out

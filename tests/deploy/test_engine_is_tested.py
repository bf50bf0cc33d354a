"""A run without the real engine is not green: where it could be made and was not, its tests fail."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_failed_build_fails_the_tests_of_the_engine() -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("VITALIS_", "PYTEST_"))}
    environ |= {"CI": "true", "VITALIS_CACHE": "/proc/nowhere", "PYTHONPATH": str(ROOT / "server")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "vllm", "tests/vllm/test_surface.py"],
        env=environ, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1]
    assert "cannot write the cache folder /proc/nowhere/env" in done.stdout

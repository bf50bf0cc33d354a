"""Logging must not stop the program, whoever does not read it."""

import os
import subprocess
import sys
import time
from pathlib import Path

SERVER = Path(__file__).parents[2] / "server"
TALKER = """
import logging, sys, time
from vitalis_serve import logs
logs.configure()
began = time.monotonic()
for number in range(int(sys.argv[1])):
    logging.getLogger("x").info("line %d of many, long enough to fill a pipe soon", number)
print(time.monotonic() - began, flush=True)
"""


def talker(stderr: int, lines: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(SERVER)}
    return subprocess.Popen(
        [sys.executable, "-c", TALKER, str(lines)], stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
    )


def test_a_pipe_that_nobody_reads_does_not_stop_the_program() -> None:
    """20,000 lines into a pipe of 64 KiB: they are lost, and the program goes on and ends."""
    reader, writer = os.pipe()
    try:
        child = talker(writer, 20_000)
        os.close(writer)
        said, _ = child.communicate(timeout=30)
        assert float(said) < 20
        assert child.returncode == 0
    finally:
        os.close(reader)


def test_the_last_lines_are_written_before_the_end() -> None:
    """What still waits in the queue when the program ends is not lost."""
    child = talker(subprocess.PIPE, 5_000)
    began = time.monotonic()
    _, logged = child.communicate(timeout=60)
    assert child.returncode == 0
    assert '"line 4999 of many' in logged.splitlines()[-1]
    assert time.monotonic() - began < 60

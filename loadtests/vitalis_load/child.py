"""One repeat as a headless Locust: a master and its workers, in a process group of their own so that the terminal's
Ctrl-C reaches only who started them."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from vitalis_load import order as orders
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.order import Order
from vitalis_load.records import RepeatEnd

LOCUSTFILE = Path(__file__).resolve().parents[1] / "locustfile.py"
SAYS = "vitalis-load: "  # begins what is said to people; all else is in locust.log
STOP_SECONDS = 25.0  # to end in order after an interruption
READ_SECONDS = 0.2
START_TRIES = 3
KEPT_LINES = 12  # of what it said last, for a failure


class Child:
    """`say` gets its progress, line by line."""

    def __init__(self, order: Order, processes: int, say: Callable[[str], None]) -> None:
        self._order = msgspec.structs.replace(order, parent=os.getpid())
        self._processes = processes
        self._say = say
        self._log = Path(order.folder) / "locust.log"
        self._last: list[str] = []
        self._rest = b""
        self._said = ""

    def run(self) -> LoadFailure | None:
        """To its end. Returns why it did not come to it as it should, if so; INTERRUPTED after SIGINT."""
        for attempt in range(1, START_TRIES + 1):
            port = _free_port()
            code = self._once(port)
            busy = any("was busy" in line for line in self._last)
            if not busy or attempt == START_TRIES:
                return self._judged(code)
            self._last.clear()
        raise AssertionError

    def _once(self, port: int) -> int:
        process = self._start(port)
        assert process.stdout is not None
        interrupted = 0
        try:
            with contextlib.suppress(OSError), self._log.open("ab", buffering=0) as log:
                while True:
                    try:
                        if not self._listen(process, log):
                            break
                    except KeyboardInterrupt:
                        interrupted += 1
                        if interrupted > 1:
                            break
                        self._say("interrupted: ending, and keeping what was measured (again: at once)")
                        self._interrupt(process)
            if interrupted > 1:
                return int(Exit.INTERRUPTED)
            return self._wait(process) if not interrupted else int(Exit.INTERRUPTED)
        finally:
            _kill_group(process)
            process.stdout.close()

    def _start(self, port: int) -> "subprocess.Popen[bytes]":
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
        package = str(LOCUSTFILE.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
        environment["PYTHONUNBUFFERED"] = "1"
        environment[orders.VARIABLE] = msgspec.json.encode(self._order).decode()
        argv = [
            sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary",
            "--loglevel", "INFO", "--processes", str(self._processes),
            "--master-bind-host", "127.0.0.1", "--master-bind-port", str(port),
            "--master-host", "127.0.0.1", "--master-port", str(port), "--expect-workers-max-wait", "60",
        ]  # fmt: skip
        try:
            return subprocess.Popen(
                argv, env=environment, cwd=self._order.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, bufsize=0, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise LoadFailure(f"Locust could not be started: {error.strerror}", Exit.CANNOT_WRITE) from None

    def _listen(self, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> bool:
        """Whether there may be more to hear; waits for it a little."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], READ_SECONDS)
        if not ready:
            return process.poll() is None
        data = os.read(process.stdout.fileno(), 65536)
        with contextlib.suppress(OSError):  # a full disk is the repeat's own trouble, and told by it
            log.write(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._heard(line.decode(errors="replace").rstrip())
        return bool(data)

    def _heard(self, line: str) -> None:
        if line.startswith(SAYS):
            self._said = line.removeprefix(SAYS)
            self._say(self._said)
        self._last = [*self._last, line][-KEPT_LINES:]

    def _interrupt(self, process: "subprocess.Popen[bytes]") -> None:
        """Asks the master to end in order; the group is killed by whoever called, in any case."""
        with contextlib.suppress(ProcessLookupError):
            process.terminate()  # not SIGINT, which a shell's background jobs ignore
        deadline = time.monotonic() + STOP_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _wait(self, process: "subprocess.Popen[bytes]") -> int:
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return int(Exit.INTERRUPTED)

    def _judged(self, code: int) -> LoadFailure | None:
        if code == Exit.OK:
            return None
        if code == Exit.INTERRUPTED:
            return LoadFailure("interrupted", Exit.INTERRUPTED)
        why = self._reason() or self._said
        if code in (Exit.CANNOT_WRITE, Exit.NO_TARGET, Exit.BAD_INPUT) and why:
            return LoadFailure(why, Exit(code))
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return LoadFailure(f"Locust {how}; its words are in {self._log}", Exit.MISSED)

    def _reason(self) -> str:
        """What the repeat itself wrote down of why it is not complete."""
        try:
            return msgspec.json.decode((Path(self._order.folder) / "end.json").read_bytes(), type=RepeatEnd).reason
        except (OSError, msgspec.DecodeError):
            return ""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Whatever of it is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

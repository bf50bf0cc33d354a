"""The task that keeps one worker or control alive: heartbeats in, replaced when silent or gone.

Unlike an engine it starts in a second and nobody's work depends on this one process, so it is replaced at
once; only deaths in quick succession are spaced out. Exit code 3 before it was ever ready means that it
cannot start at all (a port in use): that ends the whole start instead of a loop.
"""

import asyncio
import json
import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vitalis_serve.errors import StartError
from vitalis_serve.supervise import orphans
from vitalis_serve.supervise.child import Child, tether
from vitalis_serve.supervise.output import Output

logger = logging.getLogger(__name__)

CHANNEL_VARIABLE = "VITALIS_SUPERVISOR_FD"
SILENT_SECONDS = 5.0
START_SECONDS = 60.0  # importing on a slow, busy machine; `ready` normally takes under a second
QUICK_SECONDS = 10.0  # a life shorter than this counts towards the back-off
MAX_BACKOFF_SECONDS = 10.0
ASK_SECONDS = 1.0

State = Literal["starting", "ready", "draining", "backoff", "stopped"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Between workers and one replica. `arrivals` grows whenever tokens came from there, and is only compared. `full`:
    an ordinary request gets no slot there just now."""

    in_flight: int = 0
    arrivals: int = 0
    full: bool = False

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.in_flight + other.in_flight, self.arrivals + other.arrivals, self.full or other.full)


@dataclass(frozen=True, slots=True)
class AttendantSpec:
    """`fds` are inherited under the same numbers; `environment` says what they are."""

    name: str
    kind: Literal["worker", "control"]
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    fds: tuple[int, ...] = ()
    remedy: str = ""  # added to the sentence when it cannot start


class Attendant:
    """`fleet` gives the message to send it at start; `suspect` is told of replicas where a request of its failed."""

    def __init__(
        self,
        spec: AttendantSpec,
        *,
        tree: str,
        output: Output,
        fleet: Callable[[], dict[str, Any]],
        suspect: Callable[[str, int], None],
    ) -> None:
        self.spec = spec
        self.output = output
        self.state: State = "starting"
        self.starts = 0
        self.started_at: float | None = None
        self.ready = asyncio.Event()
        self.drained = asyncio.Event()
        self._mark = f"{tree}:{spec.name}"
        self._fleet = fleet
        self._suspect = suspect
        self._child: Child | None = None
        self._heard_at = 0.0
        self._traffic: dict[str, Traffic] = {}
        self._answers: deque[asyncio.Future[None]] = deque()  # in the order of our questions
        self._leaving = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    # For the supervisor

    def send(self, message: Mapping[str, Any]) -> None:
        if self._child is not None:
            self._child.send(json.dumps(message, separators=(",", ":")))

    async def traffic(self, replica: str) -> Traffic:
        """What it has at `replica` now; nothing if it is not there. One that does not answer in a second counts
        as busy as it last was, or as 1: silence is no proof."""
        if self._child is None or self.state == "starting":
            return Traffic()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        self.send({"type": "in_flight?"})
        try:
            async with asyncio.timeout(ASK_SECONDS):
                await answer
        except TimeoutError:
            last = self._traffic.get(replica, Traffic())
            return replace(last, in_flight=max(1, last.in_flight))
        return self._traffic.get(replica, Traffic())

    def drain(self, seconds: float) -> None:
        """No more replacements from here on. A worker that dies has drained, badly."""
        self._leaving.set()
        self.state = "draining"
        if self._child is None:
            self.drained.set()
        self.send({"type": "drain", "seconds": seconds})

    async def leave(self, *, politely: bool, seconds: float) -> None:
        """Ends it: SIGTERM first, or just the end of its channel; SIGKILL after `seconds`."""
        self._leaving.set()
        child = self._child
        if child is None:
            return
        if politely:
            child.signal(signal.SIGTERM)
        else:
            child.hang_up()
        try:
            async with asyncio.timeout(seconds):
                await child.wait()
        except TimeoutError:
            logger.warning("%s did not end within %g s: killed", self.spec.name, seconds)
            child.signal(signal.SIGKILL)
            await child.wait()

    async def run(self) -> None:
        """Until told to leave. Raises StartError where it says (exit code 2 or 3) that it cannot ever start."""
        quick_deaths = 0
        try:
            while not self._leaving.is_set():
                began = time.monotonic()
                code, why = await self._live()
                if self._leaving.is_set():
                    break
                if code in (2, 3) and not self.ready.is_set():
                    raise StartError(self._cannot_start(code))
                quick_deaths = quick_deaths + 1 if time.monotonic() - began < QUICK_SECONDS else 0
                delay = 0.0 if quick_deaths <= 1 else min(MAX_BACKOFF_SECONDS, 0.25 * 2 ** min(quick_deaths, 16))
                self._mourn(code, why, delay)
                await self._rest(delay)
        finally:
            self.state = "stopped"
            if self._child is not None:  # cancelled: the channel's end takes it along
                self._child.close()
            self.output.close()

    # One life

    async def _live(self) -> tuple[int | None, str]:
        self.state = "starting"
        self.starts += 1
        self.started_at = time.monotonic()
        self.output.clear()
        if not self._leaving.is_set():
            self.drained.clear()  # said by, or of, an earlier life
        environment = {**self.spec.environment, orphans.VARIABLE: self._mark}
        try:
            self._child = child = await tether(
                self.spec.argv, environment, self.output, variable=CHANNEL_VARIABLE, fds=self.spec.fds
            )
        except OSError as exc:
            return None, f"could not start: {exc}"
        self._heard_at = time.monotonic()
        self.send(self._fleet())
        if self._leaving.is_set():  # told to leave while it was being spawned: nobody else will tell it
            child.hang_up()
        async with asyncio.TaskGroup() as tasks:
            listener = tasks.create_task(self._listen(child))
            watchdog = tasks.create_task(self._watch(child))
            code = await child.wait()
            watchdog.cancel()
            await asyncio.wait({listener}, timeout=1)  # what it said last; a child of its own may hold the channel
            listener.cancel()
        self._child = None
        self._traffic.clear()
        self._release()
        child.close()
        self.drained.set()
        return code, "" if code is None or code >= 0 else f"killed by {signal.Signals(-code).name}"

    async def _listen(self, child: Child) -> None:
        async for line in child.lines():
            self._heard_at = time.monotonic()
            try:
                message = json.loads(line)
                self._hear(message)
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                logger.warning("%s said something we do not know: %r", self.spec.name, exc)

    def _hear(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "ready":
                if self.state == "starting":
                    self.state = "ready"
                self.ready.set()
                logger.info("%s is ready (process %s)", self.spec.name, self.pid)
            case "in_flight":
                arrivals, full = message.get("arrivals", {}), message.get("full", ())
                self._traffic = {
                    str(name): Traffic(int(n), int(arrivals.get(name, 0)), name in full)
                    for name, n in message.get("replicas", {}).items()
                }
                if self._answers and not (oldest := self._answers.popleft()).done():
                    oldest.set_result(None)
            case "drained":
                self.drained.set()
            case "suspect":
                self._suspect(str(message["replica"]), int(message["incarnation"]))

    async def _watch(self, child: Child) -> None:
        """SIGKILL for the silent. A check that comes late itself (we were stopped, or starved) judges
        nobody."""
        checked_at = time.monotonic()
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            if now - checked_at > 2:
                self._heard_at = now
            checked_at = now
            patience = START_SECONDS if self.state == "starting" else SILENT_SECONDS
            if now - self._heard_at > patience:
                logger.error("%s has been silent for %.1f s: killed", self.spec.name, now - self._heard_at)
                child.signal(signal.SIGKILL)
                return

    def _release(self) -> None:
        for answer in self._answers:
            if not answer.done():
                answer.set_result(None)
        self._answers.clear()

    # Between lives

    def _cannot_start(self, code: int | None) -> str:
        last = self.output.last_lines(1)
        said = last[0] if last else f"it exited with code {code}"
        if not said.startswith(self.spec.name):
            said = f"{self.spec.name} could not start: {said}"
        return f"{said}{' ' if self.spec.remedy else ''}{self.spec.remedy}"

    def _mourn(self, code: int | None, why: str, delay: float) -> None:
        self.state = "backoff"
        logger.error(
            "%s ended (%s); another %s",
            self.spec.name,
            why or f"exit code {code}",
            f"in {delay:.1f} s" if delay else "at once",
            extra={"child": self.spec.name},
        )
        for line in self.output.last_lines(5) if delay else ():
            logger.error("%s said: %s", self.spec.name, line)

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._leaving.wait()
        except TimeoutError:
            return

"""The task that owns one replica: events in, `lifecycle.step`, actions out, every change published.

How it works. One task (`run`) takes events from one queue and is the only writer of `life`. Beside it run the
prober (asks the engine, says what it saw) and, while a process lives, its watcher (reads the keeper's
channel, reaps, sweeps, says Exited). Probe results carry the incarnation they were about; those about an
older one are dropped.
"""

import asyncio
import logging
import random
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from vitalis_serve.fleet import Replica, ReplicaState
from vitalis_serve.supervise import lifecycle, orphans
from vitalis_serve.supervise.attendant import Traffic
from vitalis_serve.supervise.child import Child, keep
from vitalis_serve.supervise.lifecycle import Event, Kill, Life, Policy, Spawn, Terminate
from vitalis_serve.supervise.output import Output

logger = logging.getLogger(__name__)

STARTING_PROBE_SECONDS = 0.5
SUSPECT_PROBE_SECONDS = 0.5
DRAINING_LOOK_SECONDS = 0.1
MAX_PROBE_SECONDS = 10.0
FIRST_ANSWER_SECONDS = 30.0  # an engine's first answer compiles and warms up what later ones find ready
SHORT_ANSWER_SECONDS = 2.0  # of one that serves: it may stand behind others in the engine's queue
AFTERWARDS_SECONDS = 1.0  # for a second look, at what became of a request that was not answered


@dataclass(frozen=True, slots=True)
class Sight:
    """One cheap look at a serving engine. `counters` change whenever it makes progress, and are only
    compared.

    refused: it said no (or nobody listens), rather than nothing in time. kv_tokens: what its KV cache holds, 0 where
    it does not say. requests: running and waiting ones. gone: nobody listens. started: when its process was, in Unix
    seconds, 0 where it does not say.
    """

    healthy: bool
    requests: int = 0
    counters: Hashable = None
    refused: bool = False
    reason: str = ""
    kv_tokens: int = 0
    gone: bool = False
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a real request. `wrong`: what was wrong with it, "" for a right one. `refused`: the engine said so, rather
    than nothing in time; `busy`: by 503, which an engine with a full queue says too; `gone`: nobody listens."""

    wrong: str = ""
    refused: bool = False
    busy: bool = False
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """The models that an engine says it serves, the base model first; `reason` where it says none."""

    models: tuple[str, ...] = ()
    reason: str = ""


class Prober(Protocol):
    """How to ask an engine, for those who know what engines are. Deadlines are `loop.time()` instants."""

    async def models(self, deadline: float) -> Listing:
        """What it says that it serves."""

    async def answers(self, model: str, deadline: float) -> Answer:
        """A real request to `model`."""

    async def look(self, deadline: float) -> Sight:
        """A cheap look."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What two looks at one process are compared by: the engine's counters, and how often tokens arrived at the
    workers (a saturated engine may answer those sooner than a probe)."""

    counters: Hashable = None
    arrivals: int | None = None

    def moved(self, before: "Marks") -> bool:
        counted = before.counters is not None and self.counters != before.counters
        # Fewer than before: a worker was replaced.
        return counted or (
            before.arrivals is not None and self.arrivals is not None and self.arrivals > before.arrivals
        )


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """What one replica is. `models` is () where the engine itself is asked, again at every probe. `argv` is None for
    an engine somebody else runs. `clear` waits until there is room for another start (GPU memory of the last one
    seen free); `remedy` reads last log lines. `sockets`: a folder for each process' own, made before it starts and
    gone with it."""

    name: str
    address: str
    models: tuple[str, ...]
    slots: int
    prober: Prober
    policy: Policy
    probe_seconds: float = 2.0
    argv: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    sockets: Path | None = None
    remedy: Callable[[Sequence[str]], str | None] = lambda _: None
    clear: Callable[[], Coroutine[None, None, None]] | None = None


class ReplicaTask:
    """`traffic` asks the workers what they have there; `publish` tells everyone about a change."""

    def __init__(
        self,
        spec: ReplicaSpec,
        *,
        tree: str,
        run_folder: Path,
        output: Output,
        publish: Callable[[], None],
        traffic: Callable[[str], Awaitable[Traffic]],
    ) -> None:
        self.spec = spec
        self.output = output
        self.life = Life()
        self.started_at: float | None = None
        self.engine_pid: int | None = None
        self._kv_tokens = 0  # as the engine says, once it was looked at
        self._process_started = 0.0  # so too; the latest, should several answer at one address
        self._mark = f"{tree}:{spec.name}"
        self._run_folder = run_folder
        self._publish = publish
        self._traffic = traffic
        self._doubted = False  # a request failed there: health and idleness prove nothing until one is answered
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._look_now = asyncio.Event()
        self._child: Child | None = None
        self._clearing: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None

    # For the supervisor

    def post(self, event: Event) -> None:
        self._events.put_nowait(event)

    def advise(self) -> None:
        """A request failed there: ask at once."""
        if self.life.state in lifecycle.SERVING:
            self._doubted = True
        self._look_now.set()

    def snapshot(self) -> Replica:
        life = self.life
        return Replica(
            self.spec.name,
            self.spec.address,
            life.state,
            self.spec.models or life.models,
            self.spec.slots,
            life.incarnation,
            life.detail,
            self._kv_tokens,
        )

    async def until(self, wanted: Callable[[Life], bool], deadline: float | None = None) -> bool:
        """Waits until its life is as wanted; False at the deadline (`loop.time()`)."""
        try:
            async with asyncio.timeout_at(deadline):
                while not wanted(self.life):
                    await self._changed.wait()
        except TimeoutError:
            return wanted(self.life)
        return True

    async def run(self) -> None:
        """For ever; cancelled by its owner once at rest (else the keeper's channel closes and takes all
        along)."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._probe_for_ever(), name=f"{self.spec.name} prober")
                while True:
                    await self._act_on(await self._next_event())
        finally:
            if self._child is not None:
                self._child.close()
            self.output.close()

    # Events in, actions out

    async def _next_event(self) -> Event:
        try:
            async with asyncio.timeout_at(self.life.deadline):
                return await self._events.get()
        except TimeoutError:
            return lifecycle.Tick()

    async def _act_on(self, event: Event) -> None:
        was = self.life
        self.life, actions = lifecycle.step(was, event, asyncio.get_running_loop().time(), self.spec.policy)
        if self.life != was:
            self._tell(was, event)
        for action in actions:
            await self._act(action)

    def _tell(self, was: Life, event: Event) -> None:
        life = self.life
        if life.state is not was.state:
            level = logging.WARNING if life.state in _TROUBLE else logging.INFO
            logger.log(
                level,
                "%s: %s -> %s%s",
                self.spec.name,
                was.state,
                life.state,
                f" ({life.detail})" if life.detail else "",
                extra={"replica": self.spec.name, "state": life.state, "event": type(event).__name__},
            )
            if life.state is ReplicaState.STARTING:
                self.started_at = time.monotonic()
                self._doubted = False
                self._process_started = 0.0  # one that was drained may have been replaced meanwhile: that is no death
            if life.state is ReplicaState.FAILED:
                self._show_last_lines()
        if (life.state, life.incarnation, life.detail, life.ending, life.models) != (
            was.state,
            was.incarnation,
            was.detail,
            was.ending,
            was.models,
        ):
            self._look_now.set()
            self._publish()
            self._changed.set()
            self._changed = asyncio.Event()

    def _show_last_lines(self) -> None:
        for line in self.output.last_lines(10):
            logger.error("%s said: %s", self.spec.name, line, extra={"replica": self.spec.name})

    async def _act(self, action: Spawn | Terminate | Kill) -> None:
        match action:
            case Spawn():
                await self._spawn()
            case Terminate(seconds):
                self._command(f"stop {seconds:g}")
            case Kill(keeper=False):
                self._command("kill")
            case Kill(keeper=True) if self._child is not None:
                logger.error("%s: its keeper did not end in time: killed", self.spec.name)
                self._child.signal(signal.SIGKILL)

    def _command(self, line: str) -> None:
        if self._child is not None:
            self._child.send(line)
        elif self._clearing is not None:
            self._clearing.cancel()

    async def _spawn(self) -> None:
        assert self.spec.argv is not None
        assert self._child is None
        assert self._tasks is not None
        if self.spec.address.startswith("unix:"):
            Path(self.spec.address.removeprefix("unix:")).unlink(missing_ok=True)  # vLLM leaves it behind
        self.output.clear()
        self._tasks.create_task(self._live(self.life.incarnation), name=f"{self.spec.name} process")

    async def _live(self, incarnation: int) -> None:
        """One process from its start until nothing of it is left."""
        environment = {**self.spec.environment, orphans.VARIABLE: self._mark}
        code: int | None = None
        reason = ""
        if incarnation > 1 and not await self._clear():
            self.post(lifecycle.Exited(None, "asked to end before it had started"))
            return
        try:
            assert self.spec.argv is not None
            if self.spec.sockets is not None:
                self.spec.sockets.mkdir(mode=0o700, exist_ok=True)
            self._child = child = await keep(self.spec.argv, environment, self.output)
        except OSError as exc:
            self.post(lifecycle.Exited(None, f"could not start: {exc}", random.random()))  # noqa: S311
            return
        session = child.pid
        orphans.note_session(self._run_folder, self.spec.name, session)
        if self.life.ending:  # asked to end while it was being spawned
            child.send("kill")
        async for line in child.lines():
            word, _, rest = line.partition(" ")
            if word == "started":
                self.engine_pid = int(rest)
            elif word == "exited":
                code = int(rest) if rest.lstrip("-").isdigit() else None
                reason = self._why(code)
            elif word == "error":
                reason = f"could not start: {rest}"
        keeper_code = await child.wait()
        if not reason:
            reason = f"its keeper ended (code {keeper_code}) before it"
        _, left = await orphans.sweep(self._mark, {session})
        if left:
            logger.error("%s: processes that would not end: %s", self.spec.name, left)
        self._child = None
        self.engine_pid = None
        child.close()
        if self.spec.sockets is not None:
            shutil.rmtree(self.spec.sockets, ignore_errors=True)
        orphans.forget_session(self._run_folder, self.spec.name)
        self.post(lifecycle.Exited(code, reason, random.random()))  # noqa: S311

    async def _clear(self) -> bool:
        """Waits for room; False if it was asked to end meanwhile."""
        if self.spec.clear is not None:
            assert self._tasks is not None
            self._clearing = self._tasks.create_task(self.spec.clear())
            await asyncio.wait({self._clearing})
            self._clearing = None
        return not self.life.ending

    def _why(self, code: int | None) -> str:
        if code is not None and code < 0:
            how = f"killed by {_signal_name(-code)}"
        else:
            how = f"exited with code {code}, which nobody asked for"
        lines = self.output.last_lines(50)
        remedy = self.spec.remedy(lines)
        if remedy:
            return f"{how}. {remedy}"
        return f"{how}; last line: {lines[-1][:200]}" if lines else how

    # Probing

    async def _probe_for_ever(self) -> None:
        known = (0, Marks())
        while True:
            self._look_now.clear()
            life = self.life
            began = asyncio.get_running_loop().time()
            hung = self.spec.policy.hung_seconds
            patience = min(MAX_PROBE_SECONDS, max(hung / 4, min(1.0, hung / 2)))
            deadline = began + (FIRST_ANSWER_SECONDS if life.state is ReplicaState.STARTING else patience)
            if life.ending or life.state in lifecycle.RESTING:
                await self._look_now.wait()
                continue
            before = known[1] if known[0] == life.incarnation else Marks()
            try:
                event, seen = await self._see(life, deadline, before)
            except Exception as exc:  # the boundary of one child: a probe that trips over an answer is a failed probe
                logger.exception("%s: the probe failed", self.spec.name, extra={"replica": self.spec.name})
                event, seen = lifecycle.ProbeFailed(f"the probe failed: {exc!r}"), before
            known = (life.incarnation, seen)
            late = asyncio.get_running_loop().time() > deadline + 2  # we were paused, not the engine
            if event is not None and not late and self._still(life):
                self.post(event)
            await self._pause()

    async def _see(self, life: Life, deadline: float, before: Marks) -> tuple[Event | None, Marks]:
        if life.state is ReplicaState.STARTING:
            return await self._ask(deadline), before
        if life.state is ReplicaState.DRAINING:
            idle = (await self._traffic(self.spec.name)).in_flight == 0
            return lifecycle.Idle() if idle else None, before
        return await self._look(life, deadline, before)

    def _still(self, life: Life) -> bool:
        """Whether what was seen is still about this: the same process, and not on its way elsewhere."""
        now = self.life
        return (now.incarnation, now.ending) == (life.incarnation, life.ending) and (
            now.state is life.state or (now.state in lifecycle.SERVING and life.state in lifecycle.SERVING)
        )

    async def _pause(self) -> None:
        state = self.life.state
        seconds = {
            ReplicaState.STARTING: min(STARTING_PROBE_SECONDS, self.spec.probe_seconds),
            ReplicaState.SUSPECT: min(SUSPECT_PROBE_SECONDS, self.spec.probe_seconds),
            ReplicaState.HUNG: min(SUSPECT_PROBE_SECONDS, self.spec.probe_seconds),
            ReplicaState.DRAINING: DRAINING_LOOK_SECONDS,
        }.get(state, self.spec.probe_seconds)
        try:
            async with asyncio.timeout(seconds):
                await self._look_now.wait()
        except TimeoutError:
            return

    async def _ask(self, deadline: float) -> Event:
        said = await self._listed(deadline)
        if not said.models:
            return lifecycle.ProbeFailed(f"it has not said yet which models it serves ({said.reason})")
        answer = await self.spec.prober.answers(said.models[0], deadline)
        return lifecycle.ProbeFailed(answer.wrong) if answer.wrong else lifecycle.Answered(said.models)

    async def _look(self, life: Life, deadline: float, before: Marks) -> tuple[Event, Marks]:
        sight = await self.spec.prober.look(deadline)
        traffic = await self._traffic(self.spec.name)
        marks = Marks(sight.counters if sight.healthy else before.counters, traffic.arrivals)
        moved = marks.moved(before)
        full = traffic.full or max(sight.requests, traffic.in_flight) >= self.spec.slots
        if not sight.healthy:
            if moved and not sight.refused:
                return lifecycle.Observed(working=True, moved=True, full=full), marks
            return lifecycle.ProbeFailed(sight.reason, sight.refused, gone=sight.gone), marks
        if self._replaced(sight):
            return lifecycle.ProbeFailed("another process answers there now", refused=True, gone=True), marks
        if sight.kv_tokens != self._kv_tokens:
            self._kv_tokens = sight.kv_tokens
            self._publish()
        said = await self._listed(deadline)
        if said.models and life.models[0] not in said.models:
            # Somebody started it anew with another model: that is offered once it answers.
            answered = await self._ask(deadline)
            if isinstance(answered, lifecycle.ProbeFailed):
                return lifecycle.ProbeFailed(f"it serves other models now: {answered.reason}", refused=True), marks
            return answered, marks
        observed = lifecycle.Observed(sight.requests > 0 or traffic.in_flight > 0, moved, full, said.models)
        # Idle and silent proves nothing: a frozen engine looks like that. A real answer does.
        idle_and_away = life.state in lifecycle.AWAY and not moved and not observed.working
        if (idle_and_away or life.spoils or self._doubted) and said.models:
            return await self._question(life, observed, said.models, sight, deadline), marks
        return observed, marks

    def _replaced(self, sight: Sight) -> bool:
        """One that is not ours died, and came back between two looks."""
        before, self._process_started = self._process_started, max(self._process_started, sight.started)
        known = before > 0 and self.life.met and not self.spec.policy.owned
        return known and sight.started > before

    async def _question(
        self, life: Life, observed: lifecycle.Observed, models: tuple[str, ...], sight: Sight, deadline: float
    ) -> Event:
        """A real request tells what a look cannot. What it does not tell is whether an engine that is silent has
        frozen, or has others to serve first: that is told by whether it moved meanwhile."""
        away = life.state in lifecycle.AWAY
        if not away:
            deadline = min(deadline, asyncio.get_running_loop().time() + SHORT_ANSWER_SECONDS)
        self._doubted = False
        answer = await self.spec.prober.answers(models[0], deadline)
        if not answer.wrong:
            return lifecycle.Answered(models) if away else replace(observed, moved=True)
        if answer.gone:
            return lifecycle.ProbeFailed(answer.wrong, refused=True, gone=True)
        then = await self.spec.prober.look(deadline + AFTERWARDS_SECONDS)
        if then.gone:
            return lifecycle.ProbeFailed(then.reason, refused=True, gone=True)
        busy = answer.busy and max(sight.requests, then.requests) > 0
        if answer.refused and not busy and not (life.spoils and observed.moved):
            return lifecycle.ProbeFailed(answer.wrong, refused=True, spoilt=True)
        if observed.moved or (then.healthy and then.counters != sight.counters):
            return replace(observed, working=True, moved=True)
        self._doubted = True
        return lifecycle.ProbeFailed(answer.wrong)

    async def _listed(self, deadline: float) -> Listing:
        return Listing(self.spec.models) if self.spec.models else await self.spec.prober.models(deadline)


_TROUBLE = frozenset({*lifecycle.AWAY, ReplicaState.BACKOFF, ReplicaState.FAILED})


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

"""All replicas of this host and the orders that change them: scale, drain, restart. Owned by the supervisor.

One order at a time. Each is in the journal before it acts; after a crash of the supervisor the fleet comes up
as it was ordered to be, which resumes scale and drain, and a restart has then happened by itself.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from vitalis_serve.errors import ConfigurationError
from vitalis_serve.fleet import TAKES_REQUESTS, Fleet, Replica, ReplicaState
from vitalis_serve.supervise import lifecycle
from vitalis_serve.supervise.attendant import Traffic
from vitalis_serve.supervise.journal import Journal
from vitalis_serve.supervise.output import Output
from vitalis_serve.supervise.replica import ReplicaSpec, ReplicaTask

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
TAKE_BACK_SECONDS = 10.0  # an engine that is not ours may be away for good: no order waits for it
STOP_MARGIN_SECONDS = 25.0  # a keeper's own deadlines, twice over: beyond it nothing is waited for


class OrderError(Exception):
    """An order that cannot be carried out: one sentence for whoever gave it."""


class Replicas:
    """`make` gives the spec of replica `index` and may raise ConfigurationError (no room for it)."""

    def __init__(
        self,
        *,
        tree: str,
        run_folder: Path,
        log_folder: Path,
        journal: Journal,
        publish: Callable[[], None],
        traffic: Callable[[str], Awaitable[Traffic]],
        relay: Callable[[str, str], None] | None,
    ) -> None:
        self._tree = tree
        self._run_folder = run_folder
        self._log_folder = log_folder
        self._journal = journal
        self._publish = publish
        self._traffic = traffic
        self._relay = relay
        self._tasks: list[tuple[ReplicaTask, asyncio.Task[None]]] = []
        self._make: Callable[[int], ReplicaSpec] | None = None
        self._group: asyncio.TaskGroup | None = None
        self._order: str = ""
        self.changed = asyncio.Event()  # replaced at each change

    # What there is

    def __iter__(self) -> Iterator[ReplicaTask]:
        return iter([replica for replica, _ in self._tasks])

    def snapshot(self) -> tuple[Replica, ...]:
        return tuple(replica.snapshot() for replica in self)

    def find(self, name: str) -> ReplicaTask:
        for replica in self:
            if replica.spec.name == name:
                return replica
        known = ", ".join(replica.spec.name for replica in self) or "none"
        raise OrderError(f"there is no replica {name}; there are: {known}")

    def tell(self) -> None:
        """Called by replicas on each change."""
        self._publish()
        self.changed.set()
        self.changed = asyncio.Event()

    async def until(self, wanted: Callable[[Fleet], bool]) -> None:
        while not wanted(Fleet(0, self.snapshot())):
            await self.changed.wait()

    # Start and end

    def open(self, make: Callable[[int], ReplicaSpec], group: asyncio.TaskGroup) -> None:
        """Brings up the desired fleet. Raises ConfigurationError if the first replica cannot be made."""
        assert self._make is None, "opened twice"
        self._make, self._group = make, group
        desired = self._journal.desired
        if desired.order is not None:
            logger.info("resuming after an order that was cut short: %s", desired.order)
        for index in range(desired.replicas):
            try:
                self._add(index)
            except ConfigurationError as exc:
                if index < desired.configured:
                    raise
                logger.error("replica %d cannot come back: %s", index, exc)
                self._note(replicas=index)
                break
        names = {replica.spec.name for replica in self}
        for replica in self:
            stopped = replica.spec.name in desired.stopped
            replica.post(lifecycle.Stop() if stopped else lifecycle.Start())
        self._note(stopped=tuple(n for n in desired.stopped if n in names), order=None)
        self.tell()

    async def stop(self, seconds: float, hasten: asyncio.Event) -> None:
        """Every engine ends: SIGTERM, `stop_seconds`, SIGKILL. With nothing running at them, so without a
        drain."""
        for replica in self:
            replica.post(lifecycle.Stop(0))
        async with asyncio.TaskGroup() as tasks:
            hastener = tasks.create_task(self._hasten(hasten))
            deadline = asyncio.get_running_loop().time() + seconds + STOP_MARGIN_SECONDS
            for replica in self:
                await replica.until(lambda life: life.state is ReplicaState.STOPPED, deadline)
            hastener.cancel()
        for _, task in self._tasks:
            task.cancel()

    async def _hasten(self, hasten: asyncio.Event) -> None:
        await hasten.wait()
        for replica in self:
            replica.post(lifecycle.Hasten())

    def _add(self, index: int) -> ReplicaTask:
        assert self._make is not None
        assert self._group is not None
        spec = self._make(index)
        relay = self._relay
        line: Say | None = None
        if relay is not None:
            line = lambda text: relay(spec.name, text)  # noqa: E731
        replica = ReplicaTask(
            spec,
            tree=self._tree,
            run_folder=self._run_folder,
            output=Output(self._log_folder / f"{spec.name}.log", line),
            publish=self.tell,
            traffic=self._traffic,
        )
        self._tasks.append((replica, self._group.create_task(replica.run(), name=spec.name)))
        return replica

    def _remove_last(self) -> None:
        replica, task = self._tasks.pop()
        assert replica.life.state is ReplicaState.STOPPED
        task.cancel()
        self.tell()

    # Orders

    def _check_free(self) -> None:
        if self._make is None:
            raise OrderError("the engines are still being prepared: try again in a while")
        if self._order:
            raise OrderError(f"another order is being carried out ({self._order}): try again when it is done")

    @contextlib.contextmanager
    def _carrying_out(self, what: str, **journal: object) -> Iterator[None]:
        """While entered no other order begins. A stop of the supervisor leaves the order in the journal:
        resumed."""
        self._check_free()
        try:
            self._journal.write(**journal)
        except OSError as exc:
            raise OrderError(f"the order could not be noted in fleet.json ({exc.strerror}): nothing done") from exc
        self._order = what
        cut_short = False
        try:
            yield
        except asyncio.CancelledError:
            cut_short = True
            raise
        finally:
            self._order = ""
            if not cut_short:
                self._note(order=None)

    def _note(self, **changes: object) -> None:
        """Writes to the journal what has happened already; a full disk does not undo it."""
        try:
            self._journal.write(**changes)
        except OSError as exc:
            logger.error("fleet.json could not be written (%s): after a restart the fleet may be as it was before", exc)

    async def scale(self, count: int, say: Say) -> str:
        """To `count` replicas; going down, the highest go first, each drained."""
        if not 0 <= count <= 1024:
            raise OrderError(f"a fleet has 0 to 1024 replicas, not {count}")
        if any(not replica.spec.policy.owned for replica in self):
            raise OrderError("the engines of this gateway were given by address: start it anew with other addresses")
        before = len(self._tasks)
        specs_fit = self._check_room(before, count)
        if specs_fit:
            raise OrderError(specs_fit)
        with self._carrying_out(f"scale to {count}", replicas=count, order={"command": "scale", "replicas": count}):
            while len(self._tasks) > count:
                replica = self._tasks[-1][0]
                say(f"draining {replica.spec.name}")
                await self._drain_one(replica)
                self._remove_last()
            stopped = tuple(n for n in self._journal.desired.stopped if any(r.spec.name == n for r in self))
            self._note(stopped=stopped)
            added = [self._add(index) for index in range(len(self._tasks), count)]
            for replica in added:
                say(f"starting {replica.spec.name}")
                replica.post(lifecycle.Start())
            for replica in added:
                await self._until_up(replica)
                say(f"{replica.spec.name} is ready")
        return f"{count} replicas (there were {before})"

    def _check_room(self, before: int, count: int) -> str:
        if self._make is None:
            return ""
        try:
            for index in range(before, count):
                self._make(index)
        except ConfigurationError as exc:
            return str(exc)
        return ""

    async def drain(self, name: str, say: Say) -> str:
        """No new requests to it; what runs may end; then it stops and stays stopped until `restart`."""
        replica = self.find(name)
        stopped = tuple(sorted({*self._journal.desired.stopped, name}))
        with self._carrying_out(f"drain {name}", stopped=stopped, order={"command": "drain", "replica": name}):
            say(f"draining {name}")
            await self._drain_one(replica)
        return f"{name} is stopped, until it is restarted"

    async def restart(self, name: str | None, say: Say) -> str:
        """One after the other: drained, stopped, started, ready, and only then the next. Of engines that are not
        ours, those that were drained take requests again, and no other."""
        chosen = list(self) if name is None else [self.find(name)]
        if any(not replica.spec.policy.owned for replica in chosen):
            return await self._take_back(chosen, say)
        names = [replica.spec.name for replica in chosen]
        stopped = tuple(n for n in self._journal.desired.stopped if n not in names)
        with self._carrying_out(
            f"restart {name or 'all'}", stopped=stopped, order={"command": "restart", "replicas": names}
        ):
            for replica in chosen:
                say(f"restarting {replica.spec.name}")
                before = replica.life
                replica.post(lifecycle.Restart(replica.spec.policy.drain_seconds))
                await replica.until(functools.partial(_restarted, before))
                await self._until_up(replica)
                say(f"{replica.spec.name} is ready")
        return f"restarted {', '.join(names) or 'nothing: there are no replicas'}"

    async def _take_back(self, chosen: Sequence[ReplicaTask], say: Say) -> str:
        """An engine that is not ours is asked again; whether it runs is for others to see to."""
        self._check_free()
        drained = [replica for replica in chosen if replica.life.state is ReplicaState.STOPPED]
        names = [replica.spec.name for replica in drained]
        if not drained:
            some = ", ".join(replica.spec.name for replica in chosen)
            raise OrderError(f"{some}: not restarted, because given by address and not ours: restart it where it runs")
        stopped = tuple(n for n in self._journal.desired.stopped if n not in names)
        order = {"command": "restart", "replicas": names}
        with self._carrying_out(f"restart {', '.join(names)}", stopped=stopped, order=order):
            deadline = asyncio.get_running_loop().time() + TAKE_BACK_SECONDS
            for replica in drained:
                say(f"asking {replica.spec.name}")
                replica.post(lifecycle.Start())
            up = [await replica.until(lambda life: life.state in TAKES_REQUESTS, deadline) for replica in drained]
        return "; ".join(
            f"{name} takes requests again{'' if is_up else ' as soon as it answers'};"
            " it was not restarted, because it is not ours"
            for name, is_up in zip(names, up, strict=True)
        )

    async def _drain_one(self, replica: ReplicaTask) -> None:
        policy = replica.spec.policy
        replica.post(lifecycle.Stop(policy.drain_seconds))
        deadline = asyncio.get_running_loop().time() + policy.drain_seconds + policy.stop_seconds + STOP_MARGIN_SECONDS
        if not await replica.until(lambda life: life.state is ReplicaState.STOPPED, deadline):
            raise OrderError(f"{replica.spec.name} would not stop: {replica.life.detail}")

    async def _until_up(self, replica: ReplicaTask) -> None:
        ends = {ReplicaState.READY, ReplicaState.BUSY, ReplicaState.FAILED, ReplicaState.STOPPED}
        await replica.until(lambda life: life.state in ends)
        if replica.life.state in (ReplicaState.FAILED, ReplicaState.STOPPED):
            raise OrderError(f"{replica.spec.name} did not come up: {replica.life.detail or replica.life.state}")


def _restarted(before: lifecycle.Life, life: lifecycle.Life) -> bool:
    """A new process was started, or the old one died while it drained and that was once too often."""
    gave_up = life.state is ReplicaState.FAILED and before.state is not ReplicaState.FAILED
    return life.incarnation > before.incarnation or gave_up

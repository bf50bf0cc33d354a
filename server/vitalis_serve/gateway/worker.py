"""One gateway process: `python -m vitalis_serve.gateway.worker OPTIONS.json`.

It takes the listening socket (VITALIS_DATA_FD) and the supervisor's line (VITALIS_SUPERVISOR_FD) that it inherits,
its keys from the snapshot on disk and then from control, and serves until it is told to drain. One sweep task
looks at every deadline; nothing else here runs by the clock.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import msgspec
import uvicorn
import uvloop

from vitalis_serve.errors import ConfigurationError, ServeError
from vitalis_serve.fleet import Fleet, ReplicaState
from vitalis_serve.gateway import explaining
from vitalis_serve.gateway.guest import GuestAdmission
from vitalis_serve.gateway.keys import KeyTable
from vitalis_serve.gateway.limits import DAY
from vitalis_serve.gateway.links import HEARTBEAT_SECONDS, ControlLink, SupervisorLink
from vitalis_serve.gateway.options import WorkerOptions
from vitalis_serve.gateway.owner import Owner
from vitalis_serve.gateway.protocol import ClientConnection
from vitalis_serve.gateway.state import WorkerState
from vitalis_serve.spool.files import HOST_ID

if TYPE_CHECKING:
    from vitalis_serve.gateway.redis_limits import RedisLimits
from vitalis_serve.gateway.tokens import Grant
from vitalis_serve.tokens import Memory

logger = logging.getLogger(__name__)

SWEEP_SECONDS: Final = 0.5
RECONCILE_SECONDS: Final = 60.0
LEAVE_SECONDS: Final = 2.0  # the other workers' drains end a little after each other
_SUSPECT_SECONDS: Final = 0.2  # at most one word about the same replica in this time


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        """Accepts nothing more; connections in use end with their requests."""
        self.should_exit = True
        self._leaving.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._leaving.set()

    async def main_loop(self) -> None:
        """uvicorn's wakes ten times a second to look whether it should end; this one is told."""
        await self._leaving.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again when all is served: the worker would die of it before its last
        words to the supervisor and to the access log."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
        yield


class Worker:
    """Joins the parts of one worker and lives as long as it."""

    def __init__(self, options: WorkerOptions, loop: asyncio.AbstractEventLoop) -> None:
        self._options = options
        self.state = WorkerState(options, loop)
        self._loop = loop
        self._link: SupervisorLink | None = None
        self._suspected: dict[str, float] = {}
        self._drain: asyncio.TimerHandle | None = None
        self._drain_seconds = 0.0
        self._fleet_known = asyncio.Event()
        self._tokens: Memory[Grant] = Memory()
        config = uvicorn.Config(
            _never,
            http=self._connection,  # type: ignore[arg-type]  # a factory will do: uvicorn only calls it
            ws="none",
            lifespan="off",
            loop="none",
            interface="asgi3",
            log_config=None,
            access_log=False,
            backlog=4096,
        )
        self.server = _Server(config)
        self._connections = self.server.server_state.connections

    def _connection(self, **_: Any) -> ClientConnection:
        return ClientConnection(self.state, self._connections)

    async def serve(self, sock: socket.socket, supervisor_fd: int | None) -> None:
        """Until drained, or until SIGTERM (uvicorn's handling: idle connections close, running requests finish)."""
        self.state.open_ledger()
        self._load_snapshot()
        if supervisor_fd is not None:
            self._link = await SupervisorLink.open(supervisor_fd, self._on_message)
            self.state.on_suspect = self._on_suspect
        control = ControlLink(
            self._options.control_socket,
            name=self._options.name,
            version=lambda: self.state.keys.version,
            on_snapshot=self._on_snapshot,
            report=self.state.report,
            explain=lambda question: explaining.answer(self.state, question),
        )
        self._tokens.on_unknown_kid = lambda issuer: control.say({"type": "unknown_kid", "issuer": issuer})
        async with asyncio.TaskGroup() as tasks:
            side = [tasks.create_task(control.run()), tasks.create_task(self._sweep())]
            if isinstance(self.state.admission, GuestAdmission):
                side.append(tasks.create_task(self.state.admission.run()))
            elif self._options.workers > 1:
                side.append(tasks.create_task(self._own(Owner(self.state, self._options.admission_socket))))
            if self.state.redis is not None:
                side += [
                    tasks.create_task(self.state.redis.run()),
                    tasks.create_task(self._reconcile(self.state.redis)),
                ]
            if self._link is not None:
                side.append(tasks.create_task(self._beat(self._link)))
            await self.server.serve(sockets=[sock])
            if isinstance(self.state.admission, GuestAdmission):
                self.state.admission.close()
            elif self.state.owner is not None:
                await self.state.owner.alone(self._drain_seconds + LEAVE_SECONDS)
            if self.state.redis is not None:
                await self.state.redis.drained(LEAVE_SECONDS)
            if self._link is not None:
                self._link.say({"type": "drained"})
            for task in side:
                task.cancel()
        self.state.access.close()
        if self.state.spool is not None:
            self.state.spool.stop()

    async def _own(self, owner: Owner) -> None:
        """Admission of all workers, from the moment on that the fleet is known."""
        await self._fleet_known.wait()
        self.state.owner = owner
        await owner.run()

    # -- the supervisor's line

    def _on_message(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        if kind == "fleet":
            before = {(r.name, r.incarnation) for r in self.state.fleet.replicas if r.state is ReplicaState.HUNG}
            fleet = Fleet.from_json(message)
            self.state.take_fleet(fleet)
            for replica in fleet.replicas:
                known = (replica.name, replica.incarnation)
                if replica.state is ReplicaState.HUNG and known not in before:
                    self._give_up(*known)
            self._fleet_known.set()
        elif kind == "unready":
            self.state.unready = True
        elif kind == "drain":
            self.drain(float(message.get("seconds", 0)))
        elif kind == "in_flight?" and self._link is not None:
            seats = list(self.state.admission.seats())
            replicas = {s.replica.name: s.in_flight for s in seats}
            full = [s.replica.name for s in seats if s.in_flight and s.in_flight >= s.ordinary_slots]
            if self.state.owner is not None:  # the others count their own
                replicas = {name: n - self.state.owner.granted(name) for name, n in replicas.items()}
            count = self.state.counters.open_contexts
            arrivals = {pool.name: pool.arrivals for pool in self.state.pools()}
            self._link.say(
                {"type": "in_flight", "count": count, "replicas": replicas, "arrivals": arrivals, "full": full}
            )

    def _give_up(self, replica: str, incarnation: int) -> None:
        for connection in list(self._connections):
            connection.on_hung(replica, incarnation)  # type: ignore[union-attr]  # they are all ours

    def drain(self, seconds: float) -> None:
        """Accepts nothing more; what runs may finish for `seconds`, then it is properly ended."""
        self.state.draining = True
        self._drain_seconds = seconds
        self.server.leave()
        if self._drain is None:
            self._drain = self._loop.call_later(seconds, self._end_all)

    def _end_all(self) -> None:
        error = ServeError("draining", "The gateway is stopping; try again.", retry_after=1)
        for connection in list(self._connections):
            if isinstance(connection, ClientConnection):
                connection.end(error)

    async def _beat(self, link: SupervisorLink) -> None:
        while not self.server.started and not self.server.should_exit:
            await asyncio.sleep(0.005)
        link.say({"type": "ready"})
        while True:
            link.say({"type": "heartbeat"})
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def _on_suspect(self, replica: str, incarnation: int, reason: str) -> None:
        now = self._loop.time()
        if now - self._suspected.get(replica, -1.0) >= _SUSPECT_SECONDS and self._link is not None:
            self._suspected[replica] = now
            self._link.say({"type": "suspect", "replica": replica, "incarnation": incarnation, "reason": reason})

    async def _reconcile(self, redis: "RedisLimits") -> None:
        """A Redis that lost its data knows nothing of what was spent this day and month, and who counts while it is
        away not much; the ledger does."""
        while self._options.spent_path:
            try:
                # Control gives the folder its name, so that of the same host is said in the place of what was before.
                host = await asyncio.to_thread((Path(self._options.spool_folder) / HOST_ID).read_text)
                wall = self.state.wall()
                spent = await asyncio.to_thread(self.state.spent, wall)
                if self.state.wall() // DAY > wall // DAY:
                    continue  # it is of a day that is over
                redis.reconcile(spent, host.strip(), wall)
                if not self._options.worker:
                    self.state.counted.seed(spent, wall)
            except FileNotFoundError:
                await asyncio.sleep(1)
                continue
            except OSError as error:
                logger.warning("what was spent cannot be read: %s", error)
            await asyncio.sleep(RECONCILE_SECONDS)

    # -- keys

    def _load_snapshot(self) -> None:
        path = Path(self._options.snapshot_path)
        try:
            self._on_snapshot(path.read_bytes())
        except FileNotFoundError:
            logger.info("no snapshot yet; waiting for control")
        except (OSError, ValueError, msgspec.DecodeError) as error:
            logger.warning("the snapshot %s cannot be read (%s); waiting for control", path, error)

    def _on_snapshot(self, document: bytes) -> None:
        table = KeyTable.decode(document, self._tokens)
        if table.version >= self.state.keys.version:
            self.state.keys = table.offering(self.state.fleet.models)

    # -- the sweep

    async def _sweep(self) -> None:
        """Every deadline of this worker, by walking its connections: dearer than timers for few, cheaper for many."""
        options, state = self._options, self.state
        shortest = min(
            options.header_seconds,
            options.body_seconds,
            options.queue_seconds,
            options.first_token_seconds,
            options.idle_seconds,
            options.client_stalled_seconds,
            options.total_seconds,
            options.keepalive_seconds,
        )
        period = min(SWEEP_SECONDS, shortest / 4)
        due = self._loop.time()
        while True:
            due += period
            await asyncio.sleep(due - self._loop.time())
            now = self._loop.time()
            state.counters.loop_lag_seconds = max(0.0, now - due)
            state.date_line = b"date: %b\r\n" % formatdate(usegmt=True).encode()
            due = max(due, now - period)
            state.expire(now)
            state.killers.expire(now)
            for connection in list(self._connections):
                connection.check(now)  # type: ignore[union-attr]  # they are all ours
            for pool in state.pools():
                pool.expire(now)


async def _never(scope: object, receive: object, send: object) -> None:
    raise AssertionError("no ASGI application runs here")


async def _run(options: WorkerOptions) -> None:
    worker = Worker(options, asyncio.get_running_loop())
    supervisor = os.environ.get("VITALIS_SUPERVISOR_FD")
    sock = socket.socket(fileno=int(os.environ["VITALIS_DATA_FD"]))
    sock.setblocking(False)
    # What is here now stays; a collection need not walk it. Requests break their own cycles on release, so the
    # collector has little to find.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    await worker.serve(sock, int(supervisor) if supervisor is not None else None)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    options = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=WorkerOptions)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_run(options))
        except ConfigurationError as error:
            sys.stderr.write(f"{error}\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

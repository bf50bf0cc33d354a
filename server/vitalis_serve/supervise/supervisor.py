"""The tree of processes: binds the data port, starts control, workers and engines, publishes the fleet, stops
in order.

How it works. Everything lives in one TaskGroup. Children hold one end of a socketpair each; if this process
dies by whatever hand, those close and the children end. Stopping is a sequence with a deadline for every step
(`_stop`), and whatever the sequence left is swept at the very end, so that no path out of here leaves a
process behind.
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from vitalis_serve.errors import StartError
from vitalis_serve.fleet import Fleet
from vitalis_serve.supervise import folders, orphans
from vitalis_serve.supervise.attendant import Attendant, AttendantSpec, Traffic
from vitalis_serve.supervise.journal import Journal
from vitalis_serve.supervise.output import Output
from vitalis_serve.supervise.replica import ReplicaSpec
from vitalis_serve.supervise.replicas import OrderError, Replicas

logger = logging.getLogger(__name__)

DATA_VARIABLE = "VITALIS_DATA_FD"
BACKLOG = 4096
COMMAND_SOCKET = "supervisor.sock"
MAX_COMMAND_BYTES = 65_536
WORKER_LEAVE_SECONDS = 3.0
CONTROL_LEAVE_SECONDS = 10.0
DRAIN_MARGIN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class SupervisorOptions:
    """`replicas`: as configured; the journal may say otherwise. `control_address` is read when status is
    asked for."""

    data_folder: Path
    run_folder: Path
    host: str = "127.0.0.1"
    port: int = 8080
    replicas: int = 0
    settle_seconds: float = 0
    drain_seconds: float = 30
    stop_seconds: float = 30
    workers: tuple[AttendantSpec, ...] = ()
    control: AttendantSpec | None = None
    control_address: Callable[[], dict[str, Any]] = dict


class Supervisor:
    """`run` once. `opened` is set when the children have been started; `stop` may be called at any time."""

    def __init__(self, options: SupervisorOptions, *, relay: Callable[[str, str], None] | None = None) -> None:
        self.options = options
        self.host, self.port = options.host, options.port
        self.opened = asyncio.Event()
        self._tree = folders.tree_mark(options.data_folder)
        self._log_folder = options.data_folder / "log"
        self._relay = relay
        self._fleet = Fleet()
        self._stopping = asyncio.Event()
        self._hasten = asyncio.Event()
        self._workers: list[Attendant] = []
        self._control: Attendant | None = None
        self._data: socket.socket | None = None
        self._group: asyncio.TaskGroup | None = None
        self._callers: set[asyncio.Task[None]] = set()
        self.journal = Journal(options.data_folder / "fleet.json", options.replicas)
        self.replicas = Replicas(
            tree=self._tree,
            run_folder=options.run_folder,
            log_folder=self._log_folder,
            journal=self.journal,
            publish=self._publish,
            traffic=self._traffic,
            relay=relay,
        )

    # For main

    @property
    def fleet(self) -> Fleet:
        return self._fleet

    @property
    def control(self) -> Attendant | None:
        return self._control

    def stop(self) -> None:
        """Stops in order; called again, in a hurry."""
        if self._stopping.is_set() and not self._hasten.is_set():
            logger.warning("asked again: ending what runs now")
            self._hasten.set()
        self._stopping.set()

    def open_fleet(self, make: Callable[[int], ReplicaSpec]) -> None:
        """Starts the engines; until then there are none and workers say so. Raises ConfigurationError."""
        assert self._group is not None
        self.replicas.open(make, self._group)

    async def run(self, companion: Callable[[], Coroutine[None, None, None]]) -> None:
        """From taking the lock to having left nothing behind. `companion` runs beside the children, and is
        cancelled first when stopping. Raises StartError, ConfigurationError.

        SIGINT, SIGTERM and SIGHUP are taken, and stay taken when this has returned: the process is then ending, and
        asked once more it must neither stop half-way nor call that a fault."""
        self._take_signals()
        lock = folders.Lock(self.options.run_folder / "lock", self.options.data_folder)
        lock.acquire()
        try:
            await self._clean_up_after_the_last()
            if self._stopping.is_set():
                return
            if self.options.workers:
                self._data = bind(self.options.host, self.options.port)
                self.host, self.port = self._data.getsockname()[:2]
            await self._run_children(companion)
        finally:
            if self._data is not None:
                self._data.close()
            await self._sweep()
            self._remove_sockets()
            lock.release()

    # Start

    def _take_signals(self) -> None:
        # Not the loop's own handlers: the loop puts Python's back when it is closed.
        loop = asyncio.get_running_loop()

        def stop(_number: int, _frame: FrameType | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.stop)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, stop)

    async def _clean_up_after_the_last(self) -> None:
        if self.journal.complaint:
            logger.warning("%s", self.journal.complaint)
        killed = await self._sweep()
        if killed:
            logger.warning("killed %d processes that an earlier run had left behind", killed)
        self._remove_sockets()

    async def _sweep(self) -> int:
        killed, left = await orphans.sweep(f"{self._tree}:", orphans.noted_sessions(self.options.run_folder))
        if left:
            logger.error("processes that would not end: %s", left)
        return killed

    def _remove_sockets(self) -> None:
        for pattern in ("*.sock", f"*{orphans.SUFFIX}"):
            for path in self.options.run_folder.glob(pattern):
                path.unlink(missing_ok=True)
        for folder in self.options.run_folder.glob("*.ipc"):
            shutil.rmtree(folder, ignore_errors=True)

    async def _run_children(self, companion: Callable[[], Coroutine[None, None, None]]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._start_attendants(group)
                server = await self._open_commands()
                beside = group.create_task(companion(), name="companion")
                self.opened.set()
                await self._stopping.wait()
                beside.cancel()
                for caller in self._callers:  # an order that is cut short stays in the journal
                    caller.cancel()
                await self._stop()
                server.close()
                for caller in self._callers:
                    caller.cancel()
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors

    def _start_attendants(self, group: asyncio.TaskGroup) -> None:
        if self.options.control is not None:
            self._control = self._attend(self.options.control, group)
        for spec in self.options.workers:
            assert self._data is not None
            fd = self._data.fileno()
            environment = {**spec.environment, DATA_VARIABLE: str(fd)}
            self._workers.append(self._attend(replace(spec, fds=(*spec.fds, fd), environment=environment), group))

    def _attend(self, spec: AttendantSpec, group: asyncio.TaskGroup) -> Attendant:
        relay = self._relay
        line = None if relay is None else lambda text: relay(spec.name, text)
        attendant = Attendant(
            spec,
            tree=self._tree,
            output=Output(self._log_folder / f"{spec.name}.log", line),
            fleet=self._fleet_message,
            suspect=self._suspect,
        )
        group.create_task(attendant.run(), name=spec.name)
        return attendant

    # While it runs

    def _attendants(self) -> Sequence[Attendant]:
        return [*self._workers, *([self._control] if self._control is not None else [])]

    def _fleet_message(self) -> dict[str, Any]:
        return {"type": "fleet", **self._fleet.to_json()}

    def _publish(self) -> None:
        replicas = self.replicas.snapshot()
        if replicas != self._fleet.replicas:
            self._fleet = Fleet(self._fleet.version + 1, replicas)
            for attendant in self._attendants():
                attendant.send(self._fleet_message())

    async def _traffic(self, replica: str) -> Traffic:
        return sum(await asyncio.gather(*(worker.traffic(replica) for worker in self._workers)), Traffic())

    def _suspect(self, name: str, incarnation: int) -> None:
        for replica in self.replicas:
            if replica.spec.name == name and replica.life.incarnation == incarnation:
                replica.advise()

    # Commands

    async def _open_commands(self) -> asyncio.AbstractServer:
        path = self.options.run_folder / COMMAND_SOCKET
        server = await asyncio.start_unix_server(self._on_caller, path, limit=MAX_COMMAND_BYTES)
        path.chmod(0o600)
        return server

    def _on_caller(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._group is not None
        # In our own group, so that a caller who leaves does not cut his order short.
        task = self._group.create_task(self._serve(reader, writer), name="command")
        self._callers.add(task)
        task.add_done_callback(self._callers.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def answer(document: dict[str, Any]) -> None:
            if not writer.is_closing():
                writer.write(json.dumps(document).encode() + b"\n")

        try:
            async with asyncio.timeout(10):
                line = await reader.readline()
            answer(await self._obey(line, lambda text: answer({"done": False, "message": text})))
        except (TimeoutError, ValueError, ConnectionError):
            answer({"done": True, "ok": False, "message": "no command of one line came within 10 s"})
        except asyncio.CancelledError:
            answer({"done": True, "ok": False, "message": "the supervisor is stopping"})
            raise
        finally:
            writer.close()

    async def _obey(self, line: bytes, say: Callable[[str], None]) -> dict[str, Any]:
        try:
            command = json.loads(line)
            name = command["command"]
            if name == "status":
                return {"done": True, "ok": True, **self.status()}
            if name == "stop":
                self.stop()
                return {"done": True, "ok": True, "message": "stopping"}
            if self._stopping.is_set():
                return {"done": True, "ok": False, "message": "the supervisor is stopping"}
            message = await self._order(name, command, say)
        except OrderError as exc:
            return {"done": True, "ok": False, "message": str(exc)}
        except (ValueError, KeyError, TypeError) as exc:
            return {"done": True, "ok": False, "message": f"not a command: {exc!r}"}
        except Exception as exc:  # the boundary of one caller: his order must not end everybody's engines
            logger.exception("an order failed: %s", line[:200])
            return {"done": True, "ok": False, "message": f"the order failed inside the supervisor: {exc!r}"}
        return {"done": True, "ok": True, "message": message}

    async def _order(self, name: str, command: dict[str, Any], say: Callable[[str], None]) -> str:
        logger.info("order: %s", json.dumps(command))
        match name:
            case "scale" if isinstance(command["replicas"], int) and not isinstance(command["replicas"], bool):
                return await self.replicas.scale(command["replicas"], say)
            case "drain":
                return await self.replicas.drain(str(command["replica"]), say)
            case "restart":
                chosen = command.get("replica")
                return await self.replicas.restart(None if chosen is None else str(chosen), say)
        raise OrderError(f"there is no command {name} with these arguments: status, scale, drain, restart, stop")

    def status(self) -> dict[str, Any]:
        now = time.monotonic()
        children = [
            {
                "name": a.spec.name,
                "kind": a.spec.kind,
                "pid": a.pid,
                "state": a.state,
                "restarts": max(0, a.starts - 1),
                "uptime_seconds": 0 if a.pid is None or a.started_at is None else round(now - a.started_at, 1),
                "detail": "",
            }
            for a in self._attendants()
        ]
        children += [
            {
                "name": r.spec.name,
                "kind": "engine",
                "pid": r.engine_pid,
                "state": str(r.life.state),
                "restarts": r.life.restarts,
                "uptime_seconds": 0 if r.started_at is None else round(now - r.started_at, 1),
                "detail": r.life.detail,
            }
            for r in self.replicas
        ]
        return {
            "fleet": self._fleet.to_json(),
            "children": children,
            "pid": os.getpid(),
            "gateway": {"host": self.host, "port": self.port},
            "control": self.options.control_address(),
        }

    # Stop

    async def _stop(self) -> None:
        options = self.options
        if options.settle_seconds and self._workers:
            logger.info("stopping: unready, settling for %g s", options.settle_seconds)
            for worker in self._workers:
                worker.send({"type": "unready"})
            await self._unless_hastened(options.settle_seconds)
        if self._workers:
            logger.info("stopping: draining, at most %g s", options.drain_seconds)
            await self._drain_workers()
        logger.info("stopping: engines")
        await self.replicas.stop(options.stop_seconds, self._hasten)
        if self._control is not None:
            await self._control.leave(politely=True, seconds=CONTROL_LEAVE_SECONDS)
        logger.info("stopped")

    async def _drain_workers(self) -> None:
        for worker in self._workers:
            worker.drain(self.options.drain_seconds)
        if self._data is not None:
            self._data.close()  # else new connections would wait in its backlog for nobody
            self._data = None
        deadline = asyncio.get_running_loop().time() + self.options.drain_seconds + DRAIN_MARGIN_SECONDS
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(worker.drained.wait()) for worker in self._workers]
            hurry = group.create_task(self._unless_hastened(deadline - asyncio.get_running_loop().time()))
            pending: set[asyncio.Task[Any]] = set(waits)
            while pending and not hurry.done():
                _, rest = await asyncio.wait({*pending, hurry}, return_when=asyncio.FIRST_COMPLETED)
                pending = rest - {hurry}
            for task in (*pending, hurry):
                task.cancel()
        async with asyncio.TaskGroup() as group:
            for worker in self._workers:
                group.create_task(worker.leave(politely=False, seconds=WORKER_LEAVE_SECONDS))

    async def _unless_hastened(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hasten.wait()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket for the data port. Raises StartError naming the port and the remedy."""
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        data = socket.socket(family, kind, protocol)
        try:
            data.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            data.bind(address)
            data.listen(BACKLOG)
        except OSError:
            data.close()
            raise
    except socket.gaierror as exc:
        raise StartError(f"gateway.host {host} is no address of this machine: {exc.strerror}.") from exc
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise StartError(
                f"port {port} on {host} is in use: stop what listens there (`ss -ltnp 'sport = :{port}'` names "
                "it), or set gateway.port to another."
            ) from exc
        if exc.errno == errno.EACCES:
            raise StartError(f"port {port} may not be opened by this user: set gateway.port to 1024 or above.") from exc
        raise StartError(f"cannot listen on {where} ({exc.strerror}): set gateway.host and gateway.port.") from exc
    return data


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to report: a StartError if there is one, else the first."""
    flat: list[BaseException] = []
    todo: list[BaseException] = [errors]
    while todo:
        error = todo.pop(0)
        todo += error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        if not isinstance(error, BaseExceptionGroup):
            flat.append(error)
    return next((e for e in flat if isinstance(e, StartError)), flat[0])

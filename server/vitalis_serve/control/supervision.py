"""Control's two lines to the supervisor: the inherited channel (heartbeats out, the fleet in) and the command
socket. Without a supervisor both are simply absent: the fleet stays empty and commands are refused."""

import asyncio
import logging
import os
import socket
import threading
from typing import Any, Final

import msgspec

from vitalis_serve.errors import ServeError
from vitalis_serve.fleet import Fleet
from vitalis_serve.supervise.commands import NotRunning, request

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS: Final = 1.0


class Supervision:
    """Owns the latest fleet that the supervisor published."""

    def __init__(self, command_socket: str) -> None:
        self.fleet = Fleet()
        self._command_socket = command_socket
        self._writer: asyncio.StreamWriter | None = None

    async def run(self, fd: int) -> None:
        """Talks on the inherited channel until it closes; then the supervisor is gone and this process
        ends."""
        channel = socket.socket(fileno=fd)
        channel.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=channel, limit=16 << 20)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat())
            await self._listen(reader)

    def ready(self) -> None:
        self._say({"type": "ready"})

    async def command(self, document: dict[str, Any]) -> list[dict[str, Any]]:
        """Sends a fleet command and returns every answer, the final one last.

        Raises ServeError `supervisor_unavailable`, or `fleet_refused` with the supervisor's sentence.
        """
        if not self._command_socket:
            raise ServeError("supervisor_unavailable", "control runs without a supervisor: there is no fleet here")
        try:
            answers = await _in_thread(self._command_socket, document)
        except NotRunning as error:
            raise ServeError("supervisor_unavailable", f"{error}; look at the supervisor's log") from error
        if not answers[-1].get("ok"):
            raise ServeError("fleet_refused", str(answers[-1].get("message") or "the supervisor refused"))
        return answers

    async def _beat(self) -> None:
        while True:
            self._say({"type": "heartbeat"})
            await asyncio.sleep(_HEARTBEAT_SECONDS)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            async for line in reader:
                try:
                    self._take(msgspec.json.decode(line))
                except (KeyError, TypeError, ValueError, msgspec.DecodeError) as error:
                    logger.error("the supervisor sent what we cannot read", extra={"reason": repr(error)})
        except (OSError, ValueError):
            pass
        # Nobody is left to stop us in order, and a new supervisor will want our port and our store at once.
        os._exit(0)

    def _take(self, message: dict[str, Any]) -> None:
        match message.get("type"):
            case "fleet":
                self.fleet = Fleet.from_json(message)
            case "in_flight?":
                self._say({"type": "in_flight", "count": 0, "replicas": {}})
            case "drain":
                self._say({"type": "drained"})

    def _say(self, message: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(msgspec.json.encode(message) + b"\n")


async def _in_thread(path: str, document: dict[str, Any]) -> list[dict[str, Any]]:
    """A thread of its own, which the end of the process does not wait for: a drain may take minutes, and an
    executor would be full after a few of them and be joined at exit."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[list[dict[str, Any]]] = loop.create_future()

    def settle(answers: list[dict[str, Any]] | NotRunning) -> None:
        if outcome.done():
            return
        if isinstance(answers, NotRunning):
            outcome.set_exception(answers)
        else:
            outcome.set_result(answers)

    def ask() -> None:
        answers: list[dict[str, Any]] | NotRunning
        try:
            answers = list(request(path, document))
        except NotRunning as error:
            answers = error
        loop.call_soon_threadsafe(settle, answers)

    threading.Thread(target=ask, name="fleet-command", daemon=True).start()
    return await outcome

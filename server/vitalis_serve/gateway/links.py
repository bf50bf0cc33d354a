"""A worker's two lines to the rest: the supervisor's socket pair, and control's Unix socket. Off the hot path.

Both speak newline-delimited JSON. Losing control changes nothing (the worker serves from its last snapshot and
tries again); losing the supervisor ends the worker at once, so that nothing outlives the tree.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, Final

import msgspec

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS: Final = 1.0  # the supervisor gives up after five
RECONNECT_SECONDS: Final = 0.5
_MAX_LINE: Final = 64 << 20  # a snapshot of all keys is one line

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class SupervisorLink(asyncio.Protocol):
    """`on_message` hears every line from the supervisor."""

    def __init__(self, on_message: Callable[[dict[str, Any]], None]) -> None:
        self._on_message = on_message
        self._transport: asyncio.Transport | None = None
        self._rest = b""

    @staticmethod
    async def open(fd: int, on_message: Callable[[dict[str, Any]], None]) -> "SupervisorLink":
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        _, link = await asyncio.get_running_loop().create_unix_connection(lambda: SupervisorLink(on_message), sock=sock)
        return link

    def say(self, message: dict[str, Any]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(_encode(message) + b"\n")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._on_message(_decode(line))

    def connection_lost(self, exc: Exception | None) -> None:
        os._exit(1)  # the supervisor is gone: a worker that went on would hold the port against the next one


class ControlLink:
    """Runs for ever: `run` is one task of the worker's."""

    def __init__(
        self,
        path: str,
        *,
        name: str,
        version: Callable[[], int],
        on_snapshot: Callable[[bytes], None],
        report: Callable[[], dict[str, object]],
        explain: Callable[[bytes], dict[str, Any]],
    ) -> None:
        self._path = path
        self._name = name
        self._version = version
        self._on_snapshot = on_snapshot
        self._report = report
        self._explain = explain
        self._writer: asyncio.StreamWriter | None = None

    def say(self, message: dict[str, Any]) -> None:
        """Lost while control is away: nothing is said that it will not be told again."""
        if self._writer is not None:
            self._writer.write(_encode(message) + b"\n")

    async def run(self) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path, limit=_MAX_LINE)
            except OSError:
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            try:
                await self._talk(reader, writer)
            except (OSError, ValueError, KeyError, msgspec.DecodeError) as error:
                logger.warning("control's line broke: %s", error)
            finally:
                self._writer = None
                writer.close()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = {"type": "hello", "worker": self._name, "pid": os.getpid(), "version": self._version()}
        writer.write(_encode(hello) + b"\n")
        self._writer = writer
        while line := await reader.readline():
            message = _Message.decode(line)
            if message.type == "snapshot":
                self._on_snapshot(bytes(message.body))
                writer.write(_encode({"type": "applied", "version": self._version()}) + b"\n")
            elif message.type == "collect":
                writer.write(_encode({"type": "metrics", "id": message.id, "values": self._report()}) + b"\n")
            elif message.type == "explain":
                said = self._explain(bytes(message.body))
                writer.write(_encode({"type": "explained", "id": message.id, **said}) + b"\n")
            await writer.drain()


class _Message(msgspec.Struct):
    type: str
    id: int = 0
    version: int = 0
    body: msgspec.Raw = msgspec.Raw(b"null")

    @staticmethod
    def decode(line: bytes) -> "_Message":
        return _MESSAGE.decode(line)


_MESSAGE: Final = msgspec.json.Decoder(_Message)

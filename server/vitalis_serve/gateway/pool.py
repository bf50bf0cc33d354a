"""Connections to engines: one `EnginePool` per replica, one `EngineConnection` per connection.

How it works: a connection is in exactly one place - `idle` (the pool's deque), `assigned` (to one relay), or
closed - and says which. Taking one is a pop from the right, so the warmest is used; the coldest expire on the
left. A connection that died while idle says so itself and is skipped when popped. The parser is httptools';
everything it found in one read is handed to the relay at once, together with the raw bytes when these can be
passed on as they are.
"""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from typing import TYPE_CHECKING, Final

import httptools

from vitalis_serve.errors import ServeError

if TYPE_CHECKING:
    from vitalis_serve.gateway.relay import Relay

logger = logging.getLogger(__name__)

# A busy engine's accept queue is full: on a Unix socket connect says EAGAIN, which is saturation, not death.
_AGAIN_SECONDS: Final = 0.005
MAX_HEAD_BYTES: Final = 65_536
# A chunk whose size takes two hexadecimal digits is no longer than this, the size's and the data's line ends included.
_TWO_DIGITS: Final = 0xFF + 6


class EngineConnection(asyncio.Protocol):
    __slots__ = (
        "_boundary",
        "_chunks",
        "_complete",
        "_feed",
        "_head_bytes",
        "_keep_alive",
        "_parser",
        "content_length",
        "content_type",
        "idle_since",
        "in_body",
        "pool",
        "relay",
        "served",
        "status",
        "transport",
        "usable",
    )

    def __init__(self, pool: "EnginePool") -> None:
        self.pool = pool
        self.relay: Relay | None = None
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set before anything else is called
        self.usable = False
        self.served = 0  # responses whole; above 0 means that a reset may only be an idle close
        self.idle_since = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self._chunks: list[bytes] = []
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.content_type = b""
        self.content_length = -1
        self.in_body = False
        self._complete = False
        self._boundary = False
        self._keep_alive = False
        self._head_bytes = 0

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.usable = True
        self.pool.open += 1

    def data_received(self, data: bytes) -> None:
        relay = self.relay
        if relay is None:
            self.close()  # bytes nobody asked for: whatever they are, no answer of ours may follow them
            return
        try:
            # One whole chunk of whole events, between two others: the parser would end in the state that it is in,
            # so it is not asked. Saves a fifth of an event's cost outside the kernel.
            if self._boundary and relay.passing:
                start = 4 if len(data) <= _TWO_DIGITS else 5
                size = b"%x\r\n" % (len(data) - start - 2)
                if len(size) == start and data.startswith(size) and data.endswith(b"\n\n\r\n"):
                    relay.on_engine_chunk(data, start)
                    return
            self._received(relay, data)
        except Exception:
            logger.exception("a relay failed", extra={"request_id": relay.request_id.decode("latin-1")})
            self.drop()
            relay.cut(ServeError("internal", "Something went wrong here; the request id finds it in our log."))

    def _received(self, relay: "Relay", data: bytes) -> None:
        boundary = self._boundary
        if not self.in_body:
            self._head_bytes += len(data)
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            # More than the length that was announced: what was taken for the whole answer may be a part of it.
            if not self._complete or self.content_length >= 0:
                relay.on_engine_failed("protocol", "The engine's answer is not valid HTTP.")
                return
            self.usable = False  # a whole answer, then garbage: the answer stands, the connection goes
        chunks = self._chunks
        if chunks:
            payload = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            chunks.clear()
        else:
            payload = b""
        if self._complete:
            self._finish(relay, payload)
        elif payload:
            # Whole chunks with whole events from boundary to boundary: the bytes can go out as they came. A
            # chunk's header may be cut by the read's end, and then no callback says so; the ending does.
            ended = self._boundary = self._boundary and data.endswith(b"\n\n\r\n")
            relay.on_engine_data(payload, data if boundary and ended else None)
        else:
            self._boundary = False  # a chunk's header may have begun
            if not self.in_body and self._head_bytes > MAX_HEAD_BYTES:
                relay.on_engine_failed("protocol", "The engine's answer has headers without end.")

    def _finish(self, relay: "Relay", payload: bytes) -> None:
        """The response is whole: the connection goes back before the relay acts on the end."""
        status = self.status
        self.relay = None
        self.served += 1
        if status == 200:
            self.pool.arrivals += 1
        content_type = self.content_type
        # Answered before it had read the whole request: what is left of that must not stand in front of another.
        if self.usable and self._keep_alive and not self.transport.get_write_buffer_size():
            self._reset()
            self.pool.put_back(self)
        else:
            self.close()
        relay.on_engine_end(payload, status, content_type)

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self.pool.open -= 1
        relay, self.relay = self.relay, None
        if relay is not None:
            relay.on_engine_lost(started=self._head_bytes > 0, reused=self.served > 0)
        self._parser = self._feed = None  # type: ignore[assignment]  # breaks the cycle at once

    def eof_received(self) -> bool:
        return False  # a half-closed engine answers nothing more: close

    # -- httptools

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("a second answer to one request")  # becomes a parser's error

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self.content_type = value
        elif name == b"content-length":
            self.content_length = int(value)  # llhttp has checked it

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if 100 <= status < 200:  # not the answer yet: nothing in it is about that
            self.content_type, self.content_length = b"", -1
            return
        self.status = status
        self.in_body = True
        self._keep_alive = self._parser.should_keep_alive()  # after the message it is always False

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._boundary = False

    def on_chunk_complete(self) -> None:
        self._boundary = True

    def on_message_complete(self) -> None:
        if self.in_body:
            self._complete = True
            self.in_body = False

    # -- for the relay

    def assign(self, relay: "Relay", request: bytes) -> None:
        """Sends one request on this connection; the answer goes to `relay`."""
        assert self.relay is None, "a connection was assigned twice"
        self.relay = relay
        self.transport.write(request)

    def drop(self) -> None:
        """Closes the connection at once, which is how an engine learns that nobody wants the rest."""
        self.relay = None
        self.close()

    def close(self) -> None:
        self.usable = False
        self.transport.abort()


class EnginePool:
    """The connections to one replica. `address`: "unix:/path" or "http://host:port"."""

    def __init__(self, name: str, address: str, loop: asyncio.AbstractEventLoop, *, idle_seconds: float) -> None:
        self.name = name
        self.address = address
        self.open = 0
        self.arrivals = 0  # grows while answers come from there: in whole ones, and at each sweep that found tokens new
        self.retired = False
        self._idle: deque[EngineConnection] = deque()
        self._idle_seconds = idle_seconds
        self._loop = loop
        self._opening: set[asyncio.Task[None]] = set()

    @property
    def idle(self) -> int:
        return sum(connection.usable for connection in self._idle)

    @property
    def opening(self) -> int:
        return len(self._opening)

    def take(self) -> EngineConnection | None:
        """An idle connection that is alive as far as is known, or None."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
        return None

    def put_back(self, connection: EngineConnection) -> None:
        if self.retired:
            connection.close()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)

    def open_for(self, relay: "Relay", attempt: int, deadline: float) -> None:
        """Connects in the background; the relay hears `on_connected` or `on_connect_failed`, with its `attempt`."""
        task = self._loop.create_task(self._open(relay, attempt, deadline))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, relay: "Relay", attempt: int, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self._connect()
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            relay.on_connect_failed(attempt, str(error) or type(error).__name__)
        else:
            relay.on_connected(attempt, connection)

    async def _connect(self) -> EngineConnection:
        if self.address.startswith("unix:"):
            path = self.address[5:]
            while True:
                with contextlib.suppress(BlockingIOError):
                    _, connection = await self._loop.create_unix_connection(lambda: EngineConnection(self), path)
                    return connection
                await asyncio.sleep(_AGAIN_SECONDS)
        host, port = host_and_port(self.address)
        _, connection = await self._loop.create_connection(lambda: EngineConnection(self), host, port)
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection

    def expire(self, now: float) -> None:
        """Closes connections idle for too long (the engine would close them at an unlucky moment)."""
        idle = self._idle
        while idle and (not idle[0].usable or now - idle[0].idle_since > self._idle_seconds):
            idle.popleft().close()

    def retire(self) -> None:
        """The process behind this pool is gone or going: no connection is kept."""
        self.retired = True
        while self._idle:
            self._idle.pop().close()


def host_and_port(address: str) -> tuple[str, int]:
    """ "http://127.0.0.1:8000" -> ("127.0.0.1", 8000); ValueError where it is not such an address."""
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rstrip("/").rpartition(":")
    if scheme != "http" or not host or not port.isdigit():
        raise ValueError(f"`{address}` is not an engine's address; write http://HOST:PORT or unix:/PATH")
    return host.strip("[]"), int(port)

"""One connection of the simulated engine: HTTP in by httptools, answers out, one request at a time.

What a request for generation does is `exchange`'s; here are framing, keep-alive, the routes that answer at once, and
the end of a connection, which aborts what runs on it (as vLLM does when its client leaves or half-closes).
"""

import asyncio
import os
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, cast

import httptools

from simulator.exchange import Exchange

if TYPE_CHECKING:
    from simulator.server import Server

_PHRASES = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
            405: "Method Not Allowed", 413: "Payload Too Large", 422: "Unprocessable Entity", 429: "Too Many Requests",
            500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
            504: "Gateway Timeout"}  # fmt: skip
JSON = b"application/json"


class Request:
    """A request as it was read."""

    __slots__ = ("body", "headers", "keep_alive", "method", "path")

    def __init__(self) -> None:
        self.method = ""
        self.path = ""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.keep_alive = True

    def header(self, name: bytes) -> str:
        """The first value of a header (its name in lower case), or nothing."""
        for key, value in self.headers:
            if key == name:
                return value.decode("latin-1")
        return ""


def answer_head(status: int, content_type: bytes, length: int, extra: bytes = b"") -> bytes:
    """The head of an answer with a known length."""
    phrase = _PHRASES.get(status, "Unknown").encode()
    return (
        b"HTTP/1.1 %d %b\r\ndate: Sun, 22 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %d\r\n"
        b"content-type: %b\r\n%b\r\n" % (status, phrase, length, content_type, extra)
    )


class Connection(asyncio.Protocol):
    """A client's connection. `control`: it came over the control listener, which never misbehaves."""

    def __init__(self, server: "Server", control: bool) -> None:
        self.server = server
        self.control = control
        self.transport: asyncio.Transport
        self.answered = 0
        self.gone = False
        self._parser = httptools.HttpRequestParser(self)
        self._request = Request()
        self._body: list[bytes] = []
        self._target = b""
        self._waiting: deque[Request] = deque()
        self._exchange: Exchange | None = None
        self._idle: asyncio.TimerHandle | None = None

    # transport callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        self.server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self._rest()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_gone()
        self._waiting.clear()
        self.server.closed(self)

    def data_received(self, data: bytes) -> None:
        self._rest()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.close()
        except httptools.HttpParserError:
            text = b"Invalid HTTP request received."
            self.write(answer_head(400, b"text/plain; charset=utf-8", len(text), b"connection: close\r\n") + text)
            self.close()

    # parser callbacks

    def on_message_begin(self) -> None:
        self._request = Request()
        self._body = []
        self._target = b""

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._request.headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        request = self._request
        request.method = self._parser.get_method().decode()
        request.path = self._target.partition(b"?")[0].decode("latin-1")
        request.body = b"".join(self._body)
        request.keep_alive = self._parser.should_keep_alive()
        self._body = []
        if self._exchange is None:
            self.server.serve(self, request)
        else:
            self._waiting.append(request)

    # answers

    @property
    def busy(self) -> bool:
        """Whether a request for generation is under way."""
        return self._exchange is not None

    def take(self, exchange: Exchange) -> None:
        """The exchange that will answer the request under way, before it has answered anything."""
        self._exchange = exchange

    def done(self, keep_alive: bool) -> None:
        """The answer under way was written whole; on to the next request, or the end."""
        self._exchange = None
        self.answered += 1
        if not keep_alive:
            self.close()
        elif self._waiting and not self.gone:
            self.server.serve(self, self._waiting.popleft())
        elif not self.gone:
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(self.server.options.keep_alive_seconds, self.close)

    def answer(
        self, request: Request, status: int, body: bytes, content_type: bytes = JSON, extra: bytes = b""
    ) -> None:
        """A whole answer at once."""
        if not request.keep_alive:
            extra += b"connection: close\r\n"
        self.write(answer_head(status, content_type, len(body), extra) + (b"" if request.method == "HEAD" else body))
        self.done(request.keep_alive)

    def write(self, piece: bytes) -> None:
        if not self.gone and not self.transport.is_closing():
            self.transport.write(piece)

    def write_now(self, piece: bytes) -> None:
        """As `write`, but before it returns: uvloop keeps what is written for the end of its turn, which for the last
        of a hundred streams is milliseconds later than a log would say."""
        if not self.gone and not self.transport.is_closing() and self.transport.get_write_buffer_size() == 0:
            try:
                sent = os.write(self.transport.get_extra_info("socket").fileno(), piece)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # the transport finds out by itself
            if sent == len(piece):
                return
            piece = piece[sent:]
        self.write(piece)

    def close(self) -> None:
        """An orderly end: what was written still goes out."""
        self._rest()
        self.transport.close()

    def reset(self) -> None:
        """A disorderly end: RST on TCP; a Unix socket knows none, its peer sees the end."""
        self._rest()
        given = self.transport.get_extra_info("socket")
        if given is not None and given.family != socket.AF_UNIX:
            # uvloop's socket object refuses setsockopt; a duplicate of its descriptor shares the option
            with socket.socket(fileno=socket.dup(given.fileno())) as own:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def half_close(self) -> None:
        if not self.gone and self.transport.can_write_eof():
            self.transport.write_eof()

    def _rest(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

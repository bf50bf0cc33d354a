"""One HTTP connection of a user: sends a request, reads the answer, and says when each thing happened.

Sockets block, so that gevent makes them cooperative where it is at work; without it they simply block. Whatever a
server does wrong becomes the record's error: nothing is raised for it.
"""

import contextlib
import email.utils
import errno
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

import httptools
import msgspec

from vitalis_load import stamps, wire
from vitalis_load.records import Record
from vitalis_load.streams import Reader

Clock = Callable[[], float]


class Wakes(Protocol):
    """See wakes.py, which needs gevent."""

    turn: int

    def since(self, turn: int) -> float: ...


PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
READ_BYTES = 65536
REFUSAL_BYTES = 65536  # of a refusal's body: its words are at the beginning
# A server that closes an idle connection just as a request comes says so at once; later than this, it was the request.
AT_ONCE_SECONDS = 0.25
# How long HTTP's own end may come after the API's: the answer is whole, only the connection may not be.
LINGER_SECONDS = 1.0
RESOLVED_SECONDS = 30.0
# No descriptor, port or memory for a socket: nothing that the server did.
_OWN = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)


def request(
    api: str,
    document: Mapping[str, Any] | bytes,
    *,
    host: str,
    path_prefix: str = "",
    key: str = "",
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A whole HTTP request. `document` is the API's body, or its JSON. Chat and completions that stream are asked for
    their usage unless the document has `stream_options` of its own: without it their tokens cannot be counted."""
    if not isinstance(document, bytes):
        if document.get("stream") and api in ("chat", "completions") and "stream_options" not in document:
            document = {**document, "stream_options": {"include_usage": True}}
        document = msgspec.json.encode(document)
    lines = [
        f"POST {path_prefix.rstrip('/')}{PATHS[api]} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(document)}",
        "Accept-Encoding: identity",
    ]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    if api == "messages":
        lines.append("anthropic-version: 2023-06-01")
        if key:
            lines.append(f"x-api-key: {key}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + document


_resolved: dict[tuple[str, int], tuple[float, list[tuple[int, Any]]]] = {}


def addresses(host: str, port: int, now: float) -> list[tuple[int, Any]]:
    """(family, address) of each. Kept for RESOLVED_SECONDS: under gevent a name is resolved in a thread, for which a
    request would wait milliseconds. Raises OSError."""
    until, known = _resolved.get((host, port), (0.0, []))
    if now >= until or not known:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        known = [(family, address) for family, _, _, _, address in found]
        _resolved[host, port] = now + RESOLVED_SECONDS, known
    return known


class Connection:
    """To "http://host:port", "https://host:port" or "unix:/path"; opened when it is needed, kept while it can be.

    `tls` for https, the system's where None. When bytes came says the kernel, and where it does not (a Unix socket,
    TLS) `wakes`, under gevent. One request at a time; `abandon` may come from elsewhere."""

    def __init__(
        self,
        address: str,
        *,
        tls: ssl.SSLContext | None = None,
        connect_seconds: float = 10.0,
        wakes: Wakes | None = None,
        stamped: bool = True,
    ) -> None:
        self.address = address
        self._wakes = wakes
        self.opened = 0  # how many connections were made
        self._connect_seconds = connect_seconds
        self._path = address.removeprefix("unix:") if address.startswith("unix:") else ""
        parts = urlsplit(address)
        self._host = parts.hostname or "localhost"
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = tls
        if parts.scheme == "https" and tls is None:
            self._tls = ssl.create_default_context()
        self._socket: socket.socket | None = None
        self._ask_for_stamps = stamped
        self._stamped = False
        self._abandoned = False

    def ask(self, request: bytes, reader: Reader, *, scheduled: float, deadline: float, clock: Clock) -> Record:
        """Sends the request and reads its answer into `reader`. `scheduled` and `deadline` by `clock`, as all times of
        the record, whose task, tenant and what else a connection cannot know are the caller's to fill in."""
        self._abandoned = False
        sent = clock()
        record = Record(task="", api=reader.api, stream=reader.stream, scheduled=scheduled, sent=sent, ended=sent)
        exchange = _Exchange(record, reader)
        try:
            self._converse(request, exchange, deadline, clock)
        except BaseException:
            self.close()
            raise
        if not exchange.reusable():
            self.close()
        reader.fail("no_end", "no answer came", clock())
        reader.fill(record)
        if self._abandoned and record.error:
            record.error, record.detail, record.unfinished = "", "", True
        return record

    def abandon(self) -> None:
        """Ends the request that is under way, from another thread or greenlet: its record is `unfinished`."""
        self._abandoned = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None

    def _converse(self, request: bytes, exchange: "_Exchange", deadline: float, clock: Clock) -> None:
        reused = self._still_open()
        if not reused and (not self._open(exchange, deadline, clock) or self._abandoned):
            return
        began = clock()
        if self._attempt(request, exchange, deadline, clock) or self._abandoned:
            return
        # nothing was read
        if reused and clock() - began < AT_ONCE_SECONDS:
            self.close()
            if not self._open(exchange, deadline, clock) or self._attempt(request, exchange, deadline, clock):
                return
        exchange.fail("reset", exchange.problem or "the connection was closed before an answer came", clock())

    def _still_open(self) -> bool:
        """Whether there is an idle connection that its server has not closed meanwhile."""
        if self._socket is None:
            return False
        try:
            if isinstance(self._socket, ssl.SSLSocket):
                return True  # cannot be peeked into
            self._socket.settimeout(0)
            self._socket.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, TimeoutError):
            return True
        except OSError:
            pass
        self.close()  # closed, or talking without being asked
        return False

    def _open(self, exchange: "_Exchange", deadline: float, clock: Clock) -> bool:
        seconds = min(self._connect_seconds, deadline - clock())
        try:
            if seconds <= 0:
                raise TimeoutError("timed out")
            until = time.monotonic() + seconds
            if self._path:
                made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket = made
                made.settimeout(seconds)
                made.connect(self._path)
            else:
                made = self._connected(until)
                self._socket = made
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._stamped = self._ask_for_stamps and self._tls is None and stamps.ask_for(made)
            if self._tls is not None:
                made.settimeout(max(0.001, until - time.monotonic()))
                self._socket = self._tls.wrap_socket(made, server_hostname=self._host)
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
            own = isinstance(error, OSError) and error.errno in _OWN
            exchange.fail("client" if own else "connect", f"{self.address}: {_said(error)}", clock())
            self.close()
            return False
        self.opened += 1
        return True

    def _connected(self, until: float) -> socket.socket:
        """To the first of the name's addresses that takes it. Raises OSError."""
        problem: OSError = OSError(f"no address of {self._host}")
        for family, address in addresses(self._host, self._port, time.monotonic()):
            made = socket.socket(family, socket.SOCK_STREAM)
            try:
                made.settimeout(max(0.001, until - time.monotonic()))
                made.connect(address)
            except OSError as error:
                made.close()
                problem = error
            else:
                return made
        raise problem

    def _attempt(self, request: bytes, exchange: "_Exchange", deadline: float, clock: Clock) -> bool:
        """Sends and reads once. False: the connection broke before a byte of an answer."""
        connection = self._socket
        assert connection is not None
        exchange.problem = ""
        try:
            left = deadline - clock()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
            connection.sendall(request)
        except TimeoutError:
            exchange.fail("timeout", "the request could not be sent in time", clock())
            return True
        except OSError as error:
            exchange.problem = _said(error)  # it may have answered before it closed
        return self._read(connection, exchange, deadline, clock)

    def _read(self, connection: socket.socket, exchange: "_Exchange", deadline: float, clock: Clock) -> bool:
        began, wakes, turn, now = False, self._wakes, 0, clock()
        ancillary: list[tuple[int, int, bytes]]
        while not exchange.complete:
            left = deadline - now
            ancillary = []
            try:
                if left <= 0:
                    raise TimeoutError
                if wakes is not None:
                    turn = wakes.turn
                connection.settimeout(min(left, LINGER_SECONDS) if exchange.reader.done else left)
                if self._stamped:
                    data, ancillary, _, _ = connection.recvmsg(READ_BYTES, stamps.SPACE)
                else:
                    data = connection.recv(READ_BYTES)
            except TimeoutError:
                exchange.fail("timeout", f"no end within {deadline - exchange.record.sent:.1f} s", clock())
                return True
            except OSError as error:
                exchange.problem = exchange.problem or _said(error)
                data = b""
            age = stamps.age(ancillary) or (wakes.since(turn) if wakes is not None else 0.0)
            now = max(now, clock() - age)  # not before what was read last, whatever was done to the wall clock
            if data:
                began = True
                exchange.feed(data, now)
            elif began:
                exchange.broke(now)
                return True
            else:
                return False
        return True


class _Exchange:
    """One answer on the wire: httptools' callbacks, and where its bytes go."""

    def __init__(self, record: Record, reader: Reader) -> None:
        self.record = record
        self.reader = reader
        self.complete = False
        self.problem = ""
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0
        self._status = 0
        self._until_closed = True
        self._refusal = bytearray()
        self._message_over = False
        self._keep_alive = False
        self._more = False  # bytes after the answer, which nobody asked for

    def feed(self, data: bytes, now: float) -> None:
        self._now = now
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail("garbled", f"no HTTP: {_said(error)}", now)
        except httptools.HttpParserUpgrade:
            self.fail("garbled", "the server changed its protocol", now)
        reader = self.reader
        # what failed needs no more reading, and what is whole only its last chunk, which came with it or comes now
        if reader.ended is not None and (reader.error or self._message_over):
            self.complete = True

    def broke(self, now: float) -> None:
        """The connection ended, cleanly or not."""
        self._now = now
        self.complete = True
        if self._status >= 200 and self._until_closed and not self.problem:
            self._end()
        else:
            self.fail("reset", self.problem or "the connection was closed within the answer", now)

    def fail(self, error: str, detail: str, now: float) -> None:
        self.complete = True
        self.reader.fail(error, detail, now)

    def reusable(self) -> bool:
        return self._message_over and not self._until_closed and not self._more and self._keep_alive

    # -- httptools

    def on_message_begin(self) -> None:
        self._more = self._message_over

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._more:
            return
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._until_closed = False
        elif name == b"retry-after":
            self.record.retry_after = retry_after(value.decode("latin-1"), time.time())
        elif name == b"x-request-id":
            self.record.request_id = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._more:
            return
        if status >= 200:
            self._status = self.record.status = status
            self.record.head = self._now
        else:
            self._until_closed = True

    def on_body(self, body: bytes) -> None:
        if self._more:
            return
        if self._status == 200:
            self.reader.feed(body, self._now)
        elif len(self._refusal) < REFUSAL_BYTES:
            self._refusal += body

    def on_message_complete(self) -> None:
        if self._status >= 200 and not self._message_over:
            self._message_over = True
            self._keep_alive = bool(self._parser.should_keep_alive())
            self._end()

    def _end(self) -> None:
        self.complete = True
        if self._status == 200:
            self.reader.close(self._now)
        else:
            self.reader.fail(f"http_{self._status}", wire.body_words(bytes(self._refusal)), self._now)


def retry_after(value: str, wall_now: float) -> float | None:
    """Seconds to wait, of the header as seconds or as a date; None where it is neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - wall_now)
    except ValueError:
        return None


def _said(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[: wire.DETAIL_CHARACTERS]

"""A raw HTTP client for tests: sends exactly the bytes it is given, sees exactly the bytes that come.

    with client.connect("http://127.0.0.1:8000") as wire:
        wire.send(client.post("/v1/chat/completions", {"messages": [], "stream": True}))
        head = wire.read_head()
        first = next(wire.events(head))

Every read has a deadline (`seconds`, 5 by default) and raises TimeoutError after it; the end of the stream is `Ended`,
with what had come; a reset is the ConnectionResetError it is.
"""

import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

DEADLINE_SECONDS = 5.0


class Ended(Exception):
    """The other side ended its stream before what was awaited had come; `rest` is what had."""

    def __init__(self, rest: bytes) -> None:
        super().__init__(f"ended after {rest[-200:]!r}")
        self.rest = rest


@dataclass
class Head:
    """A response's head. Header names are in lower case; a repeated one keeps its last value (all in `lines`)."""

    status: int
    reason: str
    headers: dict[str, str] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)
    raw: bytes = b""

    @property
    def chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    @property
    def length(self) -> int | None:
        value = self.headers.get("content-length")
        return None if value is None else int(value)


@dataclass(frozen=True)
class Event:
    """One server-sent event. `name` is empty where there was no event line."""

    name: str
    data: str
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)


@dataclass
class Response:
    """A whole response."""

    head: Head
    body: bytes

    @property
    def status(self) -> int:
        return self.head.status

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Event]:
        return [_event(raw) for raw in self.body.split(b"\n\n") if raw.strip()]


def request(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """The bytes of a request. A content-length is added unless the headers carry one or say chunked."""
    own = {"host": "test", **(headers or {})}
    if (body or method == "POST") and not {"content-length", "transfer-encoding"} & {name.lower() for name in own}:
        own["content-length"] = str(len(body))
    lines = "".join(f"{name}: {value}\r\n" for name, value in own.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


def post(path: str, document: Any, headers: dict[str, str] | None = None) -> bytes:
    """The bytes of a POST of a JSON document."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return request("POST", path, body, {"content-type": "application/json", **(headers or {})})


def get(path: str, headers: dict[str, str] | None = None) -> bytes:
    return request("GET", path, b"", headers)


class Wire:
    """A connection. `received` counts all bytes that came."""

    def __init__(self, own: socket.socket) -> None:
        self.socket = own
        self.received = 0
        self._buffer = bytearray()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # sending

    def send(self, data: bytes, seconds: float = DEADLINE_SECONDS) -> None:
        self.socket.settimeout(seconds)
        self.socket.sendall(data)

    def dribble(self, data: bytes, pause_seconds: float = 0.0) -> None:
        """One byte a packet."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(data)):
            self.send(data[at : at + 1])
            if pause_seconds:
                time.sleep(pause_seconds)

    def half_close(self) -> None:
        """Ends the sending side."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Leaves with RST (on TCP)."""
        if self.socket.family != socket.AF_UNIX:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    # receiving

    def _receive(self, deadline: float) -> bool:
        """More bytes into the buffer; False at the end of the stream."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"nothing more came; so far: {bytes(self._buffer[-200:])!r}")
        self.socket.settimeout(left)
        data = self.socket.recv(1 << 16)
        self.received += len(data)
        self._buffer += data
        return bool(data)

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def read_until(self, mark: bytes, seconds: float = DEADLINE_SECONDS) -> bytes:
        """Everything up to the mark, which is included."""
        deadline = time.monotonic() + seconds
        searched = 0
        while (at := self._buffer.find(mark, searched)) < 0:
            searched = max(0, len(self._buffer) - len(mark) + 1)
            if not self._receive(deadline):
                raise Ended(self._take(len(self._buffer)))
        return self._take(at + len(mark))

    def read_exactly(self, count: int, seconds: float = DEADLINE_SECONDS) -> bytes:
        deadline = time.monotonic() + seconds
        while len(self._buffer) < count:
            if not self._receive(deadline):
                raise Ended(self._take(len(self._buffer)))
        return self._take(count)

    def read_some(self, seconds: float = DEADLINE_SECONDS) -> bytes:
        """Whatever comes next; empty at the end of the stream."""
        if not self._buffer:
            self._receive(time.monotonic() + seconds)
        return self._take(len(self._buffer))

    def sip(self, count: int, seconds: float = DEADLINE_SECONDS) -> None:
        """At most so many bytes are taken off the socket, and kept for the reads to come."""
        self.socket.settimeout(seconds)
        data = self.socket.recv(count)
        self.received += len(data)
        self._buffer += data

    def read_to_end(self, seconds: float = DEADLINE_SECONDS) -> bytes:
        """Everything until the other side ends its stream."""
        deadline = time.monotonic() + seconds
        while self._receive(deadline):
            pass
        return self._take(len(self._buffer))

    def is_quiet(self, seconds: float) -> bool:
        """Whether nothing comes, not even an end, for that long."""
        try:
            self._receive(time.monotonic() + seconds)
        except TimeoutError:
            return True
        return False

    def read_head(self, seconds: float = DEADLINE_SECONDS) -> Head:
        raw = self.read_until(b"\r\n\r\n", seconds)
        first, *rest = raw[:-4].decode("latin-1").split("\r\n")
        _, status, reason = [*first.split(" ", 2), "", ""][:3]
        lines = [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in rest)]
        return Head(int(status), reason, dict(lines), lines, raw)

    def chunks(self, seconds: float = DEADLINE_SECONDS) -> Iterator[bytes]:
        """The chunks of a chunked body, ended by its last chunk; raises Ended where that is missing."""
        while True:
            size = int(self.read_until(b"\r\n", seconds).split(b";")[0], 16)
            data = self.read_exactly(size + 2, seconds)
            assert data.endswith(b"\r\n"), f"a chunk of {size} bytes does not end after them: {data[-20:]!r}"
            if not size:
                return
            yield data[:-2]

    def body_pieces(self, head: Head, seconds: float = DEADLINE_SECONDS) -> Iterator[bytes]:
        """The body as it comes, framing taken off."""
        if head.chunked:
            yield from self.chunks(seconds)
        elif head.length is not None:
            if head.length:
                yield self.read_exactly(head.length, seconds)
        elif head.status not in (204, 304):
            yield self.read_to_end(seconds)

    def events(self, head: Head, seconds: float = DEADLINE_SECONDS) -> Iterator[Event]:
        """The events of a streamed body, each as soon as it is whole; `seconds` is the longest wait for one.
        An unfinished event at the end of a well framed body raises Ended."""
        rest = b""
        for piece in self.body_pieces(head, seconds):
            *whole, rest = (rest + piece).split(b"\n\n")
            yield from (_event(raw) for raw in whole)
        if rest.strip():
            raise Ended(rest)

    def read_response(self, seconds: float = DEADLINE_SECONDS, method: str = "GET") -> Response:
        head = self.read_head(seconds)
        return Response(head, b"" if method == "HEAD" else b"".join(self.body_pieces(head, seconds)))


def _event(raw: bytes) -> Event:
    name, data = "", []
    for line in raw.decode().split("\n"):
        if line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
    return Event(name, "\n".join(data), raw + b"\n\n")


def connect(address: str, seconds: float = DEADLINE_SECONDS, receive_buffer: int | None = None) -> Wire:
    """A connection to "http://host:port" or "unix:/path". A small `receive_buffer` makes a slow reader felt."""
    if address.startswith("unix:"):
        own = socket.socket(socket.AF_UNIX)
        target: Any = address.removeprefix("unix:")
    else:
        own = socket.socket(socket.AF_INET)
        parts = urlsplit(address)
        target = (parts.hostname, parts.port)
    if receive_buffer is not None:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    own.settimeout(seconds)
    try:
        own.connect(target)
    except BaseException:
        own.close()
        raise
    return Wire(own)


def ask(address: str, data: bytes, seconds: float = DEADLINE_SECONDS) -> Response:
    """One request on a connection of its own, and the whole response."""
    with connect(address) as wire:
        wire.send(data)
        return wire.read_response(seconds)

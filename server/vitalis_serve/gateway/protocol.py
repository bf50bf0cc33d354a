"""The client's side of HTTP/1.1: our own protocol class on httptools' strict parser, run by uvicorn's `Server`.

How it works: bytes are fed to the parser while no request is being answered; what comes behind a request (a
pipelined one) is kept, unparsed and bounded, until the answer is out. The socket is read all the while, so a
client that leaves is noticed at once, also behind a pipelined request. Deadlines are looked at by the worker's
sweep. A request that must be refused is refused at its head; if much of its body is still to come the answer
closes the connection, after the client had the time to read it.

Compared with ASGI this saves the per-request task, cycle object and dictionaries: half of the cost of a request.
"""

import asyncio
import contextlib
import fcntl
import logging
import sys
import termios
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import httptools

from vitalis_serve.errors import ServeError
from vitalis_serve.gateway import headers as rules
from vitalis_serve.gateway import own
from vitalis_serve.gateway.paths import APIS, MODEL_PREFIX, OWN, path_of
from vitalis_serve.gateway.relay import Relay

if TYPE_CHECKING:
    from vitalis_serve.gateway.keys import Key, KeyTable
    from vitalis_serve.gateway.state import WorkerState

logger = logging.getLogger(__name__)

WRITE_HIGH_WATER: Final = 16 * 1024
MAX_AHEAD_BYTES: Final = 256 * 1024  # pipelined bytes kept behind a running request before reading pauses
SMALL_BODY_BYTES: Final = 64 * 1024  # a refused body up to this size is read and the connection kept
LINGER_SECONDS: Final = 2.0
FRAMING_SHARE: Final = 4  # the framing of a body may be this part of its limit, over and above the head's
_TARGET: Final = "The request's target must be a path, or an http URL with a host"
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

HEAD, BODY, ANSWERING, IDLE, LINGERING = range(5)


class ClientConnection(asyncio.Protocol):
    __slots__ = (
        "_ahead",
        "_ahead_bytes",
        "_body",
        "_connections",
        "_feed",
        "_head_done",
        "_host",
        "_key",
        "_key_until",
        "_parser",
        "_pipeline",
        "_presented",
        "_presented_to",
        "_raw_bytes",
        "_reading_paused",
        "_received",
        "_relay",
        "_state",
        "_taken_at",
        "_trailer_bytes",
        "_unsent",
        "_url",
        "_wanted_body",
        "deadline",
        "paused_at",
        "phase",
        "transport",
        "write",
    )

    def __init__(self, state: "WorkerState", connections: "set[Any]") -> None:
        # for the whole connection
        self._state = state
        self._connections = connections
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set before anything else is called
        self.write: Any = None
        self.paused_at = 0.0  # since when more is written than the client has taken; 0 while it keeps up
        self._taken_at = 0.0  # when the sweep last saw that it had taken some of that
        self._unsent = 0  # how much there was to take then
        self.phase = HEAD
        self.deadline = 0.0
        self._parser = httptools.HttpRequestParser(self)
        self._feed = self._parser.feed_data
        self._ahead: list[bytes] = []
        self._ahead_bytes = 0
        self._reading_paused = False
        self._host: bytes | None = None  # the last one, found valid
        self._pipeline: deque[tuple[Relay, bytes]] = deque()
        # the credential last presented, and whom it named under which snapshot
        self._presented: tuple[bytes | None, bytes | None] | None = None
        self._presented_to: KeyTable | None = None
        self._key: Key | None = None
        self._key_until = 0.0
        # for the request being received
        self._relay: Relay | None = None  # the one being answered, if phase is ANSWERING
        self._received: Relay | None = None
        self._url = b""
        self._body: bytes | bytearray = b""
        self._raw_bytes = 0  # read since its first byte: the head, the body and the body's framing
        self._head_done = False
        self._trailer_bytes = 0
        self._wanted_body = 0

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        state = self._state
        self._connections.add(self)
        state.counters.client_connections += 1
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        self.write = self.transport.write
        self.deadline = state.now() + state.options.header_seconds
        if state.counters.client_connections > state.options.max_connections:
            self._refuse(ServeError("queue_full", "Too many connections are open.", retry_after=5))

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._state.counters.client_connections -= 1
        self.phase = LINGERING
        received, self._received = self._received, None
        relay, self._relay = self._relay, None
        waiting = [entry[0] for entry in self._pipeline]
        self._pipeline.clear()
        for one in (relay, received, *waiting):
            if one is not None:
                one.cancel()
        self._parser = self._feed = None  # type: ignore[assignment]  # breaks the cycle at once

    def eof_received(self) -> bool:
        return False  # a client that half-closes has left, as for nginx

    def pause_writing(self) -> None:
        self.paused_at = self._taken_at = self._state.now()
        if self._relay is not None:
            self._relay.pause()

    def resume_writing(self) -> None:
        paused_at, self.paused_at = self.paused_at, 0.0
        if self._relay is not None:
            self._relay.resume()
        if self._reading_paused and self._ahead_bytes <= MAX_AHEAD_BYTES:
            self._reading_paused = False
            if self.phase != LINGERING:
                self.deadline += self._state.now() - paused_at  # what it sent meanwhile was not looked at
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        phase = self.phase
        if phase == ANSWERING:
            self._keep_ahead(data)
            return
        if phase == LINGERING:
            return
        if phase == IDLE:
            self.phase = HEAD
            self.deadline = self._state.now() + self._state.options.header_seconds
        if self.phase == HEAD:
            self._raw_bytes += len(data)
            if self._raw_bytes > self._state.options.max_header_bytes and not self._head_ends(data):
                self._refuse(ServeError("headers_too_large", "The request's headers are too large."))
                return
        elif self._framing_too_large(len(data)):
            return
        try:
            self._feed(data)
        except httptools.HttpParserUpgrade:
            pass  # refused at the head; what follows is not HTTP
        except httptools.HttpParserError as error:
            self._parse_failed(error)

    def _parse_failed(self, error: httptools.HttpParserError) -> None:
        ours = isinstance(error, httptools.HttpParserCallbackError)
        if ours:
            logger.error("a request could not be taken in", exc_info=error)
        if self.phase == ANSWERING:
            # Requests that were whole, with garbage behind them: they are answered, then the connection ends.
            last = self._pipeline[-1][0] if self._pipeline else self._relay
            if last is not None:
                last.keep_alive = False
            received, self._received = self._received, None
            if received is not None:
                received.cancel("refused", "invalid_request")
        elif self.phase != LINGERING:
            self._refuse(_internal() if ours else ServeError("invalid_request", _reason(error)))

    def _head_ends(self, data: bytes) -> bool:
        """Whether the head, started in earlier reads, ends within its limit in this one."""
        room = self._state.options.max_header_bytes - (self._raw_bytes - len(data))
        if data.startswith((b"\n", b"\r\n")):
            return room >= 0  # the blank line may have begun in the read before
        return 0 <= data.find(b"\r\n\r\n") <= room

    def _framing_too_large(self, more: int) -> bool:
        """Ends a request of which what was read until now is mostly framing: chunk sizes, extensions, trailers.
        The parser throws those away, or gathers them (a trailer), without a limit of its own."""
        relay, options = self._received, self._state.options
        if relay is None or relay.refusal is not None:
            return False
        room = options.max_header_bytes + options.max_body_bytes // FRAMING_SHARE
        if self._raw_bytes - relay.body_bytes <= room:
            self._raw_bytes += more
            return False
        if relay.api is None:
            error = _no_body()
        else:
            error = ServeError(
                "body_too_large", "The body's framing is too large; send larger chunks, without extensions."
            )
        self._refuse_body(relay, error)
        return True

    def _keep_ahead(self, data: bytes) -> None:
        self._ahead.append(data)
        self._ahead_bytes += len(data)
        if self._ahead_bytes > MAX_AHEAD_BYTES:
            self._pause_reading()

    def _pause_reading(self) -> None:
        if not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()

    # -- httptools: the request's head

    def on_message_begin(self) -> None:
        if self.phase == LINGERING:
            return  # behind a request that ends the connection: nobody answers it
        if self.phase == IDLE:  # behind a request that was answered while this very read was parsed
            self._await_head()
        self._received = Relay(self, self._state)
        self._url = b""
        self._head_done = False
        self._trailer_bytes = 0
        self._wanted_body = 0
        self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url = self._url + url if self._url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        relay = self._received
        if relay is None:
            return
        if self._head_done:  # a trailer: nothing in it counts but its size, which belongs to the head's
            self._trailer_bytes += len(name) + len(value)
            if self._trailer_bytes > self._state.options.max_header_bytes and self._relay is None:
                self._refuse_body(relay, ServeError("headers_too_large", "The request's trailers are too large."))
            return
        name = name.lower()
        if name in rules.WANTED:
            if name not in relay.headers:
                relay.headers[name] = value
            elif name not in rules.ONCE:
                relay.headers[name] += b", " + value  # the same list in one line, as RFC 9110 5.3 has it
            elif relay.refusal is None:
                relay.refusal = ServeError("invalid_request", f"The header {name.decode()} is there twice.")

    def on_headers_complete(self) -> None:
        relay, parser = self._received, self._parser
        if relay is None:
            return
        state = self._state
        self._head_done = True
        relay.method = parser.get_method()
        relay.http_1_0 = parser.get_http_version() == "1.0"
        relay.keep_alive = parser.should_keep_alive() and not state.draining
        relay.request_id = rules.sane_request_id(relay.headers.get(b"x-request-id")) or state.next_request_id()
        url = self._url
        relay.path = url if url in APIS else path_of(url)
        if relay.refusal is not None:  # a header that may be there once was there twice
            relay.keep_alive = False
        try:
            self._judge_head(relay)
        except ServeError as error:
            if relay.refusal is None:
                relay.refusal = error.with_traceback(None)
        if self._relay is None:
            self.phase = BODY
            # A body that is only read to be thrown away gets little time: its answer stands already.
            patience = state.options.body_seconds if relay.refusal is None else LINGER_SECONDS
            self.deadline = state.now() + min(patience, state.options.body_seconds)
        if b"expect" in relay.headers and relay.refusal is None:
            self._judge_expectation(relay)
        if relay.refusal is not None and (
            parser.should_upgrade()
            or self._wanted_body > SMALL_BODY_BYTES
            or b"transfer-encoding" in relay.headers
            or b"expect" in relay.headers
        ):
            relay.keep_alive = False
            if self._relay is None:
                self._refuse(relay.refusal)

    def _judge_expectation(self, relay: Relay) -> None:
        """RFC 9110, section 10.1.1. A pipelined request is told to go on when its turn comes."""
        if relay.http_1_0:
            return  # it does not know of 100
        if relay.headers[b"expect"].strip().lower() != b"100-continue":
            relay.refusal = ServeError("invalid_request", "The only expectation met here is 100-continue.")
        elif self._relay is None and (self._wanted_body or b"transfer-encoding" in relay.headers):
            self.write(_CONTINUE)

    def _judge_head(self, relay: Relay) -> None:
        """All that can be said before the body: path, method, length, type, key. Raises ServeError."""
        path, head = relay.path, relay.headers
        api = relay.api = APIS.get(path)
        if self._parser.should_upgrade():
            wrong = "Only HTTP/1.1 is spoken here; do not ask for an upgrade."
            proxied = "This is no proxy: CONNECT is not spoken here."
            raise ServeError("invalid_request", proxied if relay.method == b"CONNECT" else wrong)
        if not relay.http_1_0 and self._parser.get_http_version() != "1.1":
            relay.keep_alive = False
            raise ServeError("invalid_request", "Only HTTP/1.0 and HTTP/1.1 are spoken here.")
        self._judge_framing(relay, head)
        if b"content-length" in head:
            self._wanted_body = int(head[b"content-length"][-20:])  # llhttp: digits, and they fit in 64 bits
        if api is not None:
            self._judge_post(relay, head)
            keyed = True
        elif path in OWN or path.startswith(MODEL_PREFIX):
            self._judge_get(relay)
            keyed = OWN.get(path, True)
        elif path.startswith(b"/"):
            raise ServeError("unknown_path", "There is nothing at this path.")
        else:
            raise ServeError("unknown_path", f"{_TARGET}.")
        if keyed:
            keys = self._state.keys
            if keys.version == 0:
                raise ServeError("no_ready_engine", "The gateway has not got its keys yet.", retry_after=2)
            # The same credential again on the same connection, under the same snapshot: no digest anew.
            presented = head.get(b"authorization"), head.get(b"x-api-key")
            wall = self._state.wall()
            if presented == self._presented and keys is self._presented_to and wall < self._key_until:
                relay.key = self._key
                return
            key, until = keys.identify(rules.credential(head), wall)
            relay.key = key
            if "inference" not in key.scopes:
                raise ServeError("scope_missing", "This key lacks the scope `inference`.")
            self._presented, self._presented_to, self._key, self._key_until = presented, keys, key, until

    def _judge_framing(self, relay: Relay, head: dict[bytes, bytes]) -> None:
        """What a proxy in front could read otherwise than we do. RFC 9112, sections 3.2, 6.1 and 7.4."""
        wrong, host = "", head.get(b"host")
        if host != self._host:
            if host is None or rules.sane_host(host):
                self._host = host
            else:
                wrong = "The Host header must be a host name or address, and a port if need be."
        if wrong:
            pass
        elif host is None and not relay.http_1_0:
            wrong = "The Host header is missing."
        elif b"transfer-encoding" in head and relay.http_1_0:
            wrong = "HTTP/1.0 has no transfer encodings."
        elif head.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            wrong = "The only transfer encoding spoken here is chunked."
        if wrong:
            relay.keep_alive = False
            raise ServeError("invalid_request", wrong)

    def _judge_post(self, relay: Relay, head: dict[bytes, bytes]) -> None:
        if relay.method != b"POST":
            raise ServeError("method_not_allowed", "This path takes POST only.")
        if self._wanted_body > self._state.options.max_body_bytes:
            raise _too_large(self._state.options.max_body_bytes)
        kind = head.get(b"content-type", b"application/json")
        if kind != b"application/json" and kind.partition(b";")[0].strip().lower() != b"application/json":
            raise ServeError("unsupported_media_type", "The body must be application/json.")
        if b"content-encoding" in head and head[b"content-encoding"].lower() != b"identity":
            raise ServeError("unsupported_media_type", "The body must not be compressed.")

    def _judge_get(self, relay: Relay) -> None:
        """A small body is read and thrown away: without a key nobody's bytes are kept."""
        if relay.method not in (b"GET", b"HEAD"):
            raise ServeError("method_not_allowed", "This path takes GET only.")
        if self._wanted_body > SMALL_BODY_BYTES:
            raise _no_body()

    # -- httptools: the body

    def on_body(self, body: bytes) -> None:
        relay, state = self._received, self._state
        if relay is None or self.phase == LINGERING:
            return
        if relay.refusal is not None or relay.api is None:
            return  # read and thrown away
        relay.body_bytes += len(body)
        if relay.body_bytes > state.options.max_body_bytes:
            self._refuse_body(relay, _too_large(state.options.max_body_bytes))
        elif not state.body_fits(len(body)):
            self._refuse_body(
                relay, ServeError("queue_full", "Too many request bodies are being received.", retry_after=2)
            )
        else:
            state.counters.body_bytes += len(body)
            relay.held_body_bytes += len(body)
            held = self._body
            if not held:
                self._body = body  # all of it, as a rule
            elif isinstance(held, bytearray):
                held += body
            else:
                self._body = bytearray(held + body)  # not a list: tiny chunks would each be an object of 50 bytes

    def _refuse_body(self, relay: Relay, error: ServeError) -> None:
        relay.refusal = error
        relay.keep_alive = False
        self._body = b""
        self._state.give_back_body(relay)
        if self._relay is None:
            self._refuse(error)

    def on_message_complete(self) -> None:
        relay, self._received = self._received, None
        if relay is None:
            return
        self._raw_bytes = 0
        body = bytes(self._body)  # no copy of what came in one piece
        self._body = b""
        if self._relay is None and self.phase != LINGERING:
            self._answer(relay, body)
        else:
            self._pipeline.append((relay, body))

    # -- answering

    def _answer(self, relay: Relay, body: bytes) -> None:
        self.phase = ANSWERING
        self._relay = relay
        try:
            if relay.refusal is not None:
                relay.cut(relay.refusal)
            elif relay.api is not None:
                relay.start(body)
            else:
                own.answer(relay, self._state)
        except ServeError as error:
            relay.cut(error)
        except Exception:
            logger.exception("a request failed", extra={"request_id": relay.request_id.decode("latin-1")})
            relay.cut(_internal())

    def on_relay_done(self, relay: Relay) -> None:
        """The relay has written its last byte and released all it had."""
        if self._relay is not relay:
            return
        self._relay = None
        if self.transport.is_closing():
            return
        if relay.linger:
            # Closing now would reset the connection under what the client still sends, and the answer with it.
            self.transport.write_eof()
            return
        if not relay.keep_alive or self._state.draining:
            self._close()
            return
        if self._pipeline or self._ahead:
            # In the next turn: a client with thousands of pipelined requests must not build up a stack.
            self._state.loop.call_soon(self._next)
        else:
            self._rest()

    def _close(self) -> None:
        """Closes once all is sent, for which a slow client gets the time that it has otherwise."""
        self.phase = LINGERING
        self.deadline = self._state.now() + self._state.options.client_stalled_seconds
        self.transport.close()

    def _rest(self) -> None:
        """Nothing is being answered: the next request, or what has come of it."""
        received, options = self._received, self._state.options
        if self.paused_at:
            self._pause_reading()  # who does not read his answers gets no more of them
        if received is None:
            self.phase = IDLE
            self.deadline = self._state.now() + options.keepalive_seconds
        elif not self._head_done:
            self._await_head()
        elif received.refusal is not None and not received.keep_alive:
            self._refuse(received.refusal)
        else:
            self.phase = BODY
            self.deadline = self._state.now() + options.body_seconds
            if received.refusal is None and b"expect" in received.headers:
                self._judge_expectation(received)

    def _await_head(self) -> None:
        """Some of the next head came together with the request before it."""
        self.phase = HEAD
        self._raw_bytes = self._raw_bytes or 1
        self.deadline = self._state.now() + self._state.options.header_seconds

    def _next(self) -> None:
        if self.phase != ANSWERING or self._relay is not None:
            return
        if self._pipeline:
            relay, body = self._pipeline.popleft()
            self._answer(relay, body)
            return
        data = b"".join(self._ahead)
        self._ahead, self._ahead_bytes = [], 0
        if self._reading_paused:
            self._reading_paused = False
            self.transport.resume_reading()
        self._rest()
        if data:
            self.data_received(data)

    def _refuse(self, error: ServeError) -> None:
        """Answers and ends the connection, though the request is not whole."""
        relay = self._received
        self._received = None
        if relay is None:
            relay = Relay(self, self._state)
        if not relay.request_id:
            relay.request_id = self._state.next_request_id()
        relay.keep_alive = False
        self._relay = relay
        self.phase = LINGERING
        self.deadline = self._state.now() + LINGER_SECONDS
        relay.linger = True
        relay.cut(error)

    # -- the sweep, and stopping

    def check(self, now: float) -> None:
        """Once per sweep: deadlines of the head, the body, idleness, and of a client that does not read."""
        if self.paused_at and self._stalled(now):
            if self._relay is not None:
                self._relay.cancel("client_gone", "client_stalled")
            self.transport.abort()
            return
        phase = self.phase
        if phase == ANSWERING:
            if self._relay is not None:
                self._relay.check(now)
        elif now >= self.deadline and (phase == LINGERING or not self._reading_paused):
            if phase == BODY:
                refusal = self._received.refusal if self._received is not None else None
                self._refuse(refusal or ServeError("body_timeout", "The body did not arrive in time."))
            elif phase == HEAD and self._raw_bytes:
                self._refuse(ServeError("body_timeout", "The request's head did not arrive in time."))
            else:
                self.transport.abort() if phase == LINGERING else self._close()

    def _stalled(self, now: float) -> bool:
        """Whether a client with bytes to take has taken none for too long. Who reads on, however slowly, is cut only
        where it takes him longer than a request may take in all."""
        options = self._state.options
        patience, unsent = options.client_stalled_seconds, _unsent(self.transport)
        if now - self.paused_at >= options.total_seconds:
            return True
        if unsent == self._unsent:
            return now - self._taken_at >= patience
        self._unsent, self._taken_at = unsent, now
        if self.phase == LINGERING and not self._state.draining:
            self.deadline = max(self.deadline, now + patience)
        return False

    def shutdown(self) -> None:
        """uvicorn's `Server` calls this when it stops: idle connections close, running requests finish."""
        self._state.draining = True
        if self.phase in (IDLE, HEAD) and not self._raw_bytes:
            self._close()
        elif self._relay is not None:
            self._relay.keep_alive = False

    def on_hung(self, replica: str, incarnation: int) -> None:
        if self._relay is not None:
            self._relay.on_hung(replica, incarnation)

    def end(self, error: ServeError) -> None:
        """The drain's deadline has passed: what runs here is properly ended."""
        if self._relay is not None:
            self._relay.keep_alive = False
            self._relay.cut(error)
        else:
            self._close()
        self.deadline = min(self.deadline, self._state.now() + LINGER_SECONDS)


def _unsent(transport: asyncio.Transport) -> int:
    """Bytes that the other side has not taken: here, and in the system's own buffer, which may hold megabytes and
    asks for more only when a third of them has gone."""
    count = transport.get_write_buffer_size()
    with contextlib.suppress(OSError):  # it is being closed
        queued = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        count += int.from_bytes(queued, sys.byteorder)
    return count


def _too_large(limit: int) -> ServeError:
    return ServeError("body_too_large", f"The body is larger than {limit} bytes.")


def _no_body() -> ServeError:
    return ServeError("body_too_large", "This path takes no body.")


def _internal() -> ServeError:
    return ServeError("internal", "Something went wrong here; the request id finds it in our log.")


def _reason(error: Exception) -> str:
    if isinstance(error, httptools.HttpParserInvalidURLError):
        return f"{_TARGET} ({error})."
    return f"This is not a valid HTTP/1.1 request: {str(error)[:120] or type(error).__name__}."

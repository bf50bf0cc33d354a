"""One request for generation, from its body to its last byte, misbehaviours included.

How it works: the exchange is the owner of its sequence. `token` turns the step into events and notes them; `flush`
writes what was noted, once a turn. Where a rule struck the request, every event goes through `_struck`, which may end
the exchange at the point the rule names; without one the path is short, because it runs for every token.
"""

import asyncio
import time
from typing import TYPE_CHECKING, Any

from simulator.calls import LEAKED
from simulator.requests import Work
from simulator.rules import Rule
from simulator.schedule import Sequence
from simulator.shapes import BODIES, ID_PREFIXES, Answer, error_body
from simulator.writers import WRITERS, MessageWriter, ResponseWriter, Writer

if TYPE_CHECKING:
    from simulator.connection import Connection, Request
    from simulator.server import Server

_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\n"
)
_CHUNKED = b"transfer-encoding: chunked\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_GARBAGE = b"\x16\x03\x01\x02\x00\x01\x00\xfcnot HTTP at all\r\n\r\n"
_SIZES = [b"%x\r\n" % size for size in range(2048)]


def chunk(event: bytes) -> bytes:
    """One event as one chunk, as vLLM's server sends it."""
    size = len(event)
    return (_SIZES[size] if size < 2048 else b"%x\r\n" % size) + event + b"\r\n"


class Exchange:
    """A request and its answer. Ends exactly once: finished, aborted, error or refused, and is logged then."""

    def __init__(self, server: "Server", connection: "Connection", request: "Request", rule: Rule | None) -> None:
        self.server = server
        self.connection = connection
        self.request = request
        self.rule = rule
        self.arrived = time.monotonic()
        self.work: Work | None = None
        self.sequence: Sequence | None = None
        self.answer: Answer | None = None
        self.writer: Writer | None = None
        self.ended = False
        self.events = 0
        self._interval = server.options.stream_interval
        self._told = 0  # tokens whose events were made
        self._pieces: list[bytes] = []
        self._times: list[float] | None = [] if server.options.log_token_times else None
        self._written: list[float] = []  # when each of those tokens went to the socket
        self._timer: asyncio.Handle | None = None
        self._dribbling: bytearray | None = None
        self._dribble_ends = False
        self._stalled = False
        self._held: list[bytes] = []  # events that came while stalled
        self._headers = b""

    # from the server

    def start(self, work: Work, identity: str) -> None:
        """Sends the head where the answer is streamed, and queues the work."""
        self.work = work
        server = self.server
        answer = Answer(work.api, ID_PREFIXES[work.api] + identity, work.model, int(time.time()), work.layout(),
                        work.finish_reason)  # fmt: skip
        answer.count = work.count
        answer.include_usage = work.include_usage
        answer.continuous = work.continuous
        answer.cached_details = server.options.prompt_tokens_details
        answer.call, answer.named = work.tool, work.named
        answer.logprobs = work.logprobs
        if self.rule is not None:
            self._mislead(answer, self.rule.kind)
        hashes = work.block_hashes(server.options.block_tokens) if server.options.prefix_caching else ()
        sequence = Sequence(self, work.prompt_tokens, work.tokens, priority=work.priority, width=work.count,
                            block_hashes=hashes)  # fmt: skip
        sequence.arrived = self.arrived
        answer.sequence = sequence
        self.answer, self.sequence = answer, sequence
        if server.options.request_id_headers:
            self._headers = b"x-request-id: %b\r\n" % identity.encode("latin-1")
        if self.rule is not None and self.rule.kind == "role_done" and not (work.stream and self.rule.after_events):
            self._abandon(answer)
            return
        if work.stream:
            self.writer = WRITERS[work.api](answer)
            self._open_stream()
            if self.ended:
                return
            for event in self.writer.opening():
                self._event(event)
            self.flush()
        if not self.ended:
            server.engine.submit(sequence)

    @staticmethod
    def _mislead(answer: Answer, kind: str) -> None:
        """Has Harmony's special tokens where no client looks for them."""
        if kind == "leak_tool_name" and answer.api != "completions":
            answer.call = (answer.call or "get") + LEAKED
        elif kind in ("leak", "leak_tool_name"):
            answer.leak = True

    def refuse(self, status: int, body: bytes, extra: bytes = b"") -> None:
        """Answers with an error, whole."""
        self._end("error", {"status": status})
        self.connection.answer(self.request, status, body, extra=extra)

    def strike_first(self, rule: Rule) -> bool:
        """A misbehaviour that needs no answer. True where it took the request away."""
        if rule.kind == "silent":
            self._stalled = True
            return True
        if rule.kind == "stale" or (rule.point == "start" and rule.kind in ("reset", "cut", "half_close")):
            self._depart(rule)
            return True
        if rule.kind == "status":
            kind = rule.error_type or {500: "InternalServerError", 503: "Service Unavailable"}.get(rule.status, "Error")
            extra = b"retry-after: %b\r\n" % rule.retry_after.encode() if rule.retry_after else b""
            self.refuse(rule.status, error_body(rule.status, rule.message, kind), extra)
            return True
        return False

    def client_gone(self) -> None:
        """The connection is lost: the engine stops at once."""
        if self._timer is not None:
            self._timer.cancel()
        self._end("aborted")

    # from the engine

    def token(self, sequence: Sequence, now: float) -> None:
        if self._times is not None:
            self._times.append(now)
        writer = self.writer
        if writer is None or self.ended:
            return
        events = writer.token(sequence.generated) if self._interval == 1 else self._group(writer, sequence)
        if self.rule is None:
            self.events += len(events)
            self._pieces.extend([chunk(event) for event in events])
        else:
            for event in events:
                self._event(event)

    def _group(self, writer: Writer, sequence: Sequence) -> list[bytes]:
        """The events of the tokens since the last ones: at the first, at every n-th after an event, and at the end."""
        count = sequence.generated
        if self._told and count - self._told < self._interval and count < sequence.target:
            return []
        first, self._told = self._told + 1, count
        return writer.group(first, count)

    def finished(self, now: float) -> None:
        if self.ended:
            return
        if self.writer is None:
            self._answer_whole(now)
            return
        events = self.writer.closing()
        if self.rule is not None and self.rule.kind == "no_done":
            events = events[:-1]
        for event in events:
            self._event(event)
            if self.ended:
                return
        if not self._stalled:
            self._close_stream(now)

    def _close_stream(self, now: float) -> None:
        if self.rule is None or self.rule.kind != "wrong_length":
            self._pieces.append(_LAST_CHUNK)
        keep_alive = self.request.keep_alive and (self.rule is None or self.rule.kind != "wrong_length")
        self._end("finished", {"finished": now})
        self.flush()
        if self._dribbling:
            self._dribble_ends = True
        else:
            self.connection.done(keep_alive)

    def flush(self) -> None:
        if not self._pieces:
            return
        pieces = b"".join(self._pieces)
        self._pieces.clear()
        if self._times is None or self.rule is not None:
            self._send(pieces)
            return
        told = len(self._times) if self._interval == 1 else self._told
        self._written.extend([time.monotonic()] * (told - len(self._written)))
        self.connection.write_now(pieces)

    # heads and bodies

    def _open_stream(self) -> None:
        rule = self.rule
        head = _STREAM_HEAD + self._headers + (b"" if self.request.keep_alive else b"connection: close\r\n")
        if rule is None:
            self.connection.write(head + _CHUNKED + b"\r\n")
            return
        if rule.kind == "wrong_length":
            head += b"content-length: %d\r\n" % (10 if rule.length == "short" else 100_000_000)
        else:
            head += _CHUNKED
        if rule.kind == "huge_head":
            head += b"x-huge: %b\r\n" % (b"h" * rule.size)
        self._send_head(head + b"\r\n")

    def _send_head(self, head: bytes) -> None:
        """The head, or as much of it as the rule lets out."""
        rule = self.rule
        assert rule is not None
        if rule.kind == "garbage" and rule.point == "head":
            self._send(_GARBAGE)
            self._depart(rule)
        elif rule.kind in ("reset", "cut", "half_close") and rule.point in ("head", "after_head"):
            self._send(head[: len(head) // 2] if rule.point == "head" else head)
            self._depart(rule)
        else:
            self._send(head)

    def _answer_whole(self, now: float) -> None:
        assert self.answer is not None
        rule = self.rule
        if rule is not None and rule.kind in ("stream_error", "harmony"):
            self.refuse(500, error_body(500, rule.message, "InternalServerError"))
            return
        if rule is not None and rule.kind == "abort":
            self.answer.finish_reason = "abort"
        body = BODIES[self.answer.api](self.answer, False)
        if rule is None or rule.kind in ("delay", "no_done", "leak", "leak_tool_name", "abort"):
            self._end("finished", {"finished": now})
            self.connection.answer(self.request, 200, body, extra=self._headers)
        else:
            self._answer_struck(rule, body, now)

    def _answer_struck(self, rule: Rule, body: bytes, now: float) -> None:
        length = len(body)
        if rule.kind == "wrong_length":
            length = len(body) // 2 if rule.length == "short" else len(body) + 1000
        head = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n" % (
            self._headers,
            length,
        )
        if rule.kind == "huge_head":
            head += b"x-huge: %b\r\n" % (b"h" * rule.size)
        if rule.kind == "garbage" and rule.point == "chunk":
            head = head.replace(b"content-length: %d" % length, b"transfer-encoding: chunked")
            body = b"zz not a size\r\n" + body
        self._send_head(head + b"\r\n")
        if self.ended:
            return
        if rule.kind in ("reset", "cut", "half_close", "stall"):
            self._send(body[: len(body) // 2])
            if rule.kind != "stall":
                self._depart(rule)
            else:
                self._stall(rule, body[len(body) // 2 :])
            return
        self._send(body)
        self._end("finished", {"finished": now})
        if rule.kind == "garbage" or rule.kind == "wrong_length":
            self.connection.done(False)
        elif self._dribbling:
            self._dribble_ends = True
        else:
            self.connection.done(self.request.keep_alive)

    def _abandon(self, answer: Answer) -> None:
        """As a draining vLLM answers: a stream without an end, or an empty answer that says abort."""
        assert self.work is not None
        if not self.work.stream:
            body = BODIES[answer.api](answer, True)
            self._end("error")
            self.connection.answer(self.request, 200, body, extra=self._headers)
            return
        writer = WRITERS[answer.api](answer)
        self._open_stream()
        for event in [*writer.opening(), *writer.abandoned()]:
            self._pieces.append(chunk(event))
            self.events += 1
        self._pieces.append(_LAST_CHUNK)
        self.flush()
        self._end("error")
        self.connection.done(self.request.keep_alive)

    # misbehaviours in the middle of a stream

    def _event(self, event: bytes) -> None:
        if self.ended:
            return
        if self._stalled:
            self._held.append(event)
            return
        rule = self.rule
        if rule is not None and self.events >= rule.after_events and self._struck(rule, event):
            return
        self.events += 1
        framed = rule is None or rule.kind != "wrong_length"
        self._pieces.append(chunk(event) if framed else event)

    def _struck(self, rule: Rule, event: bytes) -> bool:
        """What happens instead of this event; False: nothing."""
        half = event[: len(event) // 2]
        if rule.kind == "stall":
            self.flush()
            self._held.append(event)
            self._stall(rule, b"")
        elif rule.kind == "garbage":
            self._pieces.append(b"zz not a size\r\n" + event)
            self.flush()
            self._depart(rule)
        elif rule.kind in ("stream_error", "harmony"):
            self._fail(rule.message)
        elif rule.kind in ("role_done", "abort"):
            self._give_up(rule)
        elif rule.kind in ("reset", "cut", "half_close"):
            if rule.point == "chunk":
                self._pieces.append(chunk(event)[: len(half)])
            elif rule.point == "event":
                self._pieces.append(chunk(half))
            if rule.terminate:
                self._pieces.append(_LAST_CHUNK)
            self.flush()
            self._depart(rule)
        else:
            return False
        return True

    def _give_up(self, rule: Rule) -> None:
        """The end of a stream in its middle, as a vLLM that is stopped ends it."""
        assert self.writer is not None
        says_so = rule.kind == "abort" or isinstance(self.writer, MessageWriter | ResponseWriter)
        events = self.writer.aborted() if says_so else self.writer.abandoned()[-1:]
        self._pieces.extend(chunk(event) for event in events)
        self._pieces.append(_LAST_CHUNK)
        self.flush()
        self._end("error")
        self.connection.done(self.request.keep_alive)

    def _fail(self, message: str) -> None:
        assert self.writer is not None
        events = self.writer.failure(message)
        self._pieces.extend(chunk(event) for event in events)
        if events:
            self._pieces.append(_LAST_CHUNK)
        self.flush()
        self._end("error")
        self.connection.done(bool(events) and self.request.keep_alive)

    def _stall(self, rule: Rule, rest: bytes) -> None:
        """Sends nothing more; after the rule's seconds, if it has any, all is as if nothing had been."""
        self._stalled = True
        assert self.sequence is not None
        self.sequence.held = True
        if rule.seconds:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(rule.seconds, self._resume, rest)

    def _resume(self, rest: bytes) -> None:
        self._stalled = False
        self._timer = None
        self.rule = None
        if self.ended:
            return
        assert self.sequence is not None
        if rest:
            self._send(rest)
            self._end("finished", {"finished": time.monotonic()})
            self.connection.done(self.request.keep_alive)
            return
        self.sequence.held = False
        held, self._held = self._held, []
        for event in held:
            self._event(event)
        self.flush()
        if self.sequence.generated >= self.sequence.target:
            self._close_stream(time.monotonic())
        else:
            self.server.engine.resume()

    def _depart(self, rule: Rule) -> None:
        """Leaves the connection the way the rule says."""
        self._end("error")
        if rule.kind == "reset" or (rule.kind == "stale" and rule.point == "start"):
            self.connection.reset()
        elif rule.kind == "half_close":
            self.connection.half_close()
        elif not self._dribbling:
            self.connection.close()

    # bytes

    def _send(self, data: bytes) -> None:
        if self.rule is None or self.rule.kind != "dribble":
            self.connection.write(data)
        elif self._dribbling is None:
            self._dribbling = bytearray(data)
            self._dribble()
        else:
            self._dribbling += data

    def _dribble(self) -> None:
        rest = self._dribbling
        if rest is None or self.connection.gone:
            return
        assert self.rule is not None
        if rest:
            self.connection.write(bytes(rest[:1]))
            del rest[:1]
        elif self._dribble_ends:
            self._dribbling = None
            self.connection.done(self.request.keep_alive)
            return
        loop, seconds = asyncio.get_running_loop(), self.rule.seconds
        self._timer = loop.call_later(seconds, self._dribble) if seconds else loop.call_soon(self._dribble)

    # the end

    def _end(self, outcome: str, more: dict[str, Any] | None = None) -> None:
        if self.ended:
            return
        self.ended = True
        if self.sequence is not None:
            self.server.engine.abort(self.sequence)
        times = {} if self._times is None else {"token_times": self._times, "written_times": self._written}
        self.server.ended(self, outcome, {**(more or {}), **times})

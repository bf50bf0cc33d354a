"""One proxied request: the single object that owns everything of it, released exactly once.

How it works: a relay is driven by callbacks, never by a task. Its client connection (`protocol.py`) hands it a
whole request; `start` checks key and body, asks admission for a slot, and takes a connection from the pool. The
engine connection then calls `on_engine_*`. Until something was relayed the answer is held back, so that a
failure can still become another try or a proper status; from then on bytes pass as they come, and a failure
becomes the API's own terminal event. Every way out goes through `_release`, which cannot wait.

    receiving -> reserving -> queued -> connecting -> waiting -> relaying -> done
"""

from typing import TYPE_CHECKING, Any, Final

import msgspec

from vitalis_serve.errors import ServeError
from vitalis_serve.gateway import events, guidance, harmony, headers, replies, usage
from vitalis_serve.gateway.admission import NO_ENGINE
from vitalis_serve.gateway.breaker import SICK
from vitalis_serve.gateway.intake import Intake
from vitalis_serve.gateway.killers import digest
from vitalis_serve.gateway.limits import Claim
from vitalis_serve.gateway.metering import Metered
from vitalis_serve.gateway.retries import LOOKS_DEAD, may_retry
from vitalis_serve.gateway.seats import CLASSES

if TYPE_CHECKING:
    from vitalis_serve.gateway.limits import Subject
    from vitalis_serve.gateway.pool import EngineConnection
    from vitalis_serve.gateway.protocol import ClientConnection
    from vitalis_serve.gateway.seats import Seat
    from vitalis_serve.gateway.state import WorkerState

RECEIVING, RESERVING, QUEUED, CONNECTING, WAITING, RELAYING, DONE = range(7)
MAX_HELD_BYTES: Final = 1 << 20  # a plain answer larger than this is relayed while it comes
DOUBT_SECONDS: Final = 2.0  # without a byte from the engine
MAX_PREAMBLE_BYTES: Final = 16 << 20  # Responses repeats the whole request in its first event
_RETRIED_STATUSES: Final = frozenset({500, 502, 503})
# What the engine is told: lower goes first there. vLLM without priority scheduling takes no notice of it.
PRIORITIES: Final = {class_: 10 * rank for rank, class_ in enumerate(CLASSES)}
LEDGER_SECONDS: Final = 5  # until the next attempt, where what is used cannot be recorded
_NO_LEDGER: Final = "What requests use cannot be recorded just now: there is no room on the disk."
_NONE_YET: Final = b"\0"
_EVENT_STREAM: Final = b"text/event-stream; charset=utf-8"


class Relay(Metered):
    __slots__ = (
        "_attempt",
        "_choices",
        "_chunked",
        "_connection",
        "_deadline",
        "_died_at",
        "_fallback",
        "_fallbacks",
        "_harmony_tried",
        "_intake",
        "_leaked",
        "_probe",
        "_rate_lines",
        "_encoded",
        "_excluded",
        "_failure",
        "_fresh",
        "_head",
        "_held",
        "_hide_usage",
        "_idle_since",
        "_incarnation",
        "_reason",
        "_seat",
        "_stale_at",
        "_tail",
        "_unfinished",
        "_usual",
        "client",
        "headers",
        "held_body_bytes",
        "http_1_0",
        "keep_alive",
        "linger",
        "passing",
        "phase",
        "queued_at",
        "refusal",
    )

    def __init__(self, client: "ClientConnection", state: "WorkerState") -> None:
        self.client = client
        self._state = state
        self.phase = RECEIVING
        self.method = b""
        self.path = b""
        self.headers: dict[bytes, bytes] = {}
        self.http_1_0 = False
        self.keep_alive = True
        self.api = None
        self.key = None
        self.route = ""
        self.model = ""
        self.request_id = b""
        self.refusal: ServeError | None = None
        self.body_bytes = 0
        self.held_body_bytes = 0
        self.passing = False  # an event stream is relayed in the framing it comes in: whole chunks may pass untouched
        self.linger = False  # answered before the request was whole: the client gets time to read it
        self.stream = False
        self.status = 0
        self.bytes_out = 0
        self.received_at = 0.0
        self.queued_at = 0.0
        self.queued_seconds = 0.0
        self.first_at = 0.0
        self._encoded = b""
        self._intake: Intake | None = None  # until the first token
        self._demand = None  # type: ignore[assignment]  # made by `start`
        self._fallbacks: tuple[str, ...] = ()  # engines' models not tried yet
        self._fallback = ""  # the one that is asked instead of the route's own
        self._excluded: frozenset[str] = frozenset()  # replicas that failed it
        self._probe = False  # its end is what the replica's circuit breaker waits for
        self._died_at = 0  # the number of the first try that ended as an engine's death looks
        self._known = None  # digest and length of its body, for `killers.py`
        self._marked = False  # it was running when an engine seemed to die
        self._harmony_tried = False
        self._leaked = False
        self._seat: Seat | None = None
        self._reason = ""  # why this replica
        self._replica = ""
        self._incarnation = 0
        self._connection: EngineConnection | None = None
        self._attempt = 0
        self._tries = 0
        self._failure: ServeError | None = None  # how the last try ended
        self._stale_at = 0  # the try that met a stale connection
        self._held = b""
        self._hide_usage = False
        self._head = 0  # bytes of `_held` already judged
        self._tail = b""  # the event still unfinished
        self._last = b""  # the last whole events, for how the stream ended
        self._chunked = False
        self._sent_at = 0.0  # when an engine got it; 0 while none has work of it
        self._answers = 1
        self._choices = False  # an event stream of chat's or completions'
        self._unfinished = 1  # of these choices
        self._usual = _NONE_YET  # how a chunk of them ends that leaves its choice open
        self._events = 0  # of a stream, from the first that bore a token
        self._thought = False  # that one bore reasoning
        self._told = None  # by the engine, perhaps of an answer still under way
        self._told_all = False
        self._entry = b""
        self._limited = False
        self._rate_lines = b""
        self._recorded = None
        self._fresh = True
        self._idle_since = 0.0
        self._deadline = 0.0
        state.counters.open_contexts += 1

    # -- from the client's side

    def start(self, raw: bytes) -> None:
        """The request is whole. `raw`: its body. Everything that can be refused is refused here."""
        state = self._state
        now = self.received_at = state.now()
        self._deadline = now + state.options.total_seconds
        api = self.api
        assert api is not None
        assert self.key is not None
        intake = self._intake = Intake(
            raw,
            api,
            self.key,
            state.keys,
            self.headers,
            harmony_model=state.harmony,
            choices=len(state.fleet.replicas) > 1,
        )
        self.route, self._fallbacks = intake.route, intake.fallbacks
        self.stream, self._hide_usage = intake.body.stream, intake.body.hide_usage
        self._answers, self._unfinished = intake.answers, intake.sequences
        state.retry_budget.came(now)
        self._ask_for(intake.model, now)
        if intake.subjects and not self._reserve(intake.subjects, now):
            self.phase = RESERVING
            return
        self._enter(now)

    def _ask_for(self, model: str, now: float) -> None:
        """The request as an engine's model would get it. Raises ServeError where that very body kills engines."""
        state, intake = self._state, self._intake
        assert intake is not None
        self.model = model
        encoded = self._encoded = intake.encode(model)
        self._known = None
        if state.killers.refused:
            state.killers.check(encoded, now)
        self._demand = intake.demand(
            self,
            model=model,
            body_bytes=len(encoded),
            output_tokens=intake.sequences * state.estimates.expect(self.route, intake.key.tenant, intake.max_tokens),
            deadline=self._deadline,
            excluded=self._excluded,
        )

    def cancel(self, outcome: str = "client_gone", code: str = "") -> None:
        """The client is gone (or must go): the engine connection is closed at once, the slot given back."""
        if self.phase == WAITING and self._state.now() - self._idle_since >= DOUBT_SECONDS:
            self._doubt(outcome)  # a frozen engine outlives the patience of some clients unnoticed
        if self.phase != DONE:
            self._release(outcome, code)

    def cut(self, error: ServeError) -> None:
        """Ends the request from our side, properly: an error answer, or a terminal event once relayed."""
        if self.phase != DONE:
            self._fail(error)

    def pause(self) -> None:
        if self._connection is not None:
            self._connection.transport.pause_reading()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.transport.resume_reading()

    def check(self, now: float) -> None:
        """The sweep's look at the deadlines, all absolute but idleness, which is noticed by `_fresh`."""
        phase = self.phase
        if phase in (RECEIVING, QUEUED, DONE):
            return
        if phase == RESERVING and now - self.received_at >= self._state.options.queue_seconds:
            self._fail(ServeError("queue_timeout", "Nobody said in time whether a limit allows it.", retry_after=1))
        elif now >= self._deadline:
            self._fail(ServeError("total_timeout", "The request took longer than is allowed in all."))
        elif self.client.paused_at:
            self._fresh, self._idle_since = False, now  # nobody listens to the engine: its silence is not its own
        elif phase == WAITING and self.stream and now - self._idle_since >= self._state.options.first_token_seconds:
            self._drop_connection()
            self._try_failed("first_token_timeout", "first_token_timeout", "The engine gave no first token in time.")
        elif phase == RELAYING:
            if self._fresh:
                self._fresh, self._idle_since = False, now
                if self._connection is not None:
                    self._connection.pool.arrivals += 1
            elif now - self._idle_since >= self._state.options.idle_seconds:
                self._count_failure("idle_timeout")
                self._sick(now)
                self._fail(ServeError("idle_timeout", "The engine stopped in the middle of the answer."))

    # -- limits

    def _reserve(self, subjects: "tuple[Subject, ...]", now: float) -> bool:
        """False where others are asked, who will call `on_reserved` or `on_limited`. Raises ServeError at a limit."""
        state, asked, intake = self._state, self._demand, self._intake
        assert intake is not None
        most = expected = 0
        if self.api is not None and self.api.streams:
            expected = asked.prompt_tokens + asked.output_tokens
            longest = intake.max_tokens or state.estimates.longest(self.route, asked.tenant)
            most = asked.prompt_tokens + longest * asked.sequences
        lines = state.limits.ask(self, Claim(subjects, most, expected), now)
        self._limited = True
        if lines is None:
            return False
        self._rate_lines = lines
        return True

    def on_reserved(self, lines: bytes) -> None:
        """By whoever counts for several workers or hosts. lines: of the head, telling how much is left."""
        self._rate_lines = lines
        self._enter_again()

    def on_limited(self, error: ServeError) -> None:
        self._limited = False
        self._fail(error)

    # -- admission

    def _enter(self, now: float) -> None:
        """A slot, a place in the queue, or the same of the next fallback. Raises ServeError where there is none."""
        state = self._state
        while True:
            try:
                granted = state.enter(self._demand, now)
            except ServeError as error:
                if not self._tries:  # after a try the client is told how that failed
                    state.counters.shed[error.code] += 1
                if not self._fall_back(now):
                    raise
            else:
                break
        if granted is None:
            self.phase, self.queued_at = QUEUED, now
        else:
            self.on_slot(*granted)

    def _fall_back(self, now: float) -> bool:
        """Whether another model may answer instead; never after the first byte, and never unsaid."""
        if not self._fallbacks or self._intake is None:
            return False
        model = self._fallback = self._fallbacks[0]
        self._fallbacks = self._fallbacks[1:]
        self._state.counters.fallbacks[self.route, model] += 1
        self._ask_for(model, now)
        return True

    def on_slot(self, seat: "Seat", reason: str) -> None:
        """Admission granted a slot."""
        state, replica = self._state, seat.replica
        name = replica.name
        if state.breakers.calm and self.phase != DONE and not self.queued_at:
            self._sit(seat, reason)
            return
        begun = state.breakers.begins(self, name, replica.incarnation, state.now())
        if self.phase == DONE:  # the client left between the grant and this call: the slot goes on to the next
            if begun.probe:
                state.keep_away(name, state.breakers.ended(self, name, replica.incarnation))
            state.leave(self)
            return
        if self.queued_at:
            self.queued_seconds += state.now() - self.queued_at
            self.queued_at = 0.0
        if not begun.goes:  # the breaker opened between the grant and this call
            state.keep_away(name, True)
            state.leave(self)
            self._enter_again()
            return
        if begun.probe:
            self._probe = True
            state.keep_away(name, begun.keep_away)
        self._sit(seat, reason)

    def _sit(self, seat: "Seat", reason: str) -> None:
        replica = seat.replica
        self._seat, self._reason = seat, reason
        self._replica, self._incarnation = replica.name, replica.incarnation
        if not self._open_entry():
            self._leave()
            self._fail(ServeError("ledger_unavailable", _NO_LEDGER, retry_after=LEDGER_SECONDS))
            return
        self._tries += 1
        self._send()

    def reply(self, document: Any, *, status: int = 200) -> None:
        """A small answer of our own."""
        self.status = status
        self._write_own(replies.json_reply(document, self.request_id, status=status, keep_alive=self.keep_alive))
        self._release("ok", "")

    def _write_own(self, answer: bytes) -> None:
        self._write(answer if self.method != b"HEAD" else answer[: answer.index(b"\r\n\r\n") + 4])

    def on_stranded(self) -> None:
        """The last replica that held the model is gone while this waited in the queue."""
        self._out_of_queue(ServeError("no_ready_engine", NO_ENGINE, retry_after=5))

    def on_queue_timeout(self) -> None:
        self._shed("queue_timeout", "No slot became free in time.")

    def on_refused(self, error: ServeError) -> None:
        """By the worker that owns admission; after a try the client is told how that failed."""
        if not self._tries:
            self._state.counters.shed[error.code] += 1
        self._out_of_queue(self._failure or error)

    def on_shed(self) -> None:
        """Another tenant's request took the place of this one, whose tenant has the most in the queue."""
        if self.phase != DONE:
            self._shed("queue_full", "All slots are taken and the queue is full.")

    def _shed(self, code: str, message: str) -> None:
        self._state.counters.shed[code] += 1
        self._out_of_queue(ServeError(code, message, retry_after=self._state.retry_after(self._demand)))

    def _out_of_queue(self, error: ServeError) -> None:
        """It waited for nothing: another model, or the end."""
        self.phase = WAITING
        now = self._state.now()
        if self.queued_at:
            self.queued_seconds += now - self.queued_at
            self.queued_at = 0.0
        try:
            if self._fall_back(now):
                self._enter(now)
                return
        except ServeError as worse:
            error = worse
        self._fail(error)

    def _enter_again(self) -> None:
        """It was not sent: another replica, or the queue until this one is let in again."""
        try:
            self._enter(self._state.now())
        except ServeError as error:
            self._fail(error)

    def _exclude(self, replica: str) -> None:
        """Not there again, under whatever model's name."""
        self._excluded |= {replica}
        self._demand = msgspec.structs.replace(self._demand, excluded=self._excluded)

    def _send(self) -> None:
        pool = self._state.pool(self._replica)
        if pool is None:
            self._again("gone", "engine_unreachable", "The replica was taken away.")
            return
        self._attempt += 1
        # Where one idle connection was stale the others may be too: the free retry is made on a new one.
        connection = None if self._stale_at else pool.take()
        if connection is not None:
            self._assign(connection)
        else:
            self.phase = CONNECTING
            pool.open_for(self, self._attempt, self._state.now() + self._state.options.connect_seconds)

    def _assign(self, connection: "EngineConnection") -> None:
        api = self.api
        assert api is not None
        self.phase = WAITING
        self._idle_since = self._sent_at = self._state.now()
        self._connection = connection
        encoded = self._encoded
        connection.assign(
            self,
            b"%bcontent-type: application/json\r\nx-request-id: %b\r\nx-vllm-priority: %d\r\n"
            b"%bcontent-length: %d\r\n\r\n%b"
            % (
                api.request_line,
                self.request_id,
                PRIORITIES[self._demand.class_],
                headers.forwarded(self.headers),
                len(encoded),
                encoded,
            ),
        )
        if self.client.paused_at:
            connection.transport.pause_reading()

    # -- from the engine's side

    def on_connected(self, attempt: int, connection: "EngineConnection") -> None:
        if attempt != self._attempt or self.phase != CONNECTING:
            connection.pool.put_back(connection)  # the client left meanwhile; the connection is good
        elif not connection.usable:
            self.on_connect_failed(attempt, "closed at once")  # lost before it had a relay to tell
        else:
            self._assign(connection)

    def on_connect_failed(self, attempt: int, reason: str) -> None:
        if attempt == self._attempt and self.phase == CONNECTING:
            # What looked like a stale connection was the engine's death, with this request on it.
            kind = "reset" if self._stale_at == self._tries else "connect"
            self._try_failed(kind, "engine_unreachable", "The engine could not be reached.")

    def on_engine_data(self, payload: bytes, raw: bytes | None) -> None:
        """Body bytes of one read. `raw`: the read itself where it is whole chunks of whole events."""
        if self.phase == RELAYING:
            self._fresh = True
            if raw is not None and self.passing and not self._tail and not self._is_notable(payload):
                self._events += payload.count(b"\n\n")
                self._pass(raw)
            elif self.stream:
                self._relay_events(payload)
            else:
                self._take_usage(self._tail + payload)
                self._tail = payload[-usage.LONGEST :]
                self._write_body(payload)
            return
        connection = self._connection
        if connection is None:
            return  # dropped while this very read was being handled
        if self.stream and connection.status == 200:
            self._hold_events(payload)
            return
        self._held += payload
        if len(self._held) <= MAX_HELD_BYTES:
            return
        if connection.status != 200:
            self.on_engine_failed("protocol", "The engine's error is too long.")
        else:
            self._relay_head(connection.content_type, connection.content_length)
            held, self._held = self._held, b""
            self._tail = held[-usage.LONGEST :]
            self._write_body(held)

    def on_engine_chunk(self, raw: bytes, start: int) -> None:
        """One whole chunk of whole events, while `passing`; its payload begins at `start`."""
        self._fresh = True
        if self._tail or (
            # one event that ends as those before it that left their choice open
            not raw.endswith(self._usual) or raw.find(b"\n", start) != len(raw) - 4 or raw.rfind(b"|") >= 0
            if self._choices
            else events.notable(raw)
        ):
            self._relay_events(raw[start:-2])
        else:
            self._events += 1  # vLLM sends each event as a chunk; what joins them is learned as tokens per event
            self._pass(raw)

    def _is_notable(self, payload: bytes) -> bool:
        if not self._choices:
            return events.notable(payload)
        return (
            not events.all_go_on(payload, payload.count(b"\n\n"))
            or payload.rfind(usage.USAGE) >= 0
            or payload.rfind(b"|") >= 0
        )

    def _pass(self, raw: bytes) -> None:
        self._last = raw
        self.bytes_out += len(raw)
        self.client.write(raw)

    def on_engine_end(self, payload: bytes, status: int, content_type: bytes) -> None:
        """The engine's answer is whole and its connection back in the pool; so is the slot, however slow the
        client may be."""
        self._connection = None
        if status not in (500, 502):
            self._answered()
        self._leave()
        if self.stream and status == 200:
            self._end_stream(payload)
            return
        if self.phase == RELAYING:
            self._end_large(payload)
            return
        body = self._held + payload if self._held else payload
        if status == 200:
            self._end_plain(body, content_type)
        elif not 400 <= status < 600:
            self._try_failed("protocol", "engine_protocol", f"The engine answered {status}, which is no answer here.")
        elif status not in _RETRIED_STATUSES:
            self._pass_on(status, body, content_type)
        elif kind := harmony.failure(status, body):
            self._harmony_failed(kind)
        elif status == 503:
            self._sent_at = 0.0
            self._try_failed("status_503", "queue_full", "Every engine that holds this model is busy.")
        else:
            self._try_failed(f"status_{status}", "engine_protocol", f"The engine answered {status}: {_sentence(body)}")

    def on_engine_failed(self, kind: str, message: str) -> None:
        """What came is no HTTP; the connection is still open."""
        self._drop_connection()
        self._try_failed(kind, "engine_protocol", message)

    def on_hung(self, replica: str, incarnation: int) -> None:
        """No sign of life came from there for all of `hung_seconds`: who can have an answer elsewhere need not wait
        for it to come back, or for a deadline."""
        waits = self._seat is not None and self.phase in (CONNECTING, WAITING)
        if not waits or (self._replica, self._incarnation) != (replica, incarnation):
            return
        if any(seat.serves(self._demand) for seat in self._state.admission.seats()):
            self._drop_connection()
            self._try_failed("reset", "engine_unreachable", "The engine stopped making progress.")

    def on_engine_lost(self, *, started: bool, reused: bool) -> None:
        """The connection is gone before the answer was whole."""
        self._connection = None
        if self.phase == RELAYING and self._is_whole():
            self._leave()
            self._record("ok", "")
            self._end_framing()
            self._release("ok", "")
            return
        if reused and not started and not self._stale_at and self.phase == WAITING:
            # An idle connection that the engine closed just as it was used: costs nobody anything.
            self._stale_at = self._tries
            self._state.counters.retries["stale_connection"] += 1
            self._send()
            return
        self._try_failed(
            "cut" if started else "reset",
            "engine_unreachable",
            "The connection to the engine was lost before its answer was whole.",
        )

    # -- holding back

    def _hold_events(self, payload: bytes) -> None:
        held = self._held = self._held + payload if self._held else payload
        dialect = self.dialect
        start = self._head
        while (end := held.find(b"\n\n", start)) >= 0:
            verdict = events.judge(held[start:end], dialect)
            if verdict == "token":
                # in all that is held: Responses and Messages name a tool before its first argument
                if dialect != "completions" and harmony.leak(held[:end]) == "tool_name":
                    self._drop_connection()
                    self._harmony_failed("tool_name")
                else:
                    self._events = -held.count(b"\n\n", 0, start)  # what came before is counted with the rest
                    self._thought = usage.thinks(held[start:end], dialect)
                    self._begin_stream()
                return
            if verdict == "error":
                self._in_stream_error(held[start:end])
                return
            if verdict == "end":
                self._drop_connection()
                self._try_failed("aborted", "engine_unreachable", "The engine ended its answer before the first token.")
                return
            start = end + 2
        self._head = start
        if len(held) > MAX_PREAMBLE_BYTES:
            self._drop_connection()
            self._try_failed("protocol", "engine_protocol", "The engine's answer does not begin.")

    def _begin_stream(self) -> None:
        """The first token is here: head and preamble go out with it, and the body is not needed any more."""
        self._relay_head(_EVENT_STREAM, -1)
        self._state.first_token(self, self.first_at)
        held, self._held = self._held, b""
        self._relay_events(held)

    def _in_stream_error(self, event: bytes) -> None:
        """An error inside a 200, before anything was relayed: it gets its own status back."""
        self._drop_connection()
        data = events.data_of(event)
        status = _status_of(data)
        if kind := harmony.failure(200, data):
            self._harmony_failed(kind)
        elif 400 <= status < 500:
            self._pass_on(status, data, b"application/json")
        else:
            self._try_failed("in_stream_error", "engine_protocol", f"The engine failed: {_sentence(data)}")

    # -- relaying

    def _relay_head(self, content_type: bytes, content_length: int) -> None:
        """Writes the head; from here on there is no other status and no other try."""
        now = self.first_at = self._state.now()
        self.phase, self.status = RELAYING, 200
        self._fresh = True
        self._known = (digest(self._encoded), len(self._encoded))
        self._encoded, self._intake = b"", None
        self._state.give_back_body(self)
        self._answered()
        if content_length >= 0:
            framing = b"content-length: %d\r\n" % content_length
        elif self.http_1_0:
            framing = b""
            self.keep_alive = False
        else:
            framing = b"transfer-encoding: chunked\r\n"
            self._chunked = True
        if self.stream:
            framing += b"cache-control: no-cache\r\nx-accel-buffering: no\r\n"
            self.passing = self._chunked
            self._choices = self.dialect in ("chat", "completions")
        self._write(self._head_lines(200, content_type, now) + framing + b"\r\n")

    def _head_lines(self, status: int, content_type: bytes, now: float) -> bytes:
        began = self.received_at
        line = (
            b"%b%bcontent-type: %b\r\nx-request-id: %b\r\nx-vitalis-route: %b\r\n"
            b"server-timing: queue;dur=%.1f, engine;dur=%.1f\r\n"
            % (
                replies.STATUS_LINES[status],
                self._state.date_line,
                content_type or b"application/json",
                self.request_id,
                self.route.encode(),
                self.queued_seconds * 1e3,
                (now - began - self.queued_seconds) * 1e3,
            )
        )
        if self._rate_lines:
            line += self._rate_lines
        if not self.keep_alive:
            line += b"connection: close\r\n"
        if self._fallback:
            line += b"x-vitalis-fallback: %b\r\n" % self._fallback.encode()
        if self.key is not None and "debug" in self.key.scopes:
            line += b"x-vitalis-replica: %b\r\nx-vitalis-reason: %b\r\n" % (
                self._replica.encode(),
                self._reason.encode(),
            )
        return line

    def _relay_events(self, payload: bytes) -> None:
        """Writes the whole events of `payload`, keeps the unfinished one."""
        if self._tail:
            payload = self._tail + payload
        cut = payload.rfind(b"\n\n") + 2
        if cut == 1:
            self._tail = payload
            return
        self._tail = payload[cut:]
        self._write_events(payload[:cut] if cut < len(payload) else payload)

    def _write_events(self, whole: bytes) -> None:
        count = whole.count(b"\n\n")
        self._events += count
        broken_at = -1
        if not self._choices or not events.all_go_on(whole, count):
            broken_at, self._unfinished = events.broken_off(whole, self.dialect, self._unfinished)
        if self._choices and (ending := events.ending(whole)):
            self._usual = ending + b"\r\n"
        if usage.USAGE in whole:
            self._told = usage.of_events(whole, self.dialect, self._told)
            self._told_all = self._told_all or usage.is_final(whole, self.dialect)
            if self._hide_usage and broken_at < 0:
                whole = events.without_usage_event(whole)
                if not whole:
                    return
        if broken_at >= 0:
            whole = whole[:broken_at]
            if self._hide_usage:
                whole = events.without_usage_event(whole)
        error_at = events.find_error(whole, self.dialect)
        if error_at >= 0:
            self._relay_engine_error(whole, error_at)
            return
        leak = harmony.leak(whole) if self.dialect != "completions" else ""
        if leak == "tool_name":
            self._harmony_failed(leak)
            return
        if leak and not self._leaked:
            self._leaked = True
            self._count_failure("harmony_content")
        self._last = whole
        self._record_end()
        self._write_body(whole)
        if broken_at >= 0:
            self._try_failed("aborted", "engine_unreachable", "The engine gave the request up before it was finished.")

    def _record_end(self) -> None:
        """Its client may take what goes out now for the end, whatever comes after."""
        if self._entry and self._is_whole():
            self._record("ok", "")

    def _take_usage(self, body: bytes) -> None:
        """Of a plain answer, or the next part of one."""
        self._told = usage.of_answer(body) or self._told

    def _relay_engine_error(self, whole: bytes, at: int) -> None:
        """The engine's own error event ends the stream; the `[DONE]` that vLLM sends after it would be a lie."""
        end = whole.find(b"\n\n", at + 1)
        if kind := harmony.failure(200, events.data_of(whole[at:end].strip(b"\n"))):
            self._write_body(whole[:at])
            self._harmony_failed(kind)
            return
        self._count_failure("in_stream_error")
        self._mark(self._state.now())
        self._record("engine_error", "engine_protocol")
        self._write_body(whole[: end + 2])
        self._drop_connection()
        self._end_framing()
        self._release("engine_error", "engine_protocol")

    def _write_body(self, payload: bytes) -> None:
        if not payload:
            return
        if self._chunked:
            self._write(b"%x\r\n%b\r\n" % (len(payload), payload))
        else:
            self._write(payload)

    def _write(self, data: bytes) -> None:
        self.bytes_out += len(data)
        self.client.write(data)

    def _end_framing(self) -> None:
        if self._chunked:
            self._write(b"0\r\n\r\n")

    # -- endings

    def _end_stream(self, payload: bytes) -> None:
        """The engine has sent its last byte; whether the stream is whole is another question."""
        if self.phase == WAITING:
            attempt = self._attempt
            self._hold_events(payload)
            if self.phase == WAITING and self._attempt == attempt:
                self._try_failed("no_token", "engine_protocol", "The engine's stream ended before its first token.")
                return
            if self.phase != RELAYING:
                return
        elif payload:
            self._relay_events(payload)
            if self.phase != RELAYING:
                return
        if not self._is_whole():
            self._count_failure("truncated")
            self._fail(ServeError("engine_protocol", "The engine's stream ended before it was whole."))
            return
        self._record("ok", "")
        self._end_framing()
        self._release("ok", "")

    def _is_whole(self) -> bool:
        """Whether a stream has come to its API's own end, whatever becomes of its connection."""
        return self.stream and not self._tail and events.ended(self._last, self.dialect)

    def _end_plain(self, body: bytes, content_type: bytes) -> None:
        if events.given_up(body, self.dialect):
            self._try_failed("aborted", "engine_unreachable", "The engine gave the request up.")
            return
        self._take_usage(body)
        self._told_all = True  # finished, whether or not it is of use to its caller
        dialect = self.dialect
        if body.rfind(b"|") >= 0 and dialect != "completions" and (leak := harmony.leak(body)):
            if leak == "tool_name":
                self._harmony_failed(leak)
                return
            self._count_failure("harmony_content")
        if dialect == "guidance":
            try:
                body = self._guidance(body)
            except ServeError as error:
                self._fail(error)
                return
        self.status = 200
        self._record("ok", "")
        self._answer(200, body, content_type)
        self._release("ok", "")

    def _guidance(self, body: bytes) -> bytes:
        """Raises ServeError where all of the answer went into reasoning."""
        assert self._intake is not None
        assert self._intake.question is not None
        seconds = self._state.now() - self.received_at
        return msgspec.json.encode(guidance.answer(self._intake.question, body, seconds))

    def _end_large(self, payload: bytes) -> None:
        self._take_usage(self._tail + payload)
        self._record("ok", "")
        self._write_body(payload)
        self._end_framing()
        self._release("ok", "")

    def _pass_on(self, status: int, body: bytes, content_type: bytes) -> None:
        """The engine's own refusal, in the dialect of the API."""
        self._sent_at = 0.0  # it did nothing for it
        body = replies.engine_envelope(body, status, self.dialect, self.request_id.decode("latin-1"))
        self.status = status
        self._record("refused", f"engine_{status}")
        self._answer(status, body, content_type)
        self._release("refused", f"engine_{status}")

    def _answer(self, status: int, body: bytes, content_type: bytes) -> None:
        """A whole answer in one write."""
        now = self.first_at = self._state.now()
        self.status = status
        self._write(b"%bcontent-length: %d\r\n\r\n%b" % (self._head_lines(status, content_type, now), len(body), body))

    def _try_failed(self, kind: str, code: str, message: str) -> None:
        """A try ended without an answer; `kind` as `vitalis_upstream_failures_total` names it."""
        state, now = self._state, self._state.now()
        self._count_failure(kind)
        # Harmony's parser fails so on these two, and the replica is well; if it is dead the next try will say so.
        parser = self.stream and state.harmony and (self.dialect, kind) in harmony.UNSAID
        if kind in SICK and not parser:
            self._sick(now)
        if kind in LOOKS_DEAD:
            self._died_at = self._died_at or self._tries
            self._mark(now)
        alone = parser and sum(seat.serves(self._demand) for seat in state.admission.seats()) < 2
        self._again(kind, code, message, elsewhere=not alone)

    def _mark(self, now: float) -> None:
        """It was running when an engine seemed to die."""
        known = self._known or (digest(self._encoded), len(self._encoded))
        self._state.failed(self._replica, self._incarnation, known, now)
        self._known, self._marked = known, True

    def _again(self, kind: str, code: str, message: str, *, elsewhere: bool = True) -> None:
        """Another try where that may be, on another replica unless this one is not to blame; else the end."""
        state, now = self._state, self._state.now()
        error = ServeError(code, message)
        if error.status == 503:
            error.retry_after = state.retry_after(self._demand)
        relayed = self.phase == RELAYING
        if not may_retry(kind, self._tries, self._died_at, relayed, state.retry_budget, now):
            self._fail(error)
            return
        self._leave()
        self._held, self._head = b"", 0
        if elsewhere:
            self._exclude(self._replica)
        self._failure = error
        try:
            self._enter(now)
        except ServeError:
            self._fail(error)
        else:
            state.retry_budget.spend(now)
            state.counters.retries[code] += 1

    def _harmony_failed(self, kind: str) -> None:
        """The model's own doing, not the replica's: once more wherever there is room, then a plain sentence."""
        self._count_failure(f"harmony_{kind}")
        if self.phase == RELAYING or self._harmony_tried:
            self._drop_connection()
            self._fail(ServeError("engine_protocol", harmony.sentence(kind)))
        else:
            self._harmony_tried = True
            self._again("harmony", "engine_protocol", harmony.sentence(kind), elsewhere=False)

    # -- the circuit breaker

    def _answered(self) -> None:
        """The engine answers, whatever it says."""
        state = self._state
        if not state.breakers.calm:
            state.keep_away(self._replica, state.breakers.answered(self, self._replica, self._incarnation))

    def _sick(self, now: float) -> None:
        state = self._state
        verdict = state.breakers.failed(self, self._replica, self._incarnation, now, state.jitter())
        state.keep_away(self._replica, verdict)

    def _fail(self, error: ServeError) -> None:
        outcome = "engine_error" if self._tries and error.status >= 500 else "refused"
        if self.phase != RELAYING:
            self.status = error.status
            self._record(outcome, error.code)
            self._drop_connection()
            error.headers = error.headers or self._rate_lines
            allow = b""
            if error.code == "method_not_allowed":
                allow = b"POST" if self.api is not None else b"GET"
            self._write_own(
                replies.error_reply(error, self.dialect, self.request_id, keep_alive=self.keep_alive, allow=allow)
            )
        else:
            outcome = "cut"
            self._record(outcome, error.code)
            self._drop_connection()
            if self.stream:
                self._write_body(replies.terminal_event(error, self.dialect, self.request_id.decode("latin-1")))
                self._end_framing()
            else:
                self.keep_alive = False  # a plain answer that was cut: only closing in the middle says so
        self._release(outcome, error.code)

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.drop()

    def _leave(self) -> None:
        """Gives the slot back, if there is one to give."""
        seat, self._seat = self._seat, None
        if seat is not None:
            state = self._state
            if self._probe:
                self._probe = False
                state.keep_away(self._replica, state.breakers.ended(self, self._replica, self._incarnation))
            state.leave(self)

    def _count_failure(self, kind: str) -> None:
        self._state.counters.upstream_failures[self._replica, kind] += 1
        if not kind.startswith("harmony"):
            self._doubt(kind)

    def _doubt(self, reason: str) -> None:
        """The supervisor is to find out whether this was the request's own doing or the engine's."""
        self._state.on_suspect(self._replica, self._incarnation, reason)

    def _release(self, outcome: str, code: str) -> None:
        """The one exit. Nothing here can wait, so nothing can interrupt it."""
        assert self.phase != DONE, "a request was released twice"
        if self.phase == QUEUED:
            self._state.admission.withdraw(self)
        self.phase = DONE
        self._attempt += 1  # a connection still being opened is nobody's now
        self._encoded = self._held = b""
        self._intake = None
        self._drop_connection()
        self._leave()
        self._state.give_back_body(self)
        self._account(outcome, code)
        self._demand = None  # type: ignore[assignment]  # it names this: without the cycle both are freed at once
        self._state.counters.open_contexts -= 1
        self.client.on_relay_done(self)


def _status_of(data: bytes) -> int:
    """The HTTP status that vLLM puts into an error event as `code`; 500 where there is none."""
    try:
        code = msgspec.json.decode(data)["error"]["code"]
    except (*events.UNREADABLE, KeyError, TypeError):
        return 500
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _sentence(body: bytes) -> str:
    """The engine's own words, short; nothing of a request is in them but what the engine chose to repeat."""
    try:
        document = msgspec.json.decode(body)
        message = document["error"]["message"] if isinstance(document, dict) else ""
    except (*events.UNREADABLE, KeyError, TypeError):
        message = ""
    return str(message)[:300] or "no reason given"

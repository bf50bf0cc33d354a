"""The part of a relay that knows what it used, and tells everyone who counts: ledger, limits, fair queue, metrics,
estimates and the access log.

Two moments: `_record` is before the last byte goes out, so that no finished request is missing in the ledger whatever
is killed next; `_account` is the release. What finishes teaches the estimates for what does not.
"""

from typing import TYPE_CHECKING

from vitalis_serve.gateway import usage
from vitalis_serve.gateway.access import Record
from vitalis_serve.gateway.seats import Demand, cost
from vitalis_serve.gateway.usage import Usage
from vitalis_serve.spool.record import Closed, Opened

if TYPE_CHECKING:
    from vitalis_serve.gateway.keys import Key
    from vitalis_serve.gateway.paths import Api
    from vitalis_serve.gateway.state import WorkerState


class Metered:
    __slots__ = (
        "_answers", "_demand", "_entry", "_events", "_known", "_last", "_limited", "_marked", "_recorded", "_replica",
        "_sent_at", "_state", "_thought", "_told", "_told_all", "_tries", "api", "body_bytes", "bytes_out", "first_at",
        "key", "method", "model", "path", "queued_seconds", "received_at", "request_id", "route", "status", "stream",
    )  # fmt: skip

    _state: "WorkerState"
    api: "Api | None"
    key: "Key | None"
    route: str
    model: str  # the engine's name of it
    method: bytes
    path: bytes
    request_id: bytes
    status: int
    stream: bool
    body_bytes: int
    bytes_out: int
    received_at: float
    first_at: float
    queued_seconds: float
    _demand: Demand
    _replica: str
    _tries: int
    _known: tuple[bytes, int] | None
    _marked: bool
    _entry: bytes  # its id in the ledger; empty while no engine got it, or where nothing is recorded
    _limited: bool  # its limits have reserved for it
    _recorded: Usage | None
    _sent_at: float  # when an engine got it; 0 while none has work of it
    _answers: int
    _events: int  # of a stream, from the first that bore a token
    _thought: bool
    _last: bytes
    _told: Usage | None
    _told_all: bool

    @property
    def dialect(self) -> str:
        return self.api.dialect if self.api is not None else "plain"

    def _open_entry(self) -> bool:
        """Before the first engine gets it. False where its use could not be recorded, and that is no way to serve."""
        state = self._state
        spool = state.spool
        if spool is None or self._entry:
            return True
        if not spool.room:
            state.counters.uncounted += 1
            return state.options.spool_full == "serve"
        key, api, asked = self.key, self.api, self._demand
        assert key is not None
        assert api is not None
        self._entry = state.next_entry()
        spool.open(
            Opened(
                self._entry,
                state.wall(),
                key.tenant,
                key.id,
                self.route,
                self.model,
                api.name,
                asked.class_,
                self.request_id.decode("latin-1"),
                self.stream,
                asked.prompt_tokens if api.streams else 0,
                asked.output_tokens if api.streams else 0,
            )
        )
        return True

    def _record(self, outcome: str, code: str) -> Usage:
        """What it used, into the ledger and against its limits. The first call decides: by then all is known."""
        if self._recorded is not None:
            return self._recorded
        state, now = self._state, self._state.now()
        used = self._recorded = self._used(outcome, now)
        if self._limited:
            self._limited = False
            if self._tries:
                state.limits.settle(self, used.prompt_tokens + used.completion_tokens, now)
            else:
                state.limits.release(self, now)
        if self._entry:
            key, api, ended = self.key, self.api, state.wall()
            assert key is not None
            assert api is not None
            assert state.spool is not None
            state.spool.close(
                Closed(
                    self._entry,
                    ended - (now - self.received_at),
                    ended,
                    key.tenant,
                    key.id,
                    self.route,
                    self.model,
                    api.name,
                    self._demand.class_,
                    self.request_id.decode("latin-1"),
                    self.stream,
                    outcome,
                    code,
                    self.status,
                    used.prompt_tokens,
                    used.cached_tokens,
                    used.completion_tokens,
                    used.reasoning_tokens,
                    used.prompt_estimated,
                    used.completion_estimated,
                )
            )
        return used

    def _account(self, outcome: str, code: str) -> None:
        state = self._state
        counts = state.counters.routes[self.route]
        counts.ends[outcome, code] += 1
        began, now = self.received_at, state.now()
        used = self._record(outcome, code)
        counts.count(used)
        total = now - began if began else 0.0
        first = self.first_at - began if self.first_at else 0.0
        completion = used.completion_tokens
        if self._tries:  # each was charged as it was granted
            asked = self._demand
            charged = self._tries * cost(asked.prompt_tokens, asked.output_tokens)
            state.admission.settle(
                asked.tenant, asked.class_, cost(used.prompt_tokens, completion) - charged, asked.weight
            )
        if outcome == "ok":
            if self._marked and self._known is not None:
                state.cleared(self._known[0])
            counts.observe(total, first, self.queued_seconds, stream=self.stream)
        if state.access.enabled:
            key = self.key
            state.access.add(
                Record(
                    state.wall(),
                    self.request_id.decode("latin-1"),
                    self.method.decode("latin-1"),
                    self.path.decode("latin-1")[:256],
                    self.status,
                    outcome,
                    code,
                    key.tenant if key is not None else "",
                    key.id if key is not None else "",
                    self.route,
                    self._replica,
                    self.stream,
                    self._tries,
                    int(self.queued_seconds * 1e6) / 1e3,
                    int(first * 1e6) / 1e3,
                    int(total * 1e6) / 1e3,
                    self.body_bytes,
                    self.bytes_out,
                    used.prompt_tokens,
                    completion,
                    used.cached_tokens,
                    used.reasoning_tokens,
                    used.estimated,
                )
            )

    def _used(self, outcome: str, now: float) -> Usage:
        """As the engine counted; where it could not say, as is estimated. What finishes teaches what does not."""
        told, rates = self._told, self._state.rates[self.route]
        if told is not None and (self._told_all or (outcome == "ok" and not self.stream)):
            if outcome == "ok" and self._sent_at and now >= rates.next_at:
                self._teach(rates, told, now)
            return told
        if not self._sent_at or self.api is None or not self.api.streams:
            return Usage()
        return self._estimated(rates, now)

    def _teach(self, rates: usage.Rates, used: Usage, now: float) -> None:
        """What finished says of what is to come. Of a thousand a second it is enough: more would only cost."""
        rates.next_at = now + usage.LEARN_SECONDS
        asked, completion = self._demand, used.completion_tokens
        rates.learn(used, asked.body_bytes, now - self._sent_at)
        if self.stream:
            rates.learn_stream(self.dialect, self._events, completion, self._answers)
        if completion:
            each = asked.sequences
            self._state.estimates.learn(self.route, asked.tenant, asked.output_tokens // each, completion // each)

    def _estimated(self, rates: usage.Rates, now: float) -> Usage:
        told, asked, dialect = self._told, self._demand, self.dialect
        if told is None or dialect == "responses":  # which repeats the request, and whatever looks like usage
            told = Usage(rates.prompt(asked.body_bytes), prompt_estimated=True)
        told.completion_estimated = True
        if not self.stream:
            told.completion_tokens = rates.after(now - self._sent_at, asked.output_tokens)
        elif self._events > 0 and not (told.completion_tokens and self._answers == 1):
            tokens = rates.generated(self._events)
            if self._state.harmony:
                tokens += usage.hidden(self._last, dialect, thought=self._thought, choices=self._answers)
            told.completion_tokens = tokens
        return told

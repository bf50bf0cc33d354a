"""Keeps new requests away from a replica that fails them, before the supervisor has noticed. Pure.

How it works: a replica without trouble is not even listed here, so the way of a request costs two look-ups. SICK
failures in a row open its breaker; an answer of any kind in between, busy ones and refusals too, starts the count
anew. Open, it waits a back-off; then it is half-open: the first request that begins there is the probe, and nobody
else is let in until that has answered (closed), failed (open again, for longer), or gone without either (the place is
free for the next). A new incarnation is another process and starts closed.

Failures in a row, no rate: replicas fail whole (a process that died, hangs, or cannot be reached), and what they then
answer is nothing. A network that loses half of all requests makes five in a row within about 60 of them; one that
loses a twentieth within 3 million, which is what retries are for.

Every call returns what to tell admission of that replica: True to keep requests away, False to let them in, None where
nothing changes.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

# As `vitalis_upstream_failures_total` names them: not reached, lost, or without progress.
SICK: Final = frozenset({"connect", "reset", "cut", "first_token_timeout", "idle_timeout"})


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerOptions:
    """failures: so many in a row open it. The back-off doubles from the first to the longest: no longer than a request
    waits in the queue, so that where there is no other replica somebody is still there to be the probe.
    probe_seconds: a probe of which nothing was told by then is given up; longer than the first token may take.
    """

    failures: int = 5
    first_seconds: float = 2.0
    longest_seconds: float = 30.0
    probe_seconds: float = 150.0


class Begun(NamedTuple):
    """goes: whether the request may be sent. probe: it is the probe, and its end must be told (`ended`)."""

    goes: bool
    probe: bool
    keep_away: bool | None


_GOES: Final = Begun(goes=True, probe=False, keep_away=None)
_ELSEWHERE: Final = Begun(goes=False, probe=False, keep_away=None)
_IS_PROBE: Final = Begun(goes=True, probe=True, keep_away=True)


@dataclass(slots=True)
class _Trouble:
    """failures: in a row, while closed. opened: how often in a row, for the back-off. until: when the back-off is
    over, or the probe is given up."""

    state: State = State.CLOSED
    failures: int = 0
    opened: int = 0
    until: float = 0.0
    probe: Hashable = None


class Breakers:
    """Those of all replicas that one admission sends requests to. A request is anything hashable but None."""

    def __init__(self, options: BreakerOptions | None = None) -> None:
        self._options = options or BreakerOptions()
        self._incarnations: dict[str, int] = {}
        self._troubles: dict[str, _Trouble] = {}
        self.openings: dict[str, int] = {}  # per replica, as long as it is known

    def update(self, incarnations: Mapping[str, int]) -> list[str]:
        """The replicas that there are, and which process of each. Returns those to let requests into again."""
        others = [name for name in self._troubles if incarnations.get(name) != self._incarnations[name]]
        shut = [name for name in others if self._troubles.pop(name).state is not State.CLOSED]
        renewed = [name for name in shut if name in incarnations]
        self._incarnations = dict(incarnations)
        self.openings = {name: self.openings.get(name, 0) for name in incarnations}
        return renewed

    @property
    def calm(self) -> bool:
        """Whether no replica has any trouble, so that there is nothing to ask and to tell here."""
        return not self._troubles

    def troubles(self) -> dict[str, str]:
        """Replicas that failed of late, each with the state of its breaker."""
        return {name: trouble.state.value for name, trouble in self._troubles.items()}

    def state(self, replica: str) -> State:
        trouble = self._troubles.get(replica)
        return State.CLOSED if trouble is None else trouble.state

    def begins(self, request: Any, replica: str, incarnation: int, now: float) -> Begun:
        """Admission gave a request a slot there, and it is about to be sent."""
        trouble = self._troubles.get(replica)
        if trouble is None or trouble.state is State.CLOSED or self._incarnations.get(replica) != incarnation:
            return _GOES
        if trouble.state is State.OPEN or trouble.probe is not None:
            return _ELSEWHERE  # granted before the breaker opened, or together with the probe
        trouble.probe, trouble.until = request, now + self._options.probe_seconds
        return _IS_PROBE

    def answered(self, request: Any, replica: str, incarnation: int) -> bool | None:
        """The engine began to answer: its first token, or a whole answer of whatever status but 5xx other than 503.
        Once per try. While the breaker is not closed only the probe's answer counts."""
        trouble = self._troubles.get(replica)
        if trouble is None or self._incarnations.get(replica) != incarnation:
            return None
        if trouble.state is State.CLOSED:
            del self._troubles[replica]
            return None
        if trouble.probe is None or trouble.probe != request:
            return None
        del self._troubles[replica]
        return False

    def failed(self, request: Any, replica: str, incarnation: int, now: float, jitter: float = 1.0) -> bool | None:
        """A try ended as one of SICK. `jitter`, 0 to 1, spreads the back-off over its upper half."""
        if self._incarnations.get(replica) != incarnation:
            return None
        trouble = self._troubles.get(replica)
        if trouble is None:
            trouble = self._troubles[replica] = _Trouble()
        if trouble.state is State.CLOSED:
            trouble.failures += 1
            if trouble.failures < self._options.failures:
                return None
            self._open(trouble, replica, now, jitter)
            return True
        if trouble.probe is not None and trouble.probe == request:
            self._open(trouble, replica, now, jitter)
        return None

    def ended(self, request: Any, replica: str, incarnation: int) -> bool | None:
        """The probe is over, whatever became of it: after `answered` or `failed` this does nothing, and where its
        client left before either, the next request is the probe."""
        trouble = self._troubles.get(replica)
        if trouble is None or trouble.probe is None or trouble.probe != request:
            return None
        if self._incarnations.get(replica) != incarnation:
            return None
        trouble.probe = None
        return False

    def tick(self, now: float) -> list[str]:
        """Replicas to let one request into: their back-off is over, or their probe is given up."""
        if not self._troubles:
            return []
        due = []
        for name, trouble in self._troubles.items():
            waits = trouble.state is State.OPEN or trouble.probe is not None
            if waits and now >= trouble.until:
                trouble.state, trouble.probe = State.HALF_OPEN, None
                due.append(name)
        return due

    def _open(self, trouble: _Trouble, replica: str, now: float, jitter: float) -> None:
        options = self._options
        seconds = min(options.longest_seconds, options.first_seconds * 2 ** min(trouble.opened, 32))
        trouble.until = now + seconds * (0.5 + jitter / 2)
        trouble.state, trouble.probe = State.OPEN, None
        trouble.opened += 1
        self.openings[replica] += 1

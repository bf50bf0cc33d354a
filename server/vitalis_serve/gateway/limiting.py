"""Who counts requests and tokens against limits: this worker, the one that owns admission, or Redis.

How it works: a relay asks once, before admission. Where this worker counts it has its answer at once; else it waits
for `on_reserved` or `on_limited`. What was reserved is given back by `settle`, or by `release` where no engine ever
got the request; that also takes back a question that was not answered yet.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from vitalis_serve.errors import ServeError
from vitalis_serve.gateway import owner_line as said
from vitalis_serve.gateway.limits import Claim, Limits, Standing
from vitalis_serve.gateway.owner_line import Line, Message

if TYPE_CHECKING:
    from vitalis_serve.gateway.redis_limits import RedisLimits

logger = logging.getLogger(__name__)

MOST_LATE: Final = 10_000  # settlements kept for the next owner; the ledger has all


class Limiting(Protocol):
    """`now` is monotonic seconds."""

    def ask(self, relay: Any, claim: Claim, now: float) -> bytes | None:
        """Header lines that tell how much is left, or None: the relay is told later. Raises ServeError at a limit."""

    def settle(self, relay: Any, tokens: int, now: float) -> None: ...

    def release(self, relay: Any, now: float) -> None: ...

    @property
    def held(self) -> int:
        """Requests of this worker that are counted as running, or asked about."""


class LocalLimiting:
    """By this worker. `wall`: Unix seconds, for the ends of days and months."""

    def __init__(self, limits: Limits, wall: Callable[[], float]) -> None:
        self.limits = limits
        self._wall = wall

    def ask(self, relay: Any, claim: Claim, now: float) -> bytes | None:
        return self.limits.reserve(claim, relay, now, self._wall()).headers

    def settle(self, relay: Any, tokens: int, now: float) -> None:
        self.limits.settle(relay, tokens, now, self._wall())

    def release(self, relay: Any, now: float) -> None:
        self.limits.release(relay, now, self._wall())

    @property
    def held(self) -> int:
        return self.limits.in_flight


class RedisLimiting:
    """By Redis, for all hosts."""

    def __init__(self, limits: "RedisLimits") -> None:
        self.limits = limits

    def ask(self, relay: Any, claim: Claim, now: float) -> bytes | None:
        def told(outcome: Standing | ServeError) -> None:
            if isinstance(outcome, Standing):
                relay.on_reserved(outcome.headers)
            else:
                relay.on_limited(outcome)

        self.limits.reserve(claim, relay, now, told)
        return None

    def settle(self, relay: Any, tokens: int, now: float) -> None:
        self.limits.settle(relay, tokens, now)

    def release(self, relay: Any, now: float) -> None:
        self.limits.release(relay, now)

    @property
    def held(self) -> int:
        return self.limits.in_flight


class GuestLimiting:
    """By the worker that owns admission; a relay is a number there.

    While the owner is away questions wait. The next owner is told of what is reserved, and knows from the ledger what
    was used: what ends in between travels with the time of its end, for it to tell the one from the other.
    """

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._line: Line | None = None
        self._numbers = 0
        self._held: dict[Any, tuple[int, Claim]] = {}
        self._asked: dict[int, Any] = {}  # not answered yet
        self._late: list[said.Late] = []

    def ask(self, relay: Any, claim: Claim, now: float) -> bytes | None:
        self._numbers += 1
        number = self._numbers
        self._held[relay] = number, claim
        self._asked[number] = relay
        self._say(said.Reserve(number, claim))
        return None

    def settle(self, relay: Any, tokens: int, now: float) -> None:
        number, claim = self._held.pop(relay)
        if self._line is not None:
            self._line.say(said.Settled(number, tokens))
        elif len(self._late) < MOST_LATE:
            self._late.append(said.Late(claim, tokens, self._wall()))

    def release(self, relay: Any, now: float) -> None:
        number, _ = self._held.pop(relay)
        self._asked.pop(number, None)
        self._say(said.Released(number))

    @property
    def held(self) -> int:
        return len(self._held)

    def _say(self, message: Message) -> None:
        if self._line is not None:
            self._line.say(message)

    # -- the line

    def introduce(self, line: Line) -> None:
        """A new owner, or the same one again after the line broke: both know nothing of what is held here."""
        self._line = line
        held = [said.Kept(number, claim) for number, claim in self._held.values() if number not in self._asked]
        line.say(said.Limited(held, self._late))
        self._late = []
        for number, relay in self._asked.items():
            line.say(said.Reserve(number, self._held[relay][1]))

    def lost(self) -> None:
        self._line = None

    def hear(self, message: said.Reserved | said.Unreserved) -> None:
        relay = self._asked.pop(message.number, None)
        if relay is None:
            return  # it left meanwhile, and said so
        if isinstance(message, said.Reserved):
            relay.on_reserved(message.lines)
        else:
            del self._held[relay]
            error = ServeError(message.code, message.message, retry_after=message.retry_after or None)
            error.headers = message.lines
            relay.on_limited(error)


class OwnerLimiting:
    """The owner's side for one other worker: its claims beside our own in the same `Limits`."""

    def __init__(self, line: Line, limits: Limits, wall: Callable[[], float], began: float) -> None:
        """`began`: Unix seconds up to which the owner knows from the ledger what was used."""
        self._line = line
        self._limits = limits
        self._wall = wall
        self._began = began
        self._held: dict[int, Claim] = {}

    def hear(self, message: Message, now: float) -> None:
        wall = self._wall()
        match message:
            case said.Reserve():
                self._reserve(message, now, wall)
            case said.Settled():
                if self._held.pop(message.number, None) is not None:
                    self._limits.settle((self, message.number), message.tokens, now, wall)
            case said.Released():
                if self._held.pop(message.number, None) is not None:
                    self._limits.release((self, message.number), now, wall)
            case said.Limited():
                for kept in message.held:
                    self._adopt(kept.number, kept.claim, now, wall)
                for index, late in enumerate(message.late):
                    if late.ended >= self._began:
                        self._adopt(-index - 1, late.claim, now, wall)
                        del self._held[-index - 1]
                        self._limits.settle((self, -index - 1), late.tokens, now, wall)

    def lost(self, now: float) -> None:
        """That worker died, or its line broke and it will say again what it holds. What its requests were expected
        to use stays counted: the ledger has them so."""
        for number, claim in self._held.items():
            self._limits.settle((self, number), claim.expected, now, self._wall())
        self._held.clear()

    def _reserve(self, message: said.Reserve, now: float, wall: float) -> None:
        number = message.number
        try:
            standing = self._limits.reserve(message.claim, (self, number), now, wall)
        except ServeError as error:
            lines, after = error.headers, error.retry_after or 0.0
            self._line.say(said.Unreserved(number, error.code, error.message, after, lines))
        else:
            self._held[number] = message.claim
            self._line.say(said.Reserved(number, standing.headers))

    def _adopt(self, number: int, claim: Claim, now: float, wall: float) -> None:
        self._held[number] = claim
        self._limits.adopt(claim, (self, number), now, wall)

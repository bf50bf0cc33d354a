"""Admission and circuit breakers as all workers but the first have them: by asking the first.

How it works: `enter` always queues, and says so to the owner; its grant comes in one of the next turns of the loop.
While the owner is away (it is replaced within seconds) requests wait here as they would there, within the same
bounds; what was granted before runs on, and the next owner is told of it before it is asked anything.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from vitalis_serve.errors import ServeError
from vitalis_serve.fleet import TAKES_REQUESTS, Fleet
from vitalis_serve.gateway import owner_line as said
from vitalis_serve.gateway.admission import NO_ENGINE, Entered, Grant
from vitalis_serve.gateway.breaker import Begun, State
from vitalis_serve.gateway.limiting import GuestLimiting
from vitalis_serve.gateway.owner_line import Line, Message
from vitalis_serve.gateway.routing import Explanation, Policy, explain
from vitalis_serve.gateway.seats import CLASSES, Demand, Seat

logger = logging.getLogger(__name__)

RECONNECT_SECONDS: Final = 0.1
GRACE_SECONDS: Final = 1.0  # the owner's own clock decides, where there is an owner
_GOES: Final = Begun(goes=True, probe=False, keep_away=None)


@dataclass(slots=True, eq=False)
class _Asked:
    """`demand.waiter` is its number here and there. seat: once granted. first: its first token has come."""

    relay: Any
    demand: Demand
    since: float
    seat: Seat | None = None
    first: bool = False


class GuestAdmission:
    """What `Admission` is to the owner. `others`: messages that are not about admission."""

    def __init__(
        self,
        *,
        worker: str,
        path: str,
        routing: Policy,
        queue_requests: int,
        queue_seconds: float,
        cold: bool,
        others: Callable[[Message], None],
        limiting: GuestLimiting,
    ) -> None:
        self.routing = routing
        self._worker = worker
        self._path = path
        self._queue_requests = queue_requests
        self._queue_seconds = queue_seconds
        self._cold = cold
        self._others = others
        self._limiting = limiting
        self._line: Line | None = None
        self._lost = asyncio.Event()
        self._leaving = False
        self._numbers = 0
        self._waiting: dict[int, _Asked] = {}
        self._asked: dict[Any, _Asked] = {}  # by relay: waiting and granted
        self._early: list[_Asked] = []  # granted on a process that this worker has not heard of yet
        self._seats: dict[str, Seat] = {}
        self._retry_after: dict[str, float] = {}
        self.breakers = GuestBreakers(self)

    async def run(self) -> None:
        """Keeps a connection to the owner, for ever."""
        loop = asyncio.get_running_loop()
        while not self._leaving:
            self._lost.clear()
            try:
                _, line = await loop.create_unix_connection(
                    lambda: Line(loop, self._on_message, self._on_lost), self._path
                )
            except OSError:
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            self._introduce(line)
            await self._lost.wait()
            if not self._leaving:
                logger.warning("the worker that owns admission is gone: requests wait until there is another")
                await asyncio.sleep(RECONNECT_SECONDS)

    def close(self) -> None:
        """Nothing more will be asked."""
        self._leaving = True
        if self._line is not None:
            self._line.close()

    def say(self, message: Message) -> None:
        """Nobody hears it while the owner is away, and the next one has not met what it is about."""
        if self._line is not None:
            self._line.say(message)

    # -- as `Admission`

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        return sum(seat.in_flight for seat in self._seats.values())

    def queued_by_class(self) -> dict[str, int]:
        counts = dict.fromkeys(CLASSES, 0)
        for asked in self._waiting.values():
            counts[asked.demand.class_] += 1
        return counts

    def seats(self) -> Iterator[Seat]:
        """As far as this worker knows: `in_flight` is its own."""
        yield from self._seats.values()

    def explain(self, demand: Demand) -> Explanation:
        return explain(self.routing, demand)

    def update(self, fleet: Fleet, now: float, share: float | None = None) -> list[Grant]:
        seats: dict[str, Seat] = {}
        for replica in fleet.replicas:
            seat = self._seats.get(replica.name)
            if seat is None or seat.replica.incarnation != replica.incarnation:
                seat = Seat(replica)
            seat.replica = replica
            seat.takes = replica.state in TAKES_REQUESTS
            seat.models = frozenset(replica.models)
            seat.slots = seat.ordinary_slots = seat.common_slots = replica.slots
            seats[replica.name] = seat
        self._seats = seats
        self.routing.update(list(seats.values()))
        self._ask_again()
        return []

    def set_breaker(self, replica: str, now: float, *, is_open: bool, trial: bool = False) -> list[Grant]:
        return []

    def enter(self, demand: Demand, now: float, jitter: float = 0.0) -> Entered:
        """ServeError no_ready_engine; queue_full, where the owner is away for too long."""
        assert demand.waiter not in self._asked, "a waiter entered twice"
        if not any(seat.serves(demand) or (self._cold and seat.wakes(demand)) for seat in self._seats.values()):
            raise ServeError("no_ready_engine", NO_ENGINE, retry_after=5)
        if self._line is None and len(self._waiting) >= self._queue_requests:
            raise ServeError("queue_full", "All slots are taken and the queue is full.", retry_after=1 + jitter)
        self._ask(_Asked(demand.waiter, demand, now))
        return Entered(None)

    def first_token(self, waiter: Any, now: float) -> list[Grant]:
        asked = self._asked.get(waiter)
        if asked is not None:  # else it came in the engine's last read, when the slot was given back already
            asked.first = True
            self.say(said.First(asked.demand.waiter))
        return []

    def leave(self, waiter: Any, now: float) -> list[Grant]:
        asked = self._asked.pop(waiter, None)
        assert asked is not None, "a slot was given back twice"
        assert asked.seat is not None, "a slot was given back before it was granted"
        asked.seat.in_flight -= asked.demand.sequences
        self.say(said.Gone(asked.demand.waiter))
        return []

    def withdraw(self, waiter: Any) -> bool:
        asked = self._asked.get(waiter)
        if asked is None or asked.seat is not None:
            return False
        self._take_out(asked)
        self.say(said.Gone(asked.demand.waiter))
        return True

    def settle(self, tenant: str, class_: str, difference: int, weight: float = 1.0) -> None:
        self.say(said.Settle(tenant, class_, difference, weight))

    def tick(self, now: float) -> list[Grant]:
        self._ask_again()
        return []

    def expired(self, now: float) -> list[Any]:
        """Only those of whom the owner should have spoken by now."""
        late = []
        for asked in self._waiting.values():
            if now - asked.since < self._queue_seconds + GRACE_SECONDS:
                break
            late.append(asked)
        for asked in late:
            self._take_out(asked)
            self.say(said.Gone(asked.demand.waiter))
        return [asked.relay for asked in late]

    def stranded(self) -> list[Any]:
        return []  # the owner tells

    def retry_after(self, demand: Demand, now: float, jitter: float = 0.0) -> float:
        """As the owner last said, for a request like it."""
        return self._retry_after.get(demand.class_, 1 + jitter)

    # -- inside

    def _ask(self, asked: _Asked) -> None:
        """Under a new number each time: what is still said of the old one is about nothing."""
        self._numbers += 1
        asked.demand = msgspec.structs.replace(asked.demand, waiter=self._numbers)
        self._asked[asked.relay] = self._waiting[self._numbers] = asked
        self.say(said.Enter(asked.demand))

    def _ask_again(self) -> None:
        early, self._early = self._early, []
        for asked in early:
            if self._waiting.pop(asked.demand.waiter, None) is not None:
                self._ask(asked)

    def _take_out(self, asked: _Asked) -> None:
        del self._waiting[asked.demand.waiter]
        del self._asked[asked.relay]

    # -- the line

    def _introduce(self, line: Line) -> None:
        self._line = line
        self._early.clear()
        held = [
            said.Held(asked.demand, asked.seat.replica.name, asked.seat.replica.incarnation, asked.first)
            for asked in self._asked.values()
            if asked.seat is not None
        ]
        line.say(said.Hello(self._worker, held))
        self._limiting.introduce(line)
        for asked in self._waiting.values():
            line.say(said.Enter(asked.demand))

    def _on_lost(self, line: Line) -> None:
        if self._line is line:
            self._line = None
            self._limiting.lost()
            self.breakers.states = {}
        self._lost.set()

    def _on_message(self, line: Line, message: Message) -> None:
        match message:
            case said.Granted():
                self._granted(message)
            case said.Refused():
                asked = self._waiting.get(message.waiter)
                if asked is not None:
                    self._retry_after[asked.demand.class_] = message.retry_after
                    self._take_out(asked)
                    asked.relay.on_refused(
                        ServeError(message.code, message.message, retry_after=message.retry_after or None)
                    )
            case said.Reserved() | said.Unreserved():
                self._limiting.hear(message)
            case said.Troubles():
                self.breakers.states = {name: State(state) for name, state in message.states.items()}
            case _:
                self._others(message)

    def _granted(self, granted: said.Granted) -> None:
        asked = self._waiting.get(granted.waiter)
        if asked is None:
            return  # it left; the owner hears of that after having granted
        seat = self._seats.get(granted.replica)
        if seat is None or seat.replica.incarnation != granted.incarnation:
            self.say(said.Gone(granted.waiter))
            self._early.append(asked)
            return
        del self._waiting[granted.waiter]
        asked.seat = seat
        seat.in_flight += asked.demand.sequences
        asked.relay.on_slot(seat, granted.reason)

    def number(self, relay: Any) -> int | None:
        asked = self._asked.get(relay)
        return None if asked is None else asked.demand.waiter


class GuestBreakers:
    """What `Breakers` is to the owner: it decides there, at the grant, and is told here how tries end."""

    openings: Final[Mapping[str, int]] = {}  # the owner's to report

    def __init__(self, admission: GuestAdmission) -> None:
        self._admission = admission
        self.states: dict[str, State] = {}

    @property
    def calm(self) -> bool:
        return not self.states

    def state(self, replica: str) -> State:
        return self.states.get(replica, State.CLOSED)

    def troubles(self) -> dict[str, str]:
        return dict(self.states)

    def update(self, incarnations: Mapping[str, int]) -> list[str]:
        return []

    def tick(self, now: float) -> list[str]:
        return []

    def begins(self, request: Any, replica: str, incarnation: int, now: float) -> Begun:
        return _GOES

    def answered(self, request: Any, replica: str, incarnation: int) -> None:
        if (number := self._admission.number(request)) is not None:
            self._admission.say(said.Answered(number))

    def failed(self, request: Any, replica: str, incarnation: int, now: float, jitter: float = 1.0) -> None:
        if (number := self._admission.number(request)) is not None:
            self._admission.say(said.Failed(number))

    def ended(self, request: Any, replica: str, incarnation: int) -> None:
        """The owner hears that it left, and knows whether it was the probe."""

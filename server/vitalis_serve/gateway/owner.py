"""The first worker's side of a gateway of several: the others' requests enter its admission beside its own.

How it works: a request of another worker is a `Distant` here, with the callbacks of a relay, so that admission,
dispatch and circuit breakers do not know the difference. Whatever a worker holds ends with its connection. An owner
that is replaced starts from nothing: it grants nothing before the others have told it what they hold.
"""

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from vitalis_serve.errors import ServeError
from vitalis_serve.gateway import owner_line as said
from vitalis_serve.gateway.admission import NO_ENGINE, Admission
from vitalis_serve.gateway.limiting import OwnerLimiting
from vitalis_serve.gateway.owner_line import Line, Message
from vitalis_serve.gateway.seats import Demand, Seat

if TYPE_CHECKING:
    from vitalis_serve.gateway.state import WorkerState

logger = logging.getLogger(__name__)

GATHERING_SECONDS: Final = 1.0  # the others try ten times a second; one that cannot come does not stop the rest


class Distant:
    """A request that another worker's client sent."""

    __slots__ = ("_guest", "_owner", "demand", "gone", "probe", "seat")

    def __init__(self, guest: "_Guest", owner: "Owner", demand: Demand) -> None:
        self._guest = guest
        self._owner = owner
        self.demand = demand
        self.seat: Seat | None = None
        self.probe = False
        self.gone = False

    def enter(self, now: float) -> None:
        try:
            granted = self._owner.state.enter(msgspec.structs.replace(self.demand, waiter=self), now)
        except ServeError as error:
            self._refuse(error.code, error.message, error.retry_after or 0.0)
        else:
            if granted is not None:
                self.on_slot(*granted)

    def on_slot(self, seat: Seat, reason: str) -> None:
        state, replica = self._owner.state, seat.replica
        if self.gone:  # it left between the grant and this call
            state.leave(self)
            return
        begun = state.breakers.begins(self, replica.name, replica.incarnation, state.now())
        if not begun.goes:  # the breaker opened between the grant and this call
            state.keep_away(replica.name, True)
            state.leave(self)
            self.enter(state.now())
            return
        self.seat = seat
        if begun.probe:
            self.probe = True
            state.keep_away(replica.name, begun.keep_away)
        self._guest.line.say(said.Granted(self.demand.waiter, replica.name, replica.incarnation, reason))

    def on_shed(self) -> None:
        self._out("queue_full", "All slots are taken and the queue is full.")

    def on_queue_timeout(self) -> None:
        self._out("queue_timeout", "No slot became free in time.")

    def on_stranded(self) -> None:
        self._refuse("no_ready_engine", NO_ENGINE, 5)

    def _out(self, code: str, message: str) -> None:
        self._refuse(code, message, self._owner.state.retry_after(self.demand))

    def _refuse(self, code: str, message: str, retry_after: float) -> None:
        if self._guest.requests.pop(self.demand.waiter, None) is not None:
            self._guest.line.say(said.Refused(self.demand.waiter, code, message, retry_after))


class _Guest:
    """Another worker: its connection, and what it has here."""

    def __init__(self, line: Line, limiting: OwnerLimiting) -> None:
        self.line = line
        self.limiting = limiting
        self.name = ""
        self.requests: dict[int, Distant] = {}


class Owner:
    """`path` of a Unix socket in a folder that nobody else may enter."""

    def __init__(self, state: "WorkerState", path: str) -> None:
        assert isinstance(state.admission, Admission), "only one worker owns admission"
        self.state = state
        self.admission = state.admission
        self._path = path
        self._server: asyncio.Server | None = None
        self._guests: dict[Line, _Guest] = {}
        self._troubles: dict[str, str] = {}
        self._alone = asyncio.Event()
        self._alone.set()
        self._gathered = asyncio.Event()

    async def run(self) -> None:
        """Once the fleet is known: what the others hold is on its replicas."""
        await self._listen()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GATHERING_SECONDS):
                await self._gathered.wait()
        self.state.dispatch(self.admission.open(self.state.now()))

    async def _listen(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            Path(self._path).unlink()  # a worker's that was killed
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: Line(loop, self._on_message, self._on_lost, self._on_made), self._path
        )
        os.chmod(self._path, 0o600)

    async def alone(self, seconds: float) -> None:
        """Until the other workers have left, who are still served, or for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._alone.wait()

    def granted(self, replica: str) -> int:
        """How many slots of a replica the other workers have."""
        return sum(
            request.demand.sequences
            for guest in self._guests.values()
            for request in guest.requests.values()
            if request.seat is not None and request.seat.replica.name == replica
        )

    def tell(self, message: Message, but: Line | None = None) -> None:
        """All other workers."""
        for line in self._guests:
            if line is not but:
                line.say(message)

    def tell_troubles(self) -> None:
        """After anything that may have changed a breaker."""
        states = self.state.breakers.troubles()
        if states != self._troubles:
            self._troubles = states
            self.tell(said.Troubles(states))

    # -- the lines

    def _on_made(self, line: Line) -> None:
        state = self.state
        self._guests[line] = _Guest(line, OwnerLimiting(line, state.counted, state.wall, state.counted_from))
        self._alone.clear()
        line.say(said.Troubles(self._troubles))

    def _on_lost(self, line: Line) -> None:
        guest = self._guests.pop(line)
        logger.info("%s left", guest.name or "a worker")
        # First who waits: what the others give back is for somebody who is still here.
        for request in sorted(guest.requests.values(), key=lambda request: request.seat is not None):
            self._gone(request)
        guest.limiting.lost(self.state.now())
        if not self._guests:
            self._alone.set()

    def _on_message(self, line: Line, message: Message) -> None:
        guest, state, now = self._guests[line], self.state, self.state.now()
        match message:
            case said.Enter():
                request = Distant(guest, self, message.demand)
                guest.requests[message.demand.waiter] = request
                request.enter(now)
            case said.First():
                if (known := guest.requests.get(message.waiter)) is not None:
                    state.dispatch(self.admission.first_token(known, now))
            case said.Gone():
                if (known := guest.requests.pop(message.waiter, None)) is not None:
                    self._gone(known)
            case said.Settle():
                self.admission.settle(message.tenant, message.class_, message.difference, message.weight)
            case said.Reserve() | said.Settled() | said.Released() | said.Limited():
                guest.limiting.hear(message, now)
            case said.Answered() | said.Failed():
                known = guest.requests.get(message.waiter)
                if known is not None and known.seat is not None:
                    self._tell_breaker(known, known.seat, now, answered=isinstance(message, said.Answered))
            case _:
                self._on_news(guest, message, now)

    def _on_news(self, guest: _Guest, message: Message, now: float) -> None:
        """What is not about a request under way."""
        killers = self.state.killers
        match message:
            case said.Noted():
                killers.failed(message.replica, message.incarnation, message.digest, message.length, now)
                self.tell(message, but=guest.line)
            case said.Cleared():
                killers.cleared(message.digest)
                self.tell(message, but=guest.line)
            case said.Hello():
                guest.name = message.worker
                logger.info("%s is here", guest.name)
                for held in message.held:
                    self._hold(guest, held, now)
                if sum(bool(one.name) for one in self._guests.values()) >= self.state.options.workers - 1:
                    self._gathered.set()
            case _:
                raise AssertionError(f"an owner is not told {message}")

    def _hold(self, guest: _Guest, held: said.Held, now: float) -> None:
        request = Distant(guest, self, held.demand)
        demand = msgspec.structs.replace(held.demand, waiter=request)
        request.seat = self.admission.adopt(demand, held.replica, held.incarnation, now)
        if request.seat is not None:  # else that process is gone, and its slots with it
            guest.requests[held.demand.waiter] = request
            if held.first:
                self.admission.first_token(request, now)

    def _gone(self, request: Distant) -> None:
        state, seat = self.state, request.seat
        if seat is not None:
            if request.probe:
                replica = seat.replica
                state.keep_away(replica.name, state.breakers.ended(request, replica.name, replica.incarnation))
            state.leave(request)
        elif not self.admission.withdraw(request):
            request.gone = True

    def _tell_breaker(self, request: Distant, seat: Seat, now: float, *, answered: bool) -> None:
        state, replica = self.state, seat.replica
        if answered:
            verdict = state.breakers.answered(request, replica.name, replica.incarnation)
        else:
            verdict = state.breakers.failed(request, replica.name, replica.incarnation, now, state.jitter())
        state.keep_away(replica.name, verdict)

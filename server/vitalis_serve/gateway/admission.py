"""Permission to run: slots per replica, and a bounded first-come queue before them. Pure.

How it works: `enter` grants a slot on the replica with the least outstanding requests, or queues the waiter, or
refuses. `leave` gives a slot back and hands it to the first waiter that can use it. Every change returns the
grants that follow from it; the caller acts on them. A waiter is any object; it is in exactly one place: granted
(the caller's), queued (here), or gone.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vitalis_serve.errors import ServeError
from vitalis_serve.fleet import TAKES_REQUESTS, Fleet, Replica


@dataclass(slots=True)
class Seat:
    """One replica as this worker uses it. `slots` is this worker's share."""

    replica: Replica
    slots: int
    in_flight: int = 0
    takes: bool = False
    models: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Grant:
    waiter: Any
    seat: Seat


@dataclass(slots=True)
class _Waiting:
    model: str
    deadline: float
    excluded: frozenset[str] = field(default_factory=frozenset)


class Admission:
    def __init__(self, *, queue_requests: int, queue_seconds: float, workers: int = 1) -> None:
        self._limit = queue_requests
        self._patience = queue_seconds
        self._workers = workers
        self._seats: dict[str, Seat] = {}
        self._queue: OrderedDict[Any, _Waiting] = OrderedDict()
        self._queued_models: Counter[str] = Counter()  # how many wait for each; never 0
        self._left = 0  # slots given back since `_rate_since`
        self._rate_since = 0.0
        self._rate = 0.0  # slots given back per second, smoothed

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        return sum(seat.in_flight for seat in self._seats.values())

    def seats(self) -> Iterator[Seat]:
        yield from self._seats.values()

    def update(self, fleet: Fleet) -> list[Grant]:
        """Takes over a new fleet. A restarted replica starts from an empty seat: its old requests are lost with
        the old process, and each still gives back the seat object that it was granted."""
        seats: dict[str, Seat] = {}
        for replica in fleet.replicas:
            seat = self._seats.get(replica.name)
            if seat is None or seat.replica.incarnation != replica.incarnation:
                seat = Seat(replica, 0)
            seat.replica = replica
            seat.slots = max(1, replica.slots // self._workers)
            seat.takes = replica.state in TAKES_REQUESTS
            seat.models = frozenset(replica.models)
            seats[replica.name] = seat
        self._seats = seats
        return self._serve_queue()

    def enter(self, waiter: Any, model: str, now: float, excluded: frozenset[str] = frozenset()) -> Seat | None:
        """A seat (its slot taken), or None: queued until `now + queue_seconds`.

        ServeError no_ready_engine where no replica that takes requests holds the model, queue_full."""
        if not self._queue and (seat := self._choose(model, excluded)) is not None:
            seat.in_flight += 1
            return seat
        if not self._takes(model, excluded):
            raise ServeError("no_ready_engine", "No engine is ready for this model just now.", retry_after=5)
        if self._queue and (seat := self._choose(model, excluded)) is not None and not self._wanted(seat):
            seat.in_flight += 1
            return seat
        if len(self._queue) >= self._limit:
            raise ServeError(
                "queue_full", "All slots are taken and the queue is full.", retry_after=self.retry_after(now)
            )
        self._queue[waiter] = _Waiting(model, now + self._patience, excluded)
        self._queued_models[model] += 1
        return None

    def leave(self, seat: Seat, now: float) -> list[Grant]:
        """Gives one slot back, exactly once per grant."""
        seat.in_flight -= 1
        assert seat.in_flight >= 0, "a slot was given back twice"
        self._left += 1
        if now - self._rate_since >= 1.0:
            rate = self._left / (now - self._rate_since)
            self._rate = rate if self._rate == 0.0 else 0.7 * self._rate + 0.3 * rate
            self._left, self._rate_since = 0, now
        return self._serve_queue() if self._queue else _NONE

    def withdraw(self, waiter: Any) -> bool:
        """Takes a waiter out of the queue; False where it was not in it."""
        return self._remove(waiter)

    def expired(self, now: float) -> list[Any]:
        """Takes out and returns the waiters whose patience has run out."""
        late = []
        for waiter, waiting in self._queue.items():  # first come, first to expire
            if waiting.deadline > now:
                break
            late.append(waiter)
        for waiter in late:
            self._remove(waiter)
        return late

    def stranded(self) -> list[Any]:
        """Takes out and returns the waiters for whom nothing takes requests any more: no replica holds their
        model, or only such as they have tried already."""
        gone = [w for w, waiting in self._queue.items() if not self._takes(waiting.model, waiting.excluded)]
        for waiter in gone:
            self._remove(waiter)
        return gone

    def retry_after(self, now: float) -> float:
        """Seconds until the queue as it stands will have drained at the rate of the last seconds; 1 to 60."""
        elapsed = max(now - self._rate_since, 1.0)
        rate = max(self._rate, self._left / elapsed, 0.02)
        return max(1.0, min(60.0, (len(self._queue) + 1) / rate))

    def _choose(self, model: str, excluded: frozenset[str]) -> Seat | None:
        """The seat with the least outstanding requests that has a slot free."""
        best: Seat | None = None
        for seat in self._seats.values():
            if (
                seat.takes
                and seat.in_flight < seat.slots
                and model in seat.models
                and (best is None or seat.in_flight < best.in_flight)
                and seat.replica.name not in excluded
            ):
                best = seat
        return best

    def _wanted(self, seat: Seat) -> bool:
        """Whether somebody in the queue could use this seat (and so comes first)."""
        return any(w.model in seat.models and seat.replica.name not in w.excluded for w in self._queue.values())

    def _serve_queue(self) -> list[Grant]:
        grants: list[Grant] = []
        blocked: set[str] = set()
        for waiter, waiting in self._queue.items():
            if waiting.model in blocked:
                continue
            seat = self._choose(waiting.model, waiting.excluded)
            if seat is not None:
                seat.in_flight += 1
                grants.append(Grant(waiter, seat))
            elif not waiting.excluded:
                blocked.add(waiting.model)
                if len(blocked) == len(self._queued_models):
                    break
        for grant in grants:
            self._remove(grant.waiter)
        return grants

    def _takes(self, model: str, excluded: frozenset[str]) -> bool:
        """Whether there is a replica for this, with or without a free slot."""
        return any(s.takes and model in s.models and s.replica.name not in excluded for s in self._seats.values())

    def _remove(self, waiter: Any) -> bool:
        waiting = self._queue.pop(waiter, None)
        if waiting is None:
            return False
        self._queued_models[waiting.model] -= 1
        if not self._queued_models[waiting.model]:
            del self._queued_models[waiting.model]
        return True


_NONE: list[Grant] = []

"""Permission to run: three caps per replica, and before them a bounded queue that is fair to tenants. Pure.

How it works: `enter` grants a seat that the routing policy chose, or queues the waiter, or refuses. Whatever gives
room back (`leave`, `first_token`, `forget`, `update`, `tick`) returns the grants that follow from it; the caller
acts on them. A waiter is anything hashable (an object in one process, an id across a socket) and is in exactly one
place: granted, queued, or gone.

    caps      per replica: requests (slots), KV tokens, and prompt tokens without a first token yet.
    classes   emergency first, with a share of every cap for itself; the others in strict order. One grant in
              AGED_EVERY goes to whoever has waited longest, if that is too long, whatever its class and tenant.
    tenants   inside a class (`fairness.py`) the tenant with the least weighted tokens comes first.
    room      given back on one replica is offered for that replica only: nobody else could use what did not
              change. Heads of the queue that do not fit are passed over by those behind them; after `bypasses`
              times or `bypass_seconds` the replica is held for them until they fit.
    bounds    per class by count, bytes and patience. A full queue sheds the newest waiter of the tenant that has
              most there, if that is another than the one who comes.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from vitalis_serve.errors import ServeError
from vitalis_serve.fleet import TAKES_REQUESTS, Fleet
from vitalis_serve.gateway.fairness import Account, ClassQueue, Waiting
from vitalis_serve.gateway.pace import SHARE_BESIDE_OTHERS, SHARE_FOR_THE_RETURNING, DrainRate, PrefillRate
from vitalis_serve.gateway.routing import Explanation, Policy, explain, policy
from vitalis_serve.gateway.seats import CLASSES, EMERGENCY, Demand, Seat, cost

NO_ENGINE: Final = "No engine is ready for this model just now."
AGED_EVERY: Final = 8
LOOK_AHEAD: Final = 16  # waiters looked at before giving up on a replica's room
LOOK_DEEPER: Final = 4  # waiters of one tenant looked at: its own small ones pass its large one


@dataclass(frozen=True, slots=True)
class ClassLimits:
    """A class's queue: at most so many, so many bytes, nobody longer than `queue_seconds`.

    `overload_seconds`: once the queue has not been empty for `standing_seconds`, nobody waits longer than this. A
    burst is waited out, a lasting overload is refused early enough for the rest to be answered in time. 0: off.
    """

    queue_requests: int = 1024
    queue_bytes: int = 64 << 20
    queue_seconds: float = 30.0
    overload_seconds: float = 0.0
    standing_seconds: float = 5.0


def default_classes() -> dict[str, ClassLimits]:
    """Who talks to a person is answered in time or told when to come back; batch would rather wait."""
    in_time = ClassLimits(overload_seconds=1.0)
    return {
        "emergency": ClassLimits(),
        "interactive": in_time,
        "standard": in_time,
        "batch": ClassLimits(queue_seconds=55.0),
    }


@dataclass(frozen=True, slots=True)
class AdmissionOptions:
    """prefill_seconds: the time to first token that prefill in the engine may cost; with the measured rate it
    makes the prefill cap where the fleet does not say one."""

    classes: Mapping[str, ClassLimits] = field(default_factory=default_classes)
    reserved: float = 0.1
    burst_tokens: float = 30_000
    headroom: float = 0.2
    active_seconds: float = 10.0
    ageing_seconds: float = 10.0
    bypasses: int = 16
    bypass_seconds: float = 1.0
    locality_passes: int = 8
    prefill_seconds: float = 0.5
    prefill_tokens_per_second: float = 10_000  # until it is measured
    cold_start_seconds: float = 0.0  # 0: nobody waits for an engine's start


class Grant(msgspec.Struct, frozen=True):
    waiter: Any
    seat: Seat
    reason: str = ""


class Entered(msgspec.Struct, frozen=True):
    """What became of a waiter that entered: a seat and why that one, or (None) queued. `grants` and `shed` are other
    waiters'."""

    seat: Seat | None
    reason: str = ""
    grants: tuple[Grant, ...] = ()
    shed: tuple[Any, ...] = ()


class _Holding(msgspec.Struct):
    """prefill: prompt tokens that still count as being read; until `over` at the latest, where no first token is
    reported (0: it is). since: when it was granted."""

    demand: Demand
    seat: Seat
    account: Account
    prefill: int
    over: float
    since: float


def _same(demand: Demand) -> tuple[str, int, int]:
    """What a request has in common with itself when it comes again, and hardly with another."""
    return demand.tenant, demand.affinity, demand.body_bytes


class Admission:
    """`share`: this gateway's part of every cap, where several gateways serve one fleet. Not `is_open`: everyone
    waits until it is, for it is not known yet what is running."""

    def __init__(
        self,
        options: AdmissionOptions | None = None,
        *,
        routing: Policy | None = None,
        share: float = 1.0,
        is_open: bool = True,
    ) -> None:
        self._options = options or AdmissionOptions()
        self.routing = routing or policy("affinity")
        self._share = share
        self._is_open = is_open
        self._fleet = Fleet()
        self._seats: dict[str, Seat] = {}
        self._holdings: dict[Any, _Holding] = {}
        limits = self._options.classes
        self._classes = {
            name: ClassQueue(rank, limits.get(name, ClassLimits()), self._options.burst_tokens)
            for rank, name in enumerate(CLASSES)
        }
        self._emergency = self._classes[EMERGENCY]
        self._ordinary = [self._classes[name] for name in CLASSES[1:]]
        self._waiting: dict[Any, Waiting] = {}
        self._deadlines: list[tuple[float, int, Any]] = []
        self._arrivals = 0
        self._since_aged = 0
        self._counted: dict[Account, ClassQueue] = {}  # tenants that asked of late
        self._weights = dict.fromkeys(CLASSES, 0.0)  # theirs
        self._all_weights = 0.0
        self._ordinary_slots = 0
        self._drain = DrainRate(SHARE_FOR_THE_RETURNING if share == 1 else SHARE_BESIDE_OTHERS)

    # -- what there is

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        return sum(seat.in_flight for seat in self._seats.values())

    def queued_by_class(self) -> dict[str, int]:
        return {name: queue.count for name, queue in self._classes.items()}

    def seats(self) -> Iterator[Seat]:
        yield from self._seats.values()

    def explain(self, demand: Demand) -> Explanation:
        return explain(self.routing, demand)

    # -- the fleet

    def update(self, fleet: Fleet, now: float, share: float | None = None) -> list[Grant]:
        """Takes over a new fleet, a new share, or both. A restarted replica starts from an empty seat: its old
        requests are lost with the old process, and each still gives back the seat that it was granted."""
        if share is not None:
            self._share = share
        self._fleet = fleet
        self._let_go()
        seats: dict[str, Seat] = {}
        for replica in fleet.replicas:
            seat = self._seats.get(replica.name)
            if seat is None or seat.replica.incarnation != replica.incarnation:
                seat = Seat(replica, PrefillRate(self._options.prefill_tokens_per_second))
            seat.replica = replica
            seat.takes = replica.state in TAKES_REQUESTS
            seat.models = frozenset(replica.models)
            seats[replica.name] = seat
            self._limit(seat)
        self._seats = seats
        before, self._ordinary_slots = (
            self._ordinary_slots,
            sum(seat.ordinary_slots for seat in seats.values() if seat.takes),
        )
        if before:
            self._drain.scale(self._ordinary_slots / before)
        self.routing.update(list(seats.values()))
        return self._serve_all(now)

    def open(self, now: float) -> list[Grant]:
        """What runs is known; from now on slots are granted."""
        self._is_open = True
        return self.update(self._fleet, now)

    def set_breaker(self, replica: str, now: float, *, is_open: bool, trial: bool = False) -> list[Grant]:
        """An open breaker keeps new requests away; the home of their keys does not move. `trial`: one is let in, and
        then it is open again."""
        seat = self._seats.get(replica)
        if seat is None:
            return []
        seat.open, seat.trial = not is_open, trial and not is_open
        return [] if is_open else self._serve(seat, now)

    # -- coming

    def enter(self, demand: Demand, now: float, jitter: float = 0.0) -> Entered:
        """Grants, queues (`Entered.seat` is None), or refuses. `jitter`: 0 to 1, drawn anew for each call.

        ServeError no_ready_engine where no replica that takes requests holds the model, queue_full."""
        queue = self._classes[demand.class_]
        account = queue.accounts.get(demand.tenant)
        if account is None or not account.counted:
            account = self._count_in(queue, demand)
        account.seen = now
        if not (self._waiting and self._someone_first(queue, demand)):
            # Among all classes' tenants its share is smallest: below that it is below any share.
            heavy = account.running * self._all_weights >= self._ordinary_slots * account.counted
            if heavy:
                heavy = self._heavy(queue, account)
            decision = self.routing.choose(demand, heavy)
            if decision is not None:
                seat = decision.seat
                self._take(demand, seat, account, now)
                queue.grant_at_once(account, demand)
                return Entered(seat, decision.reason)
        assert demand.waiter not in self._waiting, "a waiter entered twice"
        seats = self._seats.values()
        cold = not any(seat.serves(demand) for seat in seats)
        if cold and not (self._options.cold_start_seconds and any(seat.wakes(demand) for seat in seats)):
            raise ServeError("no_ready_engine", NO_ENGINE, retry_after=5)
        shed = self._make_way(queue, demand, now, jitter)
        self._enqueue(queue, demand, now, cold=cold)
        grants = self._serve_all(now) if self._may_fit(demand) else []
        own = next((grant for grant in grants if grant.waiter == demand.waiter), None)
        if own is None:
            return Entered(None, "", tuple(grants), shed)
        others = tuple(grant for grant in grants if grant is not own)
        return Entered(own.seat, own.reason, others, shed)

    def adopt(self, demand: Demand, replica: str, incarnation: int, now: float) -> Seat | None:
        """Takes over what an admission before this one granted, room or not; None where that process is not here."""
        seat = self._seats.get(replica)
        if seat is None or seat.replica.incarnation != incarnation:
            return None
        queue = self._classes[demand.class_]
        account = queue.accounts.get(demand.tenant)
        if account is None or not account.counted:
            account = self._count_in(queue, demand)
        account.seen = now
        self._take(demand, seat, account, now)
        queue.grant_at_once(account, demand)
        return seat

    # -- going

    def first_token(self, waiter: Any, now: float) -> list[Grant]:
        """Its prefill is over: the prompt's tokens no longer count against the prefill cap."""
        holding = self._holdings.get(waiter)
        if holding is None or not holding.prefill:
            return []
        tokens, holding.prefill = holding.prefill, 0
        holding.over = 0.0
        seat = holding.seat
        seat.prefill -= tokens
        if self._seats.get(seat.replica.name) is not seat:
            return []
        if tokens > seat.ordinary_prefill > 0:
            self._rest(holding, now)
        if seat.rate.ended(tokens, seat.prefill, now):
            self._limit(seat)
        return self._serve(seat, now) if self._waiting else []

    def leave(self, waiter: Any, now: float) -> list[Grant]:
        """Gives everything of one grant back, exactly once."""
        holding = self._holdings.pop(waiter, None)
        assert holding is not None, "a slot was given back twice"
        seat = self._give_back(holding, now)
        self._drain.left(now, saturated=bool(self._waiting))
        return self._serve(seat, now) if self._waiting else []

    def withdraw(self, waiter: Any) -> bool:
        """Takes a waiter out of the queue; False where it was not in it."""
        waiting = self._waiting.get(waiter)
        if waiting is None:
            return False
        self._take_out(waiting)
        return True

    def settle(self, tenant: str, class_: str, difference: int, weight: float = 1.0) -> None:
        """Corrects what the fair queue charged, once usage is known: by weighted tokens (`seats.cost`), more than 0
        where more were used than estimated."""
        self._classes[class_].settle(tenant, difference / weight)

    def tick(self, now: float) -> list[Grant]:
        """What time alone brings. Prefill of answers that are not streamed is taken to be over, tenants that went
        away give up their share, and room that a waiter left unused by leaving is offered again. Call it every
        0.1 s or so; without it nothing is lost but pace."""
        self._forget_tenants(now)
        for holding in self._holdings.values():
            if holding.over and holding.over <= now:
                holding.seat.prefill -= holding.prefill
                if holding.prefill > holding.seat.ordinary_prefill > 0:
                    self._rest(holding, now)
                holding.prefill, holding.over = 0, 0.0
        for seat in self._seats.values():
            if seat.rests_from is not None and seat.rests_until <= now:
                seat.rests_from = None
        return self._serve_all(now)

    def expired(self, now: float) -> list[Any]:
        """Takes out and returns the waiters whose deadline or patience has run out."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order, waiter = heapq.heappop(self._deadlines)
            waiting = self._waiting.get(waiter)
            if waiting is not None and waiting.order == order:
                self._take_out(waiting)
                late.append(waiter)
        for queue in self._classes.values():
            for waiting in queue.overdue(now):
                self._take_out(waiting)
                late.append(waiting.demand.waiter)
        return late

    def stranded(self) -> list[Any]:
        """Takes out and returns the waiters that nothing which takes requests could serve any more; who may wait for
        an engine's start stays."""
        seats, cold = self._seats.values(), self._options.cold_start_seconds > 0
        gone = [
            waiting
            for waiting in self._waiting.values()
            if not any(seat.serves(waiting.demand) or (cold and seat.wakes(waiting.demand)) for seat in seats)
        ]
        for waiting in gone:
            self._take_out(waiting)
        return [waiting.demand.waiter for waiting in gone]

    def retry_after(self, demand: Demand, now: float, jitter: float = 0.0) -> float:
        """Seconds until the queue will have room for this one; 1 to 60.

        Everyone who is told to come back gets a turn of its own: turns follow each other at the measured rate,
        behind those that wait, so that those who obey do not all meet again. Whoever comes at its turn is known
        again, and an overload is more patient with it. `jitter` (0 to 1) adds up to 10 %."""
        rank = CLASSES.index(demand.class_)
        ahead = sum(self._classes[name].count for name in CLASSES[: rank + 1])
        return self._drain.turn(rank, ahead, now, jitter, _same(demand))

    # -- inside

    def _limit(self, seat: Seat) -> None:
        if not self._is_open:
            return  # no slots
        replica, share, ordinary = seat.replica, self._share, 1.0 - self._options.reserved
        seat.slots = max(1, int(replica.slots * share))
        kept = max(1, round(seat.slots * self._options.reserved)) if self._options.reserved > 0 else 0
        seat.ordinary_slots = max(1, seat.slots - kept)
        seat.common_slots = max(1, seat.ordinary_slots - int(seat.slots * self._options.headroom))
        seat.kv_limit = int(replica.kv_tokens * share)
        seat.ordinary_kv = int(seat.kv_limit * ordinary)
        if replica.prefill_tokens:
            seat.prefill_limit = int(replica.prefill_tokens * share)
        else:  # what is measured is this gateway's own part already
            seat.prefill_limit = int(seat.rate.rate * self._options.prefill_seconds)
        seat.ordinary_prefill = int(seat.prefill_limit * ordinary)

    def _someone_first(self, queue: ClassQueue, demand: Demand) -> bool:
        """Whether it must queue: no replica has room for it, or one has for which somebody else waits already."""
        rivals: Iterable[ClassQueue] = self._classes.values()
        if queue is self._emergency:
            if not queue.count:
                return False
            rivals = (queue,)
        elif len(self._waiting) == self._emergency.count and not self._emergency.waits_for(demand.model):
            return False
        heavy, free = self._is_heavy(demand), False
        for seat in self._seats.values():
            if not seat.lacks(demand, heavy):
                if any(rival.count and rival.waits_for(model) for rival in rivals for model in seat.models):
                    return True
                free = True
        return not free

    def _may_fit(self, demand: Demand) -> bool:
        heavy = self._is_heavy(demand)
        return any(not seat.lacks(demand, heavy) for seat in self._seats.values())

    def _count_in(self, queue: ClassQueue, demand: Demand) -> Account:
        """A tenant that asks again after a while, or for the first time, has a share from now on."""
        account = queue.account(demand)
        account.counted = demand.weight
        self._counted[account] = queue
        self._weights[demand.class_] += demand.weight
        self._all_weights += demand.weight
        return account

    def _forget_tenants(self, now: float) -> None:
        """Who has nothing here and did not ask for a while has no share: the others may use it."""
        before = now - self._options.active_seconds
        gone = [a for a in self._counted if a.seen < before and not (a.running or a.count)]
        for account in gone:
            queue = self._counted.pop(account)
            self._weights[CLASSES[queue.rank]] -= account.counted
            self._all_weights -= account.counted
            account.counted = 0.0

    def _is_heavy(self, demand: Demand) -> bool:
        queue = self._classes[demand.class_]
        return self._heavy(queue, queue.accounts[demand.tenant])

    def _heavy(self, queue: ClassQueue, account: Account) -> bool:
        """Whether a tenant has its share of the slots already, and lately had it of the tokens too.

        Shares are among those who asked within `active_seconds` in this class or a more urgent one."""
        if queue is self._emergency:
            return False
        rivals = sum(self._weights[name] for name in CLASSES[1 : queue.rank + 1])
        own = account.counted
        if rivals <= own or account.running < self._ordinary_slots * own / rivals:
            return False
        return not queue.in_credit(account)

    def _take(self, demand: Demand, seat: Seat, account: Account, now: float) -> None:
        waiter, tokens = demand.waiter, demand.prompt_tokens
        assert waiter not in self._holdings, "a waiter entered while it holds a slot"
        if not seat.prefill:
            seat.rate.begun(now)
        seat.in_flight += demand.sequences
        if seat.trial:
            seat.open = seat.trial = False
        seat.kv += tokens + demand.output_tokens
        seat.prefill += tokens
        over = 0.0 if demand.streamed else now + 1.5 * seat.prefill / seat.rate.rate
        self._holdings[waiter] = _Holding(demand, seat, account, tokens, over, now)

    def _rest(self, holding: _Holding, now: float) -> None:
        """After a prompt larger than the whole cap the tenant's next one has to wait as long as that took, where
        others ask too. Without that, one tenant's long prompts keep an engine reading all the time, every step
        is as long as it can be, and everyone's slots stay taken (tests/simulation/README.md)."""
        if holding.account.counted < self._all_weights:
            seat = holding.seat
            seat.rests_from = holding.demand.tenant
            # With n gateways it was read at an n-th of the speed, and each lets in as many.
            seat.rests_until = now + (now - holding.since) * (2 / self._share - 1)
            if seat.held_for is not None and seat.rests((held := self._waiting[seat.held_for]).demand):
                seat.held_for = held.holds = None

    def _give_back(self, holding: _Holding, now: float) -> Seat:
        seat, demand, prefill = holding.seat, holding.demand, holding.prefill
        self._classes[demand.class_].ended(holding.account, demand)
        seat.in_flight -= demand.sequences
        seat.kv -= demand.prompt_tokens + demand.output_tokens
        if prefill:
            seat.prefill -= prefill
            if not seat.prefill and self._seats.get(seat.replica.name) is seat:
                seat.rate.ended(0, 0, now)
        return seat

    def _make_way(self, queue: ClassQueue, demand: Demand, now: float, jitter: float) -> tuple[Any, ...]:
        """Room in the queue for one more, if need be by shedding the tenants that have most there."""
        shed: list[Any] = []
        while not queue.has_room(demand):
            victim = queue.newest_of_heaviest(demand)
            if victim is None:
                raise ServeError(
                    "queue_full",
                    "All slots are taken and the queue is full.",
                    retry_after=self.retry_after(demand, now, jitter),
                )
            self._take_out(victim)
            shed.append(victim.demand.waiter)
        return tuple(shed)

    def _enqueue(self, queue: ClassQueue, demand: Demand, now: float, *, cold: bool) -> None:
        self._arrivals += 1
        deadline = now + (self._options.cold_start_seconds if cold else queue.limits.queue_seconds)
        if demand.deadline:
            deadline = min(deadline, demand.deadline)
        charge = cost(demand.prompt_tokens, demand.output_tokens)
        waiting = Waiting(demand, charge, now, deadline, self._arrivals, cold=cold)
        waiting.returns = self._drain.is_due(_same(demand), now)
        self._waiting[demand.waiter] = waiting
        queue.add(waiting, now)
        if len(self._deadlines) > 64 + 4 * len(self._waiting):
            self._deadlines = [(w.deadline, w.order, w.demand.waiter) for w in self._waiting.values()]
            heapq.heapify(self._deadlines)
        else:
            heapq.heappush(self._deadlines, (deadline, waiting.order, demand.waiter))

    def _take_out(self, waiting: Waiting) -> None:
        demand = waiting.demand
        self._classes[demand.class_].remove(waiting)
        self._unlist(waiting)

    def _unlist(self, waiting: Waiting) -> None:
        del self._waiting[waiting.demand.waiter]
        if waiting.holds is not None:
            waiting.holds.held_for = None
            waiting.holds = None

    def _let_go(self) -> None:
        """Nothing is held any more. Whoever it was for is passed over again, if need be, and holds it again."""
        for seat in self._seats.values():
            if seat.held_for is not None:
                self._waiting[seat.held_for].holds = None
                seat.held_for = None

    # -- handing out

    def _serve_all(self, now: float) -> list[Grant]:
        grants: list[Grant] = []
        if self._waiting:
            for seat in self._seats.values():
                grants += self._serve(seat, now)
        return grants

    def _serve(self, seat: Seat, now: float) -> list[Grant]:
        """Gives this replica's room away, as far as somebody can use it."""
        grants: list[Grant] = []
        if not (seat.takes and seat.open) or self._seats.get(seat.replica.name) is not seat:
            return grants
        while self._waiting and seat.in_flight < seat.slots:
            waiting = self._next(seat, now)
            if waiting is None:
                break
            account = self._classes[waiting.demand.class_].grant(waiting)
            self._unlist(waiting)
            self._take(waiting.demand, seat, account, now)
            reason = "queued, home" if self.routing.prefers(waiting.demand, seat) else "queued, first room"
            grants.append(Grant(waiting.demand.waiter, seat, reason))
        return grants

    def _next(self, seat: Seat, now: float) -> Waiting | None:
        blocked: list[Waiting] = []
        if self._emergency.count and (found := self._search(self._emergency, seat, blocked)) is not None:
            return found
        if seat.in_flight >= seat.ordinary_slots:
            return None
        if seat.held_for is not None:
            held = self._waiting[seat.held_for]
            return None if seat.lacks(held.demand, self._is_heavy(held.demand)) else held
        aged = self._aged(now)
        found = self._search(aged, seat, blocked, by_age=True) if aged is not None else None
        for queue in self._ordinary:
            if found is None and queue.count:
                found = self._search(queue, seat, blocked)
        if found is not None:
            self._since_aged += 1
            self._note_bypassed(blocked, seat, now)
        return found

    def _aged(self, now: float) -> ClassQueue | None:
        """In every AGED_EVERYth turn, the class whose oldest waiter has waited longest beyond what is usual."""
        if self._since_aged < AGED_EVERY - 1:
            return None
        patience = self._options.ageing_seconds
        late = [
            (now - queue.oldest - patience * max(1, queue.rank - 1), queue) for queue in self._ordinary if queue.count
        ]
        overdue, queue = max(late, key=lambda pair: pair[0], default=(-1.0, self._emergency))
        if overdue < 0:
            return None
        self._since_aged = -1
        return queue

    def _search(self, queue: ClassQueue, seat: Seat, blocked: list[Waiting], *, by_age: bool = False) -> Waiting | None:
        """The first in fair order that fits here; a little later one if it is at home here and the first is not.

        Without that, a saturated fleet would send everyone to whichever replica is free first, and no prefix
        would be found again. Those before it that do not fit are added to `blocked`."""
        limit = 0 if queue is self._emergency or by_age else self._options.locality_passes
        full_for_heavy = seat.in_flight >= seat.common_slots and queue is not self._emergency
        passed: list[Waiting] = []
        looked = skipped = 0
        for waiting in queue.by_age(seat.models) if by_age else queue.in_order(seat.models, LOOK_DEEPER):
            if waiting.demand.excluded and not seat.serves(waiting.demand):
                continue  # it has nothing to do with this replica, and does not count
            if looked >= LOOK_AHEAD or skipped >= LOOK_AHEAD:
                break
            if full_for_heavy and self._is_heavy(waiting.demand):
                skipped += 1
                continue
            looked += 1
            if seat.lacks(waiting.demand):
                if not seat.rests(waiting.demand):  # nothing is held for who has to wait anyway
                    blocked.append(waiting)
                continue
            if self.routing.prefers(waiting.demand, seat):
                for one in passed:
                    one.passed += 1
                return waiting
            passed.append(waiting)
            if waiting.passed >= limit:
                break
        return passed[0] if passed else None

    def _note_bypassed(self, blocked: list[Waiting], seat: Seat, now: float) -> None:
        """Somebody else is granted what these could not use; too often, and the replica is held for them."""
        for waiting in blocked:
            waiting.bypassed += 1
            if waiting.bypassed == 1:
                waiting.blocked_since = now
            late = now - waiting.blocked_since >= self._options.bypass_seconds
            if (late or waiting.bypassed >= self._options.bypasses) and waiting.holds is None:
                self._hold(waiting, seat)

    def _hold(self, waiting: Waiting, seat: Seat) -> None:
        if waiting.demand.class_ != EMERGENCY and seat.held_for is None and seat.serves(waiting.demand):
            seat.held_for, waiting.holds = waiting.demand.waiter, seat

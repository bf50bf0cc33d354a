"""One class's queue: fair to tenants by weighted tokens, bounded, exact. Pure; `admission.py` owns and drives it.

How it works: every tenant has a tag, the weighted tokens it was granted so far over its weight; the tenant with the
lowest tag comes first, its own requests first come first served. `_virtual` is where a tenant stands that was
always served its share: it moves with every grant by the tokens over the weights of all who wait or run. Who comes back
after a pause is lifted to it, less one request's tokens: not to be served before all others for what it did not
use, but ahead of those who always wait. Estimates are charged at the grant; `settle` corrects them.

Lines of one model are kept in a list sorted by tag: at 1024 tenants insertion costs 1 us, and there is nothing
stale in it.
"""

import heapq
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Protocol

from vitalis_serve.gateway.seats import OUTPUT_WEIGHT, Demand, Seat

PATIENCE_WITH_THE_RETURNING: Final = 3


class Limits(Protocol):
    @property
    def queue_requests(self) -> int: ...
    @property
    def queue_bytes(self) -> int: ...
    @property
    def queue_seconds(self) -> float: ...
    @property
    def overload_seconds(self) -> float: ...
    @property
    def standing_seconds(self) -> float: ...


@dataclass(slots=True, eq=False)
class Waiting:
    """A waiter in the queue. `passed`: how often it gave way to one who was at home on the replica; `bypassed`: how
    often somebody behind it was granted because it did not fit. `cold`: it came while its engine was starting.
    `returns`: it was told to come now."""

    demand: Demand
    cost: int
    arrived: float
    deadline: float
    order: int
    passed: int = 0
    bypassed: int = 0
    blocked_since: float = 0.0
    cold: bool = False
    returns: bool = False
    holds: Seat | None = None


@dataclass(slots=True, eq=False)
class _Line:
    """A tenant's waiters for one model."""

    account: "Account"
    key: tuple[float, int] = (0.0, 0)
    waiters: OrderedDict[Any, Waiting] = field(default_factory=OrderedDict)


@dataclass(slots=True, eq=False)
class Account:
    """A tenant in one class: what of it waits and runs, and what it was granted.

    seen: when it last asked. counted: its weight among those who asked of late, 0 where it is not among them; both
    are admission's to write."""

    number: int
    weight: float = 1.0
    tag: float = 0.0
    count: int = 0
    running: int = 0
    bytes: int = 0
    lines: dict[str, _Line] = field(default_factory=dict)
    seen: float = 0.0
    counted: float = 0.0


class ClassQueue:
    def __init__(self, rank: int, limits: Limits, burst_tokens: float = 0.0) -> None:
        self.rank = rank
        self._burst = burst_tokens
        self.limits = limits
        self.bytes = 0
        self._by_arrival: OrderedDict[Any, Waiting] = OrderedDict()
        self.accounts: dict[str, Account] = {}
        self._most_accounts = 1024
        self._lanes: dict[str, list[tuple[tuple[float, int], _Line]]] = {}
        self._virtual = 0.0
        self._active = 0.0  # weights of the tenants that wait or run
        self._numbers = 0
        self._heaviest: list[tuple[float, int, Account]] = []
        self._standing_since = 0.0

    @property
    def count(self) -> int:
        return len(self._by_arrival)

    @property
    def oldest(self) -> float:
        """When the one who waits longest arrived; only where somebody waits."""
        return next(iter(self._by_arrival.values())).arrived

    def waits_for(self, model: str) -> bool:
        return model in self._lanes

    # -- in and out

    def add(self, waiting: Waiting, now: float) -> None:
        demand = waiting.demand
        if not self._by_arrival:
            self._standing_since = now
        account = self.account(demand)
        if not account.count:
            self._rouse(account, demand)
            account.tag = max(account.tag, self._virtual - max(self._burst, waiting.cost) / demand.weight)
        account.count += 1
        account.bytes += demand.body_bytes
        self.bytes += demand.body_bytes
        self._by_arrival[demand.waiter] = waiting
        line = account.lines.get(demand.model)
        if line is None:
            line = account.lines[demand.model] = _Line(account)
            self._place(demand.model, line)
        line.waiters[demand.waiter] = waiting
        self._note_load(account)

    def remove(self, waiting: Waiting) -> None:
        demand = waiting.demand
        del self._by_arrival[demand.waiter]
        account = self.accounts[demand.tenant]
        line = account.lines[demand.model]
        del line.waiters[demand.waiter]
        if not line.waiters:
            self._lift_out(demand.model, line)
            del account.lines[demand.model]
        account.count -= 1
        account.bytes -= demand.body_bytes
        self.bytes -= demand.body_bytes
        self._rest(account)

    def grant(self, waiting: Waiting) -> Account:
        """Charges its tenant and takes it out; returns its account."""
        account = self.accounts[waiting.demand.tenant]
        account.running += waiting.demand.sequences
        self._virtual += waiting.cost / self._active
        self.remove(waiting)
        charge = waiting.cost / account.weight
        self._move(account, charge)
        self._hold_virtual(account, charge)
        return account

    def grant_at_once(self, account: Account, demand: Demand) -> None:
        """Charges one that never waited. While nobody waits there is nothing to be fair about: no debts remain."""
        weight = demand.weight
        charge = (demand.prompt_tokens + OUTPUT_WEIGHT * demand.output_tokens) / weight
        if not account.running:
            self._rouse(account, demand)
        account.running += demand.sequences
        if account.count:
            self._move(account, charge)
            return
        burst = self._burst / weight
        lifted = self._virtual - max(burst, charge)
        tag = account.tag = max(account.tag, lifted) + charge
        if tag > self._virtual and not self._by_arrival:
            self._virtual = tag

    def ended(self, account: Account, demand: Demand) -> None:
        """One that was granted runs no more."""
        account.running -= demand.sequences
        if not account.running:
            self._rest(account)

    def settle(self, tenant: str, difference: float) -> None:
        """`difference` of weighted tokens over the weight: above 0 where more was used than charged."""
        account = self.accounts.get(tenant)
        if account is None:
            return  # forgotten, because it owed nothing
        self._move(account, difference)
        if self._by_arrival:
            self._virtual += difference * account.weight / self._active
            self._hold_virtual(account, abs(difference))

    def in_credit(self, account: Account) -> bool:
        """Whether it was granted less than its share of late, and less than somebody who waits."""
        most_served = max((lane[-1][0][0] for lane in self._lanes.values()), default=self._virtual)
        return account.tag < min(self._virtual, most_served)

    # -- order

    def in_order(self, models: frozenset[str], deeper: int) -> Iterator[Waiting]:
        """Waiters for these models, fairest first; of each tenant the first `deeper`. Not to be changed meanwhile."""
        lanes = [lane for model, lane in self._lanes.items() if model in models]
        lines = lanes[0] if len(lanes) == 1 else heapq.merge(*lanes, key=lambda entry: entry[0])
        for _, line in lines:
            yield from islice(line.waiters.values(), deeper)

    def by_age(self, models: frozenset[str]) -> Iterator[Waiting]:
        """Waiters for these models, oldest first. Not to be changed meanwhile."""
        return (waiting for waiting in self._by_arrival.values() if waiting.demand.model in models)

    def overdue(self, now: float) -> list[Waiting]:
        """Those who wait longer than is sensible in an overload that lasts: their answers would come too late
        for anybody, and by waiting they would make everyone else's late too. Who comes when it was told to may wait
        some times as long, and so is hardly ever sent away again: its turn is paid for by those that come new. Who is
        next, of a tenant with less than its share under way, is not sent away: where slots come free seconds apart,
        that is a quiet tenant whose turn has come, in a queue that another one fills."""
        patience = self.limits.overload_seconds
        if not patience or not self._by_arrival or now - self._standing_since < self.limits.standing_seconds:
            return []
        late = []
        for waiting in self._by_arrival.values():
            if now - waiting.arrived < patience:
                break
            longest = PATIENCE_WITH_THE_RETURNING * patience if waiting.returns else patience
            if not waiting.cold and now - waiting.arrived >= longest and not self._turn_has_come(waiting):
                late.append(waiting)
        return late

    def _turn_has_come(self, waiting: Waiting) -> bool:
        account = self.accounts[waiting.demand.tenant]
        line = account.lines[waiting.demand.model]
        if self._lanes[waiting.demand.model][0][1] is not line or next(iter(line.waiters.values())) is not waiting:
            return False
        under_way = sum(other.running for other in self.accounts.values())
        return account.running * self._active < under_way * account.weight

    # -- bounds

    def has_room(self, demand: Demand) -> bool:
        limits = self.limits
        return self.count < limits.queue_requests and self.bytes + demand.body_bytes <= limits.queue_bytes

    def newest_of_heaviest(self, demand: Demand) -> Waiting | None:
        """Whom to shed so that this one gets in: None where its own tenant would then have the most."""
        account = self.accounts.get(demand.tenant)
        more = Account(0, demand.weight, count=1, bytes=demand.body_bytes)
        if account is not None:
            more.count += account.count
            more.bytes += account.bytes
        heap = self._heaviest
        while heap:
            noted, _, heaviest = heap[0]
            load = self._load(heaviest)
            if load == -noted:
                break
            heapq.heappop(heap)
            if load and load < -noted:
                heapq.heappush(heap, (-load, heaviest.number, heaviest))
        if not heap or heaviest is account or self._load(heaviest) <= self._load(more):
            return None
        newest = (next(reversed(line.waiters.values())) for line in heaviest.lines.values())
        return max(newest, key=lambda waiting: waiting.order)

    # -- inside

    def account(self, demand: Demand) -> Account:
        """Its tenant's, opened where there is none."""
        account = self.accounts.get(demand.tenant)
        if account is None:
            if len(self.accounts) >= self._most_accounts:
                self._forget_the_even()
                # Twice what could not be forgotten, or a crowd of new tenants would be sorted at each of them.
                self._most_accounts = max(1024, 2 * len(self.accounts))
            self._numbers += 1
            account = self.accounts[demand.tenant] = Account(self._numbers, demand.weight)
        return account

    def _rouse(self, account: Account, demand: Demand) -> None:
        if not account.count and not account.running:
            account.weight = demand.weight
            self._active += account.weight

    def _rest(self, account: Account) -> None:
        if not account.count and not account.running:
            self._active -= account.weight
            if self._active < 1e-9:
                self._active = 0.0  # no rounding is carried on

    def _forget_the_even(self) -> None:
        """Tenants that do not wait and owe nothing would be lifted anyway. Those that owe most stay."""
        idle = sorted((a.tag, name) for name, a in self.accounts.items() if not (a.count or a.running or a.counted))
        even = sum(tag <= self._virtual for tag, _ in idle)
        for _, name in idle[: max(len(idle) // 2, even)]:
            del self.accounts[name]

    def _load(self, account: Account) -> float:
        """The larger of its shares of the queue's two bounds, over its weight."""
        limits = self.limits
        return max(account.count / max(limits.queue_requests, 1), account.bytes / max(limits.queue_bytes, 1)) / (
            account.weight
        )

    def _note_load(self, account: Account) -> None:
        if len(self._heaviest) > 64 + 4 * self.count:
            waiting = {id(a): a for a in self.accounts.values() if a.count}.values()
            self._heaviest = [(-self._load(a), a.number, a) for a in waiting]
            heapq.heapify(self._heaviest)
        else:
            heapq.heappush(self._heaviest, (-self._load(account), account.number, account))

    def _move(self, account: Account, by: float) -> None:
        """A new tag, and its lines where they then belong."""
        if not account.lines:
            account.tag += by
            return
        for model, line in account.lines.items():
            self._lift_out(model, line)
        account.tag += by
        for model, line in account.lines.items():
            self._place(model, line)

    def _place(self, model: str, line: _Line) -> None:
        line.key = (line.account.tag, line.account.number)
        insort(self._lanes.setdefault(model, []), (line.key, line))

    def _lift_out(self, model: str, line: _Line) -> None:
        lane = self._lanes[model]
        del lane[bisect_left(lane, line.key, key=_key)]
        if not lane:
            del self._lanes[model]

    def _hold_virtual(self, account: Account, charge: float) -> None:
        """Near those who wait, or rounding and estimates would carry it off. Above the most served it may rise by
        what newcomers are placed below it: else they would come before that one for ever."""
        lanes = self._lanes.values()
        if lanes:
            lowest, highest = min(lane[0][0][0] for lane in lanes), max(lane[-1][0][0] for lane in lanes)
            highest = max(highest, account.tag) + self._burst + charge
            self._virtual = min(max(self._virtual, lowest), highest)
        else:
            self._virtual = max(self._virtual, account.tag)


def _key(entry: tuple[tuple[float, int], _Line]) -> tuple[float, int]:
    return entry[0]

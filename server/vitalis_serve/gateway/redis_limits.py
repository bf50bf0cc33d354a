"""Limits that several hosts share, counted in Redis by the rules of `limits.py` (`limits.lua` has them).

How it works: a claim is one call of the script, answered within `wait_seconds` or else by the policy for Redis' being
away: counted on this host, by one for all its workers (`share`), or refused. The first claim that waited in vain sends
all others there at once; a probe every quarter of a second finds Redis' return. What was reserved in Redis is settled
there, what was reserved on this host is settled here.

A claim tells Redis by when it is wanted: carried out later it does nothing, and one whose answer comes too late, or
never, is taken back. Who is let in has a lease, renewed from here, so a killed process holds nothing for longer than
that; a Redis that lost its data learns from the renewal what runs.

Keys: of keys and tenants `vts:{TENANT}:...`, of routes `vts:{route:NAME}:...`. What keys and tenants may do lies in one
slot of a cluster. A route's limit is over all tenants, and one script call must be all or none: so a claim with a
route's limit needs a Redis that is no cluster, which otherwise refuses it (CROSSSLOT), and the policy answers.
"""

import asyncio
import contextlib
import logging
import os
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Final

from redis.exceptions import ClusterCrossSlotError, RedisError, ResponseError

from vitalis_serve.errors import ConfigurationError, ServeError
from vitalis_serve.gateway.limiting import Limiting
from vitalis_serve.gateway.limits import Account, Calendar, Claim, Standing, Subject, headers_of, refusal_of
from vitalis_serve.gateway.redis_line import Call, Line, Script, bulk, place_of, pool_of

logger = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.25
HEARTBEAT_SECONDS: Final = 1.0
STALL_SECONDS: Final = 0.005
SILENT_SECONDS: Final = 1.0  # beyond a request's wait: then the connection is given up
MOST_LATE: Final = 10_000  # settlements kept while Redis is away
MOST_WAITING: Final = 10_000  # claims
MOST_PLANS: Final = 10_000
RENEWED_AT_ONCE: Final = 500
QUIET_SECONDS: Final = 10.0  # between two words of the log about the same
SCRIPT: Final = Script(Path(__file__).with_name("limits.lua").read_text())
EPOCH: Final = 1767225600  # Unix seconds; as in the script
_UNAVAILABLE: Final = "Limits cannot be checked just now."

Outcome = Standing | ServeError
# ASKED: who counts on this host, and has not answered yet.
_WAITING, _ASKED, _REMOTE, _LOCAL, _REFUSED, _GONE = range(6)


class _Place:
    """Where a subject is counted."""

    __slots__ = ("budgeted", "keys", "name", "rates")

    def __init__(self, subject: Subject) -> None:
        rates = subject.rates
        key = f"vts:{{{subject.tenant or subject.name}}}:{subject.name}".encode()
        limits = (
            rates.requests_per_minute,
            rates.tokens_per_minute,
            rates.concurrent,
            rates.tokens_per_day,
            rates.tokens_per_month,
        )
        self.name = subject.name
        self.keys = bulk(key, key + b":held")
        self.rates = bulk(*(b"" if limit is None else b"%d" % limit for limit in limits))
        self.budgeted = rates.tokens_per_day is not None or rates.tokens_per_month is not None

    def call(self, *arguments: bytes) -> bytes:
        return SCRIPT.call(self.keys, 2, [bulk(*arguments)], len(arguments))

    def renewal(self, lease: bytes, members: list[bytes]) -> bytes:
        rest = [bulk(b"renew", lease), self.rates, bulk(*members)]
        return SCRIPT.call(self.keys, 2, rest, 7 + len(members))


class Plan:
    """What is the same in all claims of some subjects."""

    __slots__ = ("accounts", "_keys", "_rates", "places")

    def __init__(self, subjects: tuple[Subject, ...]) -> None:
        self.places = [_Place(subject) for subject in subjects]
        self._keys = b"".join(place.keys for place in self.places)
        self._rates = b"".join(place.rates for place in self.places)
        # Filled with what Redis says, so that `limits.py` can put it into words.
        self.accounts = [Account(subject.name, subject.rates, 1, 0.0) for subject in subjects]

    def reservation(self, member: bytes, tokens: bytes, by: bytes, lease: bytes) -> bytes:
        count = len(self.places)
        rest = [bulk(b"reserve", member, tokens, by, lease), self._rates]
        return SCRIPT.call(self._keys, 2 * count, rest, 5 + 5 * count)

    def call(self, *arguments: bytes) -> bytes:
        return SCRIPT.call(self._keys, 2 * len(self.places), [bulk(*arguments)], len(arguments))

    def standing(self, figures: list[bytes], now: float) -> Standing:
        said = map(float, figures)
        for one in self.accounts:
            one.requests_full, one.tokens_full = next(said), next(said)
        return Standing(headers_of(self.accounts, now))

    def refusal(self, figures: list[bytes], now: float) -> ServeError:
        said = map(float, figures)
        for one in self.accounts:
            one.requests_full, one.tokens_full = next(said), next(said)
            one.concurrent, one.reserved, one.spent = int(next(said)), int(next(said)), 0
            one.day_base, one.month_base = -int(next(said)), -int(next(said))
            one.hold_seconds = next(said)
        calendar = Calendar()
        calendar.look(now, now + EPOCH)
        return refusal_of(self.accounts, calendar, 1, now, now + EPOCH)


class _Ask(Call):
    """A claim, from the question until it is settled. To who counts on this host it is the relay."""

    __slots__ = (
        "_owner", "claim", "deadline", "done", "entered", "holder", "member", "now", "plan", "since", "state",
    )  # fmt: skip

    def __init__(
        self, owner: "RedisLimits", claim: Claim, holder: Hashable, now: float, entered: float,
        done: Callable[[Outcome], None],
    ) -> None:  # fmt: skip
        super().__init__(b"")
        self._owner = owner
        self.claim, self.holder, self.now, self.done = claim, holder, now, done
        self.entered = entered  # the loop's time
        self.deadline = 0.0
        self.state = _WAITING
        self.plan: Plan
        self.member = b""
        self.since = b""  # Redis' time

    @property
    def estimate(self) -> bytes:
        return b"%d" % self.claim.tokens

    def answered(self, reply: bytes | ResponseError) -> None:
        self._owner.on_asked(self, reply)

    def on_reserved(self, lines: bytes) -> None:
        self._owner.on_local(self, Standing(lines))

    def on_limited(self, error: ServeError) -> None:
        self._owner.on_local(self, error)


class _Tell(Call):
    """A settlement, or a reservation taken back. To be said again where nobody knows whether it was heard."""

    __slots__ = ("_owner", "counts")

    def __init__(self, owner: "RedisLimits", packed: bytes, *, counts: bool) -> None:
        """counts: it is a loss where it does not arrive."""
        super().__init__(packed)
        self._owner = owner
        self.counts = counts

    def answered(self, reply: bytes | ResponseError) -> None:
        self._owner.on_told(self, reply)


class _Probe(Call):
    __slots__ = ("_owner",)

    def __init__(self, owner: "RedisLimits", packed: bytes) -> None:
        super().__init__(packed)
        self._owner = owner

    def answered(self, reply: bytes | ResponseError) -> None:
        self._owner.on_probed(self, reply)


class RedisLimits:
    """`run` is its one task (with two for a connection); requests only append to what that sends.

    url: redis://, rediss:// or unix://. away: `share` asks `local` while Redis is away, `refuse` answers
    limits_unavailable. lease_seconds: so long a process that was killed still counts as running what it ran.
    ConfigurationError where the address is none.

    timeouts: claims that waited in vain. undone: reservations taken back because their answer came too late or their
    client had left. lost: settlements that Redis never got; the ledger makes up for them. refused: claims that Redis
    said it cannot count.
    """

    def __init__(
        self,
        url: str,
        *,
        loop: asyncio.AbstractEventLoop,
        wait_seconds: float,
        away: str,
        lease_seconds: float,
        local: Limiting,
    ) -> None:
        try:
            self._pool = pool_of(url)
        except ValueError as error:
            raise ConfigurationError(f"limits.redis_url is no address of a Redis: {error}.") from None
        self._loop = loop
        self._wait = wait_seconds
        self._refuses = away == "refuse"
        self._lease = lease_seconds
        self._local = local
        self._line: Line | None = None
        self.away = True  # until Redis has answered once
        self._away_since = loop.time()
        self._away_before = 0.0
        self._quiet_until = 0.0
        self.timeouts = self.undone = self.lost = self.refused = 0
        self._name = os.urandom(6).hex()
        self._members = 0
        self._asks: dict[Hashable, _Ask] = {}
        self._waiting: deque[_Ask] = deque()  # in the order in which they came
        self._alarm: asyncio.TimerHandle | None = None
        self._late: deque[_Tell] = deque()
        self._plans: dict[tuple[Subject, ...], Plan] = {}
        self._budgets: dict[str, _Place] = {}
        self._spent: Mapping[str, tuple[int, int]] = {}
        self._host = b""
        self._calendar = Calendar()  # the day and month that `_spent` is of
        # Redis' clock minus the loop's. What is seen is too little by the way of an answer: the most is the best.
        self._ahead = self._ahead_next = -float("inf")
        self._probe: _Probe | None = None
        self._probe_at = self._renew_at = 0.0

    # -- for requests

    def reserve(self, claim: Claim, holder: Hashable, now: float, on_done: Callable[[Outcome], None]) -> None:
        """`on_done` is called once, later, unless `release` or `forget` comes before."""
        assert holder not in self._asks, "a holder reserves once"
        entered = self._loop.time()
        ask = self._asks[holder] = _Ask(self, claim, holder, now, entered, on_done)
        if self.away or self._line is None or len(self._waiting) >= MOST_WAITING:
            self._by_policy(ask)
            return
        self._members += 1
        tokens = ask.estimate
        ask.plan = self._plan(claim.subjects)
        ask.member = b"%b-%x:%b" % (self._name.encode(), self._members, tokens)
        ask.deadline = entered + self._wait
        by = b"%.6f" % (self._ahead + ask.deadline)
        ask.packed = ask.plan.reservation(ask.member, tokens, by, b"%g" % self._lease)
        self._waiting.append(ask)
        if self._alarm is None:
            self._alarm = self._loop.call_at(ask.deadline, self._on_alarm)
        self._line.say(ask)

    def settle(self, holder: Hashable, tokens: int | None, now: float) -> None:
        """As `Limits.settle`, where it was reserved."""
        ask = self._asks.pop(holder, None)
        if ask is None:
            return
        if ask.state == _LOCAL:
            self._local.settle(ask, ask.claim.tokens if tokens is None else tokens, now)
        elif ask.state == _REMOTE:
            used = ask.estimate if tokens is None else b"%d" % tokens
            self._tell(_Tell(self, ask.plan.call(b"settle", ask.member, ask.estimate, used, ask.since), counts=True))
        else:
            self._drop(ask, now)

    def release(self, holder: Hashable, now: float) -> None:
        """As `Limits.release`, where it was reserved; also before the answer, which then does not come."""
        ask = self._asks.pop(holder, None)
        if ask is None:
            return
        if ask.state == _LOCAL:
            self._local.release(ask, now)
        elif ask.state == _REMOTE:
            self._take_back(ask)
        self._drop(ask, now)

    def forget(self, holder: Hashable) -> None:
        """Its client left before the answer."""
        ask = self._asks.get(holder)
        if ask is not None:
            self.release(holder, self._time_of(ask))

    # -- for whoever owns it

    def reconcile(self, spent: Mapping[str, tuple[int, int]], host: str, wall: float) -> None:
        """What the ledger of this host says of the UTC day and month of `wall`, by subject: budgets count at least what
        all hosts said. To be called after the start and about once a minute, by every worker with the same `host`; what
        Redis lost is made up for by this."""
        self._spent, self._host = spent, host.encode()
        self._calendar = Calendar()
        self._calendar.look(0, wall)
        if not self.away:
            self._raise_budgets()

    @property
    def away_seconds(self) -> float:
        """For how long Redis was away in all."""
        return self._away_before + (self._loop.time() - self._away_since if self.away else 0.0)

    @property
    def in_flight(self) -> int:
        """Requests that hold a reservation, here or in Redis, or wait for one."""
        return len(self._asks)

    @property
    def waiting(self) -> int:
        """Claims that neither Redis nor the policy has answered."""
        return len(self._waiting)

    @property
    def late(self) -> int:
        """Settlements kept for Redis' return."""
        return len(self._late)

    async def run(self) -> None:
        """For ever."""
        try:
            while True:
                try:
                    self._line = await Line.open(self._pool, SCRIPT)
                    await self._attend(self._line)
                except (RedisError, OSError, TimeoutError) as error:
                    self._go_away(_reason(error))
                await self._leave()
                await asyncio.sleep(TICK_SECONDS)
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            if self._line is not None:
                await self._line.close()

    async def drained(self, seconds: float) -> None:
        """Until Redis has heard all that was settled, or for so long: before `run` is cancelled."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._late or (self._line is not None and not self._line.is_quiet):
                    await asyncio.sleep(0.01)

    async def _attend(self, line: Line) -> None:
        while True:
            now = self._loop.time()
            silent = now - line.silent_since
            if silent > self._wait:
                self._go_away("it does not answer")
            if silent > self._wait + SILENT_SECONDS:
                return
            if self._probe is None and (self.away or now >= self._probe_at):
                self._probe = _Probe(self, SCRIPT.call(bulk(b"vts:probe"), 1, [bulk(b"probe")], 1))
                self._probe_at = now + HEARTBEAT_SECONDS
                line.say(self._probe)
            if not self.away and now >= self._renew_at:
                self._renew(older_than=self._lease / 3)
            if await line.ended(TICK_SECONDS):
                return

    async def _leave(self) -> None:
        line, self._line, self._probe = self._line, None, None
        if line is None:
            return
        self._go_away("it closed the connection")
        for call in reversed(await line.close()):
            if isinstance(call, _Ask):
                self._take_back(call)
            elif isinstance(call, _Tell):
                self._keep(call, first=True)

    # -- what Redis says

    def on_asked(self, ask: _Ask, reply: bytes | ResponseError) -> None:
        waiting = self._waiting
        if waiting and waiting[0] is ask:
            waiting.popleft()
        if isinstance(reply, ResponseError):
            self._on_error(ask, reply)
            return
        verdict, at, *figures = reply.split(b" ")
        self._see_clock(at)
        if ask.state != _WAITING:
            if verdict == b"yes":
                self.undone += 1
                self._take_back(ask)
            return
        if verdict == b"yes":
            ask.state, ask.since = _REMOTE, at
            self._answer(ask, ask.plan.standing(figures, float(at)))
        elif verdict == b"no":
            ask.state = _REFUSED
            self._answer(ask, ask.plan.refusal(figures, float(at)))
        else:
            self.timeouts += 1
            self._by_policy(ask)

    def _on_error(self, ask: _Ask, error: ResponseError) -> None:
        self.refused += 1
        if isinstance(error, ClusterCrossSlotError):
            self._warn("a route's limits need a Redis that is no cluster")
        else:
            self._go_away(_reason(error))
        if ask.state == _WAITING:
            self._by_policy(ask)

    def on_told(self, tell: _Tell, reply: bytes | ResponseError) -> None:
        if isinstance(reply, ResponseError):
            self.lost += tell.counts
            return
        found, at = reply.split(b" ")
        self._see_clock(at)
        if found == b"0":
            self.lost += tell.counts

    def on_probed(self, probe: _Probe, reply: bytes | ResponseError) -> None:
        self._probe = None
        if isinstance(reply, ResponseError):
            self._go_away(_reason(reply))
            return
        self._ahead, self._ahead_next = self._ahead_next, -float("inf")
        self._see_clock(reply.split(b" ")[1])
        if self.away and self._loop.time() - probe.sent_at <= self._wait:
            self._come_back()

    def _see_clock(self, at: bytes) -> None:
        ahead = float(at) - self._loop.time()
        self._ahead_next = max(self._ahead_next, ahead)
        self._ahead = max(self._ahead, ahead)

    # -- away and back

    def _on_alarm(self, is_late: bool = False) -> None:
        self._alarm = None
        waiting = self._waiting
        while waiting and waiting[0].state != _WAITING:
            waiting.popleft()
        if not waiting:
            return
        late = self._loop.time() - waiting[0].deadline
        if late < 0:
            self._alarm = self._loop.call_at(waiting[0].deadline, self._on_alarm)
            return
        if late > STALL_SECONDS and not is_late:  # not Redis stood still but this loop: the answer may be there
            self._alarm = self._loop.call_later(STALL_SECONDS, self._on_alarm, True)
            return
        self.timeouts += sum(ask.state == _WAITING for ask in waiting)
        self._go_away(f"no answer within {self._wait:g} s")

    def _go_away(self, reason: str) -> None:
        if self.away:
            if self._line is None:
                self._warn(reason)
            return
        self._warn(reason)
        self.away = True
        self._away_since = self._loop.time()
        waiting, self._waiting = self._waiting, deque()
        for ask in waiting:
            if ask.state == _WAITING:
                self._by_policy(ask)

    def _come_back(self) -> None:
        self._away_before += self._loop.time() - self._away_since
        self.away = False
        logger.info("Redis for limits at %s answers", place_of(self._pool))
        self._raise_budgets()
        self._renew(older_than=0)
        assert self._line is not None
        while self._late:
            self._line.say(self._late.popleft())

    def _warn(self, reason: str) -> None:
        now = self._loop.time()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET_SECONDS
            instead = "requests are refused" if self._refuses else "this host counts its share"
            logger.warning("Redis for limits at %s: %s; %s meanwhile", place_of(self._pool), reason, instead)

    def _by_policy(self, ask: _Ask) -> None:
        ask.dropped = True
        if self._refuses:
            ask.state = _REFUSED
            self._answer(ask, ServeError("limits_unavailable", _UNAVAILABLE, retry_after=1))
            return
        ask.state = _ASKED
        try:
            lines = self._local.ask(ask, ask.claim, self._time_of(ask))
        except ServeError as error:
            self.on_local(ask, error)
        else:
            if lines is not None:
                self.on_local(ask, Standing(lines))

    def on_local(self, ask: _Ask, outcome: Outcome) -> None:
        """The answer of who counts on this host."""
        ask.state = _LOCAL if isinstance(outcome, Standing) else _REFUSED
        self._answer(ask, outcome)

    def _time_of(self, ask: _Ask) -> float:
        return ask.now + self._loop.time() - ask.entered

    def _answer(self, ask: _Ask, outcome: Outcome) -> None:
        self._loop.call_soon(self._deliver, ask, outcome)

    def _deliver(self, ask: _Ask, outcome: Outcome) -> None:
        if ask.state == _GONE:
            return  # its client left meanwhile
        if ask.state == _REFUSED:
            del self._asks[ask.holder]
        ask.done(outcome)

    # -- what is told

    def _drop(self, ask: _Ask, now: float) -> None:
        if ask.state == _ASKED:
            self._local.release(ask, now)
        ask.state = _GONE
        ask.dropped = True

    def _take_back(self, ask: _Ask) -> None:
        self._tell(_Tell(self, ask.plan.call(b"release", ask.member, ask.estimate), counts=False))

    def _tell(self, tell: _Tell) -> None:
        if self.away or self._line is None:
            self._keep(tell)
        else:
            self._line.say(tell)

    def _keep(self, tell: _Tell, *, first: bool = False) -> None:
        if len(self._late) >= MOST_LATE:
            self.lost += tell.counts
        elif first:
            self._late.appendleft(tell)
        else:
            self._late.append(tell)

    def _plan(self, subjects: tuple[Subject, ...]) -> Plan:
        plan = self._plans.get(subjects)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
                self._budgets.clear()
            plan = self._plans[subjects] = Plan(subjects)
            for place in plan.places:
                if place.budgeted:
                    self._budgets[place.name] = place
                    self._raise_budget(place)
        return plan

    def _raise_budgets(self) -> None:
        for place in self._budgets.values():
            self._raise_budget(place)

    def _raise_budget(self, place: _Place) -> None:
        spent = self._spent.get(place.name)
        if spent is not None and self._line is not None:
            calendar = self._calendar
            day, month = (b"%d" % tokens for tokens in spent)
            packed = place.call(b"know", b"%d" % calendar.day, day, b"%d" % calendar.month, month, self._host)
            self._line.say(Call(packed))

    def _renew(self, *, older_than: float) -> None:
        """Those of younger claims are still good for long enough."""
        now = self._loop.time()
        self._renew_at = now + self._lease / 3
        members: dict[_Place, list[bytes]] = defaultdict(list)
        for ask in self._asks.values():
            if ask.state == _REMOTE and now - ask.entered >= older_than:
                for place in ask.plan.places:
                    members[place].append(ask.member)
        assert self._line is not None
        lease = b"%g" % self._lease
        for place, held in members.items():
            for start in range(0, len(held), RENEWED_AT_ONCE):
                part = held[start : start + RENEWED_AT_ONCE]
                self._line.say(Call(place.renewal(lease, part)))


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

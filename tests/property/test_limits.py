"""Limits under any sequence of events, against a model that counts in fractions: nothing over, lost or kept."""

import re
from calendar import timegm
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.limits import Claim, Limits, Rates, Standing, Subject

from tests.support.examples import examples

NAMES = ("key:a", "tenant:t", "route:r")
# Two days before the end of a month.
START = timegm((2024, 2, 27, 20, 0, 0))

never = st.none()
rates = st.builds(
    Rates,
    never | st.integers(1, 6) | st.integers(10, 200),
    st.integers(1, 300) | st.sampled_from([100, 200, 400]) | st.integers(1000, 3000) | never,
    never | never | st.integers(1, 4),
    never | never | st.integers(1, 2000),
    never | never | st.integers(1, 4000),
)
amounts = st.integers(0, 400) | st.sampled_from([50, 100, 200])


def reserve(limits: Limits, asked: Claim, holder: int, now: float, wall: float) -> Standing | ServeError:
    try:
        return limits.reserve(asked, holder, now, wall)
    except ServeError as error:
        return error


class Bucket:
    """What is left of a minute."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self.left = Fraction(0)
        self.at = Fraction(0)

    def to(self, now: Fraction) -> None:
        if self.limit is not None:
            self.left = min(Fraction(self.limit), self.left + (now - self.at) * self.limit / 60)
        self.at = now

    def allow(self, limit: int | None) -> None:
        if limit is not None:
            self.left = Fraction(limit) if self.limit in (None, self.left) else min(self.left, Fraction(limit))
        self.limit = limit

    def wait(self, wanted: Fraction) -> Fraction:
        """Seconds until so much is left; 0 where it is."""
        if self.limit is None:
            return Fraction(0)
        return max(Fraction(0), (wanted - self.left) * 60 / self.limit)


class Model:
    """One subject."""

    def __init__(self) -> None:
        self.rates = Rates()
        self.requests, self.tokens = Bucket(), Bucket()
        self.in_flight: dict[int, int] = {}
        self.spent: dict[str, int] = {}

    def to(self, now: Fraction) -> None:
        self.requests.to(now)
        self.tokens.to(now)

    def allow(self, given: Rates) -> None:
        self.rates = given
        self.requests.allow(given.requests_per_minute)
        self.tokens.allow(given.tokens_per_minute)

    def refusals(self, day: str) -> set[str]:
        found = set()
        reserved = sum(self.in_flight.values())
        for period, limit in ((day, self.rates.tokens_per_day), (day[:7], self.rates.tokens_per_month)):
            if limit is not None and self.spent.get(period, 0) >= limit:
                found.add("budget_spent")
            elif limit is not None and self.spent.get(period, 0) + reserved >= limit:
                found.add("held")  # by what runs
        if self.rates.concurrent is not None and len(self.in_flight) >= self.rates.concurrent:
            found.add("concurrency_limit")
        if self.tokens.limit is not None and self.tokens.left <= 0:
            found.add("held" if self.tokens.left + reserved > 0 else "tokens_limit")
        if self.requests.limit is not None and self.requests.left < 1:
            found.add("requests_limit")
        return found

    def returns(self) -> int:
        """Whole seconds until both buckets let one in."""
        wait = self.tokens.wait(Fraction(0))
        tokens = 0 if self.tokens.limit is None or self.tokens.left > 0 else int(wait) + 1
        return max(tokens, -int(-self.requests.wait(Fraction(1)) // 1))


def seconds(duration: str) -> float:
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    return sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+)(ms|[hms])", duration))


class Machine(RuleBasedStateMachine):
    """Times are quarters of a second, so that no fraction lies so near to a limit that floats could miss it."""

    def __init__(self) -> None:
        super().__init__()
        self.made = Limits()
        self.now = Fraction(1000)
        self.ahead = 0  # of the wall clock, seconds
        self.latest = START
        self.models = {name: Model() for name in NAMES}
        self.current = dict.fromkeys(NAMES, Rates())
        self.held: dict[int, Claim] = {}
        self.next = 0

    @property
    def wall(self) -> float:
        return START + self.ahead + float(self.now - 1000)

    def day(self) -> str:
        """Never one before the latest."""
        self.latest = max(self.latest, int(self.wall))
        return f"{datetime.fromtimestamp(self.latest, UTC):%Y-%m-%d}"

    def claim(self, names: set[str], tokens: int) -> Claim:
        for name in names:
            self.models[name].to(self.now)
            self.models[name].allow(self.current[name])
        return Claim(tuple(Subject(name, self.current[name]) for name in NAMES if name in names), tokens)

    @rule(name=st.sampled_from(NAMES), given=rates)
    def allows(self, name: str, given: Rates) -> None:
        """The next snapshot says so."""
        self.current[name] = given

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1), tokens=amounts)
    def reserves(self, names: set[str], tokens: int) -> None:
        asked, day = self.claim(names, tokens), self.day()
        touched = [self.models[name] for name in names]
        refusals = set().union(*(model.refusals(day) for model in touched))
        self.next += 1
        answer = reserve(self.made, asked, self.next, float(self.now), self.wall)
        if isinstance(answer, ServeError):
            assert answer.code in {"tokens_limit" if code == "held" else code for code in refusals}
            assert answer.code == "budget_spent" or "budget_spent" not in refusals
            assert answer.retry_after is not None
            assert 1 <= answer.retry_after <= 60
            if refusals <= {"requests_limit", "tokens_limit"}:
                assert answer.retry_after == min(60, max(model.returns() for model in touched))
            self.standing(answer.headers, names)
            return
        assert not refusals
        self.held[self.next] = asked
        for model in touched:
            model.in_flight[self.next] = tokens
            model.requests.left -= 1
            model.tokens.left -= tokens
        self.standing(answer.headers, names)

    def standing(self, headers: bytes, names: set[str]) -> None:
        said = dict(line.split(": ") for line in headers.decode().split("\r\n") if line)
        for kind in ("requests", "tokens"):
            buckets = [getattr(self.models[name], kind) for name in names if name != "route:r"]
            limited = [bucket for bucket in buckets if bucket.limit is not None]
            if not limited:
                assert f"x-ratelimit-limit-{kind}" not in said
                continue
            least = min(bucket.left for bucket in limited)
            assert int(said[f"x-ratelimit-remaining-{kind}"]) == max(0, int(least))
            shown = int(said[f"x-ratelimit-limit-{kind}"]), seconds(said[f"x-ratelimit-reset-{kind}"])
            # Two of different limits may have the same left.
            assert any(
                shown[0] == bucket.limit and -0.001 < shown[1] - float(bucket.wait(Fraction(bucket.limit))) < 1.001
                for bucket in limited
                if bucket.left == least
            )

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1), tokens=amounts)
    def adopts(self, names: set[str], tokens: int) -> None:
        asked = self.claim(names, tokens)
        self.day()
        self.next += 1
        for _ in range(2):
            self.made.adopt(asked, self.next, float(self.now), self.wall)
        self.held[self.next] = asked
        for model in (self.models[name] for name in names):
            model.in_flight[self.next] = tokens
            model.requests.left -= min(max(model.requests.left, Fraction(0)), 1)
            model.tokens.left -= min(max(model.tokens.left, Fraction(0)), tokens)

    def _ended(self, data: st.DataObject) -> tuple[int, list[Model]]:
        holder = data.draw(st.sampled_from(sorted(self.held)))
        models = [self.models[subject.name] for subject in self.held.pop(holder).subjects]
        for model in models:
            model.to(self.now)
        return holder, models

    @precondition(lambda self: self.held)
    @rule(data=st.data(), used=st.none() | amounts)
    def settles(self, data: st.DataObject, used: int | None) -> None:
        holder, models = self._ended(data)
        day = self.day()
        for _ in range(2):
            self.made.settle(holder, used, float(self.now), self.wall)
        for model in models:
            estimate = model.in_flight.pop(holder)
            counted = estimate if used is None else used
            model.tokens.left += estimate - counted
            for period in (day, day[:7]):
                model.spent[period] = model.spent.get(period, 0) + counted
            model.to(self.now)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def releases(self, data: st.DataObject) -> None:
        holder, models = self._ended(data)
        for _ in range(2):
            self.made.release(holder, float(self.now), self.wall)
        for model in models:
            model.tokens.left += model.in_flight.pop(holder)
            model.requests.left += 1
            model.to(self.now)

    @initialize(given=st.tuples(*(rates for _ in NAMES)))
    def begins(self, given: tuple[Rates, ...]) -> None:
        self.current = dict(zip(NAMES, given, strict=True))

    @rule(quarters=st.integers(1, 20) | st.integers(1, 400))
    def waits(self, quarters: int) -> None:
        self.now += Fraction(quarters, 4)

    @rule(hours=st.integers(1, 30))
    def waits_long(self, hours: int) -> None:
        self.now += hours * 3600

    @rule(hours=st.integers(-20, 0))
    def clock_is_set(self, hours: int) -> None:
        self.day()
        self.made.seed({}, self.wall)
        self.ahead = hours * 3600

    @rule(name=st.sampled_from(NAMES), more=st.integers(-100, 100))
    def seeds(self, name: str, more: int) -> None:
        day, spent = self.day(), self.models[name].spent
        known = spent.get(day, 0), spent.get(day[:7], 0)
        self.made.seed({name: (max(0, known[0] + more), max(0, known[1] + more))}, self.wall)
        spent[day], spent[day[:7]] = known[0] + max(0, more), known[1] + max(0, more)

    @rule()
    def expires(self) -> None:
        """Nobody can tell."""
        self.made.expire(float(self.now))

    @invariant()
    def in_flight(self) -> None:
        assert self.made.in_flight == len(self.held)

    def teardown(self) -> None:
        for holder in self.held:
            self.made.settle(holder, 400, float(self.now), self.wall)
        for account in self.made._accounts.values():
            assert not account.concurrent
            assert not account.reserved
        self.made.expire(float(self.now) + 1e7)
        assert not len(self.made)


Machine.TestCase.settings = settings(max_examples=examples(80), stateful_step_count=50, deadline=None)
TestMachine = Machine.TestCase


@given(
    limit=st.integers(1, 1000),
    requests=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 900), st.integers(0, 5)), min_size=1, max_size=60),
)
@settings(max_examples=examples(100), deadline=None)
def test_a_budget_is_passed_only_by_what_was_in_flight_within_it(
    limit: int, requests: list[tuple[int, int, int]]
) -> None:
    """requests: estimate, use, and how many that came later are let in before it ends."""
    made, rates = Limits(), Rates(tokens_per_day=limit)
    flying: list[tuple[int, int, int, int]] = []
    spent, beyond, last = 0, 0, 0
    for n, (estimate, use, later) in enumerate(requests):
        for ended in [one for one in flying if one[1] <= n]:
            flying.remove(ended)
            made.settle(ended[0], ended[3], 1.0, START)
            spent += ended[3]
        answer = reserve(made, Claim((Subject("key:a", rates),), estimate), n, 1.0, START)
        if isinstance(answer, ServeError):
            continue
        flying.append((n, n + 1 + later, estimate, use))
        beyond, last = beyond + max(0, use - estimate), max(last, estimate)
    spent += sum(use for *_, use in flying)
    assert spent < limit + beyond + max(last, 1)


@given(
    limit=st.integers(1, 100),
    steps=st.lists(st.integers(0, 8000), min_size=1, max_size=300),
    lowered=st.lists(st.integers(1, 100), max_size=5),
)
@settings(max_examples=examples(100), deadline=None)
def test_no_stretch_of_time_has_more_requests_than_a_bucket_and_its_refill(
    limit: int, steps: list[int], lowered: list[int]
) -> None:
    """Whatever other limits below this one were in force in between. Steps in milliseconds."""
    made, taken, now = Limits(), [], 0.0
    limits = [limit, *(min(limit, one) for one in lowered)]
    for n, step in enumerate(steps):
        now += step / 1000
        rates = Rates(limits[n % len(limits)])
        answer = reserve(made, Claim((Subject("key:a", rates),), 1), n, now, START)
        if isinstance(answer, Standing):
            taken.append(now)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            assert last - first + 1 <= limit + (taken[last] - taken[first]) * limit / 60 + 1e-3


@given(
    share=st.integers(1, 9),
    given=st.integers(1, 10**12),
)
def test_the_parts_of_all_hosts_are_not_more_than_the_limit_but_for_one_each(share: int, given: int) -> None:
    made = Limits(1 / share)
    claim = Claim((Subject("key:a", Rates(tokens_per_minute=given)),), 0)
    headers = made.reserve(claim, 1, 1.0, START).headers
    part = int(headers.split(b"\r\n")[0].split(b": ")[1])
    assert part == max(1, given // share)


@given(
    walls=st.lists(st.floats(0, 4e9) | st.floats(START - 2e5, START + 2e5), min_size=1, max_size=40),
    step=st.floats(0, 1e5),
)
@settings(max_examples=examples(100), deadline=None)
def test_whatever_the_clock_says_a_budget_does_not_come_back_within_the_same_day(
    walls: list[float], step: float
) -> None:
    """A clock may go forward as it likes (then days begin); going back it begins none before a day has passed."""
    made, rates = Limits(), Rates(tokens_per_day=10)
    fresh, now, latest = -inf, 0.0, -inf
    for n, wall in enumerate(walls):
        now += step
        began = wall // 86400 > latest // 86400
        answer = reserve(made, Claim((Subject("key:a", rates),), 10), n, now, wall)
        if isinstance(answer, ServeError):
            assert answer.code == "budget_spent"
            assert not began
            continue
        made.settle(n, 10, now, wall)
        assert began or now - fresh >= 86400
        fresh, latest = now, wall


def test_february_has_its_leap_day() -> None:
    made, claim = Limits(), Claim((Subject("key:a", Rates(tokens_per_month=1)),), 1)
    fresh = []
    for hour in range(0, 24 * 400, 6):
        wall = START + hour * 3600
        if isinstance(reserve(made, claim, hour, hour * 3600.0, wall), Standing):
            made.settle(hour, 1, hour * 3600.0, wall)
            fresh.append(datetime.fromtimestamp(wall, UTC))
    assert len(fresh) == 15
    for at in fresh[1:]:
        assert (at - timedelta(hours=6)).month != at.month

"""What keys, tenants and routes may use: requests and tokens per minute, requests at once, tokens per day and month.

A request reserves an estimate under all its subjects or under none, and settles to what it used, be it more. Minutes
are token buckets, days and months UTC's. Pure: `now` is monotonic seconds, `wall` Unix seconds.
"""

from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from datetime import UTC, datetime
from math import ceil, floor, inf
from typing import Final

import msgspec

from vitalis_serve.errors import ServeError

MINUTE: Final = 60.0
DAY: Final = 86_400
LONGEST_MONTH: Final = 31 * DAY
# Seconds. Above what floats lose at the monotonic clock of a machine that has been up for years.
_EPSILON: Final = 1e-7
_LOOKED_AT: Final = 64
_CODES: Final = {"day": "budget_spent", "month": "budget_spent", "held": "tokens_limit"}
_MILLISECONDS: Final = ("0s", *(f"{n}ms" for n in range(1, 1000)), "1s")
_SECONDS: Final = (*(f"{n}s" for n in range(60)), "1m0s")


class Rates(msgspec.Struct, frozen=True):
    """Limits of one key, tenant or route; None: no limit of that kind. All above 0."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


class Subject(msgspec.Struct, frozen=True, array_like=True):
    """Who is limited: `key:<id>`, `tenant:<name>` or `route:<name>`, and how much it may use as its snapshot says.
    tenant: whose it is; a route is nobody's."""

    name: str
    rates: Rates
    tenant: str = ""


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """What one request asks for. tokens: the most that it is likely to use, prompt and output together, so that what is
    left cannot be promised twice; expected: what one like it uses."""

    subjects: tuple[Subject, ...]
    tokens: int
    expected: int = 0


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """How a request that was let in stands. headers: whole lines `x-ratelimit-*` as OpenAI's, of the key or tenant
    with the least left; b"" where neither has a limit by the minute."""

    headers: bytes = b""


class Calendar:
    """Which UTC day and month budgets are counted in.

    A clock that is set back does not open a day again: the later one goes on, until a day's (or month's) time has
    passed by the monotonic clock. So a clock set to and fro gives no budget twice, and one set right stops none.
    """

    __slots__ = ("_day_since", "_month_since", "begins", "day", "ends", "month", "month_ends")

    def __init__(self) -> None:
        self.day = self.month = -1
        self.begins, self.ends, self.month_ends = inf, -inf, -inf
        self._day_since = self._month_since = inf

    def look(self, now: float, wall: float) -> None:
        """To be called where `wall` is not from `begins` until `ends`. now: inf where it is not known."""
        self._day_since, self._month_since = min(self._day_since, now), min(self._month_since, now)
        if wall < self.ends and not DAY <= now - self._day_since < inf:
            return
        self.day = floor(wall / DAY)
        self.begins, self.ends, self._day_since = self.day * DAY, self.day * DAY + DAY, now
        if wall >= self.month_ends or LONGEST_MONTH <= now - self._month_since < inf:
            date = datetime.fromtimestamp(wall, UTC)
            self.month, self._month_since = date.year * 12 + date.month - 1, now
            year, month = divmod(self.month + 1, 12)
            self.month_ends = datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


class Account:
    """One subject's state.

    A bucket is kept as the time at which it will be full again: a minute ahead it is empty, whatever its size, beyond
    that in debt. Where there is no limit a request costs 0 seconds and the room is inf.
    """

    __slots__ = (
        "budget", "concurrent", "concurrent_limit", "day", "day_base", "day_limit", "hold_seconds", "month_base",
        "month", "month_limit", "name", "rates", "request_cost", "requests_full", "requests_head",
        "requests_room", "reserved", "shown", "spent", "token_cost", "tokens_full", "tokens_head",
        "tokens_room",
    )  # fmt: skip

    def __init__(self, name: str, rates: Rates, share: float, now: float) -> None:
        self.name = name
        # What is left of a route's limit would tell a tenant what the others do.
        self.shown = not name.startswith("route:")
        self.requests_full = self.tokens_full = now
        self.request_cost = self.token_cost = 0.0
        self.concurrent = 0
        self.hold_seconds = 0.0  # how long its requests run: moving average
        self.reserved = 0  # tokens: the estimates of what is in flight
        self.spent = self.day_base = self.month_base = 0  # tokens: ever, and before the day and the month
        self.day = self.month = -1
        self.allow(rates, share, now)

    def allow(self, rates: Rates, share: float, now: float) -> None:
        """Other limits. What was left of a minute is still left, as far as the new limit has room for it; a bucket that
        was full is full."""
        self.rates = rates
        limit = _part(rates.requests_per_minute, share)
        self.requests_full = _moved(self.requests_full, self.request_cost, limit, now)
        self.request_cost = MINUTE / limit
        self.requests_room = inf if limit == inf else MINUTE - self.request_cost + _EPSILON
        self.requests_head = f"x-ratelimit-limit-requests: {limit}\r\nx-ratelimit-remaining-requests: "
        limit = _part(rates.tokens_per_minute, share)
        self.tokens_full = _moved(self.tokens_full, self.token_cost, limit, now)
        self.token_cost = MINUTE / limit
        self.tokens_room = inf if limit == inf else MINUTE - _EPSILON
        self.tokens_head = f"x-ratelimit-limit-tokens: {limit}\r\nx-ratelimit-remaining-tokens: "
        self.concurrent_limit = _part(rates.concurrent, share)
        self.day_limit = _part(rates.tokens_per_day, share)
        self.month_limit = _part(rates.tokens_per_month, share)
        self._draw_up()

    def turn(self, calendar: Calendar) -> None:
        """To be called where `day` is not the calendar's; months begin with days."""
        self.day, self.day_base = calendar.day, self.spent
        if self.month != calendar.month:
            self.month, self.month_base = calendar.month, self.spent
        self._draw_up()

    def know(self, day_spent: int, month_spent: int) -> None:
        """That at least so much was spent in its day and month."""
        self.day_base = min(self.day_base, self.spent - day_spent)
        self.month_base = min(self.month_base, self.spent - month_spent)
        self._draw_up()

    def _draw_up(self) -> None:
        self.budget = min(self.day_base + self.day_limit, self.month_base + self.month_limit)

    def is_idle(self, now: float) -> bool:
        """Nothing in flight and all buckets full: a new one would be the same but for what was spent."""
        return not self.concurrent and self.requests_full <= now and self.tokens_full <= now


class Limits:
    """The accounts of all subjects; one owner's. Holders are whatever names a request uniquely.

    share: the owner's part of every limit, where several hosts serve the same subjects. At least 1 is left of each.
    """

    __slots__ = ("_accounts", "_calendar", "_held", "_past", "_share", "_turns")

    def __init__(self, share: float = 1.0) -> None:
        self._share = share
        self._calendar = Calendar()
        self._accounts: dict[str, Account] = {}
        self._turns: deque[Account] = deque()  # all accounts, the next that `expire` looks at first
        self._held: dict[Hashable, tuple[list[Account], int, float]] = {}
        # What subjects without an account have spent: the day, its tokens, the month, its tokens.
        self._past: dict[str, tuple[int, int, int, int]] = {}

    def __len__(self) -> int:
        """Subjects that have an account."""
        return len(self._accounts)

    @property
    def in_flight(self) -> int:
        return len(self._held)

    def reserve(self, claim: Claim, holder: Hashable, now: float, wall: float) -> Standing:
        """Takes what the claim asks for from all its subjects.

        ServeError budget_spent, concurrency_limit, tokens_limit or requests_limit where one has no room; then nothing
        was taken from any. The rule that says so is the one with the longest wait, budgets before all others.
        """
        assert holder not in self._held, "a holder reserves once"
        fits = True
        accounts = self._find(claim, now, wall)
        for one in accounts:
            if (
                one.requests_full - now > one.requests_room
                or one.tokens_full - now >= one.tokens_room
                or one.concurrent >= one.concurrent_limit
                or one.spent + one.reserved >= one.budget
            ):
                fits = False
        if not fits:
            raise refusal_of(accounts, self._calendar, self._share, now, wall)
        tokens = claim.tokens
        for one in accounts:
            one.concurrent += 1
            one.reserved += tokens
            if one.request_cost:
                full = one.requests_full
                one.requests_full = (full if full > now else now) + one.request_cost  # noqa: FURB136 - half the time
            if one.token_cost:
                full = one.tokens_full
                one.tokens_full = (full if full > now else now) + tokens * one.token_cost  # noqa: FURB136
        self._held[holder] = (accounts, tokens, now)
        return Standing(headers_of(accounts, now))

    def adopt(self, claim: Claim, holder: Hashable, now: float, wall: float) -> None:
        """Takes over a request that another owner let in: never refused, and no debt, because the minute that it began
        in may be long past. Does nothing for one that is held already."""
        if holder in self._held:
            return
        accounts = self._find(claim, now, wall)
        for one in accounts:
            one.concurrent += 1
            one.reserved += claim.tokens
            empty = now + MINUTE
            full = max(one.requests_full, now)
            one.requests_full = max(full, min(full + one.request_cost, empty))
            full = max(one.tokens_full, now)
            one.tokens_full = max(full, min(full + claim.tokens * one.token_cost, empty))
        self._held[holder] = (accounts, claim.tokens, now)

    def settle(self, holder: Hashable, tokens: int | None, now: float, wall: float) -> None:
        """The request has ended and used so many tokens (None: nothing but the estimate is known), which count in the
        day and month of `wall`. Does nothing for a holder that is not known."""
        held = self._held.pop(holder, None)
        if held is None:
            return
        accounts, estimate, since = held
        calendar = self._calendar
        if not calendar.begins <= wall < calendar.ends:
            self._look(now, wall)
        used = estimate if tokens is None else tokens
        more = used - estimate
        for one in accounts:
            if one.day != calendar.day:
                one.turn(calendar)
            one.concurrent -= 1
            one.reserved -= estimate
            one.spent += used
            one.hold_seconds += (now - since - one.hold_seconds) * 0.125
            full = one.tokens_full
            one.tokens_full = (now if more > 0 and full < now else full) + more * one.token_cost

    def release(self, holder: Hashable, now: float, wall: float) -> None:
        """The request never ran: gives back all that it took. Does nothing for a holder that is not known."""
        held = self._held.pop(holder, None)
        if held is None:
            return
        accounts, estimate, _ = held
        for one in accounts:
            one.concurrent -= 1
            one.reserved -= estimate
            one.requests_full -= one.request_cost
            one.tokens_full -= estimate * one.token_cost

    def seed(self, spent: Mapping[str, tuple[int, int]], wall: float) -> None:
        """What subjects have spent already in the day and the month of `wall`; all that they did, so that it may be
        said again: where more is known here, that counts."""
        calendar = self._calendar
        if not calendar.begins <= wall < calendar.ends:
            self._look(inf, wall)
        for name, (day_spent, month_spent) in spent.items():
            one = self._accounts.get(name)
            if one is None:
                day, day_known, month, month_known = self._past.get(name, (-1, 0, -1, 0))
                self._past[name] = (
                    calendar.day,
                    max(day_spent, day_known) if day == calendar.day else day_spent,
                    calendar.month,
                    max(month_spent, month_known) if month == calendar.month else month_spent,
                )
                continue
            if one.day != calendar.day:
                one.turn(calendar)
            one.know(day_spent, month_spent)

    def expire(self, now: float) -> None:
        """Forgets accounts that are idle, all but what they spent this month. Looks at some of them: call it about
        once a second."""
        for _ in range(min(len(self._turns), len(self._turns) // 256 + _LOOKED_AT)):
            one = self._turns.popleft()
            if not one.is_idle(now):
                self._turns.append(one)
                continue
            del self._accounts[one.name]
            if one.spent > one.month_base and one.month == self._calendar.month:
                self._past[one.name] = (one.day, one.spent - one.day_base, one.month, one.spent - one.month_base)

    def _find(self, claim: Claim, now: float, wall: float) -> list[Account]:
        """The accounts of a claim's subjects, with the limits of the claim and the day of `wall`."""
        calendar = self._calendar
        if not calendar.begins <= wall < calendar.ends:
            self._look(now, wall)
        day = calendar.day
        found = []
        for subject in claim.subjects:
            one = self._accounts.get(subject.name)
            if one is None:
                one = self._open(subject, now)
            elif one.rates is not subject.rates and one.rates != subject.rates:
                one.allow(subject.rates, self._share, now)
            if one.day != day:
                one.turn(calendar)
            found.append(one)
        return found

    def _look(self, now: float, wall: float) -> None:
        month = self._calendar.month
        self._calendar.look(now, wall)
        if self._calendar.month != month:
            self._past = {}

    def _open(self, subject: Subject, now: float) -> Account:
        one = self._accounts[subject.name] = Account(subject.name, subject.rates, self._share, now)
        self._turns.append(one)
        one.turn(self._calendar)
        day, day_spent, month, month_spent = self._past.pop(subject.name, (-1, 0, -1, 0))
        one.know(day_spent if day == one.day else 0, month_spent if month == one.month else 0)
        return one


def _part(limit: int | None, share: float) -> float:
    """An owner's part of a limit; inf for none."""
    if limit is None:
        return inf
    return max(1, limit if share == 1 else floor(limit * share + 1e-6))


def _moved(full: float, cost: float, limit: float, now: float) -> float:
    """When a bucket will be full under another limit, of which no more is left than was under the old."""
    if full <= now or not cost or limit == inf:
        return now
    return now + MINUTE - min(limit, (now + MINUTE - full) / cost) * (MINUTE / limit)


def duration(seconds: float) -> str:
    """As OpenAI writes it: `12ms`, `1s`, `6m0s`, `1h0m0s`. Rounded up."""
    if seconds < 1:
        return _MILLISECONDS[ceil(seconds * 1000 - 1e-3)] if seconds > 0 else "0s"
    whole = ceil(seconds - 1e-6)
    if whole <= 60:
        return _SECONDS[whole]
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"


def headers_of(accounts: list[Account], now: float) -> bytes:
    """The lines of a `Standing`."""
    by_requests = by_tokens = None
    requests = tokens = inf
    for one in accounts:
        if not one.shown:
            continue
        if one.request_cost:
            ahead = one.requests_full - now
            left = (MINUTE - ahead if ahead > 0 else MINUTE) / one.request_cost
            if left < requests:
                requests, by_requests = left, one
        if one.token_cost:
            ahead = one.tokens_full - now
            left = (MINUTE - ahead if ahead > 0 else MINUTE) / one.token_cost
            if left < tokens:
                tokens, by_tokens = left, one
    lines = ""
    if by_requests is not None:
        whole, reset = int(requests + 1e-3) if requests > 0 else 0, duration(by_requests.requests_full - now)
        lines = f"{by_requests.requests_head}{whole}\r\nx-ratelimit-reset-requests: {reset}\r\n"
    if by_tokens is not None:
        whole, reset = int(tokens + 1e-3) if tokens > 0 else 0, duration(by_tokens.tokens_full - now)
        lines += f"{by_tokens.tokens_head}{whole}\r\nx-ratelimit-reset-tokens: {reset}\r\n"
    return lines.encode()


def refusal_of(accounts: list[Account], calendar: Calendar, share: float, now: float, wall: float) -> ServeError:
    """Of all rules that have no room the one with the longest wait; a budget before any other."""
    rules = [rule for one in accounts for rule in _without_room(one, calendar, now, wall)]
    _, wait, code, one = max(rules, key=lambda rule: rule[:2])
    message = f"The {one.name.replace(':', ' `', 1)}` {_complaint(one, code, wait, calendar, share)}"
    error = ServeError(_CODES.get(code, code), message, retry_after=max(1, min(60, ceil(wait))))
    error.headers = headers_of(accounts, now)
    return error


def _without_room(
    one: Account, calendar: Calendar, now: float, wall: float
) -> Iterator[tuple[bool, float, str, Account]]:
    """The rules of one account that refuse: whether it is a budget, seconds to wait, code or period, the account."""
    until_one_ends = one.hold_seconds / max(1, one.concurrent)
    for limit, ends, period in (
        (one.day_base + one.day_limit, calendar.ends, "day"),
        (one.month_base + one.month_limit, calendar.month_ends, "month"),
    ):
        if one.spent >= limit:
            yield True, ends - wall, period, one
        elif one.spent + one.reserved >= limit:
            yield False, until_one_ends, "held", one
    if one.concurrent >= one.concurrent_limit:
        yield False, until_one_ends, "concurrency_limit", one
    wait = one.tokens_full - now
    if wait - one.reserved * one.token_cost < one.tokens_room <= wait:
        yield False, until_one_ends, "held", one
    elif wait >= one.tokens_room:
        # At the very time it is still empty.
        yield False, floor(wait - MINUTE + 1e-6) + 1, "tokens_limit", one
    wait = one.requests_full - now
    if wait > one.requests_room:
        yield False, wait - one.requests_room, "requests_limit", one


def _complaint(one: Account, code: str, wait: float, calendar: Calendar, share: float) -> str:
    rates = one.rates
    if code == "requests_limit":
        limit = _said(rates.requests_per_minute, share)
        return f"may send {limit} requests per minute, and has. Try again in {duration(wait)}."
    if code == "tokens_limit":
        limit = _said(rates.tokens_per_minute, share)
        return f"may use {limit} tokens per minute, and has. Try again in {duration(wait)}."
    if code == "held":
        return "has no tokens left but those that its running requests may use. Try again when one of them has ended."
    if code == "concurrency_limit":
        limit = _said(rates.concurrent, share)
        return f"may have {limit} requests running at once, and has. Try again when one of them has ended."
    if code == "day":
        limit, ends = _said(rates.tokens_per_day, share), calendar.ends
    else:
        limit, ends = _said(rates.tokens_per_month, share), calendar.month_ends
    until = datetime.fromtimestamp(ends, UTC)
    return (
        f"has used its budget of {limit} tokens for this {code}. The next {code} begins at {until:%Y-%m-%d %H:%M} UTC."
    )


def _said(limit: int | None, share: float) -> str:
    return f"{limit}" if share == 1 else f"{limit} (here {_part(limit, share)})"

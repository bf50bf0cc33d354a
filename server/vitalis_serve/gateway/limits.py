"""What keys, tenants and routes may use: requests and tokens per minute, requests at once, tokens per day and month.

A request reserves an estimate under all its subjects or under none, and settles to what it used. Minutes are token
buckets that settlement may push into debt; days and months are UTC's. Pure: `now` is monotonic seconds, `wall` Unix
seconds.
"""

import time
from calendar import timegm
from collections import deque
from collections.abc import Hashable, Mapping
from math import ceil, floor, inf
from typing import Final

import msgspec

from vitalis_serve.errors import ServeError

DAY: Final = 86_400
LONGEST_MONTH: Final = 31 * DAY
# What float rounding may leave of the one request that a bucket must hold.
_ONE: Final = 1 - 1e-6
_EXPIRE_ROUND: Final = 64
_MILLISECONDS: Final = ("0s", *(f"{n}ms" for n in range(1, 1000)))


class Rates(msgspec.Struct, frozen=True):
    """Limits of one key, tenant or route; None: no limit of that kind. All above 0."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


class Subject(msgspec.Struct, frozen=True, array_like=True):
    """Who is limited: `key:<id>`, `tenant:<name>` or `route:<name>`, and how much it may use as its snapshot says."""

    name: str
    rates: Rates


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """What one request asks for. tokens: the estimate of prompt and output together."""

    subjects: tuple[Subject, ...]
    tokens: int


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """How a request that was let in stands. headers: whole lines `x-ratelimit-*`, as OpenAI's; b"" where no limit by
    the minute applies."""

    headers: bytes = b""


class _Calendar:
    """Which UTC day and month budgets are counted in.

    A clock that is set back does not open a day again: the later one goes on, until a day's (or month's) time has
    passed by the monotonic clock. So no set clock gives a budget twice, nor stops one for ever.
    """

    __slots__ = ("_day_since", "_month_begins", "_month_since", "begins", "day", "ends", "month", "month_ends")

    def __init__(self) -> None:
        self.day = self.month = 0
        self.begins, self.ends = inf, -inf
        self._month_begins, self.month_ends = inf, -inf
        self._day_since = self._month_since = inf

    def look(self, now: float, wall: float) -> None:
        """To be called where `wall` is not between `begins` and `ends`. `now`: inf where it is not known."""
        self._day_since = min(self._day_since, now)
        self._month_since = min(self._month_since, now)
        if wall >= self.ends or now - self._day_since >= DAY:
            self.day = floor(wall / DAY)
            self.begins, self.ends, self._day_since = self.day * DAY, self.day * DAY + DAY, now
            if wall >= self.month_ends or now - self._month_since >= LONGEST_MONTH:
                date = time.gmtime(wall)
                self.month = date.tm_year * 12 + date.tm_mon
                self._month_begins = timegm((date.tm_year, date.tm_mon, 1, 0, 0, 0))
                self.month_ends = timegm((date.tm_year, date.tm_mon + 1, 1, 0, 0, 0))
                self._month_since = now


class _Account:
    """One subject's state. A limit that is not set is inf, with a rate of 0, so that no rule asks whether it is."""

    __slots__ = (
        "at", "concurrent", "concurrent_limit", "day", "day_limit", "day_spent", "hold_seconds", "month", "month_limit",
        "month_spent", "name", "rates", "request_head", "requests", "requests_limit", "requests_rate", "reserved",
        "shown", "token_head", "tokens", "tokens_limit", "tokens_rate",
    )  # fmt: skip

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        # What is left of a route's limit would show one tenant what the others do.
        self.shown = not name.startswith("route:")
        self.at = now
        self.requests = self.tokens = inf
        self.concurrent = 0
        self.reserved = 0  # tokens that requests in flight are expected to use
        self.day = self.month = 0
        self.day_spent = self.month_spent = 0
        self.hold_seconds = 0.0  # how long its requests run: moving average

    def allow(self, rates: Rates, share: float) -> None:
        """Takes other limits. What is left of a minute stays, up to the new limit; spent budgets stay spent."""
        self.rates = rates
        self.requests_limit = _part(rates.requests_per_minute, share)
        self.tokens_limit = _part(rates.tokens_per_minute, share)
        self.requests_rate = 0.0 if self.requests_limit == inf else self.requests_limit / 60
        self.tokens_rate = 0.0 if self.tokens_limit == inf else self.tokens_limit / 60
        self.requests = min(self.requests, self.requests_limit)
        self.tokens = min(self.tokens, self.tokens_limit)
        self.concurrent_limit = _part(rates.concurrent, share)
        self.day_limit = _part(rates.tokens_per_day, share)
        self.month_limit = _part(rates.tokens_per_month, share)
        self.request_head = _head("requests", self.requests_limit)
        self.token_head = _head("tokens", self.tokens_limit)

    def refill(self, now: float) -> None:
        elapsed = now - self.at
        if elapsed > 0:
            self.at = now
            level = self.requests + elapsed * self.requests_rate
            self.requests = min(self.requests_limit, level)
            level = self.tokens + elapsed * self.tokens_rate
            self.tokens = min(self.tokens_limit, level)

    def turn(self, calendar: _Calendar) -> None:
        if self.day != calendar.day:
            self.day, self.day_spent = calendar.day, 0
        if self.month != calendar.month:
            self.month, self.month_spent = calendar.month, 0

    @property
    def is_idle(self) -> bool:
        """Nothing in flight and full: a new account would be the same, but for what was spent."""
        return not self.concurrent and self.requests == self.requests_limit and self.tokens == self.tokens_limit


class Limits:
    """The accounts of all subjects. One owner; holders are whatever names a request uniquely.

    share: this owner's part of every limit (at least 1 is left of each), where several hosts serve the same subjects.
    """

    __slots__ = ("_accounts", "_calendar", "_held", "_past", "_share", "_turn")

    def __init__(self, share: float = 1.0) -> None:
        self._share = share
        self._calendar = _Calendar()
        self._accounts: dict[str, _Account] = {}
        self._turn: deque[_Account] = deque()  # all accounts, in the order in which `expire` looks at them
        self._held: dict[Hashable, tuple[list[_Account], int, float]] = {}
        # What subjects without an account have spent: day, its tokens, month, its tokens.
        self._past: dict[str, tuple[int, int, int, int]] = {}

    def __len__(self) -> int:
        """Subjects with an account."""
        return len(self._accounts)

    @property
    def in_flight(self) -> int:
        return len(self._held)

    def reserve(self, claim: Claim, holder: Hashable, now: float, wall: float) -> Standing:
        """Takes what the claim asks for from all its subjects. ServeError budget_spent, concurrency_limit,
        tokens_limit or requests_limit where one of them has no room: then nothing was taken."""
        assert holder not in self._held, "a holder reserves once"
        accounts, refused = self._find(claim, now, wall)
        for one in accounts:
            one.refill(now)
            if (
                one.requests < _ONE
                or one.tokens <= 0
                or one.concurrent >= one.concurrent_limit
                or one.day_spent + one.reserved >= one.day_limit
                or one.month_spent + one.reserved >= one.month_limit
            ):
                refused = True
        if refused:
            raise self._refusal(accounts, wall)
        for one in accounts:
            one.requests -= 1
            one.tokens -= claim.tokens
            one.concurrent += 1
            one.reserved += claim.tokens
        self._held[holder] = (accounts, claim.tokens, now)
        return Standing(_headers(accounts))

    def adopt(self, claim: Claim, holder: Hashable, now: float, wall: float) -> None:
        """Takes over a request that another owner let in: never refused, and never into debt, as most of what it took
        there has come back since. Does nothing for one that is held already."""
        if holder in self._held:
            return
        accounts, _ = self._find(claim, now, wall)
        for one in accounts:
            one.refill(now)
            one.requests -= min(1, max(0, one.requests))
            one.tokens -= min(claim.tokens, max(0, one.tokens))
            one.concurrent += 1
            one.reserved += claim.tokens
        self._held[holder] = (accounts, claim.tokens, now)

    def settle(self, holder: Hashable, tokens: int | None, now: float, wall: float) -> None:
        """The request has ended and used so many tokens (None: the estimate is all that is known). They count in the
        day and month of `wall`. Does nothing for a holder that is not known."""
        held = self._held.pop(holder, None)
        if held is None:
            return
        accounts, estimate, since = held
        used = estimate if tokens is None else tokens
        self._look(now, wall)
        for one in accounts:
            one.refill(now)
            one.turn(self._calendar)
            one.tokens = min(one.tokens + (estimate - used), one.tokens_limit)
            one.concurrent -= 1
            one.reserved -= estimate
            one.day_spent += used
            one.month_spent += used
            one.hold_seconds += (now - since - one.hold_seconds) / 8

    def release(self, holder: Hashable, now: float, wall: float) -> None:
        """The request never ran: all that it took is given back. Does nothing for a holder that is not known."""
        held = self._held.pop(holder, None)
        if held is None:
            return
        accounts, estimate, _ = held
        self._look(now, wall)
        for one in accounts:
            one.refill(now)
            one.tokens = min(one.tokens + estimate, one.tokens_limit)
            one.requests = min(one.requests + 1, one.requests_limit)
            one.concurrent -= 1
            one.reserved -= estimate

    def seed(self, spent: Mapping[str, tuple[int, int]], wall: float) -> None:
        """What subjects have spent already in the day and the month of `wall`. What is known of them here is a part of
        that: the larger counts."""
        self._look(inf, wall)
        calendar = self._calendar
        for name, (day, month) in spent.items():
            one = self._accounts.get(name)
            if one is not None:
                one.turn(calendar)
                one.day_spent, one.month_spent = max(one.day_spent, day), max(one.month_spent, month)
            else:
                self._past[name] = (calendar.day, day, calendar.month, month)

    def expire(self, now: float) -> None:
        """Forgets subjects that are idle. Looks at a few at a time: call it about once a second."""
        turn = self._turn
        for _ in range(min(len(turn), len(turn) // 64 + _EXPIRE_ROUND)):
            one = turn.popleft()
            one.refill(now)
            if not one.is_idle:
                turn.append(one)
                continue
            del self._accounts[one.name]
            if one.month_spent:
                self._past[one.name] = (one.day, one.day_spent, one.month, one.month_spent)

    def _look(self, now: float, wall: float) -> None:
        calendar = self._calendar
        if not calendar.begins <= wall < calendar.ends:
            calendar.look(now, wall)

    def _find(self, claim: Claim, now: float, wall: float) -> tuple[list[_Account], bool]:
        self._look(now, wall)
        found = []
        for subject in claim.subjects:
            one = self._accounts.get(subject.name)
            if one is None:
                one = self._open(subject, now)
            elif one.rates is not subject.rates and one.rates != subject.rates:
                one.refill(now)
                one.allow(subject.rates, self._share)
            one.turn(self._calendar)
            found.append(one)
        return found, False

    def _open(self, subject: Subject, now: float) -> _Account:
        one = self._accounts[subject.name] = _Account(subject.name, now)
        self._turn.append(one)
        one.allow(subject.rates, self._share)
        past = self._past.pop(subject.name, None)
        if past is not None:
            one.day, one.day_spent, one.month, one.month_spent = past
        return one

    def _refusal(self, accounts: list[_Account], wall: float) -> ServeError:
        refusals = [refusal for one in accounts for refusal in _refusals(one, self._calendar, wall)]
        _, wait, code, message = max(refusals, key=lambda refusal: refusal[:2])
        error = ServeError(code, message, retry_after=max(1, min(60, ceil(wait))))
        error.headers = _headers(accounts)
        return error


def _part(limit: int | None, share: float) -> float:
    """An owner's part of a limit; inf for none."""
    if limit is None:
        return inf
    return limit if share == 1 else max(1, floor(limit * share + 1e-6))


def _head(kind: str, limit: float) -> str:
    return "" if limit == inf else f"x-ratelimit-limit-{kind}: {limit}\r\nx-ratelimit-remaining-{kind}: "


def duration(seconds: float) -> str:
    """As OpenAI writes it: `12ms`, `1s`, `6m0s`, `1h0m0s`. Rounded up."""
    milliseconds = ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return _MILLISECONDS[max(milliseconds, 0)]
    minutes, rest = divmod(ceil(seconds - 1e-6), 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"


def _headers(accounts: list[_Account]) -> bytes:
    shown = [one for one in accounts if one.shown]
    lines = ""
    by_requests = min(shown, key=lambda one: one.requests, default=None)
    if by_requests is not None and by_requests.requests_rate:
        reset = (by_requests.requests_limit - by_requests.requests) / by_requests.requests_rate
        left = max(0, int(by_requests.requests + 1e-6))
        lines += f"{by_requests.request_head}{left}\r\nx-ratelimit-reset-requests: {duration(reset)}\r\n"
    by_tokens = min(shown, key=lambda one: one.tokens, default=None)
    if by_tokens is not None and by_tokens.tokens_rate:
        reset = (by_tokens.tokens_limit - by_tokens.tokens) / by_tokens.tokens_rate
        left = max(0, int(by_tokens.tokens + 1e-6))
        lines += f"{by_tokens.token_head}{left}\r\nx-ratelimit-reset-tokens: {duration(reset)}\r\n"
    return lines.encode()


def _refusals(one: _Account, calendar: _Calendar, wall: float) -> list[tuple[bool, float, str, str]]:
    """Which of an account's rules refuse: whether for good, seconds to wait, code, message."""
    kind, _, name = one.name.partition(":")
    whose = f"The {kind} `{name}`"
    rates = one.rates
    made: list[tuple[bool, float, str, str]] = []
    for spent, limit, asked, period, ends in (
        (one.day_spent, one.day_limit, rates.tokens_per_day, "day", calendar.ends),
        (one.month_spent, one.month_limit, rates.tokens_per_month, "month", calendar.month_ends),
    ):
        if spent + one.reserved >= limit:
            until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ends))
            text = f"{whose} has used its {_said(asked, limit)} tokens of this {period}; the next begins at {until}."
            made.append((True, ends - wall, "budget_spent", text))
    if one.concurrent >= one.concurrent_limit:
        text = f"{whose} may have {_said(rates.concurrent, one.concurrent_limit)} requests running at once, and has."
        wait = one.hold_seconds / max(1, one.concurrent)
        made.append((False, wait, "concurrency_limit", f"{text} Try again when one of them has ended."))
    if one.tokens <= 0:
        wait = floor(-one.tokens / one.tokens_rate) + 1
        text = f"{whose} may use {_said(rates.tokens_per_minute, one.tokens_limit)} tokens per minute, and has used"
        made.append((False, wait, "tokens_limit", f"{text} them. Try again in {duration(wait)}."))
    if one.requests < _ONE:
        wait = (1 - one.requests) / one.requests_rate
        text = f"{whose} may send {_said(rates.requests_per_minute, one.requests_limit)} requests per minute, and has"
        made.append((False, wait, "requests_limit", f"{text} sent them. Try again in {duration(wait)}."))
    return made


def _said(limit: int | None, part: float) -> str:
    return f"{limit}" if limit == part else f"{limit} ({part} on this host)"

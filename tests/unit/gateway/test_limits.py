"""Limits: who is let in, what is taken and given back, and what refused clients are told."""

import calendar
from typing import Any

import pytest
from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.limits import Claim, Limits, Rates, Subject, duration
from vitalis_serve.gateway.replies import error_reply

# 2024-02-28, 12:00 UTC: a leap day lies ahead.
WALL = float(calendar.timegm((2024, 2, 28, 12, 0, 0)))
HOUR = 3600.0


def claim(tokens: int = 100, /, **rates: Rates) -> Claim:
    """`key=..., tenant=..., route=...`: subjects of these kinds, called a."""
    return Claim(tuple(Subject(f"{kind}:a", one) for kind, one in rates.items()), tokens)


class Site:
    """Limits with a clock of their own. `reserve` gives the headers, or the error's code."""

    def __init__(self, share: float = 1.0) -> None:
        self.limits = Limits(share)
        self.now = 1000.0
        self.wall = WALL
        self.held = 0
        self.error: ServeError | None = None

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds

    def reserve(self, asked: Claim) -> Any:
        self.held += 1
        try:
            return parsed(self.limits.reserve(asked, self.held, self.now, self.wall).headers)
        except ServeError as error:
            self.error = error
            return error.code

    def settle(self, tokens: int | None, holder: int | None = None) -> None:
        self.limits.settle(holder or self.held, tokens, self.now, self.wall)

    def spend(self, asked: Claim, tokens: int) -> Any:
        answer = self.reserve(asked)
        if not isinstance(answer, str):
            self.settle(tokens)
        return answer

    def release(self) -> None:
        self.limits.release(self.held, self.now, self.wall)


def parsed(headers: bytes) -> dict[str, str]:
    assert not headers or headers.endswith(b"\r\n")
    return dict(line.removeprefix("x-ratelimit-").split(": ") for line in headers.decode().split("\r\n") if line)


@pytest.fixture
def site() -> Site:
    return Site()


def test_requests_of_a_minute_and_their_return(site: Site) -> None:
    asked = claim(key=Rates(requests_per_minute=3))
    assert [site.reserve(asked) for _ in range(3)] == [
        {"limit-requests": "3", "remaining-requests": "2", "reset-requests": "20s"},
        {"limit-requests": "3", "remaining-requests": "1", "reset-requests": "40s"},
        {"limit-requests": "3", "remaining-requests": "0", "reset-requests": "1m0s"},
    ]
    assert site.reserve(asked) == "requests_limit"
    assert site.error is not None
    assert site.error.message == "The key `a` may send 3 requests per minute, and has. Try again in 20s."
    assert site.error.retry_after == 20
    assert parsed(site.error.headers)["remaining-requests"] == "0"
    site.wait(19.9)
    assert site.reserve(asked) == "requests_limit"
    site.wait(0.1)
    assert site.reserve(asked) == {"limit-requests": "3", "remaining-requests": "0", "reset-requests": "1m0s"}
    site.wait(3600)
    assert site.reserve(asked)["remaining-requests"] == "2"


def test_tokens_of_a_minute_go_into_debt_and_come_back(site: Site) -> None:
    asked = claim(100, key=Rates(tokens_per_minute=600))
    assert site.spend(asked, 100) == {"limit-tokens": "600", "remaining-tokens": "500", "reset-tokens": "10s"}
    assert site.reserve(asked)["remaining-tokens"] == "400"
    site.settle(1500)  # 1000 below 0
    assert site.reserve(asked) == "tokens_limit"
    assert site.error is not None
    assert site.error.retry_after == 60
    assert "600 tokens per minute, and has. Try again in 1m41s." in site.error.message
    assert parsed(site.error.headers) == {"limit-tokens": "600", "remaining-tokens": "0", "reset-tokens": "2m40s"}
    site.wait(100)
    assert site.reserve(asked) == "tokens_limit", "at 0"
    assert site.error.retry_after == 1
    site.wait(1)
    assert site.reserve(asked)["remaining-tokens"] == "0"


def test_settling_gives_back_what_was_not_used_but_never_more_than_a_full_bucket(site: Site) -> None:
    asked = claim(500, key=Rates(tokens_per_minute=600))
    site.reserve(asked)
    site.settle(20)
    assert site.reserve(asked)["remaining-tokens"] == "80"
    site.wait(60)  # full again, with its request still running
    site.settle(20)
    assert site.reserve(asked)["remaining-tokens"] == "100"


def test_a_debt_is_not_paid_with_time_before_it(site: Site) -> None:
    asked = claim(1, key=Rates(tokens_per_minute=60))
    site.reserve(asked)
    site.wait(3600)
    site.settle(100)
    assert site.reserve(asked) == "tokens_limit"
    assert site.error is not None
    assert site.error.retry_after == 40  # 60 - 99 leaves 39 to pay, and one to be above 0


def test_a_request_that_never_ran_gives_all_back(site: Site) -> None:
    asked = claim(600, key=Rates(1, 600, 1, 600, 600))
    for _ in range(3):
        assert site.reserve(asked)["remaining-tokens"] == "0"
        site.release()
    site.spend(asked, 600)
    assert site.reserve(asked) == "budget_spent"


def test_requests_at_once(site: Site) -> None:
    asked = claim(tenant=Rates(concurrent=2))
    assert site.reserve(asked) == site.reserve(asked) == {}
    site.wait(12)
    assert site.reserve(asked) == "concurrency_limit"
    assert site.error is not None
    assert site.error.message == (
        "The tenant `a` may have 2 requests running at once, and has. Try again when one of them has ended."
    )
    assert site.error.retry_after == 1
    site.settle(1, 1)
    assert site.reserve(asked) == {}


def test_who_waits_for_a_place_is_told_how_long_places_are_held(site: Site) -> None:
    asked = claim(tenant=Rates(concurrent=2))
    for _ in range(40):
        site.reserve(asked)
        site.wait(30)
        site.settle(1)
    site.reserve(asked)
    site.reserve(asked)
    assert site.reserve(asked) == "concurrency_limit"
    assert site.error is not None
    assert site.error.retry_after == 15


@pytest.mark.parametrize(
    ("rates", "period", "until", "hours"),
    [
        (Rates(tokens_per_day=1000), "day", "2024-02-29 00:00", 12),
        (Rates(tokens_per_month=1000), "month", "2024-03-01 00:00", 36),
    ],
)
def test_a_budget_comes_back_with_the_next_utc_day_or_month(
    site: Site, rates: Rates, period: str, until: str, hours: float
) -> None:
    asked = claim(10, key=rates)
    assert site.spend(asked, 999) == {}
    assert site.spend(asked, 500) == {}, "the one in flight may go over"
    assert site.reserve(asked) == "budget_spent"
    assert site.error is not None
    assert site.error.message == (
        f"The key `a` has used its budget of 1000 tokens for this {period}. The next {period} begins at {until} UTC."
    )
    reply = error_reply(site.error, "chat", b"r", keep_alive=True)
    assert b"x-should-retry: false\r\n" in reply
    site.wait(hours * HOUR - 1)
    assert site.reserve(asked) == "budget_spent"
    site.wait(1)
    assert site.reserve(asked) == {}


def test_a_year_ends_in_december(site: Site) -> None:
    site.wall = float(calendar.timegm((2024, 12, 31, 23, 0, 0)))
    asked = claim(10, key=Rates(tokens_per_month=10))
    site.spend(asked, 10)
    assert site.reserve(asked) == "budget_spent"
    assert site.error is not None
    assert "begins at 2025-01-01 00:00 UTC" in site.error.message
    site.wait(HOUR)
    assert site.spend(asked, 10) == {}
    assert site.reserve(asked) == "budget_spent"


def test_estimates_in_flight_count_in_a_budget(site: Site) -> None:
    asked = claim(500, key=Rates(tokens_per_day=1000))
    site.reserve(asked)
    site.reserve(asked)
    assert site.reserve(asked) == "tokens_limit"  # to be tried again, unlike a budget that is spent
    assert site.error is not None
    assert "no tokens left but those that its running requests may use" in site.error.message
    site.settle(100, 1)
    assert site.reserve(asked) == {}


def test_tokens_of_a_minute_that_running_requests_may_use_are_promised_to_nobody_else(site: Site) -> None:
    asked = claim(600, key=Rates(tokens_per_minute=1000))
    site.reserve(asked)
    site.reserve(asked)
    assert site.reserve(asked) == "tokens_limit"
    assert site.error is not None
    assert "running requests" in site.error.message
    site.settle(600, 1)
    site.settle(600, 2)
    assert site.reserve(asked) == "tokens_limit"
    assert "may use 1000 tokens per minute, and has" in site.error.message


def test_what_runs_over_midnight_counts_where_it_ends(site: Site) -> None:
    asked = claim(10, key=Rates(tokens_per_day=1000))
    site.spend(asked, 700)
    site.reserve(asked)
    site.wait(12 * HOUR)
    site.settle(600)
    assert site.spend(asked, 400) == {}
    assert site.reserve(asked) == "budget_spent"


def test_all_rules_or_none(site: Site) -> None:
    key, tenant = Rates(5, 5000, 5, 5000, 5000), Rates(concurrent=1)
    site.reserve(claim(tenant=tenant))
    for _ in range(20):
        assert site.reserve(claim(100, key=key, tenant=tenant)) == "concurrency_limit"
    assert site.reserve(claim(100, key=key)) == {
        "limit-requests": "5", "remaining-requests": "4", "reset-requests": "12s",
        "limit-tokens": "5000", "remaining-tokens": "4900", "reset-tokens": "2s",
    }  # fmt: skip
    assert site.limits.in_flight == 2


@pytest.mark.parametrize(
    ("rates", "used", "code"),
    [
        (Rates(1, 60), 60, "requests_limit"),  # a minute against a second
        (Rates(1, 60), 150, "tokens_limit"),  # a minute against 91 seconds
        (Rates(1, 60, 1), 150, "tokens_limit"),
        (Rates(1, 60, 1), 60, "requests_limit"),
        (Rates(60, 60, 1), 0, "concurrency_limit"),
        (Rates(1, 60, 1, 150), 150, "budget_spent"),
    ],
)
def test_the_refusal_is_the_one_with_the_longest_wait_budgets_first(
    site: Site, rates: Rates, used: int, code: str
) -> None:
    asked = claim(0, key=rates)
    site.limits.adopt(asked, "a long one", site.now, site.wall)  # keeps the place
    site.wait(60)
    site.limits.adopt(asked, "used", site.now, site.wall)
    site.limits.settle("used", used, site.now, site.wall)
    assert site.reserve(asked) == code


def test_the_longer_of_two_spent_budgets_is_named(site: Site) -> None:
    asked = claim(10, key=Rates(tokens_per_day=10, tokens_per_month=10))
    site.spend(asked, 10)
    assert site.reserve(asked) == "budget_spent"
    assert site.error is not None
    assert "for this month" in site.error.message


def test_headers_are_of_the_tightest(site: Site) -> None:
    asked = claim(100, key=Rates(10, 10_000), tenant=Rates(1000, 5000))
    assert site.reserve(asked) == {
        "limit-requests": "10", "remaining-requests": "9", "reset-requests": "6s",
        "limit-tokens": "5000", "remaining-tokens": "4900", "reset-tokens": "2s",
    }  # fmt: skip


def test_a_routes_standing_is_no_tenants_to_see(site: Site) -> None:
    route = Rates(1, 100)
    assert site.reserve(claim(100, route=route)) == {}
    assert site.reserve(claim(100, tenant=Rates(10), route=route)) == "requests_limit"
    assert site.error is not None
    assert parsed(site.error.headers) == {"limit-requests": "10", "remaining-requests": "10", "reset-requests": "0s"}


def test_other_limits_hold_at_once_and_give_no_fresh_bucket(site: Site) -> None:
    def asked(limit: int | None, concurrent: int | None = None) -> Claim:
        return claim(10, key=Rates(limit, limit and limit * 10, concurrent))

    for _ in range(60):
        site.reserve(asked(60))
    for limit in (120, 60, 6000, 60):
        assert site.reserve(asked(limit)) in ("requests_limit", "tokens_limit"), "raised or lowered: nothing is left"
    site.wait(0.5)
    assert site.reserve(asked(60)) in ("requests_limit", "tokens_limit")
    assert site.reserve(asked(6000)) in ("requests_limit", "tokens_limit")
    site.wait(0.1)
    assert site.reserve(asked(6000))["remaining-requests"] == "9", "0.5 of before, and 10 of a tenth of a second"
    assert site.reserve(asked(2))["remaining-requests"] == "1"
    assert site.reserve(asked(None, 4)) == "concurrency_limit"
    assert site.reserve(asked(None)) == {}


def test_spent_budgets_stay_spent_under_another_limit(site: Site) -> None:
    site.spend(claim(key=Rates(concurrent=9)), 800)  # no budget yet
    assert site.reserve(claim(key=Rates(tokens_per_day=800))) == "budget_spent"
    assert site.reserve(claim(key=Rates(tokens_per_day=801))) == {}


def test_a_host_has_its_part_of_every_limit() -> None:
    site = Site(share=1 / 3)
    rates = Rates(30, 600, 2, 300, 900)
    asked = claim(1, key=rates)
    assert site.reserve(asked) == {
        "limit-requests": "10", "remaining-requests": "9", "reset-requests": "6s",
        "limit-tokens": "200", "remaining-tokens": "199", "reset-tokens": "300ms",
    }  # fmt: skip
    assert site.reserve(asked) == "concurrency_limit", "at least 1, and no more"
    assert site.error is not None
    assert "2 (here 1) requests" in site.error.message
    site.settle(100, 1)
    assert site.reserve(asked) == "budget_spent"


def test_adopted_requests_count_but_are_never_refused_nor_a_debt(site: Site) -> None:
    asked = claim(100, key=Rates(2, 150, 2, 250))
    for holder in "abcd":
        site.limits.adopt(asked, holder, site.now, site.wall)
        site.limits.adopt(asked, holder, site.now, site.wall)
    assert site.limits.in_flight == 4
    assert site.reserve(asked) in ("tokens_limit", "requests_limit")
    for holder in "abcd":
        site.limits.settle(holder, 50, site.now, site.wall)
    assert site.limits.in_flight == 0
    assert site.reserve(asked) == "requests_limit"
    site.wait(30)
    assert site.reserve(asked)["remaining-requests"] == "0"
    site.settle(50)
    site.wait(30)
    assert site.reserve(asked) == "budget_spent"


def test_an_unknown_holder_changes_nothing(site: Site) -> None:
    asked = claim(100, key=Rates(10, 1000, 1))
    site.reserve(asked)
    site.settle(100)
    site.settle(100)
    site.release()
    assert site.reserve(asked)["remaining-tokens"] == "800"
    assert site.reserve(asked) == "concurrency_limit"


def test_where_only_the_estimate_is_known_it_counts(site: Site) -> None:
    asked = claim(700, key=Rates(tokens_per_day=700))
    site.reserve(asked)
    site.settle(None)
    assert site.reserve(asked) == "budget_spent"


class TestSeed:
    def test_budgets_survive_a_restart(self, site: Site) -> None:
        site.limits.seed({"key:a": (400, 5000), "key:b": (9, 9)}, site.wall)
        assert site.reserve(claim(key=Rates(tokens_per_day=400))) == "budget_spent"
        assert site.reserve(claim(key=Rates(tokens_per_month=5000))) == "budget_spent"
        assert site.reserve(claim(key=Rates(tokens_per_day=401, tokens_per_month=5001))) == {}

    def test_a_seed_is_of_its_day_and_month(self, site: Site) -> None:
        site.limits.seed({"key:a": (400, 5000)}, site.wall)
        site.wait(12 * HOUR)
        assert site.spend(claim(key=Rates(tokens_per_day=400)), 0) == {}
        assert site.reserve(claim(key=Rates(tokens_per_month=5000))) == "budget_spent"
        site.wait(24 * HOUR)
        assert site.reserve(claim(key=Rates(tokens_per_month=5000))) == {}

    def test_a_clock_set_back_opens_no_day_again(self, site: Site) -> None:
        asked = claim(key=Rates(tokens_per_day=100, tokens_per_month=10**6))
        site.limits.seed({}, site.wall)
        site.wait(12 * HOUR)
        site.spend(asked, 100)
        for _ in range(3):
            site.wall -= 13 * HOUR
            site.limits.seed({"key:b": (1, 1)}, site.wall)
            assert site.reserve(asked) == "budget_spent"
            site.wall += 13 * HOUR
            assert site.reserve(asked) == "budget_spent"

    def test_said_again_or_late_the_larger_counts(self, site: Site) -> None:
        rates = Rates(tokens_per_day=500)
        site.spend(claim(key=rates), 300)
        for _ in range(3):
            site.limits.seed({"key:a": (400, 400)}, site.wall)
        assert site.spend(claim(key=rates), 99) == {}
        site.limits.seed({"key:a": (100, 100)}, site.wall)
        assert site.spend(claim(key=rates), 1) == {}
        assert site.reserve(claim(key=rates)) == "budget_spent"

    def test_what_a_forgotten_account_spent_is_not_made_less(self, site: Site) -> None:
        rates = Rates(tokens_per_day=500)
        site.spend(claim(key=rates), 500)
        site.limits.expire(site.now)
        site.limits.seed({"key:a": (100, 600)}, site.wall)
        assert site.reserve(claim(key=rates)) == "budget_spent"
        assert site.reserve(claim(key=Rates(tokens_per_month=600))) == "budget_spent"


class TestClock:
    """Midnight of a clock that is not to be trusted."""

    def test_set_back_and_forth_over_midnight_it_gives_one_budget(self, site: Site) -> None:
        asked = claim(10, key=Rates(tokens_per_day=100))
        site.spend(asked, 100)
        site.wait(12 * HOUR)
        assert site.spend(asked, 100) == {}
        for _ in range(5):
            site.wall -= 2 * HOUR
            assert site.reserve(asked) == "budget_spent"
            site.wait(2 * HOUR)
            assert site.reserve(asked) == "budget_spent"

    def test_set_right_after_years_ahead_it_goes_on_with_days(self, site: Site) -> None:
        asked = claim(10, key=Rates(tokens_per_day=100, tokens_per_month=300))
        site.wall += 10 * 365 * 24 * HOUR
        site.spend(asked, 100)
        site.wall -= 10 * 365 * 24 * HOUR
        assert site.reserve(asked) == "budget_spent"
        site.wait(24 * HOUR)
        assert site.spend(asked, 100) == {}
        assert site.reserve(asked) == "budget_spent"
        site.wait(24 * HOUR)
        assert site.spend(asked, 100) == {}
        site.wait(24 * HOUR)
        assert site.reserve(asked) == "budget_spent", "the month's"
        site.wait(31 * 24 * HOUR)
        assert site.reserve(asked) == {}

    def test_set_back_by_years_it_neither_fails_nor_stops_budgets_for_years(self, site: Site) -> None:
        asked = claim(10, key=Rates(tokens_per_day=100))
        site.spend(asked, 100)
        site.wall = 1000.0
        assert site.reserve(asked) == "budget_spent"
        site.wait(24 * HOUR)
        assert site.spend(asked, 100) == {}
        assert site.reserve(asked) == "budget_spent"
        site.wait(24 * HOUR)
        assert site.spend(asked, 100) == {}


class TestExpire:
    def test_idle_subjects_are_forgotten_and_their_spending_is_not(self, site: Site) -> None:
        rates = Rates(60, 600, 5, 100)
        for n in range(300):
            site.spend(Claim((Subject(f"key:{n}", rates),), 10), 100 if n == 7 else 10)
        site.reserve(Claim((Subject("key:8", rates),), 10))
        site.limits.expire(site.now)
        assert len(site.limits) == 300, "not full yet"
        site.wait(30)
        for _ in range(10):
            site.limits.expire(site.now)
        assert len(site.limits) == 1, "the one that runs"
        assert site.reserve(Claim((Subject("key:7", rates),), 10)) == "budget_spent"
        assert site.reserve(Claim((Subject("key:9", rates),), 10))["remaining-tokens"] == "590"

    def test_debts_are_not_forgotten(self, site: Site) -> None:
        site.spend(claim(1, key=Rates(tokens_per_minute=60)), 6000)
        site.wait(5000)
        site.limits.expire(site.now)
        assert len(site.limits) == 1
        site.wait(1000)
        site.limits.expire(site.now)
        assert len(site.limits) == 0

    @pytest.mark.parametrize(("rates", "full"), [(Rates(2), 30), (Rates(None, 200), 30), (Rates(2, 200), 30)])
    def test_a_bucket_is_kept_until_it_is_full(self, site: Site, rates: Rates, full: float) -> None:
        site.spend(claim(100, key=rates), 100)
        site.wait(full - 0.1)
        site.limits.expire(site.now)
        assert len(site.limits) == 1
        site.wait(0.1)
        site.limits.expire(site.now)
        assert len(site.limits) == 0

    def test_a_call_looks_at_a_part_of_many(self, site: Site) -> None:
        for n in range(2000):
            site.spend(Claim((Subject(f"key:{n}", Rates(60)),), 1), 0)
        site.wait(60)
        site.limits.expire(site.now)
        assert 1900 < len(site.limits) < 2000
        for _ in range(100):
            site.limits.expire(site.now)
        assert len(site.limits) == 0

    def test_what_was_spent_in_a_past_month_is_forgotten_too(self, site: Site) -> None:
        for n in range(50):
            site.spend(Claim((Subject(f"key:{n}", Rates(60)),), 1), 10)
        site.wait(60)
        site.limits.expire(site.now)
        assert len(site.limits._past) == 50
        site.wait(48 * HOUR)
        site.spend(claim(key=Rates(60)), 10)
        assert not site.limits._past


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"), (0, "0s"), (0.0001, "1ms"), (0.012, "12ms"), (0.0121, "13ms"), (0.9999, "1s"), (1, "1s"),
        (1.2, "2s"), (59.5, "1m0s"), (60, "1m0s"), (61, "1m1s"), (360, "6m0s"), (3600, "1h0m0s"), (90061, "25h1m1s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_errors_headers_are_in_its_reply() -> None:
    error = ServeError("tokens_limit", "Slower.", retry_after=7)
    plain = error_reply(error, "chat", b"r", keep_alive=True)
    error.headers = b"x-ratelimit-limit-tokens: 9\r\n"
    head, _, body = error_reply(error, "chat", b"r", keep_alive=True).partition(b"\r\n\r\n")
    assert b"\r\nx-ratelimit-limit-tokens: 9\r\n" in head
    assert b"\r\nretry-after: 7\r\n" in head
    assert head.replace(b"x-ratelimit-limit-tokens: 9\r\n", b"") + b"\r\n\r\n" + body == plain

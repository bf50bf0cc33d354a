"""What may be tried again, how often, and within which share of the traffic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitalis_serve.gateway.retries import LOOKS_DEAD, RETRIED, SLICES, RetryBudget, may_retry


def ask(kind: str = "connect", tries: int = 1, died: int = 0, relayed: bool = False) -> bool:
    return may_retry(kind, tries, died, relayed, RetryBudget(), 0.0)


@pytest.mark.parametrize(
    "kind",
    [
        "connect",
        "reset",
        "cut",
        "status_500",
        "status_502",
        "status_503",
        "first_token_timeout",
        "aborted",
        "in_stream_error",
        "gone",
    ],
)
def test_what_another_replica_may_do_better_is_retried(kind: str) -> None:
    assert ask(kind)
    assert not ask(kind, relayed=True)


@pytest.mark.parametrize("kind", ["status_429", "status_400", "status_504", "idle_timeout"])
def test_what_another_replica_would_not_do_better_is_not(kind: str) -> None:
    assert not ask(kind)


def test_two_retries_at_most() -> None:
    assert [ask("status_503", tries) for tries in (1, 2, 3)] == [True, True, False]


def test_one_retry_at_most_after_a_death() -> None:
    assert ask("reset", tries=1, died=1)
    assert not ask("reset", tries=2, died=1)  # the second engine it meets is its last
    assert not ask("status_503", tries=2, died=1)
    assert ask("reset", tries=2, died=2)  # the first try only met a busy one
    assert LOOKS_DEAD < RETRIED


def test_a_few_retries_are_allowed_without_traffic_then_no_more() -> None:
    budget = RetryBudget(at_least=3, seconds=60)
    for second in range(3):
        assert may_retry("connect", 1, 0, False, budget, second)
        budget.spend(second)
    assert not may_retry("connect", 1, 0, False, budget, 3.0)
    assert not budget.allows(54.0)
    assert budget.allows(60.0 + 60 / SLICES)


def test_a_tenth_of_the_traffic() -> None:
    budget = RetryBudget()
    spent = 0
    for n in range(1000):
        budget.came(n / 100)
        if budget.allows(n / 100):
            budget.spend(n / 100)
            spent += 1
    assert spent == 100


def test_traffic_that_is_over_counts_no_more() -> None:
    budget = RetryBudget()
    for _ in range(1000):
        budget.came(0.0)
    for _ in range(100):
        assert budget.allows(50.0)
        budget.spend(50.0)
    assert not budget.allows(50.0)
    for _ in range(100):
        budget.came(70.0)
    assert not budget.allows(70.0)  # 100 retries against 100 requests
    assert budget.allows(200.0)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.5, 4.0, 5.0, 31.0, 1e5]), st.integers(0, 60), st.integers(0, 9)))
)
def test_retries_stay_within_their_share_of_any_traffic(story: list[tuple[float, int, int]]) -> None:
    """Whenever one is granted. A slice is dropped whole, so what counts reaches back 55 to 60 seconds."""
    budget, now = RetryBudget(share=0.1, at_least=3, seconds=60), 1e6
    came: list[float] = []
    spent: list[float] = []
    for seconds, requests, wanted in story:
        now += seconds
        for _ in range(requests):
            budget.came(now)
            came.append(now)
        for _ in range(wanted):
            if budget.allows(now):
                budget.spend(now)
                spent.append(now)
                lately = sum(now - at < 60 - 60 / SLICES - 1e-6 for at in spent)
                assert lately <= max(3, 0.1 * sum(now - at <= 60 + 1e-6 for at in came))
            else:
                assert sum(now - at <= 60 + 1e-6 for at in spent) >= 3, "refused though few were spent"

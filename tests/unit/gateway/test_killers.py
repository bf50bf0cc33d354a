"""Who was there at two deaths is refused, who was there at one is not, and nobody for ever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.killers import NOTE_SECONDS, Killers, digest

BODY = b'{"model":"m","messages":[]}'
OTHER = b'{"model":"m","messages":{}}'  # of the same length


def refused(killers: Killers, body: bytes, now: float) -> bool:
    try:
        killers.check(body, now)
    except ServeError:
        return True
    return False


def failed(killers: Killers, body: bytes, replica: str, incarnation: int, now: float) -> None:
    killers.failed(replica, incarnation, digest(body), len(body), now)


def kills(killers: Killers, body: bytes, replica: str, incarnation: int, now: float) -> None:
    failed(killers, body, replica, incarnation, now)
    killers.died(replica, incarnation, now + 1)


def test_two_deaths_and_it_is_refused_for_an_hour() -> None:
    killers = Killers()
    kills(killers, BODY, "e0", 1, 0.0)
    assert not refused(killers, BODY, 2.0)
    kills(killers, BODY, "e1", 1, 10.0)
    assert refused(killers, BODY, 12.0)
    assert not refused(killers, OTHER, 12.0)
    assert refused(killers, BODY, 11.0 + 3599)
    assert not refused(killers, BODY, 11.0 + 3600)
    killers.expire(11.0 + 3600)
    assert len(killers) == 0


def test_the_refusal_is_one_that_nobody_tries_again() -> None:
    killers = Killers()
    kills(killers, BODY, "e0", 1, 0.0)
    kills(killers, BODY, "e0", 2, 10.0)
    with pytest.raises(ServeError, match="2 engines crashed, so it is refused for another 60 min") as caught:
        killers.check(BODY, 11.0)
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")
    assert killers.refusals == 1


def test_all_in_flight_are_marked_and_each_once_per_death() -> None:
    killers = Killers()
    for body in (BODY, BODY, OTHER):
        failed(killers, body, "e0", 1, 0.0)
    assert killers.died("e0", 1, 1.0) == 2
    assert killers.died("e0", 1, 1.1) == 0
    failed(killers, BODY, "e0", 1, 1.2)  # heard of after the death
    assert not refused(killers, BODY, 2.0)
    assert len(killers) == 2


def test_who_was_there_at_one_death_is_not_refused_beside_who_was_at_two() -> None:
    killers = Killers()
    failed(killers, OTHER, "e0", 1, 0.0)
    kills(killers, BODY, "e0", 1, 0.0)
    kills(killers, BODY, "e1", 1, 10.0)
    assert refused(killers, BODY, 12.0)
    assert not refused(killers, OTHER, 12.0)


def test_a_loss_heard_of_after_the_death_counts() -> None:
    killers = Killers()
    kills(killers, BODY, "e0", 1, 0.0)
    killers.died("e1", 7, 5.0)
    failed(killers, BODY, "e1", 7, 5.1)
    assert refused(killers, BODY, 6.0)


def test_a_failure_without_a_death_is_none() -> None:
    killers = Killers()
    for incarnation in range(5):
        failed(killers, BODY, "e0", incarnation, 0.0)
    assert killers.died("e0", 1, NOTE_SECONDS + 1) == 0
    killers.expire(NOTE_SECONDS + 1)
    assert killers.died("e0", 2, 1.0) == 0
    assert not refused(killers, BODY, 40.0)


def test_a_good_end_clears_the_bystander_but_not_who_met_two_deaths() -> None:
    killers = Killers()
    failed(killers, BODY, "e0", 1, 0.0)
    killers.cleared(digest(BODY))  # before the death is known
    assert killers.died("e0", 1, 1.0) == 0
    kills(killers, BODY, "e0", 2, 10.0)
    killers.cleared(digest(BODY))  # after
    kills(killers, BODY, "e0", 3, 20.0)
    assert not refused(killers, BODY, 22.0)
    kills(killers, BODY, "e0", 4, 30.0)
    killers.cleared(digest(BODY))
    assert refused(killers, BODY, 32.0)


def test_deaths_an_hour_apart_do_not_add_up() -> None:
    killers = Killers(seconds=100)
    kills(killers, BODY, "e0", 1, 0.0)
    kills(killers, BODY, "e0", 2, 200.0)
    assert not refused(killers, BODY, 202.0)
    kills(killers, BODY, "e0", 3, 210.0)
    assert refused(killers, BODY, 212.0)


def test_replicas_that_are_gone_are_forgotten() -> None:
    killers = Killers()
    killers.died("e0", 1, 0.0)
    killers.keep(frozenset({"e1"}))
    failed(killers, BODY, "e0", 1, 0.1)
    assert len(killers) == 0


def test_digest_tells_bodies_apart() -> None:
    assert digest(BODY) != digest(OTHER)
    assert len(digest(BODY)) == 16


events = st.lists(
    st.tuples(
        st.sampled_from(["failed", "died", "cleared", "expire"]),
        st.integers(0, 11),
        st.sampled_from(["e0", "e1"]),
        st.integers(1, 3),
        st.sampled_from([0.0, 1.0, 20.0, 60.0]),
    ),
    max_size=80,
)


@given(events)
def test_bounded_and_exact_whatever_happens(story: list[tuple[str, int, str, int, float]]) -> None:
    """Nobody is refused without two different deaths; memory is bounded; once all is over nothing is left."""
    killers, now = Killers(seconds=100, entries=8), 0.0
    bodies = [b"x" * (n // 2) + b"%02d" % n for n in range(12)]
    deaths: dict[int, set[tuple[str, int]]] = {n: set() for n in range(12)}
    failures: dict[int, set[tuple[str, int]]] = {n: set() for n in range(12)}
    dead: set[tuple[str, int]] = set()
    for what, n, replica, incarnation, seconds in story:
        now += seconds
        if what == "failed":
            failed(killers, bodies[n], replica, incarnation, now)
            failures[n].add((replica, incarnation))
        elif what == "died":
            killers.died(replica, incarnation, now)
            dead.add((replica, incarnation))
        elif what == "cleared":
            killers.cleared(digest(bodies[n]))
        else:
            killers.expire(now)
        for m in range(12):
            deaths[m] |= failures[m] & dead
            assert len(deaths[m]) >= 2 or not refused(killers, bodies[m], now)
        assert len(killers) <= 8
    killers.expire(now + 101)
    assert len(killers) == 0
    assert not killers.refused
    assert not killers._notes

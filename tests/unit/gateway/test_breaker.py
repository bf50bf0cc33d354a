"""The breaker's life: opened by failures in a row, one probe at a time, never open for ever."""

import pytest
from vitalis_serve.errors import CODES
from vitalis_serve.gateway.breaker import SICK, BreakerOptions, Breakers, State

OPTIONS = BreakerOptions(failures=3, first_seconds=2, longest_seconds=8, probe_seconds=100)


def breakers(**incarnations: int) -> Breakers:
    made = Breakers(OPTIONS)
    made.update(incarnations or {"e0": 1, "e1": 1})
    return made


def opened(now: float = 0.0) -> Breakers:
    made = breakers()
    assert [made.failed(n, "e0", 1, now) for n in range(3)] == [None, None, True]
    return made


def half_open(now: float = 2.0) -> Breakers:
    made = opened(now - 2.0)
    assert made.tick(now) == ["e0"]
    return made


def test_failures_in_a_row_open_it_for_one_replica_only() -> None:
    made = opened()
    assert made.state("e0") is State.OPEN
    assert made.openings == {"e0": 1, "e1": 0}
    assert not made.begins("a", "e0", 1, 0.1).goes
    assert made.begins("a", "e1", 1, 0.1) == (True, False, None)


def test_an_answer_in_between_starts_the_count_anew() -> None:
    made = breakers()
    for _ in range(10):
        assert made.failed("a", "e0", 1, 0.0) is None
        assert made.failed("b", "e0", 1, 0.0) is None
        assert made.answered("c", "e0", 1) is None
    assert made.state("e0") is State.CLOSED


def test_busy_answers_errors_and_harmony_are_no_sickness() -> None:
    assert not {kind for kind in SICK if kind.startswith("status_")}
    assert not SICK & {"aborted", "in_stream_error", "no_token", "protocol", "truncated"}
    assert SICK & CODES.keys() == {"first_token_timeout", "idle_timeout"}


def test_back_off_ends_in_one_probe_whose_answer_closes() -> None:
    made = opened()
    assert made.tick(1.9) == []
    assert made.tick(2.0) == ["e0"]
    assert made.tick(2.1) == []
    assert made.begins("a", "e0", 1, 2.1) == (True, True, True)
    assert made.begins("b", "e0", 1, 2.1) == (False, False, None)
    assert made.answered("b", "e0", 1) is None  # sent before it opened: says nothing of now
    assert made.state("e0") is State.HALF_OPEN
    assert made.answered("a", "e0", 1) is False
    assert made.state("e0") is State.CLOSED
    assert made.ended("a", "e0", 1) is None


def test_failed_probes_make_the_back_off_longer_up_to_its_bound() -> None:
    made, now, waits = opened(), 0.0, []
    for probe in range(5):
        due = next(now + tenth / 10 for tenth in range(1000) if made.tick(now + tenth / 10))
        waits.append(round(due - now))
        now = due
        assert made.begins(probe, "e0", 1, now).probe
        assert made.failed(probe, "e0", 1, now) is None  # admission keeps away already
        assert made.state("e0") is State.OPEN
    assert waits == [2, 4, 8, 8, 8]


@pytest.mark.parametrize(("jitter", "seconds"), [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)])
def test_jitter_spreads_the_back_off(jitter: float, seconds: float) -> None:
    made = breakers()
    for n in range(3):
        made.failed(n, "e0", 1, 0.0, jitter)
    assert made.tick(seconds - 0.01) == []
    assert made.tick(seconds) == ["e0"]


def test_back_off_starts_small_again_after_a_recovery() -> None:
    made = half_open()
    made.begins("a", "e0", 1, 2.0)
    made.failed("a", "e0", 1, 2.0)
    assert made.tick(6.0) == ["e0"]
    made.begins("b", "e0", 1, 6.0)
    made.answered("b", "e0", 1)
    for n in range(3):
        made.failed(n, "e0", 1, 7.0)
    assert made.tick(9.0) == ["e0"]


def test_a_probe_whose_client_left_frees_its_place() -> None:
    made = half_open()
    assert made.begins("a", "e0", 1, 2.0).probe
    assert made.ended("b", "e0", 1) is None  # not the probe
    assert made.ended("a", "e0", 1) is False
    assert made.begins("b", "e0", 1, 2.0).probe


def test_a_probe_never_heard_of_again_is_given_up() -> None:
    made = half_open()
    made.begins("a", "e0", 1, 2.0)
    assert made.tick(101.9) == []
    assert made.tick(102.0) == ["e0"]
    assert made.begins("b", "e0", 1, 102.0).probe
    assert made.answered("a", "e0", 1) is None
    assert made.failed("a", "e0", 1, 103.0) is None
    assert made.state("e0") is State.HALF_OPEN


def test_old_failures_do_not_lengthen_the_back_off() -> None:
    made = opened()
    for n in range(50):
        assert made.failed(n, "e0", 1, 1.0) is None
    assert made.tick(2.0) == ["e0"]
    assert made.openings["e0"] == 1


def test_a_new_incarnation_starts_closed_and_hears_nothing_of_the_old() -> None:
    made = opened()
    assert made.update({"e0": 2, "e1": 1}) == ["e0"]
    assert made.begins("a", "e0", 2, 0.1) == (True, False, None)
    for n in range(5):
        assert made.failed(n, "e0", 1, 0.2) is None
    assert made.state("e0") is State.CLOSED


def test_an_unchanged_fleet_changes_nothing_and_a_gone_replica_is_forgotten() -> None:
    made = opened()
    assert made.update({"e0": 1, "e1": 1}) == []
    assert made.state("e0") is State.OPEN
    assert made.update({"e1": 1}) == []
    assert made.failed("a", "e0", 1, 1.0) is None
    assert made.openings == {"e1": 0}
    assert made.tick(10.0) == []

"""Which loads a sweep measures, against servers whose capacity is known."""

import pytest
from vitalis_load import sweeping
from vitalis_load.searching import Point, Step
from vitalis_load.sweeping import Bounds


def open_loop(load: float, *, capacity: float, slo_to: float, repeats: int = 1, **more) -> Point:
    """A server that answers at most `capacity` requests per second of 100 tokens, and meets the SLO up to `slo_to`."""
    answered, met = min(load, capacity), load <= slo_to
    return Point(
        **{
            "load": load,
            "requests_per_second": answered,
            "tokens_per_second": 100 * answered,
            "goodput": answered if met else answered * 0.2,
            "slo_met": met,
            "missed": [] if met else ["TTFT p99 900 ms, not 500 ms"],
            "requests": 2000,
            "repeats": repeats,
        }
        | more
    )


def closed(users: float, *, capacity: float, slo_to: float = 1e9, repeats: int = 1) -> Point:
    """Each user has 50 tokens/s for itself until `capacity` is shared."""
    tokens = min(50 * users, capacity)
    return Point(
        load=users, requests_per_second=tokens / 100, tokens_per_second=tokens, goodput=tokens / 100,
        slo_met=users <= slo_to, missed=[] if users <= slo_to else ["TPOT p99"], requests=500, repeats=repeats,
    )  # fmt: skip


def swept(bounds: Bounds, measure, points=()) -> list[Point]:
    points = list(points)
    while step := sweeping.next_step(points, bounds):
        points.append(measure(step))
        assert len(points) <= bounds.points + bounds.confirm
    return points


@pytest.mark.parametrize("slo_to", [0.6, 3.0, 7.3, 11.0])
@pytest.mark.parametrize("first", [0.5, 2.0, 16.0])
def test_the_highest_rate_under_the_slo_is_found_within_the_precision(slo_to, first):
    bounds = Bounds(unit="requests/s", first=first, most=100, least=0.1, precision=0.05)
    points = swept(bounds, lambda step: open_loop(step.load, capacity=10, slo_to=slo_to, repeats=step.repeats))
    found = sweeping.findings(points, bounds)
    highest = min(slo_to, 10 / (0.95 - 2 / 2000**0.5))
    assert highest / 1.07 <= found.best.load <= highest + 0.01
    assert found.best.repeats == 3, "the best one is measured in full"
    assert all(point.repeats == 1 for point in points[:-1])


@pytest.mark.parametrize("first", [1.0, 2.0, 3.0])
def test_a_quarter_more_of_few_users_is_one_more(first):
    bounds = Bounds(unit="users", first=first, most=100, least=first, growth=1.25, confirm=1, points=20)
    points = swept(bounds, lambda step: closed(step.load, capacity=1e9, slo_to=8))
    loads = [point.load for point in points]
    assert len(loads) == len(set(loads))
    assert sweeping.findings(points, bounds).best.load == 8
    assert loads[:3] == [first, first + 1, first + 2]


def test_fewer_users_are_tried_below_two():
    bounds = Bounds(unit="users", first=2, most=100, growth=1.25, confirm=1)
    points = swept(bounds, lambda step: closed(step.load, capacity=1e9, slo_to=1))
    assert [point.load for point in points] == [2, 1]


def test_what_lost_a_process_is_measured_again_and_decides_nothing():
    bounds = Bounds(unit="users", first=4, most=4, confirm=1)
    broken = closed(4, capacity=1e9)
    broken.partial = "process 1 was lost"
    assert sweeping.next_step([broken], bounds) == Step(4)
    assert sweeping.best([broken, broken], bounds) is None
    assert sweeping.next_step([broken, closed(4, capacity=1e9)], bounds) is None
    assert sweeping.best([broken, closed(4, capacity=1e9)], bounds).load == 4


def test_the_order_is_doubling_then_halving_the_gap():
    bounds = Bounds(unit="requests/s", first=1, most=64, confirm=1)
    points = swept(bounds, lambda step: open_loop(step.load, capacity=20, slo_to=5))
    assert [point.load for point in points] == [1, 2, 4, 8, 5.66, 4.76, 5.19]


def test_past_saturation_nothing_more_is_asked_for():
    bounds = Bounds(unit="requests/s", first=1, most=1000, confirm=1)
    points = swept(bounds, lambda step: open_loop(step.load, capacity=10, slo_to=1e9))
    assert max(point.load for point in points) == 16
    found = sweeping.findings(points, bounds)
    assert found.saturated
    assert 9 <= found.saturation.load <= 11
    assert "saturated from" in found.said


def test_requests_answered_late_do_not_hide_saturation():
    """Where the queue is only waited out, as many are answered as were asked for; the tokens per second tell."""
    bounds = Bounds(unit="requests/s", first=1, most=1000, confirm=1)

    def late(step: Step) -> Point:
        return open_loop(step.load, capacity=10, slo_to=1e9, requests_per_second=step.load)

    points = swept(bounds, late)
    assert max(point.load for point in points) <= 32


def test_a_few_requests_more_or_less_are_no_saturation():
    """Two seconds at these rates have so few requests that tokens/s say nothing."""
    due = {1.0: 2.0, 2.0: 3.5, 4.0: 5.5, 8.0: 7.0}
    points = [
        Point(
            load=load, offered_per_second=came, requests_per_second=came, tokens_per_second=tokens, goodput=came,
            requests=round(2 * came),
        )
        for (load, came), tokens in zip(due.items(), [45, 88, 89, 120], strict=True)
    ]  # fmt: skip
    assert sweeping.holding(points, "requests/s") == points


def test_users_are_whole_and_a_plateau_ends_it():
    bounds = Bounds(unit="users", first=1, most=1024, confirm=1)
    points = swept(bounds, lambda step: closed(step.load, capacity=1600))
    loads = [point.load for point in points]
    assert loads == [1, 2, 4, 8, 16, 32, 64]
    found = sweeping.findings(points, bounds)
    assert (found.best.load, found.saturation.load, found.saturated) == (32, 32, True)


def test_users_under_an_slo_are_found_to_the_user():
    bounds = Bounds(unit="users", first=1, most=1024, precision=0.01, confirm=1)
    points = swept(bounds, lambda step: closed(step.load, capacity=1e9, slo_to=23))
    assert sweeping.best(points, bounds).load == 23
    assert not sweeping.findings(points, bounds).saturated


def test_no_load_that_holds_is_said_and_not_searched_for_ever():
    bounds = Bounds(unit="requests/s", first=4, most=64)
    points = swept(bounds, lambda step: open_loop(step.load, capacity=10, slo_to=0))
    assert [point.load for point in points] == [4, 2, 1, 0.5]
    found = sweeping.findings(points, bounds)
    assert found.best is None
    assert found.said.startswith("no load held: at 0.5 requests/s the SLO is missed (TTFT p99 900 ms, not 500 ms)")


def test_a_full_load_generator_ends_the_climb_is_asked_again_once_and_named():
    """It can send nine a second, of a server that could do more."""
    bounds = Bounds(unit="requests/s", first=1, most=64, confirm=1)
    points = swept(
        bounds,
        lambda step: open_loop(
            step.load, capacity=9, slo_to=1e9, client_bound="cpu 0.97 of a core" if step.load > 4 else ""
        ),
    )
    loads = [point.load for point in points]
    assert loads[:6] == [1, 2, 4, 8, 16, 16], "at 8 it was full too, and the server held all the same"
    assert all(loads.count(load) <= 2 for load in loads)
    found = sweeping.findings(points, bounds)
    assert 8 <= found.best.load <= 11.3
    assert "the load generator was full there, so the server may do better" in found.said
    assert "nothing can be said, since the load generator was full" in found.said


def test_a_load_generator_that_was_full_by_chance_changes_nothing():
    bounds = Bounds(unit="requests/s", first=1, most=8, confirm=1)
    disturbed = {4.0}

    def measure(step: Step) -> Point:
        late = step.load in disturbed
        disturbed.discard(step.load)
        return open_loop(
            step.load, capacity=20, slo_to=0 if late else 99, client_bound="another program" if late else ""
        )

    points = swept(bounds, measure)
    assert [point.load for point in points] == [1, 2, 4, 4, 8]
    assert sweeping.best(points, bounds).load == 8


def test_a_best_point_that_does_not_hold_when_repeated_is_not_the_best():
    bounds = Bounds(unit="requests/s", first=1, most=64, precision=0.05)

    def lucky(step: Step) -> Point:
        return open_loop(step.load, capacity=20, slo_to=9 if step.repeats == 1 else 7, repeats=step.repeats)

    points = swept(bounds, lucky)
    best = sweeping.best(points, bounds)
    assert best.load <= 7
    assert best.repeats == 3


def test_one_that_holds_above_one_that_does_not_was_luck():
    points = [
        open_loop(4, capacity=20, slo_to=5),
        open_loop(8, capacity=20, slo_to=5),
        open_loop(9, capacity=20, slo_to=99),
    ]
    assert [point.load for point in sweeping.holding(points, "requests/s")] == [4]


def test_what_was_measured_before_an_interruption_is_not_measured_again():
    bounds = Bounds(unit="requests/s", first=1, most=64)

    def measure(step: Step) -> Point:
        return open_loop(step.load, capacity=20, slo_to=5, repeats=step.repeats)

    whole = swept(bounds, measure)
    for cut in range(len(whole)):
        asked: list[Step] = []

        def noting(step: Step, asked=asked) -> Point:
            asked.append(step)
            return measure(step)

        assert swept(bounds, noting, whole[:cut]) == whole
        assert len(asked) == len(whole) - cut


def test_the_most_is_asked_for_and_no_more():
    bounds = Bounds(unit="requests/s", first=3, most=20, confirm=1)
    points = swept(bounds, lambda step: open_loop(step.load, capacity=1e9, slo_to=1e9))
    assert [point.load for point in points] == [3, 6, 12, 20]
    said = sweeping.findings(points, bounds).said
    assert said.endswith("no more was asked for (--most); saturation was not reached")

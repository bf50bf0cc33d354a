"""What is made of direct and gateway rounds."""

import pytest
from vitalis_load.overhead import Round, order, overhead, percentile
from vitalis_load.target import Target, alike


def one(way: str, pair: int, tokens: float, ttft_ms: float, cpu: float = 0.0, **more) -> Round:
    return Round(
        **{
            "way": way, "pair": pair, "seconds": 10, "whole_seconds": 12, "tokens_per_second": tokens,
            "requests": 400, "failed": 0, "events": 10_000, "gateway_cpu": cpu,
            "ttft": [ttft_ms / 1e3] * 99 + [ttft_ms / 1e3 * 3], "tpot": [0.010] * 100,
        }
        | more
    )  # fmt: skip


def test_the_ways_alternate_and_take_turns_at_being_first():
    assert order(4) == [
        (0, "direct"), (0, "gateway"), (1, "gateway"), (1, "direct"),
        (2, "direct"), (2, "gateway"), (3, "gateway"), (3, "direct"),
    ]  # fmt: skip


def test_what_drifts_is_no_overhead():
    """Each round is 10 % faster than the one before; the gateway costs 2 %."""
    rounds = []
    for index, (pair, way) in enumerate(order(8)):
        rounds.append(one(way, pair, 1000 * 1.1**index * (0.98 if way == "gateway" else 1), 50))
    found = overhead(rounds)
    assert 0.90 < found.ratio.median < 1.08
    assert found.ratio.mean == pytest.approx(0.98, rel=0.01)


def test_added_times_and_cpu_per_event():
    rounds = [
        each
        for pair in range(4)
        for each in (one("direct", pair, 1000, 50, cpu=0.12), one("gateway", pair, 990, 51, cpu=0.42))
    ]
    found = overhead(rounds)
    assert found.pairs == 4
    assert found.ratio.median == pytest.approx(0.99)
    assert found.ttft_p50.added == pytest.approx(1.0)
    assert found.ttft_p99.direct == pytest.approx(50)
    assert found.ttft_p50.pairs.min == pytest.approx(1.0)
    assert found.tpot_p50.added == 0
    assert found.cpu_idle == pytest.approx(0.01)
    assert found.cpu_us_per_event_gross == pytest.approx(42)
    assert found.cpu_us_per_event == pytest.approx(30), "0.42 s less 12 s of idling, over 10,000 events"
    assert found.doubts == []
    assert (found.requests, found.failed) == ({"direct": 1600, "gateway": 1600}, {"direct": 0, "gateway": 0})


def test_half_a_pair_is_left_out_and_doubts_are_said():
    rounds = [
        one("direct", 0, 1000, 50), one("gateway", 0, 900, 51, failed=3, client_bound="cpu 0.97 of a core"),
        one("gateway", 1, 1, 1),
    ]  # fmt: skip
    found = overhead(rounds)
    assert found.pairs == 1
    assert found.ratio.median == pytest.approx(0.9)
    assert found.doubts == [
        "so few pairs of rounds (1) say little: 3 or more show by how much they differ",
        "400 requests (direct) are few for a p99: it is one of the slowest 4",
        "the load generator was full in 1 of 1 rounds (gateway): cpu 0.97 of a core",
        "3 of 400 requests failed (gateway)",
        "400 requests (gateway) are few for a p99: it is one of the slowest 4",
    ]


def test_without_a_gateways_processes_there_is_no_cpu_and_without_tokens_no_ratio():
    found = overhead([one("direct", 0, 0, 50), one("gateway", 0, 0, 50, tpot=[])])
    assert (found.cpu_us_per_event, found.ratio, found.tpot_p50) == (None, None, None)
    assert overhead([]).pairs == 0


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (0.999, 100), (1.0, 100), (0.0, 1)])
def test_percentiles_are_values_that_were_seen(share, value):
    assert percentile(range(1, 101), share) == value
    assert percentile([], share) is None


def test_both_ways_are_timed_by_the_same_clock():
    socket, other = Target(url="unix:/run/e.sock"), Target(url="http://127.0.0.1:1")
    assert [one.stamps for one in alike(socket, other)] == [False, False]
    assert [one.stamps for one in alike(other, other)] == [True, True]

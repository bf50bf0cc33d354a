"""Durations added up over processes: what comes out is what went in, within three digits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitalis_load.histograms import Histogram, rank

durations = st.lists(st.floats(1e-6, 600), min_size=1, max_size=60)
SHARES = (50, 90, 95, 99, 99.9)


def of(values: list[float]) -> Histogram:
    made = Histogram()
    for value in values:
        made.add(value)
    return made


@given(first=durations, second=durations)
def test_added_up_and_passed_on_nothing_changes(first: list[float], second: list[float]) -> None:
    both = Histogram.decode(of(first).encode())
    both.merge(Histogram.decode(of(second).encode()))
    every = sorted(first + second)
    assert both.count == len(every)
    for share, found in zip(SHARES, both.percentiles(*SHARES), strict=True):
        exact = every[max(1, math.ceil(len(every) * share / 100 - 1e-9)) - 1]
        assert found == pytest.approx(exact, rel=1.01e-3, abs=1.5e-6)
        assert both.percentile(share) == found
    assert both.mean() == pytest.approx(sum(every) / len(every), rel=1e-3, abs=1.5e-6)
    assert both.minimum() == pytest.approx(every[0], rel=1.01e-3, abs=1.5e-6)
    assert both.maximum() == pytest.approx(every[-1], rel=1.01e-3, abs=1.5e-6)
    assert sum(count for _, _, count in both.bins()) == both.count


def test_the_same_added_in_one_and_in_many() -> None:
    one = Histogram()
    one.add(0.01, count=1000)
    assert one.encode() == of([0.01] * 1000).encode()


def test_many_that_differ_are_folded_on_the_way() -> None:
    many = Histogram()
    for microseconds in range(1, 50_001):
        many.add(microseconds / 1e6)
    assert many.count == 50_000
    assert many.percentile(50) == pytest.approx(0.025, rel=1e-3)


def test_beyond_its_range() -> None:
    odd = of([-1.0, 0.0, 3600.0])
    assert odd.count == 3
    assert odd.minimum() == 0
    assert odd.maximum() == pytest.approx(600, rel=1e-3)


def test_empty() -> None:
    empty = Histogram()
    assert (empty.count, empty.mean(), empty.minimum(), empty.maximum(), empty.percentile(99)) == (0, 0, 0, 0, 0)
    assert list(empty.bins()) == []
    back = Histogram.decode(empty.encode())
    assert back.count == 0
    back.merge(of([0.5]))
    back.merge(empty)
    assert (back.count, back.minimum()) == (1, pytest.approx(0.5, rel=1e-3))


@pytest.mark.parametrize("text", ["", "x", "AAAA", "HISTFAAAAAA=", "é", Histogram().encode()[:-9]])
def test_what_is_no_histogram(text: str) -> None:
    with pytest.raises(ValueError, match="no HdrHistogram"):
        Histogram.decode(text)


def test_rank() -> None:
    """The nearest rank: the first value that the share does not exceed."""
    assert [rank(share, 10) for share in (0, 10, 50, 51, 90, 99, 100)] == [1, 1, 5, 6, 9, 10, 10]
    assert [rank(99, count) for count in (1, 99, 100, 101, 1000)] == [1, 99, 99, 100, 990]
    assert rank(99.9, 1000) == 999

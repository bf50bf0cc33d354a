"""Things that come at changing rates, and how much of them came between two moments. Pure."""

import bisect
import math
from collections.abc import Iterable, Iterator

from simulator.regression import Row


class Course:
    """How much there was of several things up to a moment, each coming evenly between its changes."""

    def __init__(self, pieces: Iterable[tuple[float, Row]]) -> None:
        """`pieces`: a time, and how much of each comes a second from then on; in the order of time."""
        self._times: list[float] = []
        self._rates: list[Row] = []
        self._sums: list[Row] = []
        for at, rates in pieces:
            self._sums.append(self.until(at) if self._times else (0.0,) * len(rates))
            self._times.append(at)
            self._rates.append(rates)

    def until(self, when: float) -> Row:
        at = max(0, bisect.bisect_right(self._times, when) - 1)
        passed = max(0.0, when - self._times[at])
        return tuple(total + passed * rate for total, rate in zip(self._sums[at], self._rates[at], strict=True))

    def between(self, begin: float, end: float) -> Row:
        return tuple(max(0.0, b - a) for a, b in zip(self.until(begin), self.until(end), strict=True))


def pieces(parts: Iterable[tuple[float, float, Row]], count: int) -> Iterator[tuple[float, Row]]:
    """Of parts (from, to, how much a second of each of `count` things) that may overlap: their sums, by time."""
    changes = []
    for begin, end, rates in parts:
        changes += [(begin, rates), (end, tuple(-rate for rate in rates))]
    changes.sort()
    now = (0.0,) * count
    yield -math.inf if not changes else changes[0][0] - 1, now
    for at, change in changes:
        now = tuple(a + b for a, b in zip(now, change, strict=True))
        yield at, now

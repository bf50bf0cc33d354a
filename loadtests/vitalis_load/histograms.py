"""Durations as HdrHistograms: 1 us to 10 min with three digits, added up over processes and seconds."""

import math
import struct
import zlib
from collections.abc import Iterator

from hdrh.codec import HdrCookieException, HdrLengthException
from hdrh.histogram import HdrHistogram

MOST_MICROSECONDS = 600_000_000
_DIGITS = 3
_MOST_NOTED = 20_000
# What hdrh raises over bytes that are none.
_UNREADABLE = (
    zlib.error, struct.error, HdrCookieException, HdrLengthException, IndexError, TypeError, ValueError, RuntimeError,
)  # fmt: skip


class Histogram:
    """Durations in seconds. What is longer than 10 minutes counts as 10 minutes, what is below zero as zero."""

    def __init__(self) -> None:
        self._hdr = HdrHistogram(1, MOST_MICROSECONDS, _DIGITS)
        # Recording is pure Python and costs 2 us, a dict's count a tenth of it: they are recorded when somebody asks.
        self._noted: dict[int, int] = {}

    def add(self, seconds: float, count: int = 1) -> None:
        microseconds = round(seconds * 1e6)
        noted = self._noted
        noted[microseconds] = noted.get(microseconds, 0) + count
        if len(noted) > _MOST_NOTED:
            self._folded()

    def merge(self, other: "Histogram") -> None:
        if other.count:  # hdrh takes an empty one's minimum for zero
            self._folded().add(other._folded())  # noqa: SLF001 - another of the same class

    @property
    def count(self) -> int:
        return int(self._folded().total_count)

    def percentile(self, share: float) -> float:
        """The seconds that `share` (50, 99, 99.9) per cent of the durations do not exceed; 0 where there are none."""
        return self.percentiles(share)[0]

    def percentiles(self, *shares: float) -> list[float]:
        """As `percentile`, for ascending shares, in one pass."""
        found: list[float] = []
        count = self.count
        sum_so_far = 0
        if not count:
            return [0.0] * len(shares)
        wanted = [rank(share, count) for share in shares]
        for _, high, times in self.bins():
            sum_so_far += times
            while len(found) < len(wanted) and sum_so_far >= wanted[len(found)]:
                found.append(high)
        return found

    def mean(self) -> float:
        """In seconds; 0 where there are none."""
        count = self.count
        return sum((low + high) / 2 * times for low, high, times in self.bins()) / count if count else 0.0

    def minimum(self) -> float:
        return next((low for low, _, _ in self.bins()), 0.0)

    def maximum(self) -> float:
        return float(self._folded().get_max_value()) / 1e6

    def bins(self) -> Iterator[tuple[float, float, int]]:
        """What was measured, in ascending order: from (seconds), to (seconds), how many."""
        hdr = self._folded()
        if not hdr.total_count:
            return
        for index, count in enumerate(hdr.counts[: hdr.get_counts_array_index(hdr.max_value) + 1]):
            if count:
                low = hdr.get_value_from_index(index)
                yield low / 1e6, hdr.get_highest_equivalent_value(low) / 1e6, count

    def encode(self) -> str:
        """V2 compressed, base64, as `decode` and every HdrHistogram library read it."""
        return str(self._folded().encode().decode())

    @classmethod
    def decode(cls, text: str) -> "Histogram":
        """Raises ValueError where the text is no histogram of microseconds up to 10 minutes."""
        made = cls()
        try:
            decoded = HdrHistogram.decode(text.encode())
            if decoded.total_count:
                made._hdr.add(decoded)
        except _UNREADABLE as error:
            raise ValueError(f"no HdrHistogram: {error or type(error).__name__}") from None
        return made

    def _folded(self) -> HdrHistogram:
        for microseconds, count in self._noted.items():
            self._hdr.record_value(min(max(microseconds, 0), MOST_MICROSECONDS), count)
        self._noted.clear()
        return self._hdr


def rank(share: float, count: int) -> int:
    """Which of `count` ascending values, from 1, is the first that `share` per cent do not exceed (nearest rank)."""
    return min(count, max(1, math.ceil(count * share / 100 - 1e-9)))

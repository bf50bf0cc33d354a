"""The same figure of several repeats: its median, and how far it can be trusted."""

import functools
import math
import statistics
from collections.abc import Iterable

import msgspec


class Estimate(msgspec.Struct, kw_only=True):
    """One figure over the repeats that had it. The interval is the mean's, by Student's t; None for one repeat."""

    values: list[float]  # in the order of the repeats
    median: float
    mean: float
    min: float
    max: float
    low: float | None  # 95 % interval
    high: float | None
    deviation: float | None  # of the sample


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """None where no repeat had the figure."""
    had = [value for value in values if value is not None and math.isfinite(value)]
    if not had:
        return None
    mean = statistics.fmean(had)
    deviation = statistics.stdev(had) if len(had) > 1 else None
    half = None if deviation is None else t_quantile(0.975, len(had) - 1) * deviation / math.sqrt(len(had))
    return Estimate(
        values=had,
        median=statistics.median(had),
        mean=mean,
        min=min(had),
        max=max(had),
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        deviation=deviation,
    )


@functools.lru_cache(maxsize=256)
def t_quantile(share: float, freedom: float) -> float:
    """The value below which Student's t with `freedom` degrees (need not be whole) lies with probability `share`."""
    low, high = 0.0, 1.0
    target = max(share, 1 - share)
    while t_share(high, freedom) < target:
        low, high = high, high * 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, freedom) < target else (low, middle)
    return high if share >= 0.5 else -high


def t_share(value: float, freedom: float) -> float:
    """The probability that Student's t with `freedom` degrees lies below `value`."""
    tail = _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + value * value)) / 2
    return 1 - tail if value > 0 else tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised, by its continued fraction, which converges quickly on the side that is taken."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    tiny = 1e-300
    result, c, d = 1.0, 1.0, 0.0
    for i in range(400):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        result *= c * d
        if abs(1 - c * d) < 1e-12:
            break
    return front * (result - 1)

"""From values to places in a drawing, with ticks at round numbers."""

import math
from collections.abc import Iterable, Sequence

FAR = 3  # times the highest value: a limit beyond is not drawn to scale


class Axis:
    """Of values between `low` and `high`; `start` and `end` are where these are drawn."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def place(self, value: float) -> float:
        """What lies outside is drawn at the edge."""
        value = min(self.high, max(self.low, value))
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, about: int = 4) -> list[float]:
        return _round_log(self.low, self.high, about) if self.log else _round(self.low, self.high, about)


def from_zero(values: Iterable[float], start: float, end: float, *, least: float = 0.0) -> Axis:
    """From 0 to a round number above all; `least` is the lowest that this number may be."""
    most = max((*values, least))
    if most <= 0:
        most = 1.0
    ticks = _round(0, most, 4)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else most
    return Axis(0, max(math.ceil(most / step - 1e-9) * step, step), start, end)


def around(values: Iterable[float], start: float, end: float) -> Axis:
    """Logarithmic, from a little below the least to a little above the most. Values must be above 0."""
    had = [value for value in values if value > 0] or [0.001, 1]
    low, high = min(had), max(had)
    if high / low < 1.5:
        low, high = low / 1.25, high * 1.25
    room = (high / low) ** 0.06
    return Axis(low / room, high * room, start, end, log=True)


def reaching(values: Sequence[float], limit: float | None) -> list[float]:
    """The values, and the limit where it is not so far above them that they would shrink to a line."""
    return [*values, limit] if limit is not None and limit < FAR * max(values, default=0) else list(values)


def _round(low: float, high: float, about: int) -> list[float]:
    if high <= low:
        return [low]
    raw = (high - low) / max(1, about)
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= raw * 0.75)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(count)]


def _round_log(low: float, high: float, about: int) -> list[float]:
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [
            factor * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for factor in factors
            if low <= factor * 10.0**power <= high
        ]
        if len(ticks) >= min(3, about):
            break
    else:
        ticks = [tick for tick in _round(low, high, about) if tick > 0]
    while len(ticks) > about + 2:
        ticks = ticks[::2]
    return ticks

"""How the load goes over time: a factor on the rate or on the number of users.

Every shape is a line through knots (seconds, factor); two knots at the same second are a jump. So the load expected up
to any moment, and the moment by which a given load is due, are exact (`Course`).
"""

from bisect import bisect_right
from math import ceil, sqrt
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer

from vitalis_load.lengths import STRICT, assumed

Knots = list[tuple[float, float]]

MOST_FACTOR = 1000


class Moment(float):
    """Seconds, or a share of the shape's `seconds` where it is written as "40%"."""

    share: bool = False

    def of(self, seconds: float) -> float:
        """In seconds, not beyond the end."""
        return min(seconds, float(self) * seconds if self.share else float(self))

    def __str__(self) -> str:
        return f"{float(self) * 100:g}%" if self.share else f"{float(self):g}"


def _moment(value: Any) -> Any:
    if isinstance(value, Moment):
        return value
    text = value[:-1].strip() if isinstance(value, str) and value.endswith("%") else None
    try:
        number = float(value if text is None else text)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool) or not 0 <= number < 1e9 or (text is not None and number > 100):
        raise ValueError('must be seconds (30), or a share of the whole ("40%")')
    moment = Moment(number / 100 if text is not None else number)
    moment.share = text is not None
    return moment


When = Annotated[
    Any,
    BeforeValidator(_moment),
    PlainSerializer(lambda moment: str(moment) if isinstance(moment, Moment) and moment.share else moment),
    Field(json_schema_extra={"type": ["number", "string"]}),
]
Factor = Annotated[float, Field(ge=0, le=MOST_FACTOR)]


class _Shape(BaseModel):
    model_config = STRICT

    seconds: Annotated[float, Field(gt=0, le=7 * 86400)] | None = None

    def knots(self, seconds: float) -> Knots:
        raise NotImplementedError


class Steady(_Shape):
    """The same load all the time."""

    kind: Literal["steady"] = "steady"

    def knots(self, seconds: float) -> Knots:
        return [(0, 1), (seconds, 1)]


class Ramp(_Shape):
    """Straight from `start` to `end`."""

    kind: Literal["ramp"]
    start: Factor = 0.1
    end: Factor = 1.0

    def knots(self, seconds: float) -> Knots:
        return [(0, self.start), (seconds, self.end)]


class Spike(_Shape):
    """`low`, and `high` for `lasts` from `at` on; again `every` so often where that is given."""

    kind: Literal["spike"]
    low: Factor = 1.0
    high: Factor = 5.0
    at: When = _moment("40%")
    lasts: When = _moment("20%")
    every: When = None

    def knots(self, seconds: float) -> Knots:
        lasts, every = self.lasts.of(seconds), self.every.of(seconds) if self.every is not None else seconds
        line: Knots = [(0, self.low)]
        start = self.at.of(seconds)
        while start < seconds:
            end = min(seconds, start + min(lasts, max(every, 1)))
            line += [(start, self.low), (start, self.high), (end, self.high), (end, self.low)]
            start += max(every, 1)
        return [*line, (seconds, self.low)]


class Step(_Shape):
    """`steps` plateaus of the same length, from `start` to `end`."""

    kind: Literal["step"]
    start: Factor = 0.25
    end: Factor = 1.0
    steps: Annotated[int, Field(ge=2, le=100)] = 4

    def knots(self, seconds: float) -> Knots:
        line: Knots = []
        for number in range(self.steps):
            factor = self.start + (self.end - self.start) * number / (self.steps - 1)
            line += [(seconds * number / self.steps, factor), (seconds * (number + 1) / self.steps, factor)]
        return line


class Soak(_Shape):
    """Hours of load that goes gently up and down between 1 - `swing` and 1 + `swing`, once in `period_seconds`."""

    kind: Literal["soak"]
    swing: Annotated[float, Field(ge=0, lt=1)] = 0.25
    period_seconds: Annotated[float, Field(ge=10)] = 600

    def knots(self, seconds: float) -> Knots:
        quarter = self.period_seconds / 4
        line = [(n * quarter, 1 + self.swing * (0, 1, 0, -1)[n % 4]) for n in range(ceil(seconds / quarter) + 1)]
        return [*line[:-1], (seconds, Course(line).factor(seconds))]


Shape = Annotated[Steady | Ramp | Spike | Step | Soak, Field(discriminator="kind"), assumed("steady")]


class Course:
    """A shape's line, with warm-up before it at its first factor and cool-down after it at its last."""

    def __init__(self, knots: Knots, before: float = 0, after: float = 0) -> None:
        line = [(at + before, factor) for at, factor in knots]
        if before:
            line.insert(0, (0, line[0][1]))
        if after:
            line.append((line[-1][0] + after, line[-1][1]))
        self._times = [at for at, _ in line]
        self._factors = [factor for _, factor in line]
        self._loads = [0.0]  # the integral of the factor up to each knot
        for (t0, f0), (t1, f1) in zip(line, line[1:], strict=False):
            self._loads.append(self._loads[-1] + (t1 - t0) * (f0 + f1) / 2)

    @property
    def seconds(self) -> float:
        return self._times[-1]

    @property
    def load(self) -> float:
        """Of the whole course, in seconds at factor 1."""
        return self._loads[-1]

    @property
    def peak(self) -> float:
        return max(self._factors)

    def factor(self, at: float) -> float:
        """At this moment; at a jump, what comes after it. Beyond the ends it stays as it is there."""
        place = bisect_right(self._times, at)
        if place in (0, len(self._times)):
            return self._factors[0 if place == 0 else -1]
        t0, t1, f0, f1 = *self._times[place - 1 : place + 1], *self._factors[place - 1 : place + 1]
        return f0 + (f1 - f0) * (at - t0) / (t1 - t0)

    def between(self, start: float, end: float) -> float:
        """The load of these seconds, in seconds at factor 1."""
        return self._until(end) - self._until(start)

    def _until(self, at: float) -> float:
        place = min(max(bisect_right(self._times, at), 1), len(self._times) - 1)
        since = at - self._times[place - 1]
        if self._times[place] <= self._times[place - 1]:
            return self._loads[place]
        return self._loads[place - 1] + since * (self._factors[place - 1] + self.factor(at)) / 2

    def when(self, load: float) -> float:
        """The moment by which so much load is due (0 <= load < self.load)."""
        place = min(max(bisect_right(self._loads, load), 1), len(self._loads) - 1)
        t0, t1, f0, f1 = *self._times[place - 1 : place + 1], *self._factors[place - 1 : place + 1]
        rest = load - self._loads[place - 1]
        slope = (f1 - f0) / (t1 - t0) if t1 > t0 else 0.0
        # f0 * x + slope * x^2 / 2 = rest, in the form that loses no digits where the slope is small
        root = sqrt(max(0.0, f0 * f0 + 2 * slope * rest))
        return min(t1, t0 + (2 * rest / (f0 + root) if f0 + root > 0 else 0.0))

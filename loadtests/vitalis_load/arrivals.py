"""When requests are due: closed users who wait for their answers, or an open loop that waits for nobody."""

import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainSerializer, PlainValidator

from vitalis_load.lengths import STRICT, Length
from vitalis_load.shapes import Course


class Times(float):
    """A rate as a multiple of the scenario's `capacity`, written "2x"."""

    def __str__(self) -> str:
        return f"{float(self):g}x"


def _rate(value: Any) -> float:
    """Requests a second, or a multiple of the capacity."""
    number: Any = value
    if isinstance(value, str) and value.endswith("x"):
        try:
            number = Times(value[:-1])
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= 1e6:
        raise ValueError('must be requests a second (12.5), or a multiple of the capacity ("2x"), above 0')
    return number if isinstance(number, Times) else float(number)


Rate = Annotated[
    float, PlainValidator(_rate), PlainSerializer(lambda rate: str(rate) if isinstance(rate, Times) else float(rate))
]


class _Arrivals(BaseModel):
    model_config = STRICT


class Users(_Arrivals):
    """Closed: each user asks, waits for the whole answer, thinks, and asks again."""

    kind: Literal["users"]
    users: Annotated[int, Field(ge=1, le=100_000)]
    think_seconds: Length = Length(min=0, max=0)


class Constant(_Arrivals):
    """Open: at even distances, whatever becomes of those before."""

    kind: Literal["constant"]
    rate: Rate


class Poisson(_Arrivals):
    """Open: as independent people come. `seed` fixes when they come, whatever the run's seed is."""

    kind: Literal["poisson"]
    rate: Rate
    seed: int | None = None


class Trace(_Arrivals):
    """Open: as written down. `speed` 2 replays it in half the time; `unit` is that of the trace's times."""

    kind: Literal["trace"]
    path: str
    speed: Annotated[float, Field(gt=0, le=1000)] = 1.0
    unit: Literal["seconds", "milliseconds"] = "seconds"


Arrivals = Annotated[Users | Constant | Poisson | Trace, Field(discriminator="kind")]


def due(arrivals: Constant | Poisson, rate: float, course: Course, dice: random.Random) -> Iterator[float]:
    """The moments at which requests are due, in seconds since the course began, in order.

    Args:
        rate: Requests a second at factor 1; the course's factor scales it from moment to moment.
        dice: What Poisson draws from.
    """
    load, total = 0.0, course.load
    poisson = isinstance(arrivals, Poisson)
    while True:
        # an even schedule's first one comes half a distance late: no burst at the start, none lost at the end
        load += (dice.expovariate(1) if poisson else (1.0 if load else 0.5)) / rate
        if load >= total:
            return
        yield course.when(load)

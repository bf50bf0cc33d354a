"""How long prompts, answers and pauses are: one figure, an even spread, or log-normal by median and 95th percentile."""

import random
from math import exp, log
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Z95 = 1.6449  # the normal distribution's 95th percentile
MOST = 10_000_000  # tokens or seconds; a tail is cut there
_MANY = 4000  # draws that `mean` takes where a limit cuts the log-normal

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def assumed(kind: str) -> BeforeValidator:
    """The `kind` of a mapping that names none."""
    return BeforeValidator(lambda value: {"kind": kind, **value} if isinstance(value, dict) else value)


class Length(BaseModel):
    """Written `400`, `{median: 400, p95: 2000}` or `{min: 100, max: 200}`. Beside median and p95, min and max limit."""

    model_config = STRICT

    median: Annotated[float, Field(gt=0, le=MOST)] | None = None
    p95: Annotated[float, Field(gt=0, le=MOST)] | None = None
    min: Annotated[float, Field(ge=0, le=MOST)] | None = None
    max: Annotated[float, Field(ge=0, le=MOST)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_figure(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {"min": value, "max": value}
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.median is None) != (self.p95 is None):
            raise ValueError("median and p95 go together; give both, or min and max, or one number")
        if self.median is None and (self.min is None or self.max is None):
            raise ValueError("needs one number, or median and p95, or min and max")
        if self.median is not None and self.p95 is not None and self.p95 < self.median:
            raise ValueError(f"p95 ({self.p95:g}) is below median ({self.median:g})")
        if self.min is not None and self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max:g}) is below min ({self.min:g})")
        return self

    @property
    def fixed(self) -> bool:
        return self.median is None and self.min == self.max

    def draw(self, dice: random.Random) -> float:
        """One length, in whatever unit the spread is of. A fixed one takes nothing from the dice."""
        if self.median is None or self.p95 is None:
            low, high = self.min or 0, self.max or 0
            return low if low == high else dice.uniform(low, high)
        value = self.median * exp(log(self.p95 / self.median) / Z95 * dice.gauss(0, 1))
        value = min(value, MOST if self.max is None else self.max)
        return value if self.min is None else max(value, self.min)

    def whole(self, dice: random.Random) -> int:
        """The same in tokens: at least one."""
        return max(1, round(self.draw(dice)))

    @property
    def mean(self) -> float:
        if self.median is None or self.p95 is None:
            return ((self.min or 0) + (self.max or 0)) / 2
        if self.min is None and self.max is None:
            return self.median * exp((log(self.p95 / self.median) / Z95) ** 2 / 2)
        dice = random.Random(0)
        return sum(self.draw(dice) for _ in range(_MANY)) / _MANY

    def __str__(self) -> str:
        if self.fixed:
            return f"{self.min:g}"
        if self.median is None:
            return f"{self.min:g} to {self.max:g}"
        limits = [f"{word} {value:g}" for word, value in (("min", self.min), ("max", self.max)) if value is not None]
        return ", ".join([f"median {self.median:g}, p95 {self.p95:g}", *limits])

"""Recorded traffic to replay: a JSONL of when requests came and how long they and their answers were.

A line is {"timestamp": 12.5, "prompt_tokens": 400, "output_tokens": 150} and, if wanted, "task" (a task's name).
`at` is another word for `timestamp`, `input_length` and `input_tokens` for `prompt_tokens`, `output_length` for
`output_tokens`. Times are numbers, or dates as 2026-11-22T10:00:00.5Z; they count from the earliest. Lines need
not be in order, other fields are passed over.
"""

from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

import msgspec

from vitalis_load.errors import LoadFailure
from vitalis_load.prompts import read_lines


class Asked(NamedTuple):
    """One request of a trace: `at` in seconds since the first, lengths in tokens."""

    at: float
    prompt_tokens: int
    output_tokens: int
    task: str = ""


class _Line(msgspec.Struct):
    timestamp: float | str | None = None
    at: float | str | None = None
    prompt_tokens: int | None = None
    input_length: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    output_length: int | None = None
    task: str = ""

    @property
    def time(self) -> float | str | None:
        return self.at if self.timestamp is None else self.timestamp

    def seconds(self, scale: float) -> float:
        """Numbers by the trace's unit; a date without a zone is UTC. Raises ValueError for what is no date."""
        if not isinstance(self.time, str):
            return (self.time or 0.0) * scale
        date = datetime.fromisoformat(self.time)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()

    @property
    def asked(self) -> int | None:
        return next((n for n in (self.prompt_tokens, self.input_length, self.input_tokens) if n is not None), None)

    @property
    def answered(self) -> int | None:
        return self.output_length if self.output_tokens is None else self.output_tokens


def _wrong(line: _Line) -> str:
    if line.time is None:
        return 'has no "timestamp"'
    try:
        line.seconds(1)
    except ValueError:
        return f'"timestamp" must be a number or a date as 2026-11-22T10:00:00Z, not {line.time!r}'
    if line.asked is None or line.answered is None:
        return 'has no "prompt_tokens"' if line.asked is None else 'has no "output_tokens"'
    if line.asked < 1 or line.answered < 0:
        return "lengths must be above 0"
    return ""


@lru_cache(maxsize=4)
def read(path: str, unit: str = "seconds", tasks: tuple[str, ...] = ()) -> tuple[Asked, ...]:
    """In the order of time. Raises LoadFailure with every wrong line (the first ten), or for a task there is not."""
    scale = 0.001 if unit == "milliseconds" else 1.0
    lines = read_lines(path, _Line, _wrong, "trace lines")
    strange = next(((number, line.task) for number, line in lines if line.task and line.task not in tasks), None)
    if strange is not None:
        number, name = strange
        raise LoadFailure(f"{path}: line {number}: the scenario has no task {name!r}; it has {', '.join(tasks)}")
    rows = sorted((line.seconds(scale), line.asked, max(1, line.answered), line.task) for _, line in lines)
    first = rows[0][0]
    return tuple(Asked(at - first, prompt, output, task) for at, prompt, output, task in rows)

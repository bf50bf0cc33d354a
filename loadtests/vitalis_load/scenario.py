"""A scenario: what is asked, by whom, how often and for how long. One YAML file, in full and in small.

scenario = load("short-chat", scale="small", overrides={"arrivals.rate": "2"})
plan = scenario.plan(seed=1, salt="run-7/repeat-1", model="gpt-oss-20b")
for arrival in plan.split(processes=2, process=0):
    ask = plan.request(arrival)
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vitalis_load import complaints, layers, prompts, traces
from vitalis_load.arrivals import Arrivals, Constant, Poisson, Times, Trace, Users
from vitalis_load.asking import Plan
from vitalis_load.errors import LoadFailure
from vitalis_load.lengths import STRICT
from vitalis_load.metrics import Slo
from vitalis_load.prompts import Tokenisation
from vitalis_load.shapes import Course, Shape, Steady
from vitalis_load.tasks import Limits, Task

FOLDER = Path(__file__).resolve().parents[1] / "scenarios"
SCALES = ("full", "small")


class Credential(BaseModel):
    """Whose key it is. `env` names the variable that has it where the command line does not say (`--keys`)."""

    model_config = ConfigDict(**STRICT, serialize_by_alias=True)

    klass: Annotated[Literal["", "emergency", "interactive", "standard", "batch"], Field(alias="class")] = ""
    env: str = ""
    about: str = ""


class Scenario(BaseModel):
    """See docs/load-testing.md for every field. `seconds` and `window` say how long it takes."""

    model_config = ConfigDict(**STRICT, serialize_by_alias=True)

    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9_.-]+$")]
    about: str = ""
    capacity: Annotated[float, Field(gt=0, le=1e6)] | None = None
    arrivals: Arrivals | None = None
    shape: Shape = Steady()
    warmup_seconds: Annotated[float, Field(ge=0, le=86400)] = 10.0
    cooldown_seconds: Annotated[float, Field(ge=0, le=86400)] = 5.0
    repeats: Annotated[int, Field(ge=1, le=100)] = 3
    deadline_seconds: Annotated[float, Field(gt=0, le=86400)] = 120.0
    slo: Limits = {}
    credentials: dict[str, Credential] = {}
    tasks: Annotated[list[Task], Field(min_length=1)]

    @field_validator("tasks")
    @classmethod
    def _names_once(cls, tasks: list[Task]) -> list[Task]:
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two tasks are called {', '.join(twice)}; each needs a name of its own")
        return tasks

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        wrong = list(self._misfits())
        if wrong:
            raise ValueError("; ".join(wrong))
        for place, task in enumerate(self.tasks):
            of_key = self.credentials.get(task.tenant, Credential()).klass
            if of_key and not task.klass:
                self.tasks[place] = task.model_copy(update={"klass": of_key})
        return self

    def _misfits(self) -> list[str]:
        own = [task for task in self.tasks if task.arrivals is not None]
        wrong = []
        if self.arrivals is None and len(own) < len(self.tasks):
            lacking = ", ".join(task.name for task in self.tasks if task.arrivals is None)
            wrong.append(f"arrivals are missing: the scenario has none, nor has its task {lacking}")
        if isinstance(self.arrivals, Users) and own:
            wrong.append(f"task {own[0].name} has arrivals of its own, which closed users do not go with")
        if self.arrivals is not None and len(own) == len(self.tasks):
            wrong.append("arrivals are of no use: every task has its own")
        every = [self.arrivals, *(task.arrivals for task in own)]
        if self.capacity is None and any(isinstance(getattr(one, "rate", None), Times) for one in every):
            wrong.append("capacity is missing: a rate is a multiple of it")
        if self.shape.seconds is None and not isinstance(self.arrivals, Trace):
            wrong.append("shape.seconds is missing: how long it is measured")
        if isinstance(self.arrivals, Trace) and self.shape.kind != "steady":
            wrong.append(f"shape {self.shape.kind} does not go with a trace, which says itself when requests come")
        for task in self.tasks:
            of_key = self.credentials.get(task.tenant, Credential()).klass
            if of_key and task.klass not in ("", of_key):
                wrong.append(f"task {task.name} is of class {task.klass}, its credential {task.tenant} of {of_key}")
        used = {task.tenant for task in self.tasks}
        strange = [label for label in self.credentials if label not in used]
        if strange:
            wrong.append(f"credentials of no task: {', '.join(strange)}; tasks have {layers.listed(sorted(used))}")
        return wrong

    # when

    @property
    def open(self) -> bool:
        """Whether requests come when they are due, whatever becomes of others; else users wait for their answers."""
        return not isinstance(self.arrivals, Users)

    @property
    def measured_seconds(self) -> float:
        """Without warm-up and cool-down."""
        if self.shape.seconds is not None:
            return self.shape.seconds
        assert isinstance(self.arrivals, Trace)
        length = self.trace(self.arrivals)[-1].at / self.arrivals.speed + 1  # so that the last one is in
        return max(1.0, length - self.warmup_seconds - self.cooldown_seconds)

    @property
    def seconds(self) -> float:
        """From the first request that is due to the last: warm-up, what is measured, cool-down."""
        return self.warmup_seconds + self.measured_seconds + self.cooldown_seconds

    @property
    def window(self) -> tuple[float, float]:
        """Begin and end of what is measured, in seconds since the repeat began."""
        return self.warmup_seconds, self.warmup_seconds + self.measured_seconds

    def course(self, task: Task | None = None) -> Course:
        """The load's factor over time, of the scenario or of a task that has its own arrivals."""
        shape = (task.shape or Steady()) if task is not None else self.shape
        return Course(shape.knots(self.measured_seconds), self.warmup_seconds, self.cooldown_seconds)

    def users_at(self, at: float) -> int:
        """Closed users at this second; 0 in an open loop."""
        return round(self.arrivals.users * self.course().factor(at)) if isinstance(self.arrivals, Users) else 0

    def rate(self, arrivals: Constant | Poisson) -> float:
        """Requests a second at factor 1."""
        return float(arrivals.rate) * (self.capacity or 1.0) if isinstance(arrivals.rate, Times) else arrivals.rate

    @property
    def mean_rate(self) -> float:
        """Requests a second that an open loop asks for within the window, on average."""
        start, end = self.window
        drawn = sum(course.between(start, end) * rate for course, rate in self._streams())
        return (drawn + sum(start <= at < end for at in self._replayed())) / (end - start)

    @property
    def peak_rate(self) -> float:
        """The most that an open loop asks for at a time, where all of its streams peak together."""
        seconds = Counter(int(at) for at in self._replayed())
        return sum(course.peak * rate for course, rate in self._streams()) + max(seconds.values(), default=0)

    def _streams(self) -> list[tuple[Course, float]]:
        found = []
        for task, arrivals in ((None, self.arrivals), *((task, task.arrivals) for task in self.tasks)):
            if isinstance(arrivals, (Constant, Poisson)):
                found.append((self.course(task), self.rate(arrivals)))
        return found

    def _replayed(self) -> Iterator[float]:
        """When the requests of its traces are due."""
        end = self.seconds
        for arrivals in (self.arrivals, *(task.arrivals for task in self.tasks)):
            if isinstance(arrivals, Trace):
                yield from (at for asked in self.trace(arrivals) if (at := asked.at / arrivals.speed) < end)

    def trace(self, trace: Trace) -> tuple[traces.Asked, ...]:
        return traces.read(trace.path, trace.unit, tuple(task.name for task in self.tasks))

    # who

    @property
    def limits(self) -> Slo:
        """The run's SLO; a task's own is in `task.slo`."""
        return Slo(**self.slo)

    @property
    def labels(self) -> list[str]:
        """Of the credentials that tasks use, in their order; "" is the run's own key."""
        return list(dict.fromkeys(task.tenant for task in self.tasks))

    def credential(self, label: str) -> Credential:
        """Of a task's `tenant`; its variable is VITALIS_LOAD_KEY_<LABEL> unless the scenario names another."""
        found = self.credentials.get(label, Credential())
        classes = [task.klass for task in self.tasks if task.tenant == label and task.klass]
        default = "VITALIS_LOAD_KEY_" + "".join(c if c.isalnum() else "_" for c in label).upper() if label else ""
        return Credential(
            **{"class": found.klass or next(iter(classes), "")}, env=found.env or default, about=found.about
        )

    # what

    def plan(self, seed: int, *, salt: str = "", model: str = "", tokenisation: Tokenisation | None = None) -> Plan:
        """Its requests.

        Args:
            seed: Fixes when requests come, of which task and length.
            salt: Changes the texts and nothing else. One of its own for each repeat of each run keeps an engine's
                prefix cache from knowing the prompts of the one before.
            model: What documents ask for where the task does not say.
            tokenisation: As `prompts.fit` measured it.
        """
        return Plan(self, seed, salt, model, tokenisation or Tokenisation())

    def resolved(self) -> dict[str, Any]:
        """The whole of it after defaults and scale, as JSON has it, and beside it as `expected` what it comes to: open,
        seconds, window, of an open loop mean_rate and peak_rate in requests/s, and digests of the files that it names.
        `of` makes the same of it again."""
        expected: dict[str, Any] = {"open": self.open, "seconds": self.seconds, "window": list(self.window)}
        if files := self._files():
            expected["files"] = files
        if self.open:
            expected |= {"mean_rate": self.mean_rate, "peak_rate": self.peak_rate}
        return self.model_dump(mode="json", exclude_none=True) | {"expected": expected}

    def _files(self) -> dict[str, str]:
        """What is in its traces and prompts: the path to a file says little of what is asked."""
        paths = {"arrivals": self.arrivals} | {f"tasks.{task.name}.arrivals": task.arrivals for task in self.tasks}
        found = {name: one.path for name, one in paths.items() if isinstance(one, Trace)}
        found |= {f"tasks.{t.name}.prompt": t.prompt.path for t in self.tasks if isinstance(t.prompt, prompts.File)}
        return {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in found.items()}

    @classmethod
    def of(cls, resolved: Mapping[str, Any]) -> Self:
        """Raises pydantic's ValidationError."""
        return cls.model_validate({name: value for name, value in resolved.items() if name != "expected"})


def names() -> list[str]:
    """Of the scenarios that come with this."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(path_or_name: str | Path, *, scale: str = "full", overrides: Mapping[str, str] | None = None) -> Scenario:
    """Of a file, or of one that comes with this by name.

    Args:
        scale: "full", or "small" with what the file has under `small:`.
        overrides: {"tasks.chat.output": "16"}: dotted names, values in YAML; they win.

    Raises:
        LoadFailure: With every mistake: file and line, field, what is allowed.
    """
    path = _path(str(path_or_name))
    if scale not in SCALES:
        raise LoadFailure(f"scale must be full or small, not {scale!r}")
    written = layers.read(path)
    small = written.pop("small", layers.Mapped())
    if not isinstance(small, layers.Mapped):
        raise LoadFailure(f"{written.places.get('small', path)}: small needs fields that differ in small")
    tree = layers.laid_over(written, small) if scale == "small" else written
    if overrides:
        tree = layers.laid_over(tree, layers.from_options(overrides))
    try:
        values = layers.plain(tree)
    except RecursionError:
        raise LoadFailure(
            f"{path}: holds itself, or is nested too deep; an anchor (&) must not be within itself"
        ) from None
    _find_files(values, path.parent)
    try:
        scenario = Scenario.model_validate(values)
    except ValidationError as error:
        raise LoadFailure(complaints.sentence(error, tree, path, Scenario)) from None
    read_files(scenario)
    return scenario


def _path(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return Path(name)
    if name in names():
        return FOLDER / f"{name}.yaml"
    near = get_close_matches(name, names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"there is {layers.listed(names())}, or give a file's path"
    raise LoadFailure(f"there is no scenario {name!r}; {hint}")


def _find_files(value: Any, folder: Path) -> None:
    """Paths of traces and prompts count from the scenario's folder, else from where the command was called."""
    if isinstance(value, dict):
        given = value.get("path")
        if value.get("kind") in ("trace", "file") and isinstance(given, str):
            beside = folder / given
            value["path"] = str((beside if beside.exists() else Path(given)).absolute())
        for item in value.values():
            _find_files(item, folder)
    elif isinstance(value, list):
        for item in value:
            _find_files(item, folder)


def read_files(scenario: Scenario) -> None:
    """So that a wrong line, a file that is not on this machine, or a trace of which nothing would be measured is found
    before the first request. Raises LoadFailure."""
    for arrivals in (scenario.arrivals, *(task.arrivals for task in scenario.tasks)):
        if isinstance(arrivals, Trace):
            lasts = scenario.trace(arrivals)[-1].at / arrivals.speed
            if lasts < scenario.warmup_seconds:
                raise LoadFailure(
                    f"{arrivals.path}: it lasts {lasts:.4g} s, all of it within the warm-up of "
                    f"{scenario.warmup_seconds:g} s, and nothing would be measured: --set warmup_seconds=0"
                )
    for task in scenario.tasks:
        if isinstance(task.prompt, prompts.File):
            lines = prompts.read_file(task.prompt.path)
            if task.api == "completions" and any(line.messages for line in lines):
                raise LoadFailure(
                    f'{task.prompt.path}: task {task.name} asks for completions, which need "prompt", not "messages"'
                )

"""A traffic to plan for: how much of what comes, at what lengths, and what has to hold. One YAML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from simulator.calibration import Engine

from vitalis_load import complaints, layers
from vitalis_load.errors import LoadFailure
from vitalis_load.lengths import STRICT, Length, assumed
from vitalis_load.prompts import Shared, Text

CLASSES = ("emergency", "interactive", "standard", "batch")
# Those of a scenario's that can be worked out. Nothing fails in a simulation, and tokens/s follow from the traffic.
LIMITS = ("ttft_p99_ms", "tpot_p99_ms", "e2e_p99_ms", "ttft_ms", "tpot_ms", "e2e_ms", "min_good_share")


class Replica(BaseModel):
    """What an engine of the fleet is started with. None: as calibrated, else as the simulator's defaults are."""

    model_config = STRICT

    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_num_batched_tokens: Annotated[int, Field(ge=64)] | None = None
    kv_cache_tokens: Annotated[int, Field(ge=1024)] | None = None
    max_model_len: Annotated[int, Field(ge=256)] | None = None
    block_tokens: Annotated[int, Field(ge=1, le=1024)] | None = None
    prefix_caching: bool = True

    def over(self, known: Engine) -> dict[str, int]:
        """These options, and what is known of the calibrated engine where they say nothing."""
        names = ("max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens", "max_model_len", "block_tokens")
        both = {name: getattr(self, name) or getattr(known, name) for name in names}
        return {name: value for name, value in both.items() if value is not None}


class Task(BaseModel):
    """One sort of request, in a scenario's words. `prompt` of kind shared: `tokens` come on top of the prefix."""

    model_config = ConfigDict(**STRICT, serialize_by_alias=True)

    name: Annotated[str, Field(min_length=1, max_length=60)]
    weight: Annotated[float, Field(gt=0)] = 1.0
    klass: Annotated[Literal["emergency", "interactive", "standard", "batch"], Field(alias="class")] = "standard"
    prompt: Annotated[Text | Shared, Field(discriminator="kind"), assumed("text")]
    output: Length


class Traffic(BaseModel):
    """`rate`: requests a second in the busiest hour; the plan is for rate x peak_factor x (1 + margin)."""

    model_config = STRICT

    name: Annotated[str, Field(min_length=1, max_length=60)]
    about: str = ""
    rate: Annotated[float, Field(gt=0, le=100_000)]
    peak_factor: Annotated[float, Field(ge=1, le=1000)] = 1.0
    margin: Annotated[float, Field(ge=0, le=10)] = 0.15
    spare: Annotated[int, Field(ge=0, le=1000)] = 0
    seconds: Annotated[float, Field(ge=10, le=36_000)] = 120.0
    warmup_seconds: Annotated[float, Field(ge=0, le=3600)] = 20.0
    repeats: Annotated[int, Field(ge=1, le=20)] = 3
    most_replicas: Annotated[int, Field(ge=1, le=1000)] = 64
    slo: Annotated[dict[str, float], Field(min_length=1)]
    engine: Replica = Replica()
    tasks: Annotated[list[Task], Field(min_length=1)]

    @field_validator("slo")
    @classmethod
    def _limits(cls, slo: dict[str, float]) -> dict[str, float]:
        complaints.check_slo(slo)
        strange = [name for name in slo if name not in LIMITS]
        if strange:
            raise ValueError(f"{', '.join(strange)} cannot be planned for; allowed: {', '.join(LIMITS)}")
        if slo.get("min_good_share", 0) > 1:
            raise ValueError("min_good_share is a share: at most 1")
        return slo

    @field_validator("tasks")
    @classmethod
    def _names_once(cls, tasks: list[Task]) -> list[Task]:
        names = [task.name for task in tasks]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))} stands twice; results are told apart by these names")
        return tasks

    @property
    def planned_rate(self) -> float:
        return self.rate * self.peak_factor * (1 + self.margin)


def load(path: Path, overrides: Mapping[str, str] | None = None) -> Traffic:
    """The traffic in this file, with fields changed ({"rate": "20"}). Raises LoadFailure with all that is wrong."""
    if not path.is_file():
        raise LoadFailure(f"{path}: there is no such file; loadtests/traffic/example.yaml shows what a traffic is")
    tree = layers.laid_over(layers.read(path), layers.from_options(overrides or {}))
    try:
        return Traffic.model_validate(tree)
    except ValidationError as error:
        raise LoadFailure(complaints.sentence(error, tree, path, Traffic)) from None

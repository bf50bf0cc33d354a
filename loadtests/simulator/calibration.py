"""The file that `simulator calibrate` writes and `--calibration` takes: how fast an engine was, and how it is known."""

from pathlib import Path
from typing import Any

import msgspec

from simulator.speed import Speed

SCHEMA = "vitalis-simulator/1"


class Unusable(Exception):
    """A file that is no calibration, in a sentence."""


class Engine(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the engine was started with, as far as it is known."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_tokens: int | None = None
    max_model_len: int | None = None
    block_tokens: int | None = None


class Quality(msgspec.Struct, kw_only=True):
    """How well the figures describe what was measured, and over what range. `intervals`: 95 %, of the fit alone."""

    requests: int
    alone: int
    batch: tuple[float, float]
    context: tuple[float, float]
    explained: float
    error_p50: float
    error_p90: float
    intervals: dict[str, tuple[float, float]] = {}
    notes: list[str] = []


class Calibration(msgspec.Struct, kw_only=True):
    """Speeds in seconds, and tokens a second. `overhead_seconds`: of a request, spent around the engine."""

    schema: str = SCHEMA
    decode_step_seconds: float
    per_sequence_seconds: float
    prefill_tokens_per_second: float
    per_context_token_seconds: float = 0.0
    overhead_seconds: float = 0.0
    engine: Engine = msgspec.field(default_factory=Engine)
    fit: Quality | None = None
    run: dict[str, Any] = {}

    @property
    def speed(self) -> Speed:
        return Speed(
            self.decode_step_seconds,
            self.per_sequence_seconds,
            self.prefill_tokens_per_second,
            self.per_context_token_seconds,
        )


def load(path: Path) -> Calibration:
    """The calibration in this file. Raises Unusable."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except OSError as error:
        raise Unusable(f"{path}: the calibration cannot be read ({error.strerror}); check the path") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unusable(f"{path} is not a calibration: {error}; `python -m simulator calibrate RUN` makes one") from None
    if found.schema != SCHEMA:
        raise Unusable(f"{path} is of the schema {found.schema}; this program reads {SCHEMA}")
    low = [
        name
        for name in ("per_sequence_seconds", "per_context_token_seconds", "overhead_seconds",
                     "prefill_tokens_per_second", "decode_step_seconds")
        if getattr(found, name) < 0
    ]  # fmt: skip
    if low:
        raise Unusable(f"{path}: {', '.join(low)} must not be below 0")
    return found

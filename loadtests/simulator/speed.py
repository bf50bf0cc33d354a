"""How fast a simulated engine is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast the engine is. prefill_tokens_per_second 0: prefill takes no time. per_context_token_seconds: what each
    token in the contexts of the sequences that decode adds to a step."""

    decode_step_seconds: float
    per_sequence_seconds: float
    prefill_tokens_per_second: float
    per_context_token_seconds: float = 0.0


PRESETS = {
    "sim-20b": Speed(0.008, 0.0001, 20_000),
    "instant": Speed(0, 0, 0),
}

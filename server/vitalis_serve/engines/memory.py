"""The memory plan: what weights and working space take, and how many tokens and sequences fit in the rest.

KV cache is counted as vLLM counts it: in blocks, layers grouped by kind. A full layer keeps every token; a sliding
one only its window (and, while a prompt is being read, what is in flight). Pure.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from vitalis_serve.errors import ConfigurationError

GIB: Final = 1 << 30
MIB: Final = 1 << 20
# Resident memory on CPU beside weights and KV cache, as observed: API server 1.2 GB and engine core 1 GB, then each
# rank's worker.
CPU_BASE_BYTES: Final = 2_200_000_000
CPU_RANK_BYTES: Final = 1_000_000_000
# Estimates for GPUs: CUDA's own context and libraries, and one captured graph (vLLM captures every size up to 32
# eight apart, then 16 apart).
GPU_CONTEXT_BYTES: Final = 600 * MIB
GPU_GRAPH_BYTES: Final = 6 * MIB


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model's shape. Sizes in bytes, windows and lengths in tokens."""

    name: str
    family: str
    weight_bytes: int
    hidden_size: int
    layers_full: int
    layers_sliding: int
    sliding_window: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    experts_per_token: int
    intermediate_size: int
    vocabulary: int
    max_model_len: int
    kv_bytes_per_value: int = 2
    sampling: Mapping[str, float] = field(default_factory=dict)

    def token_bytes(self, *, kind: Literal["full", "sliding", "all"] = "full", ranks: int = 1) -> int:
        """KV-cache bytes of one token in all layers of a kind, on each of `ranks` tensor-parallel ranks."""
        heads = max(1, self.kv_heads // ranks)
        layers = {"full": self.layers_full, "sliding": self.layers_sliding}.get(
            kind, self.layers_full + self.layers_sliding
        )
        return layers * 2 * heads * self.head_dim * self.kv_bytes_per_value

    def sequence_bytes(self, tokens: int, *, ranks: int = 1) -> int:
        """KV-cache bytes of one sequence of `tokens` in steady state (blocks not rounded up)."""
        window = min(tokens, self.sliding_window)
        return self.token_bytes(ranks=ranks) * tokens + self.token_bytes(kind="sliding", ranks=ranks) * window


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What one replica takes on each of its GPUs (on CPU: all of it, in main memory).

    tokens: the size of the KV cache as vLLM reports it (`kv_cache_size_tokens`), sequences: how many of
    `max_model_len` fit at once (`kv_cache_max_concurrency`).
    """

    total_bytes: int
    weight_bytes: int
    working_bytes: int
    kv_bytes: int
    token_bytes: int
    max_model_len: int
    tokens: int
    sequences: float
    problem: str = ""

    @property
    def fits(self) -> bool:
        return not self.problem


def architectures(file: Path) -> Mapping[str, Architecture]:
    """config/model-params.json. Raises ConfigurationError where it cannot be read or lacks something."""
    try:
        document = json.loads(file.read_text("utf-8"))
        return {name: _from_params(name, values) for name, values in document.items() if not name.startswith("$")}
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{file}: not a table of architectures: {error!r}") from None


def _from_params(name: str, values: Mapping[str, Any]) -> Architecture:
    known = {key: values[key] for key in Architecture.__dataclass_fields__ if key in values}
    return Architecture(name=name, **known)


def architecture_of(folder: Path) -> Architecture:
    """The architecture that a model folder's config.json describes, weights as large as its files.

    Raises ConfigurationError where config.json is missing or says too little.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
        layers = int(config["num_hidden_layers"])
        window = int(config.get("sliding_window") or 0)
        kinds = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
        sliding = sum(kind == "sliding_attention" for kind in kinds) if window else 0
        heads = int(config["num_attention_heads"])
        return Architecture(
            name=folder.name,
            family=str(config.get("model_type", "")),
            weight_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            hidden_size=int(config["hidden_size"]),
            layers_full=layers - sliding,
            layers_sliding=sliding,
            sliding_window=window if sliding else 0,
            attention_heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            experts_per_token=int(config.get("num_experts_per_tok") or 0),
            intermediate_size=int(config.get("intermediate_size") or 4 * config["hidden_size"]),
            vocabulary=int(config["vocab_size"]),
            max_model_len=int(config["max_position_embeddings"]),
        )
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigurationError(f"{file}: does not describe a model: {error!r}") from None


def kv_capacity(
    architecture: Architecture,
    kv_bytes: int,
    *,
    block: int,
    max_model_len: int,
    tokens_in_flight: int,
    ranks: int = 1,
) -> tuple[int, float]:
    """(tokens, sequences of max_model_len) that fit in `kv_bytes` of one rank, by vLLM's own arithmetic."""
    full, sliding = architecture.layers_full, architecture.layers_sliding
    group = min(full, sliding) if full and sliding else full + sliding
    layer_bytes = architecture.token_bytes(kind="all", ranks=ranks) // (full + sliding)
    blocks = kv_bytes // (layer_bytes * group * block)
    needed = math.ceil(full / group) * math.ceil(max_model_len / block)
    if sliding:
        # What a window holds while a prompt is read in chunks, plus one: a window may begin inside a block.
        held = min(architecture.sliding_window - 1 + tokens_in_flight, max_model_len)
        needed += math.ceil(sliding / group) * (math.ceil(held / block) + 1)
    sequences = blocks / needed
    return int(sequences * max_model_len), sequences


def plan_memory(
    architecture: Architecture,
    *,
    device: Literal["cuda", "cpu"],
    total_bytes: int,
    device_name: str = "",
    ranks: int = 1,
    replicas: int = 1,
    slots: int = 64,
    engine_args: Mapping[str, Any],
    engine_env: Mapping[str, str | None],
) -> MemoryPlan:
    """What one replica takes and holds. `total_bytes` is the memory of one GPU, or the machine's on CPU."""
    length = int(_number(engine_args, "max-model-len", architecture.max_model_len))
    if device == "cpu":
        kv = int(float(engine_env.get("VLLM_CPU_KVCACHE_SPACE") or 4) * GIB)
        working = CPU_BASE_BYTES + ranks * CPU_RANK_BYTES
        weights, batch, block = architecture.weight_bytes, 2048 * ranks, 128
        taken = weights + working + kv * ranks
        problem = ""
        if replicas * taken > total_bytes:
            problem = (
                f"{replicas} x {taken / GIB:.1f} GiB is more than the {total_bytes / GIB:.1f} GiB of memory;"
                " lower engines.replicas or VLLM_CPU_KVCACHE_SPACE"
            )
        in_flight = int(_number(engine_args, "max-num-batched-tokens", batch))
    else:
        share = _number(engine_args, "gpu-memory-utilization", 0.92)
        big = total_bytes >= 70 * GIB and "A100" not in device_name.upper()
        batch = int(_number(engine_args, "max-num-batched-tokens", 8192 if big else 2048))
        weights, block = architecture.weight_bytes // ranks, 16
        working = _gpu_working_bytes(architecture, batch, slots, engine_args)
        kv = int(_number(engine_args, "kv-cache-memory-bytes", share * total_bytes - weights - working))
        problem = ""
        in_flight = 2 * batch  # scheduling runs one step ahead
    block = int(_number(engine_args, "block-size", block))
    tokens, sequences = kv_capacity(
        architecture, max(0, kv), block=block, max_model_len=length, tokens_in_flight=in_flight, ranks=ranks
    )
    if not problem and kv <= 0:
        problem = (
            f"weights ({weights / GIB:.1f} GiB) and working space ({working / GIB:.1f} GiB) leave no room for KV"
            f" cache in {total_bytes / GIB:.1f} GiB; use a larger GPU or raise engines.tensor_parallel"
        )
    if not problem and sequences < 1:
        problem = (
            f"one sequence of max-model-len {length} does not fit in {max(0, kv) / GIB:.2f} GiB of KV cache; at"
            f" most about {_longest(tokens)} does: set engines.engine_args.max-model-len"
        )
    return MemoryPlan(
        total_bytes=total_bytes,
        weight_bytes=weights,
        working_bytes=working,
        kv_bytes=max(0, kv),
        token_bytes=architecture.token_bytes(ranks=ranks),
        max_model_len=length,
        tokens=tokens,
        sequences=sequences,
        problem=problem,
    )


def _longest(tokens: int) -> int:
    return max(0, tokens // 1024 * 1024)


def _gpu_working_bytes(architecture: Architecture, batch: int, slots: int, engine_args: Mapping[str, Any]) -> int:
    """Activations of the largest batch, sampling's copies of the logits, CUDA graphs. An estimate."""
    hidden = batch * architecture.hidden_size * 2 * 6
    experts = batch * max(1, architecture.experts_per_token) * architecture.intermediate_size * 2 * 3
    logits = int(_number(engine_args, "max-num-seqs", slots)) * architecture.vocabulary * 4 * 2
    graphs = 0
    if not engine_args.get("enforce-eager"):
        graphs = int(_number(engine_args, "max-cudagraph-capture-size", 512)) // 8 + 4
    return GPU_CONTEXT_BYTES + hidden + experts + logits + graphs * GPU_GRAPH_BYTES


def _number(engine_args: Mapping[str, Any], name: str, default: float) -> float:
    value = engine_args.get(name)
    if value is None:
        return default
    if isinstance(value, str):
        # vLLM reads "32k" as 32,000 and "32K" as 32,768; "auto" and -1 leave the choice to it.
        units = {"k": 1000, "K": 1024, "m": 10**6, "M": 1 << 20, "g": 10**9, "G": 1 << 30}
        text, unit = (value[:-1], units[value[-1]]) if value and value[-1] in units else (value, 1)
        try:
            return float(text) * unit
        except ValueError:
            return default
    return float(value) if isinstance(value, int | float) and value > 0 else default

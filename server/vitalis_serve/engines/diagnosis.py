"""From an engine's last log lines to a cause and what to do about it. Pure.

The first rule that matches wins, so specific ones stand before general ones; of the lines the last that matches
counts, as the cause is usually printed after its symptoms began. Patterns are vLLM 0.32's and its libraries' words.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: re.Pattern[str]
    remedy: Callable[[re.Match[str]], str]


def _rule(pattern: str, remedy: str | Callable[[re.Match[str]], str]) -> _Rule:
    compiled = re.compile(pattern, re.IGNORECASE)
    if isinstance(remedy, str):
        text = remedy
        return _Rule(compiled, lambda _: text)
    return _Rule(compiled, remedy)


def _flag(match: re.Match[str]) -> str:
    flag = match[1].split()[0].split("=")[0].lstrip("-")
    return f"this vLLM does not know --{flag}: correct or remove engines.engine_args.{flag}"


def _module(match: re.Match[str]) -> str:
    return (
        f"the engine environment lacks the Python module {match[1]}: make it anew with"
        " `python3 deploy/environments.py engine`"
    )


_RULES: Final = (
    _rule(r"unrecognized arguments: (\S.*)", _flag),
    _rule(
        r"argument (--[a-z0-9-]+)[^:]*: (.{1,200})",
        lambda m: f"vLLM refuses the value of {m[1]} ({m[2].strip()}): correct engines.engine_args.{m[1][2:]}",
    ),
    _rule(
        r"CUDA out of memory|CUDA error: out of memory|torch\.OutOfMemoryError|cudaErrorMemoryAllocation",
        "the GPU ran out of memory: lower engines.slots or engines.engine_args.max-model-len or"
        " gpu-memory-utilization, and see with nvidia-smi whether another process holds memory",
    ),
    _rule(
        r"Free memory on device .* is less than desired GPU memory utilization",
        "another process holds memory of this GPU (see nvidia-smi): end it, or lower"
        " engines.engine_args.gpu-memory-utilization",
    ),
    _rule(
        r"No available memory for the cache blocks"
        r"|larger than the (?:available KV cache memory|maximum number of tokens that can be stored)"
        r"|(?:GiB )?KV cache is needed, which is larger",
        "the KV cache has no room for one sequence of max-model-len: lower engines.engine_args.max-model-len,"
        " or raise gpu-memory-utilization (on CPU: engines.engine_env.VLLM_CPU_KVCACHE_SPACE)",
    ),
    _rule(
        r"NVIDIA driver on your system is too old|driver version is insufficient|CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"
        r"|forward compatibility was attempted",
        "the NVIDIA driver is too old for the engine's CUDA: install a newer driver (`vitalis-serve doctor` shows it)",
    ),
    _rule(
        r"No CUDA GPUs are available|no CUDA-capable device is detected|Found no NVIDIA driver|Failed to infer device"
        r" type",
        "the engine sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use the profile cpu-demo",
    ),
    _rule(
        r"no kernel image is available for execution",
        "this GPU is not supported by the engine's CUDA build: use a GPU of compute capability 8.0 or newer",
    ),
    _rule(
        r"No space left on device|ENOSPC|Disk quota exceeded",
        "a disk is full: free room on the disks of the data folder, the cache folder and /tmp (on /dev/shm:"
        " give the container more shared memory)",
    ),
    _rule(
        r"o200k_base|tiktoken.*(?:vocab|download)|error downloading or loading vocab file|TIKTOKEN_ENCODINGS_BASE",
        "Harmony's vocabulary is missing: put o200k_base.tiktoken into a folder tiktoken/ inside the model folder,"
        " or name its folder in engines.engine_env.TIKTOKEN_ENCODINGS_BASE",
    ),
    _rule(
        r"Address already in use|EADDRINUSE",
        "the engine's socket is in use: another vitalis-serve runs on this data folder, or an engine was left behind",
    ),
    _rule(r"AF_UNIX path too long", "the socket's path is too long: use a data_folder with a shorter path"),
    _rule(
        r"Permission denied(?::? '?([^'\n]{1,200}))?|EACCES|Operation not permitted",
        lambda m: (
            f"no permission{f' for {m[1]}' if m.lastindex else ''}: give this user access to the data, cache and"
            " model folders"
        ),
    ),
    _rule(r"No module named '?([\w.]+)", _module),
    _rule(
        r"safetensors_rust\.SafetensorError|Error while deserializing header|invalid header|MetadataIncompleteBuffer",
        "a weight file is damaged or cut short: run `vitalis-serve model verify`, then `vitalis-serve model fetch`",
    ),
    _rule(
        r"Cannot find any model weights|does not appear to have a file named"
        r"|No such file or directory: '?([^'\n]{1,200})|Can't load (?:tokenizer|the configuration)"
        r"|Unrecognized model in|is not a valid (?:local folder|model identifier)",
        lambda m: (
            f"a file of the model is missing{f' ({m[1]})' if m.lastindex else ''}: run `vitalis-serve model verify`"
        ),
    ),
    _rule(
        r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len",
        lambda m: f"the model cannot have max-model-len {m[1]}: lower engines.engine_args.max-model-len",
    ),
    _rule(
        r"Total number of attention heads \((\d+)\) must be divisible by tensor parallel size",
        lambda m: f"{m[1]} attention heads cannot be cut so: change engines.tensor_parallel",
    ),
    _rule(
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError",
        "GPUs could not reach each other (NCCL): in a container give more shared memory (--ipc=host or --shm-size 2g);"
        " else set engines.engine_env.NCCL_DEBUG to INFO and look at the engine's log",
    ),
    _rule(
        r"Cannot allocate memory|MemoryError|std::bad_alloc|oom-kill|Out of memory: Killed",
        "main memory ran out: lower engines.replicas or engines.engine_env.VLLM_CPU_KVCACHE_SPACE",
    ),
    _rule(r"Too many open files", "too many open files: raise the limit (`ulimit -n`; doctor shows it)"),
)


def remedy(last_lines: Sequence[str]) -> str | None:
    """The cause and remedy as one sentence without a full stop; None where no known cause is in these lines."""
    for rule in _RULES:
        for line in reversed(last_lines):
            match = rule.pattern.search(line)
            if match:
                return rule.remedy(match)
    return None

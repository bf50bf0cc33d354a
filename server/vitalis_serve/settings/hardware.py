"""Which profile suits this machine, by the GPUs NVML names. Placement's inventory is `engines/gpus.py`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import pynvml

from vitalis_serve.errors import ConfigurationError

GIB: Final = 1 << 30
CPU_PROFILE: Final = "cpu-demo"
# In order: the first whose word is in the name wins ("NVIDIA H200 NVL" is an H200).
_BY_NAME: Final = (("H200", "h200"), ("H100", "h100"), ("A100", "a100"), ("L40S", "l40s"))


@dataclass(frozen=True, slots=True)
class GpuModel:
    name: str
    memory_bytes: int


@contextmanager
def nvml() -> Iterator[bool]:
    """NVML for the length of a block; False where this machine has no NVIDIA driver to ask."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def gpu_models() -> tuple[GpuModel, ...]:
    """Name and memory of every GPU here; empty without a driver or a GPU."""
    with nvml() as found:
        if not found:
            return ()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(
            GpuModel(pynvml.nvmlDeviceGetName(handle), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
            for handle in handles
        )


def profile_for(gpus: Sequence[GpuModel]) -> str:
    """The profile that `profile: auto` means: by the name of the smallest GPU, else by its memory.

    Raises ConfigurationError where no profile suits (less than 15 GiB: gpt-oss-20b's weights take 12.8).
    """
    if not gpus:
        return CPU_PROFILE
    smallest = min(gpus, key=lambda gpu: gpu.memory_bytes)
    by_name = next((profile for word, profile in _BY_NAME if word in smallest.name.upper()), None)
    if by_name and not (by_name == "a100" and smallest.memory_bytes < 60 * GIB):
        return by_name
    for least, profile in ((130, "h200"), (75, "h100"), (40, "l40s"), (21, "rtx-24gb"), (15, "rtx-16gb")):
        if smallest.memory_bytes >= least * GIB:
            return profile
    raise ConfigurationError(
        f"profile auto: {smallest.name} has {smallest.memory_bytes / GIB:.1f} GiB and gpt-oss-20b needs 15;"
        " set profile (cpu-demo runs without a GPU) or engines.gpus"
    )

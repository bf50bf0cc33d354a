"""GPU memory as the driver sees it now, and waiting until a killed engine's has been given back."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import pynvml

from vitalis_serve.engines.gpus import Gpu
from vitalis_serve.settings.hardware import nvml

FREE_SECONDS: Final = 60.0
FREE_LOOK_SECONDS: Final = 0.5


def read_free(gpus: Sequence[Gpu]) -> list[float]:
    """The share of each GPU's memory that is free now; [] where the driver does not say."""
    with nvml() as found:
        if not found:
            return []
        try:
            seen = [pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)) for gpu in gpus]
        except pynvml.NVMLError:
            return []
    return [int(memory.free) / int(memory.total) for memory in seen]


async def until_free(
    gpus: Sequence[Gpu],
    share: float,
    *,
    seconds: float = FREE_SECONDS,
    read: Callable[[Sequence[Gpu]], list[float]] = read_free,
) -> bool:
    """Waits until `share` of each GPU's memory is free, at most `seconds`; False where it is not by then.

    A driver takes a moment to give back what a killed engine held, and a start meanwhile fails for want of memory."""
    deadline = asyncio.get_running_loop().time() + seconds
    while any(free < share for free in await asyncio.to_thread(read, gpus)):
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(min(FREE_LOOK_SECONDS, seconds / 4))
    return True

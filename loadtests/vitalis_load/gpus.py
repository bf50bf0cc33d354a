"""How many NVIDIA GPUs there are, by NVML."""

from collections.abc import Sequence


def count(chosen: Sequence[int] | None) -> int:
    """`chosen`: those that the configuration names; None: all there are. 0 where there is none, or no driver."""
    if chosen is not None:
        return len(chosen)
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetCount())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001  pynvml raises its own, and ImportError where it is not there: both mean none
        return 0

"""Waiting for GPU memory before a restart. The driver's answers are played; no card is needed."""

import asyncio
from collections.abc import Callable, Sequence

from vitalis_serve.engines.gpu_memory import read_free, until_free
from vitalis_serve.engines.gpus import Gpu

CARD = Gpu(0, "GPU-0", "NVIDIA H200", 150 << 30)


def answers(*shares: list[float]) -> tuple[Callable[[Sequence[Gpu]], list[float]], list[int]]:
    """A driver that gives these answers, the last one for ever, and how often it was asked."""
    left, asked = list(shares), [0]

    def read(_: Sequence[Gpu]) -> list[float]:
        asked[0] += 1
        return left.pop(0) if len(left) > 1 else left[0]

    return read, asked


def test_waits_until_every_card_is_free() -> None:
    """The second card gives its memory back later than the first."""
    read, asked = answers([0.1, 0.1], [0.95, 0.1], [0.95, 0.93])
    assert asyncio.run(until_free([CARD, CARD], 0.92, seconds=0.2, read=read))
    assert asked == [3]


def test_gives_up_at_its_deadline() -> None:
    """Somebody else's process holds the memory: the start is tried all the same, and says why it fails."""
    read, asked = answers([0.5])
    assert not asyncio.run(until_free([CARD], 0.92, seconds=0.05, read=read))
    assert asked[0] >= 2


def test_without_a_driver_there_is_nothing_to_wait_for() -> None:
    assert read_free([]) == []
    assert asyncio.run(until_free([], 0.92))

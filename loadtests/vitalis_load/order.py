"""What a Locust master, its workers and the program that starts them tell each other about a repeat."""

import os
import time
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from vitalis_load.prompts import Tokenisation
from vitalis_load.scenario import Scenario
from vitalis_load.target import Target

VARIABLE = "VITALIS_LOAD_ORDER"  # an Order as JSON, in the environment of a Locust that `runs` starts


class Order(msgspec.Struct, kw_only=True):
    """One repeat. `scenario` as `Scenario.resolved` has it. Holds credentials: never written to a file."""

    scenario: dict[str, Any]
    target: Target
    seed: int
    salt: str
    folder: str = ""  # of the repeat; "": nothing is written
    per_word: float = Tokenisation().per_word
    overhead: float = Tokenisation().overhead
    frames: dict[str, float] = msgspec.field(default_factory=lambda: dict(Tokenisation().frames))
    parent: int = 0  # process that started it, and without which it ends

    def scenario_made(self) -> Scenario:
        return Scenario.of(self.scenario)


class Begin(msgspec.Struct, kw_only=True):
    """The master to one worker: your part of the repeat, and when it begins."""

    process: int
    processes: int
    zero: float  # by the monotonic clock of the machine `boot`
    boot: str
    zero_unix: float
    scenario: dict[str, Any]
    model: str
    seed: int
    salt: str
    per_word: float
    overhead: float
    frames: dict[str, float]


def begin(order: Order, process: int, processes: int, zero: float) -> Begin:
    return Begin(
        process=process,
        processes=processes,
        zero=zero,
        boot=boot(),
        zero_unix=time.time() + zero - time.monotonic(),
        scenario=order.scenario,
        model=order.target.model,
        seed=order.seed,
        salt=order.salt,
        per_word=order.per_word,
        overhead=order.overhead,
        frames=order.frames,
    )


def zero_here(told: Begin) -> float:
    """The repeat's begin by this machine's monotonic clock. On another machine than the master's it is as exact as
    their clocks agree; durations do not depend on it."""
    if told.boot == boot():
        return told.zero
    return time.monotonic() + told.zero_unix - time.time()


@lru_cache(maxsize=1)
def boot() -> str:
    """The same for processes that share a monotonic clock, and for no others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{uuid.getnode()}-{os.getuid()}"

"""Runs of the simulation beside each other, one process for each core. They know no clock and share nothing: what comes
out is the same as one after the other."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

Run = Callable[..., Any]
RunAll = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def run_all() -> Iterator[RunAll]:
    """`run_all(call, call, ...)`: what each of these returns, in their order. Longest first is soonest done."""
    cores = len(os.sched_getaffinity(0))
    # Spawned: a fork of a process that has threads may stand still for ever.
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:

        def run(*calls: Run) -> list[Any]:
            return [task.result() for task in [pool.submit(call) for call in calls]]

        yield run

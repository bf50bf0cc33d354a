"""The gateway's processes and the CPU they take."""

import os
from collections.abc import Sequence

import psutil

from vitalis_load.discovery import Status
from vitalis_load.errors import Exit, LoadFailure


def gateway_processes(status: Status) -> list[psutil.Process]:
    """Supervisor, workers and control with what they started, without the engines: what stands between clients and
    engines. Raises LoadFailure where they are not this machine's."""
    children = [child.pid for child in status.children if child.kind != "engine" and child.pid]
    try:
        found = [psutil.Process(pid) for pid in [status.pid, *children]]
        return found + [below for process in found[1:] for below in process.children(recursive=True)]
    except psutil.Error as error:
        raise LoadFailure(f"the gateway's processes cannot be looked at ({error})", Exit.NO_TARGET) from None


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """What they took until now. Raises LoadFailure where one has ended: a difference would mean nothing."""
    try:
        return float(sum(sum(process.cpu_times()[:2]) for process in processes))
    except psutil.Error as error:
        raise LoadFailure(f"a process of the gateway ended while it was measured ({error})", Exit.NO_TARGET) from None


def third_of_cores() -> int:
    """What of a machine the load generator may take beside engine and gateway."""
    return max(1, len(os.sched_getaffinity(0)) // 3)

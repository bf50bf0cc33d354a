"""Which GPUs, or which CPU cores, each replica gets. Pure: the same settings and inventory give the same answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from vitalis_serve.engines.gpus import Gpu, Inventory
from vitalis_serve.engines.memory import Architecture
from vitalis_serve.errors import ConfigurationError
from vitalis_serve.settings.schema import Settings


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one replica runs. `threads` is vLLM's binding of CPU threads ("0-3|4-7", one part per
    tensor-parallel rank); empty leaves the choice to vLLM."""

    replica: int
    device: Literal["cuda", "cpu"]
    gpus: tuple[Gpu, ...] = ()
    threads: str = ""


def device_of(settings: Settings, inventory: Inventory) -> Literal["cuda", "cpu"]:
    """cuda or cpu, with `auto` decided by whether there is a GPU."""
    device = settings.engines.device
    if device == "auto":
        return "cuda" if inventory.gpus else "cpu"
    return device


def place(settings: Settings, inventory: Inventory, architecture: Architecture | None = None) -> tuple[Placement, ...]:
    """One placement for each replica, best-linked GPUs first.

    Raises ConfigurationError where they do not fit, or where `architecture` cannot be cut so.
    """
    if architecture is not None:
        check_heads(settings, architecture)
    if device_of(settings, inventory) == "cpu":
        return _on_cpu(settings, inventory)
    groups = _groups(_chosen(settings, inventory), settings.engines.tensor_parallel, inventory)
    replicas = settings.engines.replicas
    if replicas > len(groups):
        width = settings.engines.tensor_parallel
        raise ConfigurationError(
            f"engines.replicas is {replicas} but {len(groups) * width} GPUs make only {len(groups)} groups of"
            f" {width}; lower engines.replicas or engines.tensor_parallel"
        )
    return tuple(Placement(i, "cuda", gpus=groups[i]) for i in range(replicas))


def check_heads(settings: Settings, architecture: Architecture) -> None:
    """Raises ConfigurationError where vLLM could not spread the model's heads over `engines.tensor_parallel` ranks:
    each takes as many attention heads, and either as many key-value heads or a copy of one."""
    width, model = settings.engines.tensor_parallel, settings.model
    heads, kv_heads = architecture.attention_heads, architecture.kv_heads
    right = [n for n in range(1, 65) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    if width not in right:
        # As configured: the architecture's own name may be that of a folder in the cache.
        name = model.hub or model.package or model.build or str(model.folder)
        shown = ", ".join(str(n) for n in right)
        raise ConfigurationError(
            f"engines.tensor_parallel is {width} but {name} has {heads} attention heads and {kv_heads} key-value"
            f" heads, which allow {shown} only"
        )


def _chosen(settings: Settings, inventory: Inventory) -> tuple[Gpu, ...]:
    if not inventory.gpus:
        raise ConfigurationError(
            "engines.device is cuda but no GPU was found; install NVIDIA's driver, check CUDA_VISIBLE_DEVICES,"
            " or use the profile cpu-demo"
        )
    wanted = settings.engines.gpus
    if wanted is None:
        return inventory.gpus
    by_index = {gpu.index: gpu for gpu in inventory.gpus}
    for index in wanted:
        if index not in by_index:
            known = ", ".join(str(i) for i in by_index)
            raise ConfigurationError(f"engines.gpus names GPU {index}, but there are only {known}")
        if wanted.count(index) > 1:
            raise ConfigurationError(f"engines.gpus names GPU {index} more than once")
    if not wanted:
        raise ConfigurationError("engines.gpus is an empty list; leave it out to use all GPUs")
    return tuple(by_index[index] for index in wanted)


def _groups(gpus: Sequence[Gpu], width: int, inventory: Inventory) -> list[tuple[Gpu, ...]]:
    """All GPUs cut into groups of `width`. A group is as fast as its slowest link, so that counts first."""
    if len(gpus) % width:
        right = ", ".join(str(n) for n in range(1, len(gpus) + 1) if len(gpus) % n == 0)
        raise ConfigurationError(
            f"engines.tensor_parallel is {width} but {len(gpus)} GPUs cannot be cut into groups of {width}; use"
            f" {right}, or name the GPUs to use in engines.gpus"
        )

    def quality(group: tuple[Gpu, ...]) -> tuple[int, int]:
        links = [inventory.link(a, b) for a, b in combinations(group, 2)] or [0]
        return min(links), sum(links)

    free, groups = list(gpus), []
    while free:
        # max keeps the first of equals, and combinations come in order: lowest indices win a tie.
        best = max(combinations(free, width), key=quality)
        groups.append(best)
        free = [gpu for gpu in free if gpu not in best]
    return groups


def _on_cpu(settings: Settings, inventory: Inventory) -> tuple[Placement, ...]:
    """Cores are cut evenly over all ranks of all replicas; with more ranks than cores they are shared in turn.

    A single rank is left to vLLM, which then keeps a core free for its scheduler and minds NUMA nodes.
    """
    replicas, width = settings.engines.replicas, settings.engines.tensor_parallel
    ranks = replicas * width
    if ranks <= 1:
        return tuple(Placement(i, "cpu") for i in range(replicas))
    parts = _cut(inventory.cores, ranks)
    return tuple(Placement(i, "cpu", threads="|".join(parts[i * width : (i + 1) * width])) for i in range(replicas))


def _cut(cores: tuple[tuple[int, ...], ...], ranks: int) -> list[str]:
    if len(cores) < ranks:
        logical = [cpu for core in cores for cpu in core]
        return [_ranges([logical[rank % len(logical)]]) for rank in range(ranks)]
    share, parts = len(cores) // ranks, []
    for rank in range(ranks):
        mine = [core[0] for core in cores[rank * share : (rank + 1) * share]]
        # As vLLM does by itself: where there are enough, one core stays free for the scheduler.
        parts.append(_ranges(mine[:-1] if len(mine) >= 4 else mine))
    return parts


def _ranges(cpus: Sequence[int]) -> str:
    """[0, 1, 2, 8] -> "0-2,8"."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)

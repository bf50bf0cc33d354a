"""What this machine has: GPUs and the links between them (NVML), CPU cores, memory.

An inventory goes to JSON and back, so that placement on a machine that is not at hand can be planned and tested.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pynvml

from vitalis_serve.errors import ConfigurationError
from vitalis_serve.settings.hardware import nvml

# Best first. Names as `nvidia-smi topo -m` has them, nvlink standing for NV1 to NV18.
LINKS: Final = ("sys", "node", "phb", "pxb", "pix", "nvlink")
_BY_ANCESTOR: Final = (("sys", 50), ("node", 40), ("phb", 30), ("pxb", 20), ("pix", 0))


@dataclass(frozen=True, slots=True)
class Gpu:
    index: int
    uuid: str
    name: str
    memory_bytes: int
    numa: int | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """links: (index, index, kind) of each pair, lower index first, kind from LINKS.
    cores: one tuple of logical CPUs for each physical core that this process may use."""

    gpus: tuple[Gpu, ...] = ()
    links: tuple[tuple[int, int, str], ...] = ()
    cores: tuple[tuple[int, ...], ...] = ((0,),)
    memory_bytes: int = 0
    driver: str = ""

    def link(self, a: Gpu, b: Gpu) -> int:
        """How good the link between two GPUs is: an index into LINKS, 0 where nothing is known."""
        pair = (min(a.index, b.index), max(a.index, b.index))
        return next((LINKS.index(kind) for i, j, kind in self.links if (i, j) == pair), 0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> "Inventory":
        """Raises ConfigurationError where the document is not one that `to_json` made."""
        try:
            return Inventory(
                gpus=tuple(Gpu(**gpu) for gpu in document["gpus"]),
                links=tuple((int(a), int(b), _link_kind(kind)) for a, b, kind in document["links"]),
                cores=tuple(tuple(int(cpu) for cpu in core) for core in document["cores"]),
                memory_bytes=int(document["memory_bytes"]),
                driver=str(document.get("driver", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"not an inventory as `vitalis-serve plan --json` writes it: {error!r}") from None


def _link_kind(kind: object) -> str:
    if kind not in LINKS:
        raise ValueError(f"link {kind!r} is none of {', '.join(LINKS)}")
    return str(kind)


def read_inventory(environ: Mapping[str, str]) -> Inventory:
    """This machine now. GPUs that CUDA_VISIBLE_DEVICES hides are left out; no driver means no GPUs."""
    gpus, links, driver = _gpus()
    visible = _visible(gpus, environ.get("CUDA_VISIBLE_DEVICES"))
    kept = {gpu.index for gpu in visible}
    return Inventory(
        gpus=visible,
        links=tuple(link for link in links if link[0] in kept and link[1] in kept),
        cores=_cores(sorted(os.sched_getaffinity(0)), Path("/sys/devices/system/cpu")),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        driver=driver,
    )


def _gpus() -> tuple[tuple[Gpu, ...], tuple[tuple[int, int, str], ...], str]:
    with nvml() as found:
        if not found:
            return (), (), ""
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(
            Gpu(
                index=i,
                uuid=pynvml.nvmlDeviceGetUUID(handle),
                name=pynvml.nvmlDeviceGetName(handle),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                numa=_numa(handle),
            )
            for i, handle in enumerate(handles)
        )
        links = tuple(
            (i, j, _link(handles[i], handles[j])) for i in range(len(handles)) for j in range(i + 1, len(handles))
        )
        return gpus, links, str(pynvml.nvmlSystemGetDriverVersion())


def _numa(handle: Any) -> int | None:
    try:
        return int(pynvml.nvmlDeviceGetNumaNodeId(handle))
    except pynvml.NVMLError:
        return None


def _link(a: Any, b: Any) -> str:
    try:
        # Says yes behind an NVSwitch too, where counting a GPU's own links would not tell who is at the other end.
        if pynvml.nvmlDeviceGetP2PStatus(a, b, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) == pynvml.NVML_P2P_STATUS_OK:
            return "nvlink"
        ancestor = pynvml.nvmlDeviceGetTopologyCommonAncestor(a, b)
    except pynvml.NVMLError:
        return "sys"
    return next(kind for kind, level in _BY_ANCESTOR if ancestor >= level)


def _visible(gpus: tuple[Gpu, ...], variable: str | None) -> tuple[Gpu, ...]:
    if variable is None:
        return gpus
    named = [part.strip() for part in variable.split(",") if part.strip()]
    return tuple(
        gpu
        for gpu in gpus
        if any(part == str(gpu.index) or (part.startswith("GPU-") and gpu.uuid.startswith(part)) for part in named)
    )


def _cores(usable: list[int], folder: Path) -> tuple[tuple[int, ...], ...]:
    """Usable logical CPUs by physical core: two threads of one core are no two cores to compute on."""
    cores: dict[str, list[int]] = {}
    for cpu in usable:
        try:
            key = (folder / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            key = str(cpu)
        cores.setdefault(key, []).append(cpu)
    return tuple(tuple(cpus) for cpus in cores.values())

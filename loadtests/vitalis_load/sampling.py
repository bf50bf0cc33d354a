"""What the other side says of itself, asked for once a second: the gateway's counts from control, each engine's from
vLLM's /metrics, GPUs by NVML. Who does not answer in time is missing in that sample, and nothing waits for it."""

import contextlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from vitalis_load.plain_http import ask
from vitalis_load.records import EngineSample, GpuSample, Sample
from vitalis_load.target import Target

ANSWER_SECONDS = 0.9

# Of an engine's page, which is long, only these lines are looked for.
_ENGINE = {
    "running": b"vllm:num_requests_running",
    "waiting": b"vllm:num_requests_waiting",
    "kv_usage": b"vllm:kv_cache_usage_perc",
    "generation_tokens": b"vllm:generation_tokens_total",
    "prompt_tokens": b"vllm:prompt_tokens_total",
    "cache_queries": b"vllm:prefix_cache_queries_total",
    "cache_hits": b"vllm:prefix_cache_hits_total",
    "preemptions": b"vllm:num_preemptions_total",
}
_REQUIRED = ("running", "waiting", "kv_usage", "generation_tokens", "prompt_tokens")
_LINE = re.compile(rb"^(vitalis_[a-z0-9_]+)(?:\{[^\n]*\})? (\S+)$", re.MULTILINE)
_NOT_SUMS = (b"_bucket", b"_created")


def engine_sample(name: str, page: bytes) -> EngineSample | None:
    """vLLM's page; several data-parallel ranks are added up (use of the KV cache: their mean). None where it is none
    of vLLM's."""
    values: dict[str, float] = {}
    for field, metric in _ENGINE.items():
        found = list(_values(page, metric))
        if found:
            values[field] = sum(found) / (len(found) if field == "kv_usage" else 1)
    if any(field not in values for field in _REQUIRED):
        return None
    return EngineSample(name=name, **values)


def _values(page: bytes, metric: bytes) -> Iterable[float]:
    """Of every line of exactly that name."""
    at = page.find(metric)
    while at >= 0:
        end = page.find(b"\n", at)
        line = page[at : end if end >= 0 else len(page)]
        after = line[len(metric) : len(metric) + 1]
        if after in (b"{", b" ") and (at == 0 or page[at - 1 : at] == b"\n"):
            try:
                yield float(line.rpartition(b" ")[2])
            except ValueError:
                return
        at = page.find(metric, at + len(metric))


def gateway_sample(page: bytes) -> dict[str, float]:
    """Every metric of the gateway, without labels, added up; of histograms their sums and counts."""
    sums: dict[str, float] = {}
    for name, value in _LINE.findall(page):
        if not name.endswith(_NOT_SUMS):
            key = name.decode()
            try:
                sums[key] = sums.get(key, 0.0) + float(value)
            except ValueError:
                continue
    return sums


class Gpus:
    """The machine's NVIDIA GPUs by NVML; none where there is no driver. `close` when done."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        except Exception:  # noqa: BLE001  no library, no driver, a driver in trouble: a run goes on without
            self._handles = []

    def names(self) -> list[str]:
        """As the driver says them."""
        try:
            found = [self._nvml.nvmlDeviceGetName(handle) for handle in self._handles]
        except Exception:  # noqa: BLE001
            return []
        return [name.decode() if isinstance(name, bytes) else str(name) for name in found]

    def sample(self) -> list[GpuSample]:
        """Of each GPU what it tells now; one that tells nothing (it fell off the bus) is left out."""
        samples = []
        for index, handle in enumerate(self._handles):
            one = GpuSample(index=index)
            with contextlib.suppress(Exception):  # NVML's own kinds, and a library that lacks a function
                one.utilisation = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
            with contextlib.suppress(Exception):
                one.memory_bytes = float(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
            with contextlib.suppress(Exception):
                one.power_watts = self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000
            if (one.utilisation, one.memory_bytes, one.power_watts) != (None, None, None):
                samples.append(one)
        return samples

    def close(self) -> None:
        if self._nvml is not None:
            try:
                self._nvml.nvmlShutdown()
            except Exception:  # noqa: BLE001
                return


def sources(target: Target) -> list[tuple[str, Callable[[], Any]]]:
    """What can be asked, each with its name ("" is the gateway). Asking raises OSError."""
    found: list[tuple[str, Callable[[], Any]]] = []
    if target.metrics_url:
        url, token = target.metrics_url.rstrip("/").removesuffix("/metrics"), target.metrics_token
        found.append(("", lambda: gateway_sample(_page(url, token))))
    for name, address in target.engines.items():
        where = address.rstrip("/").removesuffix("/metrics")
        found.append((name, lambda name=name, where=where: engine_sample(name, _page(where))))  # type: ignore[misc]
    return found


def together(at: float, answers: dict[str, Any], gpus: list[GpuSample]) -> Sample:
    """One sample of what came in time."""
    engines = [answer for name, answer in answers.items() if name and answer is not None]
    return Sample(at=at, gateway=answers.get("") or {}, engines=engines, gpus=gpus)


def _page(url: str, token: str = "") -> bytes:
    answer = ask(url, "/metrics", token=token, seconds=ANSWER_SECONDS)
    if answer.status != 200:
        raise OSError(f"it answers {answer.status}")
    return answer.body

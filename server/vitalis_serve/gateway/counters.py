"""A worker's counts: plain numbers on the hot path, turned into `vitalis_serve.metrics`' report when control asks."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from vitalis_serve.gateway.usage import Usage
from vitalis_serve.metrics import TIME_BUCKETS

Sample = tuple[str, dict[str, str], float]


class Histogram:
    """Counts per bucket (not cumulative, one more than there are bounds) and the sum, in seconds."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(TIME_BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(TIME_BUCKETS, seconds)] += 1
        self.sum += seconds


class RouteCounts:
    __slots__ = (
        "cached_tokens",
        "completion_tokens",
        "ends",
        "estimated_completion_tokens",
        "estimated_prompt_tokens",
        "first_byte",
        "first_token",
        "prompt_tokens",
        "queue",
        "reasoning_tokens",
        "request",
    )

    def __init__(self) -> None:
        self.ends: dict[tuple[str, str], int] = defaultdict(int)  # (outcome, code)
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self.estimated_prompt_tokens = 0
        self.estimated_completion_tokens = 0
        self.first_byte = Histogram()
        self.first_token = Histogram()
        self.request = Histogram()
        self.queue = Histogram()

    def observe(self, request: float, first_byte: float, queued: float, *, stream: bool) -> None:
        """A request that came to a good end, in seconds."""
        self.request.observe(request)
        self.first_byte.observe(first_byte)
        if stream:
            self.first_token.observe(first_byte)
        if queued:
            self.queue.observe(queued)
        else:
            self.queue.counts[0] += 1

    def count(self, usage: Usage) -> None:
        """A request's tokens; estimated ones apart, so that the others are what the engines counted."""
        if usage.prompt_estimated:
            self.estimated_prompt_tokens += usage.prompt_tokens
        else:
            self.prompt_tokens += usage.prompt_tokens
            self.cached_tokens += usage.cached_tokens
        if usage.completion_estimated:
            self.estimated_completion_tokens += usage.completion_tokens
        else:
            self.completion_tokens += usage.completion_tokens
            self.reasoning_tokens += usage.reasoning_tokens


class Counters:
    """One per worker; every field has one writer, the event loop."""

    def __init__(self) -> None:
        self.routes: dict[str, RouteCounts] = defaultdict(RouteCounts)
        self.open_contexts = 0
        self.client_connections = 0
        self.body_bytes = 0
        self.uncounted = 0  # requests that came while their use could not be recorded
        self.loop_lag_seconds = 0.0
        self.shed: dict[str, int] = defaultdict(int)
        self.retries: dict[str, int] = defaultdict(int)
        self.fallbacks: dict[tuple[str, str], int] = defaultdict(int)  # (route, the model asked instead)
        self.upstream_failures: dict[tuple[str, str], int] = defaultdict(int)

    def report(self, extra_gauges: Iterable[Sample], extra_counters: Iterable[Sample]) -> dict[str, Any]:
        """The document of `vitalis_serve.metrics`; the extra ones are those whose owners live elsewhere."""
        counters: list[Any] = [list(sample) for sample in extra_counters]
        histograms: list[Any] = []
        for route, counts in self.routes.items():
            name = {"route": route}
            for (outcome, code), n in counts.ends.items():
                counters.append(["vitalis_requests_total", {**name, "outcome": outcome, "code": code}, n])
            counters.append(["vitalis_prompt_tokens_total", name, counts.prompt_tokens])
            counters.append(["vitalis_completion_tokens_total", name, counts.completion_tokens])
            counters.append(["vitalis_cached_tokens_total", name, counts.cached_tokens])
            counters.append(["vitalis_reasoning_tokens_total", name, counts.reasoning_tokens])
            for kind, tokens in (
                ("prompt", counts.estimated_prompt_tokens),
                ("completion", counts.estimated_completion_tokens),
            ):
                counters.append(["vitalis_estimated_tokens_total", {**name, "kind": kind}, tokens])
            for metric, histogram in (
                ("vitalis_first_byte_seconds", counts.first_byte),
                ("vitalis_first_token_seconds", counts.first_token),
                ("vitalis_request_seconds", counts.request),
                ("vitalis_queue_seconds", counts.queue),
            ):
                histograms.append([metric, name, histogram.counts, histogram.sum])
        counters += [["vitalis_shed_total", {"reason": r}, n] for r, n in self.shed.items()]
        counters += [["vitalis_retries_total", {"reason": r}, n] for r, n in self.retries.items()]
        counters += [
            ["vitalis_upstream_failures_total", {"replica": replica, "kind": kind}, n]
            for (replica, kind), n in self.upstream_failures.items()
        ]
        counters += [
            ["vitalis_fallbacks_total", {"route": route, "model": model}, n]
            for (route, model), n in self.fallbacks.items()
        ]
        gauges: list[Any] = [
            ["vitalis_open_contexts", {}, self.open_contexts],
            ["vitalis_client_connections", {}, self.client_connections],
            ["vitalis_event_loop_lag_seconds", {}, self.loop_lag_seconds],
            ["vitalis_body_bytes", {}, self.body_bytes],
            *([name, labels, value] for name, labels, value in extra_gauges),
        ]
        return {"counters": counters, "gauges": gauges, "histograms": histograms}

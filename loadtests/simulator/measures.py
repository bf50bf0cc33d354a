"""vLLM's Prometheus metrics, as plain numbers until somebody asks for the page."""

import time
from bisect import bisect_left
from collections.abc import Iterable

from simulator.options import Options
from simulator.schedule import Schedule, Sequence

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
            80.0, 160.0, 640.0, 2560.0)  # fmt: skip
_GAPS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
            960.0, 1920.0, 7680.0)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")


class Histogram:
    """Counts by bucket; `weight` observations of one value at once."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += weight
        self.total += value * weight

    def lines(self, name: str, labels: str) -> Iterable[str]:
        count = 0
        for bound, more in zip(self.bounds, self.counts, strict=False):
            count += more
            yield f'{name}_bucket{{le="{float(bound)}",{labels}}} {count}.0'
        count += self.counts[-1]
        yield f'{name}_bucket{{le="+Inf",{labels}}} {count}.0'
        yield f"{name}_count{{{labels}}} {count}.0"
        yield f"{name}_sum{{{labels}}} {self.total}"


class Measures:
    """What the engine counts beside its schedule."""

    def __init__(self) -> None:
        self.first_token = Histogram(_SECONDS)
        self.gap = Histogram(_GAPS)
        self.latency = Histogram(_LATENCY)
        self.queue = Histogram(_LATENCY)
        self.prefill = Histogram(_LATENCY)
        self.decode = Histogram(_LATENCY)
        self.inference = Histogram(_LATENCY)
        self.per_token = Histogram(_GAPS)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        self.step_tokens = Histogram(_STEP_TOKENS)
        self.finished = dict.fromkeys(FINISHED_REASONS, 0)
        self.rejected = 0
        self.started = time.time()

    def request(self, sequence: Sequence, reason: str, count: int, now: float) -> None:
        """A request of `count` answers has its last token."""
        decode = now - sequence.first_token
        self.finished[reason] += count
        self.latency.observe(now - sequence.arrived)
        self.queue.observe(sequence.scheduled - sequence.arrived)
        self.prefill.observe(sequence.first_token - sequence.scheduled)
        self.decode.observe(decode)
        self.inference.observe(now - sequence.scheduled)
        self.per_token.observe(decode / max(1, sequence.generated - 1))
        self.prompt_tokens.observe(sequence.prompt_tokens)
        self.generation_tokens.observe(sequence.generated * count)

    def page(self, options: Options, schedule: Schedule) -> bytes:
        """The answer of GET /metrics."""
        labels = f'engine="0",model_name="{options.models[0]}"'
        lines = ["# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {self.started}"]

        def add(kind: str, name: str, text: str, values: Iterable[tuple[str, float]]) -> None:
            full = f"vllm:{name}"
            lines.append(f"# HELP {full} {text}")
            lines.append(f"# TYPE {full} {kind}")
            suffix = "_total" if kind == "counter" else ""
            lines.extend(f"{full}{suffix}{{{which}}} {float(value)}" for which, value in values)

        waiting = schedule.waiting_count
        add("gauge", "num_requests_running", "Number of requests in model execution batches.",
            [(labels, len(schedule.running))])  # fmt: skip
        add("gauge", "num_requests_waiting", "Number of requests waiting to be processed.", [(labels, waiting)])
        add("gauge", "num_requests_waiting_by_reason", "Number of requests waiting, by reason.",
            [(f'{labels},reason="capacity"', waiting), (f'{labels},reason="deferred"', 0)])  # fmt: skip
        add("gauge", "kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.",
            [(labels, schedule.kv_usage())])  # fmt: skip
        add("counter", "prefix_cache_queries", "Prefix cache queries, in tokens.", [(labels, schedule.cache_queries)])
        add("counter", "prefix_cache_hits", "Prefix cache hits, in tokens.", [(labels, schedule.cache_hits)])
        add("counter", "num_preemptions", "Cumulative number of preemptions.", [(labels, schedule.preemptions)])
        add("counter", "prompt_tokens", "Number of prefill tokens processed.", [(labels, schedule.prompt_tokens)])
        add("counter", "prompt_tokens_cached", "Number of prompt tokens found in the prefix cache.",
            [(labels, schedule.cache_hits)])  # fmt: skip
        add("counter", "generation_tokens", "Number of generation tokens processed.",
            [(labels, schedule.generation_tokens)])  # fmt: skip
        add("counter", "request_success", "Count of successfully processed requests.",
            [(f'{labels},finished_reason="{reason}"', count) for reason, count in self.finished.items()])  # fmt: skip
        add("counter", "admission_rejections", "Requests refused at admission.",
            [(f'model_name="{options.models[0]}",reason="max_num_queued_reqs"', self.rejected)])  # fmt: skip
        add("gauge", "cache_config_info", "Information of the LLMEngine CacheConfig", [(_cache_labels(options), 1)])
        for name, text, histogram in (
            ("iteration_tokens_total", "Histogram of number of tokens per engine_step.", self.step_tokens),
            ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", self.first_token),
            ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", self.gap),
            ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", self.latency),
            ("request_queue_time_seconds", "Histogram of time spent in WAITING phase.", self.queue),
            ("request_prefill_time_seconds", "Histogram of time spent in PREFILL phase.", self.prefill),
            ("request_decode_time_seconds", "Histogram of time spent in DECODE phase.", self.decode),
            ("request_inference_time_seconds", "Histogram of time spent in RUNNING phase.", self.inference),
            ("request_time_per_output_token_seconds", "Histogram of time per output token.", self.per_token),
            ("request_prompt_tokens", "Number of prefill tokens processed.", self.prompt_tokens),
            ("request_generation_tokens", "Number of generation tokens processed.", self.generation_tokens),
        ):
            add("histogram", name, text, [])
            lines.extend(histogram.lines(f"vllm:{name}", labels))
        return ("\n".join(lines) + "\n").encode()


def _cache_labels(options: Options) -> str:
    blocks = options.kv_cache_tokens // options.block_tokens
    concurrency = options.kv_cache_tokens / options.max_model_len
    labels = {
        "block_size": options.block_tokens,
        "cache_dtype": "auto",
        "enable_prefix_caching": options.prefix_caching,
        "engine": 0,
        "kv_cache_max_concurrency": concurrency,
        "kv_cache_size_tokens": options.kv_cache_tokens,
        "num_gpu_blocks": blocks,
    }
    return ",".join(f'{name}="{value}"' for name, value in labels.items())

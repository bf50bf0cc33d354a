"""What a run writes down, line by line, while it goes on: the only thing that results are made of.

A run is a folder:

    run.json               RunInfo, written before the first request
    repeat-1/requests.jsonl  a Record per request, in the order in which they ended
    repeat-1/gaps.jsonl      GapsOfSecond: gaps between chunks, as HdrHistograms to be added up
    repeat-1/client.jsonl    ClientSecond: what the load generator itself was doing
    repeat-1/samples.jsonl   Sample: what the gateway, the engines and the GPUs said of themselves
    repeat-1/end.json        RepeatEnd; missing where the run was killed
    result.json, report.html  made of the above, again and again if wanted

All times `at`, `scheduled`, `sent` ... are seconds since the repeat began, by the monotonic clock of the machine that
measured. Tokens come from `usage` and are None where the server did not say.
"""

from typing import Any

import msgspec

# Beside "http_<status>": the load generator itself had no socket for it; no connection could be made in time; the
# connection broke; no end within the request's deadline; an error event inside a 200; a stream that just ended; bytes
# that are not the API's.
ERRORS = ("client", "connect", "reset", "timeout", "stream_error", "no_end", "garbled")


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request as its client saw it."""

    task: str
    api: str  # chat, completions, responses, messages
    stream: bool = True
    tenant: str = ""  # the scenario's name for whose credential was used
    klass: str = ""  # the class asked for: emergency, interactive, standard, batch; "" for the key's own
    process: int = 0
    turn: int = 0  # of a conversation, from 0
    scheduled: float  # when it should have been sent; `sent` for closed users
    sent: float  # when its first byte was written, connection included
    head: float | None = None  # the response's head was read
    first_token: float | None = None  # the first token of any kind: reasoning, content, tool call
    first_output: float | None = None  # the first token of content or of a tool call
    last_token: float | None = None
    ended: float  # the API's last event was read, or it failed
    status: int = 0  # HTTP; 0: no head came
    error: str = ""  # "": finished as the API says it must; else of ERRORS or "http_<status>"
    detail: str = ""  # the server's or the system's words, at most 200 characters
    unfinished: bool = False  # still going when the run ended: neither good nor failed
    retry_after: float | None = None  # seconds
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None  # reasoning included
    reasoning_tokens: int | None = None
    wanted_tokens: int | None = None  # the length that was asked for (max_tokens), for drift of output length
    chunks: int = 0  # events that carried tokens
    finish: str = ""  # the API's finish reason
    request_id: str = ""


class GapsOfSecond(msgspec.Struct):
    """Gaps between two chunks with tokens of the same answer, that ended within the second `at`."""

    at: int
    process: int
    hdr: str  # HdrHistogram of microseconds, V2 compressed, base64; 1 us to 10 min, 3 digits


class ClientSecond(msgspec.Struct):
    """One process of the load generator in one second."""

    at: int
    process: int
    cpu: float  # of one core, this process
    loop_lag_ms: float  # the longest that a ready greenlet waited
    in_flight: int
    started: int
    ended: int
    events: int  # chunks read
    users: int = 0


class EngineSample(msgspec.Struct):
    """One engine's vLLM metrics. Totals count up from the engine's start."""

    name: str
    running: float
    waiting: float
    kv_usage: float  # 0 to 1
    generation_tokens: float
    prompt_tokens: float
    cache_queries: float = 0
    cache_hits: float = 0
    preemptions: float = 0


class GpuSample(msgspec.Struct):
    """None: this GPU does not tell it (a part of a divided one its use, one that shares the CPU's memory that)."""

    index: int
    utilisation: float | None = None  # 0 to 1
    memory_bytes: float | None = None  # used
    power_watts: float | None = None


class Sample(msgspec.Struct, omit_defaults=True):
    """What the other side said of itself at one moment. What cannot be had is empty."""

    at: float
    gateway: dict[str, float] = {}  # metric name without labels -> sum
    engines: list[EngineSample] = []
    gpus: list[GpuSample] = []


class RunInfo(msgspec.Struct, kw_only=True):
    """What was run, where and with what. `scenario` is the whole of it after defaults and scale."""

    schema: str = "vitalis-load/1"
    id: str
    scenario: dict[str, Any]
    scale: str
    url: str
    model: str
    repeats: int
    processes: int
    began_at: float  # Unix seconds
    commit: str = ""  # of this repository; "+changes" where files differ
    versions: dict[str, str] = {}  # python, locust, gevent, vitalis-load, the server's where it tells
    machine: dict[str, Any] = {}  # cpu, cores, memory_bytes, kernel, gpus
    target: dict[str, Any] = {}  # what the target said: models, profile, engine options
    note: str = ""


class RepeatEnd(msgspec.Struct, kw_only=True):
    began_at: float  # Unix seconds
    seconds: float
    complete: bool = True
    reason: str = ""  # a sentence where not complete: interrupted, worker lost, disk full
    lost_processes: list[int] = []

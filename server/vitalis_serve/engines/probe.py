"""Asking an engine: does the model answer (a real completion), and does it make progress (its counters).

A small HTTP client of its own on asyncio streams, so that a probe depends on nothing but the engine. Deadlines are
`loop.time()` instants, computed once by the caller. Whatever the other side does, the outcome is a result, never an
exception.
"""

import asyncio
import errno
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MAX_HEAD_BYTES: Final = 65_536
MAX_BODY_BYTES: Final = 4 << 20
MAX_MODELS: Final = 256
MODEL_NAME: Final = re.compile(r"[!-~]{1,256}")
PROMPT: Final = "1, 2, 3,"
# Names as vLLM 0.32 exports them -> fields of Progress.
_SERIES: Final[Mapping[str, str]] = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:iteration_tokens_total_count": "iterations",
    "vllm:generation_tokens_total": "generated_tokens",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
}
# A Unix socket's accept queue is full (asyncio takes that for a connection, which it then lacks), or we lack
# descriptors or memory: as if nothing had come in time.
_NOT_ITS_FAULT: Final = frozenset(
    {errno.EAGAIN, errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
)
# asyncio's words where a name has several addresses (localhost: ::1 and 127.0.0.1) and none could be connected to.
_REFUSED_BY_ONE: Final = f"[Errno {errno.ECONNREFUSED}]"
NOBODY: Final = "nobody listens"
_STARTED: Final = re.compile(rb"^process_start_time_seconds ([^\s]+)", re.MULTILINE)
_SAMPLE: Final = re.compile(rb"^(vllm:[a-z_]+)(?:\{[^\n]*\})? ([^\s]+)", re.MULTILINE)


class ProbeError(Exception):
    """What went wrong, in a few words. `refused`: it said no or nobody listens, rather than nothing in time. `busy`: it
    said 503 to a real request. `gone`: nobody listens."""

    def __init__(self, reason: str, *, refused: bool = False, busy: bool = False, gone: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused
        self.busy = busy
        self.gone = gone


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """`ready` only if the model generated a token. `reason` says what was wrong otherwise; `refused`, `busy` and `gone`
    as in ProbeError. `text` is the answer."""

    ready: bool
    reason: str = ""
    refused: bool = False
    busy: bool = False
    gone: bool = False
    text: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelsResult:
    """`names` is () where the engine does not say; then `reason` tells why."""

    names: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """`healthy` is /health's word, which a frozen engine gives too: compare `counters` of two looks to tell. `refused`
    and `gone` as in ProbeError. `started`: when its process was, in Unix seconds; 0 where it does not say."""

    healthy: bool
    reason: str = ""
    refused: bool = False
    gone: bool = False
    started: float = 0.0
    running: int = 0
    waiting: int = 0
    iterations: float = 0.0
    generated_tokens: float = 0.0
    prompt_tokens: float = 0.0
    kv_cache_usage: float = 0.0
    kv_cache_tokens: int | None = field(default=None)

    @property
    def counters(self) -> tuple[float, ...]:
        """Different from an earlier look's exactly where the engine has done something since."""
        return (self.iterations, self.generated_tokens, self.prompt_tokens)


async def answers(address: str, model: str, deadline: float) -> ProbeResult:
    """Whether `model` really answers at `address` ("unix:/path" or "http://host:port") before `deadline`."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}).encode()
    try:
        status, answer = await request(address, "POST", "/v1/completions", deadline, body)
        if status != 200:
            raise ProbeError(f"answered {status}: {_message(answer)}", refused=True, busy=status == 503)
        text = _completion(answer)
    except ProbeError as error:
        return ProbeResult(False, str(error), error.refused, error.busy, error.gone, seconds=loop.time() - began)
    return ProbeResult(True, text=text, seconds=loop.time() - began)


async def progress(address: str, deadline: float | None = None) -> Progress:
    """A cheap look: /health, then the counters in /metrics. `deadline` defaults to two seconds from now."""
    if deadline is None:
        deadline = asyncio.get_running_loop().time() + 2
    try:
        status, _ = await request(address, "GET", "/health", deadline)
        if status != 200:
            raise ProbeError(f"/health answered {status}", refused=True)
        status, text = await request(address, "GET", "/metrics", deadline)
        if status != 200:
            raise ProbeError(f"/metrics answered {status}", refused=True)
    except ProbeError as error:
        return Progress(False, str(error), error.refused, error.gone)
    return parse_metrics(text)


async def models(address: str, deadline: float) -> ModelsResult:
    """The names that the engine answers to, as it lists them. Left out are those that no header could carry."""
    try:
        status, answer = await request(address, "GET", "/v1/models", deadline)
        if status != 200:
            raise ProbeError(f"/v1/models answered {status}", refused=True)
    except ProbeError as error:
        return ModelsResult(reason=str(error))
    listed = _document(answer).get("data")
    names = [model.get("id") for model in listed if isinstance(model, dict)] if isinstance(listed, list) else []
    usable = dict.fromkeys(name for name in names if isinstance(name, str) and MODEL_NAME.fullmatch(name))
    return ModelsResult(tuple(usable)[:MAX_MODELS], "" if usable else "/v1/models lists none")


def parse_metrics(text: bytes) -> Progress:
    """vLLM's exposition, each series summed over its labels (engines of one process). Never fails: what is not
    there is 0."""
    sums = dict.fromkeys(_SERIES.values(), 0.0)
    for name, number in _SAMPLE.findall(text):
        key = _SERIES.get(name.decode())
        if key:
            sums[key] += _number(number)
    started = _STARTED.search(text)
    tokens = re.search(rb'kv_cache_size_tokens="(\d{1,18})"', text)
    return Progress(
        healthy=True,
        started=_number(started[1]) if started else 0.0,
        running=int(sums["running"]),
        waiting=int(sums["waiting"]),
        iterations=sums["iterations"],
        generated_tokens=sums["generated_tokens"],
        prompt_tokens=sums["prompt_tokens"],
        kv_cache_usage=sums["kv_cache_usage"],
        kv_cache_tokens=int(tokens[1]) if tokens else None,
    )


def _number(text: bytes) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


async def request(address: str, method: str, path: str, deadline: float, body: bytes = b"") -> tuple[int, bytes]:
    """(status, body) of one request on a connection of its own. Raises ProbeError, and nothing else."""
    writer: asyncio.StreamWriter | None = None
    if deadline <= asyncio.get_running_loop().time():
        raise ProbeError("no answer in time")
    try:
        async with asyncio.timeout_at(deadline):
            reader, writer = await _connect(address)
            head = (
                f"{method} {path} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            return await _answer(reader)
    except TimeoutError:
        raise ProbeError("no answer in time") from None
    except (ConnectionRefusedError, FileNotFoundError):
        raise ProbeError(NOBODY, refused=True, gone=True) from None
    except asyncio.IncompleteReadError:
        raise ProbeError("the connection closed inside the answer", refused=True) from None
    except asyncio.LimitOverrunError:
        raise ProbeError("the answer is not HTTP", refused=True) from None
    except (OSError, ValueError) as error:
        if _REFUSED_BY_ONE in str(error):
            raise ProbeError(NOBODY, refused=True, gone=True) from None
        refused = getattr(error, "errno", None) not in _NOT_ITS_FAULT
        raise ProbeError(f"{type(error).__name__}: {error}", refused=refused) from None
    finally:
        if writer is not None:
            writer.transport.abort()


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        return await asyncio.open_unix_connection(rest, limit=MAX_HEAD_BYTES)
    if scheme != "http":
        raise ValueError(f"{address} is neither unix:/path nor http://host:port")
    host, _, port = rest.strip("/").rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port), limit=MAX_HEAD_BYTES)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    version, _, rest = head[0].partition(b" ")
    if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise ProbeError("the answer is not HTTP", refused=True)
    headers: dict[bytes, bytes] = {}
    for line in head[1:]:
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    return int(rest[:3]), await _body(reader, headers)


async def _body(reader: asyncio.StreamReader, headers: Mapping[bytes, bytes]) -> bytes:
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        parts: list[bytes] = []
        total = 0
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            total += _bounded(size)
            _bounded(total)
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        return b"".join(parts)
    if b"content-length" in headers:
        return await reader.readexactly(_bounded(int(headers[b"content-length"])))
    parts, total = [], 0
    while part := await reader.read(MAX_HEAD_BYTES):
        total += len(part)
        _bounded(total)
        parts.append(part)
    return b"".join(parts)


def _bounded(size: int) -> int:
    if not 0 <= size <= MAX_BODY_BYTES:
        raise ProbeError(f"the answer has {size} bytes", refused=True)
    return size


def _document(answer: bytes) -> dict[str, Any]:
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _completion(answer: bytes) -> str:
    """The text generated. Raises ProbeError where it is not an answer with at least one token."""
    document = _document(answer)
    choices, usage = document.get("choices"), document.get("usage")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ProbeError("answered 200 without a choice", refused=True)
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if not isinstance(tokens, int) or tokens < 1:
        raise ProbeError("answered 200 without generating a token", refused=True)
    return str(choices[0].get("text", ""))


def _message(answer: bytes) -> str:
    error = _document(answer).get("error")
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text or answer[:200].decode("utf-8", "replace")).split())[:200]

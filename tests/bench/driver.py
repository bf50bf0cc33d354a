"""A closed-loop load of chat requests on kept-alive connections: counts and latencies for the benches."""

import asyncio
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools


@dataclass
class Load:
    """What one run of a load saw. Latencies in seconds: of a whole plain answer, or of a stream's first byte."""

    requests: int = 0
    events: int = 0
    failures: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """In milliseconds; 0 where nothing was measured."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3 if ordered else 0.0


class _Connection(asyncio.Protocol):
    def __init__(self, request: bytes, load: Load, done: asyncio.Event) -> None:
        self._request, self._load, self._done = request, load, done
        self._parser = httptools.HttpResponseParser(self)
        self._began = 0.0
        self._first = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._send()

    def _send(self) -> None:
        self._first = True
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._load.events += data.count(b"data: {")
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if self._first:
            self._first = False
            self._load.latencies.append(time.perf_counter() - self._began)

    def on_message_complete(self) -> None:
        self._load.requests += 1
        if self._parser.get_status_code() != 200:
            self._load.failures += 1
        if not self._done.is_set():
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.is_set():
            self._load.failures += 1


def chat(host: str, key: str, model: str, *, stream: bool, usage: bool = True, tokens: int = 100) -> bytes:
    """A chat request as bytes."""
    extra = f',"sim_output_tokens":{tokens}'
    if stream:
        extra += ',"stream":true' + (',"stream_options":{"include_usage":true}' if usage else "")
    body = (
        f'{{"model":"{model}","messages":[{{"role":"system","content":"You are a helpful assistant for the Vitalis '
        'application."},{"role":"user","content":"What is the capital of France, and why does it matter to the history '
        f'of Europe in the nineteenth century?"}}],"max_tokens":{tokens},"temperature":0.2{extra}}}'
    ).encode()
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


async def run(url: str, request: bytes, connections: int, seconds: float) -> Load:
    """`connections` clients, each sending its next request when the last answer is whole."""
    parts = urlsplit(url)
    loop, load, done = asyncio.get_running_loop(), Load(), asyncio.Event()
    began = time.perf_counter()
    opened = [
        await loop.create_connection(lambda: _Connection(request, load, done), parts.hostname, parts.port)
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    done.set()
    load.seconds = time.perf_counter() - began
    for transport, _ in opened:
        transport.abort()
    return load

"""Python's share of a request and of a streamed event, without sockets: `python tests/bench/hot_path.py`.

Real protocol classes on transports that throw bytes away. The best of many short rounds is printed, so the figure
holds on a busy machine; the kernel's share (two thirds of a real event) is what `make bench` adds.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server")]

from vitalis_serve.fleet import Fleet, Replica, ReplicaState  # noqa: E402
from vitalis_serve.gateway.keys import KeyTable  # noqa: E402
from vitalis_serve.gateway.options import WorkerOptions  # noqa: E402
from vitalis_serve.gateway.pool import EngineConnection  # noqa: E402
from vitalis_serve.gateway.protocol import ClientConnection  # noqa: E402
from vitalis_serve.gateway.state import WorkerState  # noqa: E402

from tests.support.worker import KEY, MODEL, snapshot  # noqa: E402

BODY = (
    b'{"model":"gpt-oss-20b","messages":[{"role":"system","content":"You are a helpful assistant for the Vitalis '
    b'application."},{"role":"user","content":"What is the capital of France, and why does it matter to the history '
    b'of Europe in the nineteenth century?"}],"max_tokens":128,"temperature":0.2%b}'
)
ANSWER = (
    b'{"id":"chatcmpl-0","object":"chat.completion","created":1,"model":"gpt-oss-20b","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"The capital of France is Paris.","reasoning":null},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":37,"total_tokens":67,"completion_tokens":30,"prompt_tokens_details":null}}'
)
EVENT = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"gpt-oss-20b","choices":[{"index"'
    b':0,"delta":{"content":" carrying"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
)
LAST = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"gpt-oss-20b","choices":[{"index"'
    b':0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null}]}\n\n'
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"gpt-oss-20b","choices":[],"usage":'
    b'{"prompt_tokens":35,"total_tokens":135,"completion_tokens":100}}\n\ndata: [DONE]\n\n'
)


class Sink:
    """A transport that takes everything."""

    written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)

    def nothing(self, *_: Any, **__: Any) -> None: ...

    set_write_buffer_limits = pause_reading = resume_reading = close = abort = write_eof = nothing

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


def request(body: bytes, credential: str = KEY) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b" % (credential.encode(), len(body), body)
    )


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
AN_EVENT, LAST_EVENTS = chunk(EVENT), chunk(LAST) + b"0\r\n\r\n"


class Bench:
    """One client connection, one worker's state and one engine connection."""

    def __init__(self, document: bytes, credential: str = KEY, **options: Any) -> None:
        fixed = {"name": "worker-0", "snapshot_path": "", "control_socket": ""}
        log = tempfile.mktemp(suffix=".jsonl")
        self.state = WorkerState(WorkerOptions(**fixed, access_log_path=log, **options), asyncio.get_running_loop())
        self.state.open_ledger()
        self.state.keys = KeyTable.decode(document)
        replica = Replica("engine-0", "http://127.0.0.1:1", ReplicaState.READY, models=(MODEL,), incarnation=1)
        self.state.take_fleet(Fleet(1, (replica,)))
        pool = self.state.pool("engine-0")
        assert pool is not None
        self.engine = EngineConnection(pool)
        self.engine.connection_made(Sink())  # type: ignore[arg-type]
        pool.put_back(self.engine)
        self.client = ClientConnection(self.state, set())
        self.client.connection_made(Sink())  # type: ignore[arg-type]
        self.plain = request(BODY % b"", credential)
        length = len(ANSWER)
        self.answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
            length,
            ANSWER,
        )

    def requests(self, n: int) -> None:
        for _ in range(n):
            self.client.data_received(self.plain)
            self.engine.data_received(self.answer)

    def streams(self, n: int, first: bytes) -> None:
        for _ in range(n):
            self.client.data_received(first)
            self.engine.data_received(HEAD)
            for _ in range(100):
                self.engine.data_received(AN_EVENT)
            self.engine.data_received(LAST_EVENTS)

    def close(self) -> None:
        assert self.state.counters.open_contexts == 0
        assert not self.state.counters.upstream_failures
        counts = self.state.counters.routes[MODEL]
        assert set(counts.ends) == {("ok", "")}, counts.ends
        self.state.access.close()
        if self.state.spool is not None:
            self.state.spool.stop()


def best(rounds: int, n: int, what: Any, *args: Any) -> float:
    """Microseconds of CPU each time."""
    found = 1e9
    for _ in range(rounds):
        began = time.thread_time()
        what(n, *args)
        found = min(found, (time.thread_time() - began) / n)
    return found * 1e6


async def measure() -> None:
    bench = Bench(snapshot())
    streamed = {
        "shown": request(BODY % b',"stream":true,"stream_options":{"include_usage":true}'),
        "hidden": request(BODY % b',"stream":true'),
    }
    await asyncio.sleep(0.1)
    print(f"request                     {best(200, 50, bench.requests):7.2f} us")
    for name, first in streamed.items():
        whole = best(200, 2, bench.streams, first)
        print(f"stream of 100, usage {name} {whole:7.2f} us, {whole / 100:.3f} us an event")
    bench.close()


if __name__ == "__main__":
    asyncio.run(measure())

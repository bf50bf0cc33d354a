"""What the tests of the data plane share: requests of every API, answers read, and what must hold after each test."""

import contextlib
import json
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

from simulator.answers import chat_layout, completion_layout, content_text

from tests.support import client
from tests.support.client import Event, Head, Response, Wire
from tests.support.worker import KEY, MODEL, SESSION, WorkerProcess

AUTH = {"authorization": f"Bearer {KEY}", "x-session-id": SESSION}
TOKENS = 24
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
APIS = tuple(PATHS)


def document(api: str, *, stream: bool = False, tokens: int = TOKENS, **more: Any) -> dict[str, Any]:
    """A request that the simulated engine answers with that many tokens."""
    made: dict[str, Any] = {"model": MODEL, "sim_output_tokens": tokens}
    if api in ("chat", "messages"):
        made["messages"] = [{"role": "user", "content": "What now?"}]
    else:
        made["prompt" if api == "completions" else "input"] = "What now?"
    if api != "responses":
        made["max_tokens"] = tokens + 10
    if stream:
        made["stream"] = True
    return made | more


def request(
    api: str, *, stream: bool = False, tokens: int = TOKENS, headers: dict[str, str] | None = None, **more: Any
) -> bytes:
    """The bytes of such a request, with the key."""
    return client.post(PATHS[api], document(api, stream=stream, tokens=tokens, **more), AUTH | (headers or {}))


def expected_text(api: str, tokens: int = TOKENS) -> str:
    layout = completion_layout(tokens) if api == "completions" else chat_layout(tokens, "stop")
    return content_text(layout.content)


def plain_text(api: str, answer: dict[str, Any]) -> str:
    """The text of a whole answer."""
    if api == "chat":
        return str(answer["choices"][0]["message"]["content"])
    if api == "completions":
        return str(answer["choices"][0]["text"])
    if api == "messages":
        return "".join(block["text"] for block in answer["content"] if block["type"] == "text")
    parts = [part for item in answer["output"] if item["type"] == "message" for part in item["content"]]
    return "".join(part["text"] for part in parts)


def stream_text(api: str, events: list[Event]) -> str:
    """The text of a streamed answer, as far as it came."""
    documents = [event.json for event in events if event.data not in ("", "[DONE]")]
    if api == "chat":
        return "".join((choice["delta"].get("content") or "") for d in documents for choice in d.get("choices", []))
    if api == "completions":
        return "".join(choice["text"] for d in documents for choice in d.get("choices", []))
    if api == "messages":
        return "".join(d["delta"].get("text", "") for d in documents if d["type"] == "content_block_delta")
    return "".join(d["delta"] for d in documents if d["type"] == "response.output_text.delta")


def broken(event: Event) -> bool:
    """The half of an event that was cut and closed with a blank line."""
    try:
        return event.data not in ("", "[DONE]") and not event.json
    except ValueError:
        return True


def looks_whole(api: str, events: list[Event]) -> bool:
    """Whether a client would take this stream for a finished answer."""
    if api in ("chat", "completions"):
        return any(event.data == "[DONE]" for event in events)
    ending = {"responses": ("response.completed", "response.incomplete"), "messages": ("message_stop",)}[api]
    return any(event.name in ending for event in events)


def terminal_error(api: str, events: list[Event]) -> dict[str, Any]:
    """The error with which a stream ended, in the words of its API; fails where it did not end with one."""
    last = events[-1]
    answer = dict(last.json)
    if api == "messages":
        assert last.name == "error", last
        return dict(answer["error"])
    if api == "responses":
        assert last.name == "response.failed", last
        assert answer["response"]["status"] == "failed"
        return dict(answer["response"]["error"])
    return dict(answer["error"])


def ask(worker: WorkerProcess, data: bytes, seconds: float = 5) -> Response:
    return client.ask(worker.url, data, seconds)


def check_answer(api: str, answer: Response, *, stream: bool, tokens: int = TOKENS) -> None:
    """It is the whole, right answer."""
    assert answer.status == 200, answer.body
    if stream:
        assert looks_whole(api, answer.events)
        assert stream_text(api, answer.events) == expected_text(api, tokens)
    else:
        assert plain_text(api, answer.json) == expected_text(api, tokens)


def error_code(answer: Response) -> str:
    return str(answer.json["error"]["code"])


def settled(worker: WorkerProcess, seconds: float = 5) -> None:
    """No context is open, no slot is taken, and nothing was ever logged with a traceback."""
    deadline = time.monotonic() + seconds
    while True:
        said = worker.in_flight()
        if said["count"] == 0 and not any(said["replicas"].values()):
            break
        assert time.monotonic() < deadline, f"still open: {said}\n{worker.log()[-3000:]}"
        time.sleep(0.005)
    assert worker.process.poll() is None
    assert "Traceback" not in worker.log(), worker.log()[-4000:]


def wait_until(condition: Callable[[], bool], seconds: float = 5, what: str = "it") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.005)


def record_of(worker: WorkerProcess, request_id: str, seconds: float = 5) -> dict[str, Any]:
    """The access log's one record of this request."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = [record for record in worker.records() if record["request_id"] == request_id]
        return bool(found)

    wait_until(there, seconds, f"a record of {request_id}")
    assert len(found) == 1
    return found[0]


def start_stream(worker: WorkerProcess, data: bytes) -> tuple[Wire, Head, Iterator[Event]]:
    """A stream whose head has come; the wire is the caller's to close."""
    wire = client.connect(worker.url)
    wire.send(data)
    head = wire.read_head()
    assert head.status == 200, head.raw
    return wire, head, wire.events(head)


# An engine that says exactly the bytes it is told, in exactly the reads it is told.

Piece = bytes | str  # bytes to send as one read; "close", "reset" or "wait" (until the other side leaves)


class ScriptedEngine:
    """Answers each request with the next script (the last one for ever), over a Unix socket or TCP.

    A piece is sent once the piece before it was read by the other side, so the pieces are that side's reads."""

    def __init__(self, path: Path | None = None) -> None:
        self.scripts: list[list[Piece]] = []
        self.requests: list[bytes] = []
        self.connections = 0
        self.left = 0  # connections that the other side ended
        self.reset_at_accept = False
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
            self.address = "http://{}:{}".format(*self._listener.getsockname())
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen(128)
            self.address = f"unix:{path}"
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            left = list(self._open)
        for own in left:
            with contextlib.suppress(OSError):
                own.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        while True:
            try:
                own, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.reset_at_accept:
                _reset(own)
                continue
            with self._lock:
                self._open.add(own)
            threading.Thread(target=self._serve, args=(own,), daemon=True).start()

    def _serve(self, own: socket.socket) -> None:
        with contextlib.suppress(OSError), own:
            while (request := _read_request(own)) is not None:
                with self._lock:
                    self.requests.append(request)
                    script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                if not self._play(own, script):
                    break
            else:
                self.left += 1
        with self._lock:
            self._open.discard(own)

    def _play(self, own: socket.socket, script: list[Piece]) -> bool:
        for piece in script:
            if piece == "close":
                return False
            if piece == "reset":
                _reset(own)
                return False
            if piece == "wait":
                own.recv(1)
                self.left += 1
                return False
            assert isinstance(piece, bytes)
            own.sendall(piece)
            while own.family == socket.AF_UNIX and _unread(own):
                time.sleep(0.0002)
        return True


def _unread(own: socket.socket) -> int:
    """Bytes that the other side has not read yet."""
    return int(struct.unpack("i", ioctl(own.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])


def _reset(own: socket.socket) -> None:
    if own.family == socket.AF_INET:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    own.close()


def _read_request(own: socket.socket) -> bytes | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = own.recv(1 << 16)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        more = own.recv(1 << 16)
        if not more:
            return None
        body += more
    return head + b"\r\n\r\n" + body


@contextlib.contextmanager
def scripted_engine(path: Path | None = None) -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(path)
    try:
        yield engine
    finally:
        engine.close()


def http_answer(body: bytes | dict[str, Any], status: int = 200, headers: bytes = b"") -> bytes:
    """A whole answer with a content-length."""
    raw = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n%b" % (
        status, len(raw), headers, raw,
    )  # fmt: skip


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"

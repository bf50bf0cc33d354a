"""Answers of a real vLLM as they came off its socket, for tests of what reads them.

    PYTHONPATH=server:.:loadtests python -m tests.support.recording     # records them all again: minutes

A recording is a text file: a line of JSON that says what it is, then one for each read: [seconds since the request
was sent, the bytes as latin-1 text], HTTP's framing included. `ended` says how the connection was after the last one:
"kept" open, "closed", or "reset".
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools

FOLDER = Path(__file__).resolve().parents[1] / "unit" / "load" / "recorded"
MODEL = "gpt-oss-tiny"
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ABOUT = "Current weather in a city"
FUNCTION = {"name": "get_weather", "description": ABOUT, "parameters": PARAMETERS}
CHAT_TOOL = {"tools": [{"type": "function", "function": FUNCTION}], "messages": WEATHER}
RESPONSE_TOOL = {"tools": [{"type": "function", **FUNCTION}], "input": WEATHER}
MESSAGE_TOOL = {"tools": [{"name": "get_weather", "description": ABOUT, "input_schema": PARAMETERS}]}
GREEDY = {"model": MODEL, "temperature": 0}
COUNTING = [{"role": "user", "content": "Count to two hundred."}]
ENDLESS = {"min_tokens": 3000, "max_tokens": 3000}
LONG: dict[str, dict[str, Any]] = {
    "chat": {**GREEDY, **USAGE, "messages": COUNTING, **ENDLESS},
    "completions": {**GREEDY, **USAGE, "prompt": "Once", **ENDLESS},
    "responses": {**GREEDY, "stream": True, "input": COUNTING, "max_output_tokens": 3000},
    "messages": {**GREEDY, "stream": True, "messages": COUNTING, "max_tokens": 3000},
}
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
# name -> API, document
ANSWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("completions", {**GREEDY, **USAGE, "prompt": "The capital of", "max_tokens": 12}),
    "completions-plain": ("completions", {**GREEDY, "prompt": "The capital of", "max_tokens": 12}),
    "chat": ("chat", {**GREEDY, **USAGE, "messages": QUESTION}),
    "chat-plain": ("chat", {**GREEDY, "messages": QUESTION}),
    "chat-without-usage": ("chat", {**GREEDY, "stream": True, "messages": QUESTION}),
    "chat-continuous-usage": (
        "chat",
        {
            **GREEDY,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "messages": QUESTION,
        },
    ),
    "chat-hidden-reasoning": ("chat", {**GREEDY, **USAGE, "messages": QUESTION, "include_reasoning": False}),
    "chat-cut-in-reasoning": ("chat", {**GREEDY, **USAGE, "messages": QUESTION, "max_tokens": 6}),
    "chat-cut-before-any-text": ("chat", {**GREEDY, **USAGE, "messages": QUESTION, "max_tokens": 2}),
    "chat-tool-call": ("chat", {**GREEDY, **USAGE, **CHAT_TOOL}),
    "responses": ("responses", {**GREEDY, "stream": True, "input": QUESTION}),
    "responses-plain": ("responses", {**GREEDY, "input": QUESTION}),
    "responses-cut": ("responses", {**GREEDY, "stream": True, "input": QUESTION, "max_output_tokens": 18}),
    "responses-tool-call": ("responses", {**GREEDY, "stream": True, **RESPONSE_TOOL}),
    "messages": ("messages", {**GREEDY, "stream": True, "messages": QUESTION, "max_tokens": 100}),
    "messages-plain": ("messages", {**GREEDY, "messages": QUESTION, "max_tokens": 100}),
    "messages-tool-call": (
        "messages",
        {**GREEDY, "stream": True, "messages": WEATHER, **MESSAGE_TOOL, "max_tokens": 100},
    ),
    "too-long": ("completions", {**GREEDY, **USAGE, "prompt": "Once", "max_tokens": 100_000}),
    "no-such-model": ("chat", {**GREEDY, **USAGE, "messages": QUESTION, "model": "other"}),
}
# An engine that was told to send every fourth token.
GROUPED: dict[str, tuple[str, dict[str, Any]]] = {
    "completions-every-4th": (
        "completions",
        {**GREEDY, **USAGE, "prompt": "Once", "max_tokens": 41, "ignore_eos": True},
    ),
    "chat-every-4th": ("chat", {**GREEDY, **USAGE, "messages": QUESTION}),
    "responses-every-4th": ("responses", {**GREEDY, "stream": True, "input": QUESTION}),
    "messages-every-4th": ("messages", {**GREEDY, "stream": True, "messages": QUESTION, "max_tokens": 100}),
}


@dataclass
class Recording:
    """One answer: `reads` are (seconds since it was asked, bytes)."""

    name: str
    api: str
    document: dict[str, Any]
    about: str = ""
    ended: str = "kept"
    reads: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def stream(self) -> bool:
        return bool(self.document.get("stream"))

    def body(self) -> list[tuple[float, bytes]]:
        """The reads, less HTTP's head and framing."""
        pieces: list[tuple[float, bytes]] = []

        class Take:
            def on_body(self, data: bytes) -> None:
                pieces.append((at, data))

        parser = httptools.HttpResponseParser(Take())
        for at, data in self.reads:  # noqa: B007 - Take reads it
            parser.feed_data(data)
        return pieces

    def events(self) -> list[Any]:
        """The JSON of every event."""
        body = b"".join(data for _, data in self.body())
        lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")]
        return [json.loads(line) for line in lines]


def load(name: str) -> Recording:
    first, *rest = (FOLDER / f"{name}.jsonl").read_text().splitlines()
    head = json.loads(first)
    reads = [(at, text.encode("latin-1")) for at, text in map(json.loads, rest)]
    return Recording(head["name"], head["api"], head["document"], head["about"], head["ended"], reads)


def save(recording: Recording) -> None:
    head = {"name": recording.name, "api": recording.api, "document": recording.document, "about": recording.about,
            "ended": recording.ended}  # fmt: skip
    lines = [json.dumps(head), *(json.dumps([round(at, 6), data.decode("latin-1")]) for at, data in recording.reads)]
    (FOLDER / f"{recording.name}.jsonl").write_text("\n".join(lines) + "\n")


class _End:
    """Tells when a response is whole."""

    def __init__(self) -> None:
        self.whole = False

    def on_message_complete(self) -> None:
        self.whole = True


def record(
    path: Path, name: str, api: str, document: dict[str, Any], about: str = "",
    strike: Callable[[], object] | None = None,
) -> Recording:  # fmt: skip
    """Asks the engine at the Unix socket; `strike` is called once, after the tenth read."""
    made = Recording(name, api, document, about)
    body = json.dumps(document).encode()
    head = f"POST {PATHS[api]} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    end = _End()
    parser = httptools.HttpResponseParser(end)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(str(path))
        began = time.monotonic()
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        while not end.whole:
            try:
                data = connection.recv(65536)
            except ConnectionResetError:
                made.ended = "reset"
                break
            if not data:
                made.ended = "closed"
                break
            made.reads.append((time.monotonic() - began, data))
            parser.feed_data(data)
            if strike is not None and len(made.reads) == 10:
                strike()
    save(made)
    print(
        f"{name}: {len(made.reads)} reads, {sum(len(data) for _, data in made.reads)} bytes, {made.ended}", flush=True
    )
    return made


@contextlib.contextmanager
def _engine(**settings: Any) -> Iterator[tuple[Path, int]]:
    """A ready engine's socket and pid."""
    from tests.support import engines

    with engines.stack(profile="cpu-tiny", engines_replicas=1, **settings) as tree:
        tree.wait_ready(1)
        tree.idle()
        yield tree.engines()[0].socket, next(iter(tree.pids("engine").values()))


def _struck(path: Path, what: str, about: str, strike: Callable[[], None]) -> None:
    """A long answer of each API, all of them under way when `strike` is called."""
    ready = threading.Barrier(len(LONG), action=strike)
    threads = [
        threading.Thread(target=record, args=(path, f"{api}-{what}", api, document, about, ready.wait))
        for api, document in LONG.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _core(pid: int) -> int:
    """The process below the server's that does the work."""
    from tests.support.engines import descendants

    # the kernel keeps 15 characters of VLLM::EngineCore
    return next(one for one in descendants(pid) if "VLLM::Engine" in Path(f"/proc/{one}/comm").read_text())


def main() -> None:
    with _engine() as (path, pid):
        for name, (api, document) in ANSWERS.items():
            record(path, name, api, document)
        core = _core(pid)
        about = "the engine's own process was killed while it answered"
        _struck(path, "engine-killed", about, lambda: os.kill(core, signal.SIGKILL))
    with _engine() as (path, pid):
        _struck(path, "killed", "the server was killed while it answered", lambda: os.kill(pid, signal.SIGKILL))
    with _engine(engines_engine_args="{stream-interval: 4}") as (path, pid):
        for name, (api, document) in GROUPED.items():
            record(path, name, api, document)
        command, environ = _words(pid, "cmdline"), dict(word.split("=", 1) for word in _words(pid, "environ") if word)
    with tempfile.TemporaryDirectory() as scratch:  # without a supervisor, which would end it by force
        path = Path(scratch) / "s"
        command = command[command.index("--") + 1 :] if "--" in command else command  # less who keeps it
        command[command.index("--uds") + 1] = str(path)
        command[command.index("--shutdown-timeout") + 1] = "0"
        alone = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_ready(path, alone)
            _struck(path, "stopped", "the server was told to stop while it answered", alone.terminate)
        finally:
            alone.terminate()
            alone.wait(60)


def _wait_ready(path: Path, engine: "subprocess.Popen[bytes]") -> None:
    """Until it has answered once."""
    while True:
        assert engine.poll() is None, "the engine ended"
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            record(path, "warm-up", *ANSWERS["chat"])
            (FOLDER / "warm-up.jsonl").unlink()
            return
        time.sleep(0.5)


def _words(pid: int, kind: str) -> list[str]:
    return Path(f"/proc/{pid}/{kind}").read_text().rstrip("\0").split("\0")


if __name__ == "__main__":
    main()

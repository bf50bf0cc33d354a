"""Answers of a real vLLM 0.32, as they came off its socket: what is read of them is what was in them.

What is expected is worked out here by another way than the reader's: from the documents of the whole body, and the
time at which the bytes that complete each event were read.
"""

import json
import socket
import threading
import time
from typing import Any

import pytest
from vitalis_load import client, metrics, streams
from vitalis_load.records import Record

from tests.support import recording
from tests.support.recording import ANSWERS, GROUPED, LONG, Recording

WHOLE = [name for name, (_, document) in (ANSWERS | GROUPED).items() if document.get("stream")]
WHOLE = [name for name in WHOLE if name not in ("too-long", "no-such-model")]
PLAIN = [name for name, (_, document) in ANSWERS.items() if not document.get("stream")]


def read(recorded: Recording) -> streams.Reader:
    reader = streams.reader(recorded.api, recorded.stream)
    for at, data in recorded.body():
        reader.feed(data, at)
    reader.close(recorded.reads[-1][0])
    return reader


def timed_events(recorded: Recording) -> list[tuple[float, Any]]:
    """Every event's JSON and when its last byte was read; the marker [DONE] as it is."""
    found, body = [], b""
    for at, data in recorded.body():
        body += data
        while b"\n\n" in body:
            event, _, body = body.partition(b"\n\n")
            text = event.partition(b"data: ")[2].decode()
            found.append((at, text if text == "[DONE]" else json.loads(text)))
    return found


def said(event: Any) -> tuple[str, str]:
    """What the model thought and what it said in one event: the texts, a tool call as its name or its arguments."""
    if event == "[DONE]":
        return "", ""
    if "choices" in event:
        choice = (event["choices"] or [{}])[0]
        delta = choice.get("delta") or {}
        calls = "".join(
            (call["function"].get("name") or "") + (call["function"].get("arguments") or "")
            for call in delta.get("tool_calls") or []
        )
        return delta.get("reasoning") or "", (delta.get("content") or choice.get("text") or "") + calls
    kind = event["type"]
    if kind == "content_block_delta":
        delta = event["delta"]
        return delta.get("thinking", ""), delta.get("text", "") + delta.get("partial_json", "")
    if kind == "content_block_start":
        return "", event["content_block"].get("name", "")
    if kind == "response.output_item.added":
        return "", event["item"].get("name", "")
    if kind == "response.reasoning_text.delta":
        return event["delta"], ""
    return "", event["delta"] if kind.endswith(".delta") else ""


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_stream(name: str) -> None:
    recorded = recording.load(name)
    reader = read(recorded)
    assert (reader.error, reader.detail, reader.done) == ("", "", True)
    events = timed_events(recorded)
    tokens = [at for at, event in events if any(said(event))]
    output = [at for at, event in events if said(event)[1]]
    assert reader.chunks == len(tokens)
    assert reader.first_token == tokens[0]
    assert reader.last_token == tokens[-1]
    assert reader.first_output == (output[0] if output else None)
    assert reader.gaps == [after - before for before, after in zip(tokens, tokens[1:], strict=False)]
    assert reader.ended == events[-1][0]


@pytest.mark.parametrize(
    ("name", "thoughts", "text"),
    [
        ("chat", "The user asks for a capital city.", "The capital of France is Paris."),
        ("chat-hidden-reasoning", "", "The capital of France is Paris."),
        ("chat-tool-call", "I need the weather tool for this.", 'get_weather{"city": "Paris"}'),
        ("responses", "The user asks for a capital city.", "The capital of France is Paris."),
        ("responses-tool-call", "I need the weather tool for this.", 'get_weather{"city": "Paris"}'),
        ("messages", "The user asks for a capital city.", "The capital of France is Paris."),
        ("messages-tool-call", "I need the weather tool for this.", 'get_weather{"city": "Paris"}'),
        ("chat-every-4th", "The user asks for a capital city.", "The capital of France is Paris."),
    ],
)
def test_the_way_here_misses_nothing_that_was_said(name: str, thoughts: str, text: str) -> None:
    events = recording.load(name).events()
    assert "".join(said(event)[0] for event in events) == thoughts
    assert "".join(said(event)[1] for event in events) == text


# prompt, cached, completion, reasoning; finish
TOLD = {
    "completions": (3, 0, 11, None, "stop"),
    "completions-every-4th": (1, 0, 41, None, "length"),
    "chat": (74, 0, 25, 8, "stop"),
    "chat-continuous-usage": (74, 0, 25, 8, "stop"),
    "chat-hidden-reasoning": (74, 0, 25, 8, "stop"),
    "chat-every-4th": (74, 0, 25, 8, "stop"),
    "chat-without-usage": (None, None, None, None, "stop"),
    "chat-cut-in-reasoning": (74, 0, 6, 3, "length"),
    "chat-tool-call": (126, 0, 33, 14, "tool_calls"),
    "responses": (74, 0, 25, 8, "completed"),
    "responses-cut": (74, 0, 18, 8, "max_output_tokens"),
    "responses-tool-call": (126, 0, 33, 14, "completed"),
    "messages": (74, 0, 25, None, "end_turn"),
    "messages-tool-call": (126, 0, 33, None, "tool_use"),
    "completions-plain": (3, 0, 11, None, "stop"),
    "chat-plain": (74, 0, 25, 8, "stop"),
    "responses-plain": (74, 0, 25, 8, "completed"),
    "messages-plain": (74, 0, 25, None, "end_turn"),
}


@pytest.mark.parametrize(("name", "told"), TOLD.items(), ids=TOLD)
def test_tokens_and_the_reason_are_the_servers(name: str, told: tuple[Any, ...]) -> None:
    reader = read(recording.load(name))
    usage = reader.usage
    assert (usage.prompt, usage.cached, usage.completion, usage.reasoning, reader.finish) == told
    assert reader.error == ""


def test_a_chunk_is_no_token() -> None:
    """Where each is taken for the other, the measured speed is wrong by these factors."""
    assert read(recording.load("chat")).chunks == 15  # Harmony's markers are never seen: 25 tokens
    assert read(recording.load("completions-every-4th")).chunks == 11  # 41 tokens
    assert read(recording.load("chat-hidden-reasoning")).chunks == 7  # 25 tokens


def test_the_role_is_no_token() -> None:
    """vLLM announces it with the engine's first output: here three hidden tokens before the first thought."""
    recorded = recording.load("chat")
    (at, role), *_ = timed_events(recorded)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    reader = read(recorded)
    assert reader.first_token is not None
    assert reader.first_token > at


def test_reasoning_is_a_token_and_no_output() -> None:
    for name in ("chat", "responses", "messages"):
        reader = read(recording.load(name))
        assert reader.first_token is not None
        assert reader.first_output is not None
        assert reader.first_output - reader.first_token > 0.05
    hidden = read(recording.load("chat-hidden-reasoning"))
    assert hidden.first_token == hidden.first_output
    assert read(recording.load("chat-cut-in-reasoning")).first_output is None


@pytest.mark.parametrize("api", LONG)
def test_an_engine_that_died(api: str) -> None:
    """An error inside a 200; of Responses, vLLM breaks the body."""
    recorded = recording.load(f"{api}-engine-killed")
    reader = read(recorded)
    assert reader.chunks > 0
    assert reader.usage.completion is None
    if api == "responses":
        assert (recorded.ended, reader.error) == ("closed", "no_end")
        return
    assert (recorded.ended, reader.error) == ("kept", "stream_error")
    assert ("EngineCore encountered an issue" if api != "messages" else "validation error") in reader.detail


@pytest.mark.parametrize("what", ["killed", "stopped"])
@pytest.mark.parametrize("api", LONG)
def test_a_stream_without_an_end(api: str, what: str) -> None:
    reader = read(recording.load(f"{api}-{what}"))
    assert reader.error in ("no_end", "stream_error")
    assert not reader.done
    assert reader.chunks > 0


# -- and over a socket, framing and all, as it was cut then


class Player:
    """Answers each request with a recording: its reads as writes, with the pauses there were."""

    def __init__(self, *names: str) -> None:
        self.recordings = [recording.load(name) for name in names]
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._play)
        self._thread.start()

    def _play(self) -> None:
        left = list(self.recordings)
        while left:
            connection, _ = self._listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while left and connection.recv(65536):
                    recorded = left.pop(0)
                    began = time.monotonic()
                    for at, data in recorded.reads:
                        time.sleep(max(0.0, began + at - time.monotonic()))
                        connection.sendall(data)
                    if recorded.ended != "kept":
                        break

    def end(self) -> None:
        self._thread.join(10)
        self._listener.close()


def ask(connection: client.Connection, recorded: Recording) -> Record:
    sent = client.request(recorded.api, recorded.document, host="h")
    reader = streams.reader(recorded.api, recorded.stream)
    now = time.monotonic()
    return connection.ask(sent, reader, scheduled=now, deadline=now + 30, clock=time.monotonic)


def test_played_again_over_a_socket() -> None:
    names = ("chat", "chat-plain", "messages", "no-such-model", "responses-engine-killed", "chat-engine-killed")
    player = Player(*names)
    connection = client.Connection(player.address)
    chat, plain, message, unknown, broken, failed = (ask(connection, recorded) for recorded in player.recordings)
    connection.close()
    player.end()
    then = read(player.recordings[0])
    assert (chat.error, chat.chunks, chat.completion_tokens) == ("", 15, 25)
    # never before it was sent; how much later is the machine's affair
    assert then.first_token is not None
    assert then.ended is not None
    ttft, tpot = metrics.ttft(chat), metrics.tpot(chat)
    assert ttft is not None
    assert tpot is not None
    assert then.first_token <= ttft < then.first_token + 0.5
    assert tpot == pytest.approx((then.ended - then.first_token) / 24, abs=0.02)
    assert (plain.error, plain.completion_tokens, metrics.ttft(plain)) == ("", 25, None)
    assert (message.error, message.completion_tokens, message.finish) == ("", 25, "end_turn")
    assert (unknown.error, unknown.status) == ("http_404", 404)
    assert unknown.detail.startswith("The model `other` does not exist")
    assert (broken.error, broken.detail) == ("reset", "the connection was closed within the answer")
    assert (failed.error, failed.status) == ("stream_error", 200)
    assert connection.opened == 2, "only the broken one cost a connection"

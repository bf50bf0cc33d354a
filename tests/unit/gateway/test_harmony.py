"""Harmony's failures as vLLM 0.32 and openai_harmony write them, and what only looks like one.

Messages were recorded from the StreamableParser of oss-harmony 0.0.11, shapes from vLLM 0.32's HarmonyParser.
"""

import json
from typing import Any

import msgspec
import pytest
from vitalis_serve.gateway.harmony import breaks, failure, leak, sentence

MESSAGES = [
    ("Unexpected token 200002 while expecting start token 200006", "unexpected_token"),
    ("Unexpected token 12606 while expecting start token 200006", "unexpected_token"),
    ('unexpected tokens remaining in message header: Some("to=functions.get json")', "header"),
    ('unexpected tokens remaining in message header: ["––commentary"]', "header"),
    ("channel marker present but no channel value found in header", "header"),
    ("Unexpected EOS while waiting for message header to complete", "header"),
    ("Unknown role: assistant<|channel|>commentary", "role"),
    ("error downloading or loading vocab file: failed to download or load vocab file", "vocabulary"),
    ("openai_harmony.HarmonyError: Unexpected token 13 while expecting start token 200006", "unexpected_token"),
    ("HarmonyError('Unknown role: assistantassistant')", "role"),
    ("HarmonyError: something new", "other"),
]
ORDINARY = [
    "EngineCore encountered an issue. See stack trace (above) for the root cause.",
    "Unexpected token '<' in JSON at position 0",
    "cannot schedule new futures after shutdown",
    "The engine said: Unknown role: x",
    "",
]


def error(message: Any) -> bytes:
    """vLLM's plain error, and its event's data, which json.dumps writes with spaces."""
    return json.dumps(
        {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}}
    ).encode()


@pytest.mark.parametrize(("message", "kind"), MESSAGES + [(words, "") for words in ORDINARY])
def test_a_failure_is_known_by_its_words(message: str, kind: str) -> None:
    for status in (200, 500, 503):
        assert failure(status, error(message)) == kind
    assert failure(500, error(message).replace(b'": ', b'":')) == kind
    anthropic = json.dumps({"type": "error", "error": {"type": "InternalServerError", "message": message}}).encode()
    assert failure(500, anthropic) == kind
    failed = json.dumps(
        {"type": "response.failed", "response": {"error": {"code": "server_error", "message": message}}}
    )
    assert failure(200, failed.encode()) == kind
    assert failure(503, message.encode()) == kind  # a proxy that keeps the words and nothing else
    assert failure(400, error(message)) == ""  # the client's own doing, whatever it says


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"\xff\xfe", b'{"error":null}', b'{"error":{"message":7}}',
                                  b'{"error":"Unauthorized"}', b"<html>502</html>", b'{"error":{"mess'])  # fmt: skip
def test_what_has_no_words_is_no_failure_of_harmonys(body: bytes) -> None:
    assert failure(500, body) == ""


def test_messages_streams_hide_the_words() -> None:
    message = (
        "2 validation errors for ChatCompletionStreamResponse\nmodel\n  Field required [type=missing, "
        "input_value={'error': {'message': 'Un...am': None, 'code': 500}}, input_type=dict]"
    )
    data = json.dumps({"type": "error", "error": {"type": "internal_error", "message": message}}).encode()
    assert failure(200, data) == ""


def test_the_client_is_told_what_it_was_and_nothing_of_the_answer() -> None:
    kinds = {kind for _, kind in MESSAGES} | {"tool_name"}
    assert {sentence(kind) for kind in kinds if "vocabulary" in sentence(kind)} == {sentence("vocabulary")}
    assert all(sentence(kind).endswith(".") and "<|" not in sentence(kind) for kind in kinds)


CHUNK = (
    '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":%s,%s}]}'
)
REST = '"logprobs":null,"finish_reason":null,"token_ids":null'


def chunk(delta: str, rest: str = REST) -> bytes:
    return b"data: " + (CHUNK % (delta, rest)).encode() + b"\n\n"


def call(name: str, arguments: str = "") -> bytes:
    function = {"name": name, "arguments": arguments}
    calls = [{"id": "chatcmpl-tool-9532d9f05b99539a", "type": "function", "index": 0, "function": function}]
    return chunk(json.dumps({"tool_calls": calls}, separators=(",", ":")))


@pytest.mark.parametrize("name", [
    "get<|start|>assistant", "get<|end|>json", "get<|return|>", "query_dataset<|channel|>commentary",
    "<|constrain|>json", 'a\\"b<|call|>',
])  # fmt: skip
def test_a_special_token_in_a_tools_name(name: str) -> None:
    assert leak(call(name)) == "tool_name"
    assert leak(chunk('{"content":"<|start|>"}') + call(name)) == "tool_name"
    plain = {
        "choices": [{"message": {"content": None, "tool_calls": [{"function": {"name": name, "arguments": "{}"}}]}}]
    }
    assert leak(json.dumps(plain).encode()) == "tool_name"
    block = {"type": "content_block_start", "content_block": {"type": "tool_use", "id": "x", "name": name, "input": {}}}
    assert leak(b"event: content_block_start\ndata: " + msgspec.json.encode(block) + b"\n\n") == "tool_name"
    whole = {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "x", "name": name, "input": {"name": "<|end|>"}}],
    }
    assert leak(msgspec.json.encode(whole)) == "tool_name"
    item = {"type": "response.output_item.added", "item": {"type": "function_call", "name": name, "arguments": ""}}
    assert leak(b"event: response.output_item.added\ndata: " + msgspec.json.encode(item) + b"\n\n") == "tool_name"


@pytest.mark.parametrize("payload", [
    chunk('{"content":"<|start|>assistant<|channel|>comm"}'),  # what 0.32 recovers of an unfinished header
    chunk('{"content":"a"}') + chunk('{"content":"<|channel|>"}') + chunk('{"content":"final"}'),
    chunk('{"reasoning":"<|message|>"}'),
    b'{"choices":[{"message":{"role":"assistant","content":"<|channel|>analysis<|message|>We must"}}]}',
    b'event: content_block_delta\ndata: {"delta":{"type":"text_delta","text":"<|start|>"},"index":0}\n\n',
    b'event: response.output_text.delta\ndata: {"content_index":0,"delta":"<|end|>","logprobs":[]}\n\n',
])  # fmt: skip
def test_a_text_that_begins_with_a_special_token(payload: bytes) -> None:
    assert leak(payload) == "content"


@pytest.mark.parametrize("payload", [
    chunk('{"content":"tok1"}'),
    chunk('{"content":"| a | b |"}'),
    chunk('{"content":"a <| b |> c <|other|>"}'),
    chunk('{"content":"end with <|return|>, say"}'),
    call("get", '{"name":"<|start|>"}'),
    chunk(r'{"content":"send {\"name\":\"get<|start|>assistant\"} to it"}'),
    chunk(r'{"content":"\"content\":\"<|start|>\""}'),
    chunk("{}", '"logprobs":{"content":[{"token":"<|channel|>","logprob":-0.1,"bytes":[1],"top_logprobs":[]}]}'),
    b'{"type":"response.created","response":{"instructions":"<|start|> begins a message","output":[]}}',
    b'{"tools":[{"name":"get","description":"<|start|>"}]}',
    b'{"role":"assistant","content":[{"type":"tool_use","id":"x","name":"get","input":{"name":"<|start|>"}}]}',
    b"",
])  # fmt: skip
def test_what_cannot_be_told_from_a_quote_is_no_leak(payload: bytes) -> None:
    assert leak(payload) == ""


def fields(**document: Any) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in document.items()}


@pytest.mark.parametrize("value", [True, 1, "true", "yes"])
def test_ignore_eos_is_refused_where_harmony_is_parsed(value: Any) -> None:
    for dialect in ("chat", "responses"):
        assert breaks(fields(ignore_eos=value), dialect).startswith("`ignore_eos` cannot be used")
    for dialect in ("completions", "messages"):  # raw text; a field that vLLM does not read
        assert breaks(fields(ignore_eos=value), dialect) == ""


@pytest.mark.parametrize("value", [False, None, 0, "false", "No"])
def test_ignore_eos_that_is_off_breaks_nothing(value: Any) -> None:
    assert breaks(fields(ignore_eos=value), "chat") == ""


BAD = "get<|channel|>commentary"


@pytest.mark.parametrize(("dialect", "field", "value"), [
    ("chat", "tools", [{"type": "function", "function": {"name": BAD}}]),
    ("chat", "messages", [{"role": "assistant", "tool_calls": [{"function": {"name": BAD, "arguments": "{}"}}]}]),
    ("messages", "tools", [{"name": BAD, "input_schema": {}}]),
    ("messages", "messages", [{"role": "assistant", "content": [{"type": "tool_use", "name": BAD, "input": {}}]}]),
    ("responses", "tools", [{"type": "function", "name": BAD}]),
    ("responses", "input", [{"type": "function_call", "name": BAD, "arguments": "{}"}]),
])  # fmt: skip
def test_a_tools_name_with_a_special_token_is_refused(dialect: str, field: str, value: Any) -> None:
    said = breaks(fields(**{field: value}), dialect)
    assert said.startswith(f"`{field}` has one of Harmony's special tokens")
    plain = msgspec.json.decode(msgspec.json.encode(value).replace(BAD.encode(), b"get"))
    assert breaks(fields(**{field: plain}), dialect) == ""


@pytest.mark.parametrize("value", [
    "What does <|channel|> mean?",
    [{"role": "user", "name": "<|end|>", "content": "What does <|channel|> mean?"}],
    [{"role": "user", "content": [{"type": "text", "text": "<|end|>"}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "get", "arguments": '{"name":"<|end|>"}'}}]}],
    [{"role": "assistant", "tool_calls": "<|end|>", "content": None}, 7, None, ["<|end|>"]],
    {"content": "<|end|>"},
])  # fmt: skip
def test_a_text_may_quote_what_it_likes(value: Any) -> None:
    for dialect, field in (("chat", "messages"), ("responses", "input"), ("messages", "messages")):
        assert breaks(fields(**{field: value}), dialect) == ""

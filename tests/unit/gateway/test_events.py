"""Events as vLLM 0.32 writes them: which bears the first token, what is hidden."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitalis_serve.gateway.events import (
    ENDINGS,
    all_go_on,
    broken_off,
    data_of,
    ending,
    find_error,
    given_up,
    judge,
    without_usage_event,
)

CHUNK = '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[%s]}'
TEXT = '{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[%s]}'


def chat(choice: str) -> bytes:
    return b"data: " + (CHUNK % choice).encode()


def completion(choice: str) -> bytes:
    return b"data: " + (TEXT % choice).encode()


def named(kind: str, **more: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **more}, separators=(',', ':'))}".encode()


USAGE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[],'
    b'"system_fingerprint":"vllm-0.32.0","usage":{"prompt_tokens":71,"total_tokens":96,"completion_tokens":25,'
    b'"prompt_tokens_details":null,"completion_tokens_details":{"reasoning_tokens":8}}}'
)

CHAT = [
    (chat('{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'), "preamble"),
    (chat('{"index":0,"delta":{"reasoning":"We"},"logprobs":null,"finish_reason":null}'), "token"),
    (chat('{"index":0,"delta":{"reasoning_content":"We"},"finish_reason":null}'), "token"),
    (chat('{"index":0,"delta":{"content":"Hi"},"logprobs":null,"finish_reason":null}'), "token"),
    (chat('{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c","type":"function",'
          '"function":{"name":"f","arguments":""}}]},"finish_reason":null}'), "token"),
    (chat('{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}'), "token"),
    (chat('{"index":0,"delta":{"content":""},"finish_reason":"length"}'), "token"),
    (chat('{"index":0,"delta":{"content":""},"finish_reason":"abort"}'), "end"),
    (chat('{"index":0,"delta":{"content":null},"finish_reason":null}'), "preamble"),
    (chat('{"index":0,"delta":null,"finish_reason":null}'), "preamble"),
    (chat('{"index":0,"delta":{"content":""},"finish_reason":null},{"index":1,"delta":{"content":"b"}}'), "token"),
    (USAGE, "preamble"),
    (b"data: [DONE]", "end"),
    (b": keep-alive", "preamble"),
    (b"", "preamble"),
    (b'data: {"error":{"message":"EngineCore encountered an issue.","type":"InternalServerError","code":500}}',
     "error"),
    (b"data: not json", "error"),
    (b"data: []", "error"),
    (b'data: {"object":"x"}', "error"),
    (b'data: {"choices":"x"}', "error"),
    (b'data: {"choices":[1]}', "error"),
    (b'data: {"choices":[null]}', "error"),
    (b'data: {"choices":[{"delta":"x"}]}', "error"),
]  # fmt: skip


@pytest.mark.parametrize(("event", "verdict"), CHAT)
def test_chat(event: bytes, verdict: str) -> None:
    assert judge(event, "chat") == verdict


@pytest.mark.parametrize(
    ("event", "verdict"),
    [
        (completion('{"index":0,"text":"Hi","logprobs":null,"finish_reason":null}'), "token"),
        (completion('{"index":0,"text":"","logprobs":null,"finish_reason":null}'), "preamble"),
        (completion('{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}'), "token"),
        (completion('{"index":0,"text":"","finish_reason":"abort"}'), "end"),
        (b'data: {"error":{"message":"x","code":400}}', "error"),
        (b"data: [DONE]", "end"),
    ],
)
def test_completions(event: bytes, verdict: str) -> None:
    assert judge(event, "completions") == verdict


NOTHING = {"status": "completed", "output": [], "usage": {"input_tokens": 5, "output_tokens": 0}}
HIDDEN = {"status": "incomplete", "output": [], "usage": {"input_tokens": 5, "output_tokens": 3}}


@pytest.mark.parametrize(
    ("event", "verdict"),
    [
        (named("response.created", response={"status": "in_progress"}), "preamble"),
        (named("response.in_progress", response={"status": "in_progress"}), "preamble"),
        (named("response.output_item.added", item={"type": "reasoning"}), "preamble"),
        (named("response.content_part.added", part={"text": ""}), "preamble"),
        (named("response.reasoning_text.delta", delta="We"), "token"),
        (named("response.output_text.delta", delta="Hi"), "token"),
        (named("response.function_call_arguments.delta", delta="{"), "token"),
        (named("response.completed", response=HIDDEN), "token"),
        (named("response.incomplete", response=HIDDEN), "token"),
        (named("response.completed", response=NOTHING), "end"),
        (named("response.failed", response={"status": "failed"}), "error"),
        (named("error", message="x"), "error"),
    ],
)
def test_responses(event: bytes, verdict: str) -> None:
    assert judge(event, "responses") == verdict


@pytest.mark.parametrize(
    ("event", "verdict"),
    [
        (named("message_start", message={"usage": {"input_tokens": 9, "output_tokens": 0}}), "preamble"),
        (named("ping"), "preamble"),
        (named("content_block_start", content_block={"type": "text", "text": ""}), "preamble"),
        (named("content_block_delta", delta={"type": "thinking_delta", "thinking": "We"}), "token"),
        (named("content_block_delta", delta={"type": "text_delta", "text": "Hi"}), "token"),
        (named("content_block_delta", delta={"type": "input_json_delta", "partial_json": "{"}), "token"),
        (named("message_delta", delta={"stop_reason": "max_tokens"}, usage={"output_tokens": 3}), "token"),
        # a message that stops without ever having said why is one that a draining engine gave up
        (named("message_stop"), "end"),
        (named("error", error={"type": "internal_error", "message": "x"}), "error"),
    ],
)
def test_messages(event: bytes, verdict: str) -> None:
    assert judge(event, "messages") == verdict


@given(event=st.binary(max_size=60), dialect=st.sampled_from(sorted(ENDINGS)))
def test_a_verdict_on_anything(event: bytes, dialect: str) -> None:
    assert judge(event, dialect) in ("preamble", "token", "error", "end")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "delta", "type", "error", "finish_reason", "text", "content", "response", "usage"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(document=_json, dialect=st.sampled_from(sorted(ENDINGS)))
def test_a_verdict_on_any_json(document: object, dialect: str) -> None:
    assert judge(b"data: " + json.dumps(document).encode(), dialect) in ("preamble", "token", "error", "end")


def test_data_of_an_event() -> None:
    assert data_of(b"data: a") == b"a"
    assert data_of(b"data:a\ndata: b") == b"a\nb"
    assert data_of(b"event: x\ndata: a\nid: 1") == b"a"
    assert data_of(b": comment") == b""


@given(st.lists(st.sampled_from([event for event, _ in CHAT]), max_size=8))
def test_only_the_added_usage_event_is_taken_out(events: list[bytes]) -> None:
    payload = b"".join(event + b"\n\n" for event in events)
    assert without_usage_event(payload) == b"".join(event + b"\n\n" for event in events if event != USAGE)


ERROR = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"x"}}\n\n'
SAID = (
    named("content_block_delta", delta={"type": "text_delta", "text": 'a\n\nevent: error\ndata: {"error":'}) + b"\n\n"
)


@pytest.mark.parametrize("dialect", ["messages", "responses"])
def test_an_error_event_is_found_and_text_that_looks_like_one_is_not(dialect: str) -> None:
    assert find_error(ERROR, dialect) == 0
    assert find_error(SAID, dialect) == -1
    assert (SAID + ERROR)[find_error(SAID + ERROR, dialect) :].strip() == ERROR.strip()


def test_an_error_event_of_chat() -> None:
    error = b'data: {"error":{"message":"x","code":500}}\n\n'
    said = chat('{"delta":{"content":"data: {\\"error\\":"}}') + b"\n\n"
    assert find_error(error, "chat") == 0
    assert find_error(said, "chat") == -1
    assert find_error(said + error, "chat") == len(said) - 1


def test_a_plain_answer_that_was_given_up() -> None:
    assert given_up(b'{"choices":[{"text":"","finish_reason":"abort"}]}', "completions")
    assert not given_up(b'{"choices":[{"text":"abort","finish_reason":"stop"}]}', "completions")
    assert given_up(b'{"output":[],"usage":{"input_tokens":1,"output_tokens":0}}', "responses")
    assert not given_up(b'{"output":[],"usage":{"input_tokens":0,"output_tokens":10}}', "messages")
    assert not given_up(b'{"input_tokens":0}', "messages")


def test_where_a_stream_is_broken_off() -> None:
    goes_on = chat('{"delta":{"content":"\\"finish_reason\\":\\"abort\\""},"finish_reason":null}') + b"\n\n"
    stop = chat('{"delta":{},"finish_reason":"stop"}') + b"\n\n"
    abort = stop.replace(b"stop", b"abort")
    done = b"data: [DONE]\n\n"
    assert broken_off(goes_on, "chat", 1) == (-1, 1)
    assert broken_off(goes_on + stop + done, "chat", 1) == (-1, 0)
    assert broken_off(goes_on + stop + done, "chat", 2) == (len(goes_on + stop), 1)
    assert broken_off(goes_on + abort + done, "chat", 1) == (len(goes_on), 1)
    assert broken_off(abort, "chat", 1) == (0, 1)
    assert broken_off(done, "chat", 1) == (0, 1)
    assert broken_off(done, "chat", 0) == (-1, 0)
    assert ending(goes_on).startswith(b'"finish_reason":null')
    assert goes_on.endswith(ending(stop + goes_on))
    assert ending(goes_on + stop) == b""
    assert all_go_on(goes_on * 2, 2)
    assert not all_go_on(goes_on + done, 2)


def test_a_response_is_cancelled_only_by_its_own_status() -> None:
    event = b'event: response.completed\ndata: {"type":"response.completed","response":%b}\n\n'
    said = b'{"metadata":{"status":"cancelled"},"status":"completed"}'
    assert broken_off(event % b'{"status":"cancelled"}', "responses", 1)[0] == 0
    assert broken_off(event % said, "responses", 1)[0] == -1
    assert given_up(b'{"status":"cancelled"}', "responses")
    assert not given_up(said, "responses")

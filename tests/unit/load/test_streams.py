"""What came of an answer, and when: by hand, cut anywhere, and as the simulated engine writes it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulator import shapes, writers
from simulator.answers import chat_layout, completion_layout
from simulator.schedule import Sequence
from vitalis_load import streams, wire
from vitalis_load.records import Record

DONE = b"data: [DONE]\n\n"


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    return (
        b"data: "
        + json.dumps({"id": "c", "object": "chat.completion.chunk", "choices": choices, **more}).encode()
        + b"\n\n"
    )


def text(text: str, finish: str | None = None, **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": finish}], **more}).encode() + b"\n\n"


def named(kind: str, **document: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **document})}\n\n".encode()


def read(api: str, *pieces: bytes, stream: bool = True, close: bool = True) -> streams.Reader:
    """Each piece is read a second after the last; the body is closed a second after all."""
    reader = streams.reader(api, stream)
    for second, piece in enumerate(pieces, 1):
        reader.feed(piece, float(second))
    if close:
        reader.close(float(len(pieces) + 1))
    return reader


USAGE = {
    "prompt_tokens": 71, "completion_tokens": 25, "total_tokens": 96,
    "prompt_tokens_details": {"cached_tokens": 64}, "completion_tokens_details": {"reasoning_tokens": 8},
}  # fmt: skip
ROLE = chunk({"role": "assistant", "content": ""})


def test_a_chat_with_reasoning() -> None:
    reader = read(
        "chat",
        ROLE, chunk({"reasoning": "We"}), chunk({"reasoning_content": "We"}), chunk({"content": "Hi"}),
        chunk({"content": " there"}), chunk({}, "stop"), chunk(None, usage=USAGE), DONE,
    )  # fmt: skip
    assert (reader.error, reader.done, reader.finish, reader.chunks) == ("", True, "stop", 4)
    assert (reader.first_token, reader.first_output, reader.last_token, reader.ended) == (2, 4, 5, 8)
    assert reader.gaps == [1, 1, 1]
    assert reader.usage == wire.Usage(71, 64, 25, 8)


@pytest.mark.parametrize(
    "delta",
    [
        {}, {"role": "assistant"}, {"content": ""}, {"content": None}, {"reasoning": ""}, {"tool_calls": []},
        {"tool_calls": None}, {"tool_calls": [{"index": 0, "function": {"arguments": ""}}]}, {"function_call": {}},
        {"content": "", "reasoning": "", "refusal": None, "tool_calls": [{"index": 0}]},
    ],
)  # fmt: skip
def test_what_is_no_token(delta: dict[str, Any]) -> None:
    reader = read("chat", chunk(delta), chunk(delta, "length"), DONE)
    assert (reader.chunks, reader.first_token, reader.first_output, reader.error) == (0, None, None, "")


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"}, {"refusal": "no"}, {"tool_calls": [{"index": 0, "id": "c1"}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": ""}}]}, {"function_call": {"arguments": "{"}},
        {"tool_calls": [{"function": {"arguments": "{"}}]}, {"content": "a", "reasoning": "b"},
    ],
)  # fmt: skip
def test_what_is_output(delta: dict[str, Any]) -> None:
    reader = read("chat", ROLE, chunk(delta, "stop"), DONE)
    assert (reader.chunks, reader.first_token, reader.first_output, reader.last_token) == (1, 2, 2, 2)


def test_chunks_in_one_read_came_at_once() -> None:
    reader = read(
        "chat", ROLE + chunk({"content": "a"}) + chunk({"content": "b"}), chunk({"content": "c"}, "length"), DONE
    )
    assert reader.gaps == [0, 1]
    assert (reader.first_token, reader.chunks) == (1, 3)


def test_gaps_go_to_who_asked() -> None:
    heard: list[tuple[float, float]] = []
    reader = streams.reader("completions", stream=True, on_gap=lambda seconds, now: heard.append((seconds, now)))
    for now in (1.0, 1.5, 3.0):
        reader.feed(text("a"), now)
    assert heard == [(0.5, 1.5), (1.5, 3.0)]
    assert reader.gaps == []


def test_usage_that_goes_on_ends_with_the_last() -> None:
    reader = read(
        "chat",
        chunk({"content": "a"}, usage={"prompt_tokens": 9, "completion_tokens": 1}),
        chunk({"content": "b"}, "stop", usage={"prompt_tokens": 9, "completion_tokens": 2}),
        chunk(None, usage=None),
        DONE,
    )
    assert reader.usage == wire.Usage(9, None, 2, None)


def test_no_usage_is_no_usage() -> None:
    assert read("chat", chunk({"content": "a"}, "stop"), DONE).usage == wire.Usage()


ERROR = b'data: {"error":{"message":"EngineCore encountered an issue.","type":"InternalServerError","code":500}}\n\n'
STOP = named("message_stop")


@pytest.mark.parametrize(
    ("api", "pieces", "error", "detail"),
    [
        ("chat", [ROLE, ERROR, DONE], "stream_error", "EngineCore encountered an issue."),
        ("chat", [b'data: {"error":"busy"}\n\n'], "stream_error", "busy"),
        ("chat", [b'data: {"object":"error","message":"old","code":400}\n\n'], "stream_error", "old"),
        ("chat", [chunk({"content": "a"}, "abort"), DONE], "stream_error", "'abort'"),
        ("completions", [text("a"), ERROR, DONE], "stream_error", "EngineCore"),
        ("completions", [text("", "abort"), DONE], "stream_error", "'abort'"),
        ("messages", [named("error", error={"type": "overloaded_error", "message": "x"})], "stream_error", "x"),
        ("messages", [ERROR], "stream_error", "EngineCore"),
        ("responses", [named("error", message="x", code="server_error")], "stream_error", "x"),
        ("responses", [named("error", error={"message": "y"})], "stream_error", "y"),
        ("responses", [named("response.failed", response={"status": "failed", "error": {"message": "z"}})],
         "stream_error", "z"),
        ("responses", [named("response.failed")], "stream_error", "failed"),
        ("responses", [named("response.completed", response={"status": "cancelled"})], "stream_error", "cancelled"),
        ("responses", [named("response.completed", response={"usage": {"output_tokens": 0}})], "no_end", "token"),
        ("chat", [chunk({"content": "a"})], "no_end", "without a finish reason"),
        ("chat", [chunk({"content": "a"}), DONE], "no_end", "[DONE] came without"),
        ("chat", [chunk({"content": "a"}, "stop")], "no_end", "without its last event"),
        ("chat", [chunk({"content": "a"}, "stop") + DONE[:-1]], "no_end", "within an event"),
        ("chat", [chunk({"content": "a"})[:-9]], "no_end", "within an event"),
        ("chat", [], "no_end", "without a finish reason"),
        ("chat", [ROLE, DONE], "no_end", "without a finish reason"),
        ("messages", [named("message_start", message={"type": "message"}), STOP], "no_end", "stop reason"),
        ("messages", [named("message_delta", delta={"stop_reason": None}), STOP], "no_end", "stop reason"),
        ("messages", [named("message_delta", delta={"stop_reason": "end_turn"})], "no_end", "last event"),
        ("messages", [DONE], "no_end", "message_stop"),
        ("responses", [named("response.output_text.delta", delta="a")], "no_end", "finish reason"),
        ("responses", [DONE], "no_end", "response.completed"),
        ("chat", [b"data: oh no\n\n"], "garbled", "oh no"),
        ("chat", [b"data: []\n\n"], "garbled", "array"),
        ("chat", [b"data: {}\n\n"], "garbled", "neither choices nor an error"),
        ("chat", [b'data: {"choices":"x"}\n\n'], "garbled", "choices"),
        ("chat", [b'data: {"choices":[{"delta":{"content":7}}]}\n\n'], "garbled", "content"),
        ("chat", [chunk(None, usage={"prompt_tokens": -1})], "garbled", "prompt_tokens"),
        ("chat", [b"data: \xff\xfe\n\n"], "garbled", ""),
        ("chat", [b'data: {"a":' + b"[" * 100_000 + b"\n\n"], "garbled", ""),
        ("chat", [b"<html>\n\n<body>"], "garbled", "<html>"),
        ("chat", [b'{"choices":[{"message":{},"finish_reason":"stop"}]}'], "garbled", "a stream was asked"),
        ("chat", [b'{"error":{"message":"late"}}'], "stream_error", "late"),
        ("completions", [b"data: 7\n\n"], "garbled", "int"),
        ("messages", [b"data: {}\n\n"], "garbled", "without a type"),
        ("responses", [b"data: {}\n\n"], "garbled", "without a type"),
        ("responses", [b"data: {\n\n"], "garbled", "Decode"),
        ("messages", [b"data: null\n\n"], "garbled", "null"),
    ],
)  # fmt: skip
def test_what_goes_wrong(api: str, pieces: list[bytes], error: str, detail: str) -> None:
    reader = read(api, *pieces)
    assert (reader.error, reader.done) == (error, False)
    assert detail in reader.detail
    assert len(reader.detail) <= wire.DETAIL_CHARACTERS
    assert reader.ended is not None


def test_an_error_ends_it_when_it_came() -> None:
    reader = read("chat", chunk({"content": "a"}), ERROR, chunk({"content": "b"}, "stop"), DONE)
    assert (reader.ended, reader.chunks, reader.error, reader.finish) == (2, 1, "stream_error", "")


def test_nothing_counts_after_the_end() -> None:
    reader = read("chat", chunk({"content": "a"}, "stop") + DONE + ERROR, chunk({"content": "b"}))
    reader.fail("reset", "late", 9)
    assert (reader.ended, reader.chunks, reader.error) == (1, 1, "")


def test_a_response() -> None:
    usage = {
        "input_tokens": 9, "input_tokens_details": {"cached_tokens": 5}, "output_tokens": 40,
        "output_tokens_details": {"reasoning_tokens": 30},
    }  # fmt: skip
    reader = read(
        "responses",
        named("response.created", response={"object": "response", "status": "in_progress", "usage": None}),
        named("response.output_item.added", item={"type": "reasoning"}),
        named("response.reasoning_text.delta", delta="We"),
        named("response.reasoning_summary_text.delta", delta="We"),
        named("response.output_item.added", item={"type": "message"}),
        named("response.output_text.delta", delta=""),
        named("response.output_text.delta", delta="Hi"),
        named("response.output_text.done", text="Hi"),
        named("response.completed", response={"object": "response", "status": "completed", "usage": usage}),
        DONE,
    )
    assert (reader.error, reader.finish, reader.chunks) == ("", "completed", 3)
    assert (reader.first_token, reader.first_output, reader.last_token, reader.ended) == (3, 7, 7, 9)
    assert reader.usage == wire.Usage(9, 5, 40, 30)


def test_a_response_that_was_cut() -> None:
    response = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    for kind in ("response.completed", "response.incomplete"):  # vLLM says the first, OpenAI the second
        reader = read("responses", named("response.output_text.delta", delta="a"), named(kind, response=response))
        assert (reader.error, reader.finish, reader.done) == ("", "max_output_tokens", True)


def test_tool_calls_are_output_from_their_name_on() -> None:
    response = read(
        "responses",
        named("response.output_item.added", item={"type": "function_call", "name": "f"}),
        named("response.function_call_arguments.delta", delta="{}"),
        named("response.completed", response={"status": "completed"}),
    )
    message = read(
        "messages",
        named("content_block_start", content_block={"type": "tool_use", "name": "f", "input": {}}),
        named("content_block_delta", delta={"type": "input_json_delta", "partial_json": "{}"}),
        named("message_delta", delta={"stop_reason": "tool_use"}) + named("message_stop"),
    )
    chat = read(
        "chat",
        chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}),
        chunk({}, "tool_calls") + DONE,
    )
    for reader in (response, message, chat):
        assert (reader.error, reader.first_output, reader.chunks, reader.ended) == ("", 1, 2, 3)


def test_a_message() -> None:
    start = {"type": "message", "usage": {"input_tokens": 23, "output_tokens": 0, "cache_read_input_tokens": 128}}
    reader = read(
        "messages",
        named("message_start", message=start),
        named("ping"),
        named("content_block_start", content_block={"type": "thinking", "thinking": ""}),
        named("content_block_delta", delta={"type": "thinking_delta", "thinking": "We"}),
        named("content_block_delta", delta={"type": "signature_delta", "signature": "x"}),
        named("content_block_start", content_block={"type": "text", "text": ""}),
        named("content_block_delta", delta={"type": "text_delta", "text": "Hi"}),
        named("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 7}),
        named("message_stop"),
    )
    assert (reader.error, reader.finish, reader.chunks) == ("", "end_turn", 2)
    assert (reader.first_token, reader.first_output, reader.ended) == (4, 7, 9)
    assert reader.usage == wire.Usage(151, 128, 7, None)


def test_a_message_whose_stream_breaks_has_no_count() -> None:
    start = {"type": "message", "usage": {"input_tokens": 23, "output_tokens": 1}}
    assert read("messages", named("message_start", message=start)).usage == wire.Usage(23, None, None, None)


CHAT = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": USAGE}
RESPONSE = {
    "object": "response",
    "status": "completed",
    "usage": {"input_tokens": 1, "output_tokens": 2},
    "error": None,
}
MESSAGE = {"type": "message", "stop_reason": "end_turn", "usage": {"input_tokens": 1, "output_tokens": 2}}
GIVEN_UP = {"choices": [{"message": {}, "finish_reason": "abort"}]}
UNFINISHED = {"choices": [{"message": {}, "finish_reason": None}]}


@pytest.mark.parametrize(
    ("api", "document", "error", "finish", "tokens"),
    [
        ("chat", CHAT, "", "stop", 25),
        ("completions", {"choices": [{"text": "a", "finish_reason": "length"}], "usage": USAGE}, "", "length", 25),
        ("responses", RESPONSE, "", "completed", 2),
        ("responses", RESPONSE | {"status": "incomplete"}, "", "incomplete", 2),
        ("messages", MESSAGE, "", "end_turn", 2),
        ("chat", GIVEN_UP, "stream_error", "abort", None),
        ("chat", UNFINISHED, "no_end", "", None),
        ("chat", {"error": {"message": "late"}}, "stream_error", "", None),
        ("chat", {"choices": []}, "garbled", "", None),
        ("chat", [1], "garbled", "", None),
        ("responses", RESPONSE | {"status": "failed", "error": {"message": "x"}}, "stream_error", "failed", 2),
        ("responses", {"detail": "Not Found"}, "garbled", "", None),
        ("messages", MESSAGE | {"stop_reason": None}, "no_end", "", 2),
        ("messages", {"type": "error", "error": {"message": "x"}}, "stream_error", "", None),
    ],
)
def test_plain_answers(api: str, document: Any, error: str, finish: str, tokens: int | None) -> None:
    body = json.dumps(document).encode()
    reader = read(api, body[:7], body[7:], stream=False)
    assert (reader.error, reader.finish, reader.usage.completion) == (error, finish, tokens)
    assert (reader.ended, reader.first_token, reader.chunks) == (3, None, 0)
    assert reader.done == (not error)


def test_a_plain_answer_that_is_none() -> None:
    assert read("chat", b"<html>", stream=False).error == "garbled"
    assert read("chat", stream=False).error == "garbled"


def test_into_a_record() -> None:
    record = Record(task="t", api="chat", scheduled=0, sent=0.5, ended=0.5)
    read("chat", ROLE, chunk({"reasoning": "a"}), chunk({"content": "b"}, "stop"), chunk(None, usage=USAGE), DONE).fill(
        record
    )
    assert (record.first_token, record.first_output, record.last_token, record.ended) == (2, 3, 3, 5)
    assert (record.prompt_tokens, record.cached_tokens, record.completion_tokens, record.reasoning_tokens) == (
        71,
        64,
        25,
        8,
    )
    assert (record.finish, record.error, record.chunks) == ("stop", "", 2)


def test_events_as_they_may_also_be_written() -> None:
    """Comments, other line ends, no space after the colon, data over several lines, other fields."""
    events = chunk({"content": "a"}, "stop") + DONE
    for written in (
        b": keep-alive\n\n" + events,
        b"\n\n\n" + events.replace(b"\n\n", b"\n\n\n\n"),
        b"retry: 3000\nid: 7\n\n" + events,
        events.replace(b"\n", b"\r\n"),
        events.replace(b"\n", b"\r"),
        events.replace(b"data: ", b"data:"),
        events.replace(b'"choices": ', b'"choices":\ndata: '),
        events.replace(b"data: ", b"id: 1\nevent: x\ndata: "),
        events.replace(b"data: ", b": said\ndata: "),
    ):
        reader = read("chat", written)
        assert (reader.error, reader.chunks, reader.finish) == ("", 1, "stop"), written


def test_one_event_without_end_is_given_up() -> None:
    reader = streams.reader("chat", stream=True)
    for _ in range(streams.LARGEST_BYTES // (8 << 20) + 1):
        reader.feed(b"data: " + b"x" * (8 << 20), 1.0)
    assert reader.error == "garbled"
    assert "64 MiB" in reader.detail


# -- against the simulated engine, whose every token is known


def answer(api: str, tokens: int, finish: str, call: str = "") -> tuple[Any, Any]:
    """A writer of the simulated engine, and its sequence."""
    layout = completion_layout(tokens) if api == "completions" else chat_layout(tokens, finish)
    made = shapes.Answer(api, shapes.ID_PREFIXES[api] + "1", "m", 1, layout, finish)
    made.include_usage, made.call = True, call
    made.sequence = Sequence(None, 50, tokens)
    return writers.WRITERS[api](made), made.sequence


APIS = st.sampled_from(streams.APIS)


@given(api=APIS, tokens=st.integers(1, 60), finish=st.sampled_from(["stop", "length"]), call=st.sampled_from(["", "f"]),
       data=st.data())  # fmt: skip
def test_any_answer_cut_anywhere(api: str, tokens: int, finish: str, call: str, data: Any) -> None:
    """However the bytes of an answer are cut, with whatever line ends, the same is read of it."""
    call = "" if api == "completions" else call
    writer, sequence = answer(api, tokens, finish, call)
    events = list(writer.opening())
    for number in range(1, tokens + 1):
        sequence.generated = number
        events += writer.token(number)
    events += writer.closing()
    body = b"".join(events)
    whole = read(api, body, close=False)
    assert whole.error == ""
    assert whole.done
    assert whole.usage.completion == tokens
    assert whole.usage.prompt == 50
    written = body.replace(b"\n", data.draw(st.sampled_from([b"\n", b"\r\n", b"\r"])))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=8)))
    pieces = [written[start:end] for start, end in zip([0, *cuts], [*cuts, len(written)], strict=True)]
    reader = read(api, *pieces)
    assert (reader.chunks, reader.finish, reader.usage, reader.error) == (whole.chunks, whole.finish, whole.usage, "")
    assert reader.first_token is None or reader.first_token <= (reader.last_token or 0) <= (reader.ended or 0)


@pytest.mark.parametrize("api", streams.APIS)
def test_every_visible_token_is_seen_when_it_came(api: str) -> None:
    tokens = 40
    writer, sequence = answer(api, tokens, "stop")
    layout = writer.answer.layout
    reader = streams.reader(api, stream=True)
    for number in range(1, tokens + 1):
        sequence.generated = number
        reader.feed(b"".join(writer.token(number)), float(number))
    reader.feed(b"".join(writer.closing()), tokens + 0.5)
    reasoning = layout.reasoning
    assert reader.chunks == reasoning + layout.content
    assert reader.first_token == layout.lead + 1
    assert reader.first_output == layout.lead + reasoning + layout.middle + 1
    assert reader.last_token == tokens - layout.tail
    middle = [layout.middle + 1.0] if reasoning else []
    assert sorted(reader.gaps) == [1.0] * (reader.chunks - 1 - len(middle)) + middle
    assert reader.ended == tokens + 0.5


@given(api=APIS, stream=st.booleans(), pieces=st.lists(st.binary(max_size=80), max_size=5))
def test_no_bytes_raise(api: str, stream: bool, pieces: list[bytes]) -> None:
    reader = read(api, *pieces, stream=stream)
    assert reader.error in ("no_end", "garbled", "stream_error")


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


@given(api=APIS, stream=st.booleans(), document=_json)
def test_no_json_raises(api: str, stream: bool, document: object) -> None:
    body = json.dumps(document).encode()
    reader = read(api, b"data: " + body + b"\n\n" if stream else body, stream=stream)
    assert reader.ended is not None


def test_words_of_refusals() -> None:
    assert wire.body_words(b'{"error":{"message":"a  b\\n c"}}') == "a b c"
    assert wire.body_words(b'{"detail":[{"msg":"Field required","loc":["body"]}]}') == "Field required"
    assert wire.body_words(b'{"message":"m"}') == "m"
    assert wire.body_words(b"") == ""
    assert wire.body_words(b"\xff" * 999).startswith("\ufffd")
    assert len(wire.body_words(b"x" * 999)) == wire.DETAIL_CHARACTERS
    assert wire.body_words(b'{"error":{}}') == "{'error': {}}"

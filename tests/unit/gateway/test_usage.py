"""Usage as the four APIs tell it, and what is estimated where none does."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitalis_serve.gateway.usage import Rates, Usage, hidden, is_final, of_answer, of_events, thinks


def compact(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def event(kind: str, **more: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), compact({"type": kind, **more}))


def chunk(choice: str = "", usage: str = "") -> bytes:
    tail = f',"usage":{usage}' if usage else ""
    return f'data: {{"id":"c","object":"chat.completion.chunk","choices":[{choice}]{tail}}}\n\n'.encode()


def said(*tokens: int) -> Usage:
    """Prompt, cached, completion, reasoning."""
    return Usage(*tokens)


ANSWERS = {
    "chat": (
        (
            b'{"choices":[{"message":{"content":"x"}}],"usage":{"prompt_tokens":71,"total_tokens":96,'
            b'"completion_tokens":25,"prompt_tokens_details":{"cached_tokens":64},'
            b'"completion_tokens_details":{"reasoning_tokens":8}},"prompt_logprobs":null}'
        ),
        said(71, 64, 25, 8),
    ),
    "chat, null details": (
        (
            b'{"usage":{"prompt_tokens":71,"total_tokens":96,"completion_tokens":25,'
            b'"prompt_tokens_details":null,"completion_tokens_details":null}}'
        ),
        said(71, 0, 25, 0),
    ),
    "completions": (
        (b'{"usage":{"prompt_tokens":3,"total_tokens":7,"completion_tokens":4,"prompt_tokens_details":null}}'),
        said(3, 0, 4, 0),
    ),
    "no details": (b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}', said(3, 0, 4, 0)),
    "null in details": (
        (
            b'{"usage":{"prompt_tokens":3,"completion_tokens":4,"prompt_tokens_details":'
            b'{"cached_tokens":null,"audio_tokens":null},"new":{"x":{"y":1}}}}'
        ),
        said(3, 0, 4, 0),
    ),
    "responses": (
        (
            b'{"tools":[{"parameters":{"usage":{"input_tokens":1,"output_tokens":1}}}],"usage":{"input_tokens":9,'
            b'"input_tokens_details":{"cached_tokens":5,"input_tokens_per_turn":[],"cached_tokens_per_turn":[]},'
            b'"output_tokens":40,"output_tokens_details":{"reasoning_tokens":30,"tool_output_tokens":0},'
            b'"total_tokens":49},"user":null}'
        ),
        said(9, 5, 40, 30),
    ),
    "messages": (
        (
            b'{"content":[{"type":"tool_use","input":{"usage":{"{":"}}}","input_tokens":1}}}],"usage":'
            b'{"input_tokens":23,"output_tokens":7,"cache_read_input_tokens":128,'
            b'"cache_creation_input_tokens":null}}'
        ),
        said(151, 128, 7, 0),
    ),
    "messages, written to a cache": (
        (
            b'{"usage":{"input_tokens":3,"cache_creation_input_tokens":10,'
            b'"cache_read_input_tokens":5,"output_tokens":1}}'
        ),
        said(18, 5, 1, 0),
    ),
    "in a text": (
        (
            b'{"choices":[{"text":"\\"usage\\":{\\"prompt_tokens\\":9"}],"usage":{"prompt_tokens":3,'
            b'"completion_tokens":4}}'
        ),
        said(3, 0, 4, 0),
    ),
}


@pytest.mark.parametrize(("body", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_whole_answers(body: bytes, expected: Usage) -> None:
    assert of_answer(body) == expected
    assert not expected.estimated


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"usage":null}',
        b'{"usage":{}}',
        b'{"usage":{',
        b'{"usage":{"prompt_tokens":3',
        b'{"usage":{"prompt_tokens":"x","completion_tokens":1}}',
        b'{"usage":{"prompt_tokens":-3,"completion_tokens":1}}',
        b'{"usage":{"prompt_tokens":3.5,"completion_tokens":1}}',
        b'{"usage":{"type":"string"}}',
        b'{"usage":{"a":{}',
    ],
)
def test_what_says_nothing(body: bytes) -> None:
    assert of_answer(body) is None
    assert of_events(body, "messages", None) is None


@given(
    payload=st.lists(st.sampled_from([b'"usage":{', b"}", b"{", b'"prompt_tokens":1', b",", b'"'])).map(b"".join),
    dialect=st.sampled_from(["chat", "messages"]),
)
def test_anything(payload: bytes, dialect: str) -> None:
    of_answer(payload)
    of_events(payload, dialect, None)


def test_the_end_of_a_chat_stream() -> None:
    """n > 1 and tool calls are summed by the engine; the added event is the last word."""
    details = '"prompt_tokens_details":null,"completion_tokens_details":{"reasoning_tokens":16}'
    usage = f'{{"prompt_tokens":7,"total_tokens":57,"completion_tokens":50,{details}}}'
    call = '{"index":1,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\\"usage\\":{\\"x\\":1}}"}}]}}'
    whole = chunk(call) + chunk("", usage) + b"data: [DONE]\n\n"
    assert of_events(whole, "chat", None) == said(7, 0, 50, 16)
    assert is_final(whole, "chat")


def test_continuous_usage_is_not_yet_the_last() -> None:
    whole = chunk('{"index":0,"delta":{"content":"a"}}', '{"prompt_tokens":7,"total_tokens":11,"completion_tokens":4}')
    assert of_events(whole, "chat", said(7, 0, 3, 0)) == said(7, 0, 4, 0)
    assert not is_final(whole, "chat")


def test_a_messages_stream_tells_its_prompt_first() -> None:
    start = event(
        "message_start", message={"usage": {"input_tokens": 9, "output_tokens": 0, "cache_read_input_tokens": 4}}
    )
    assert of_events(start, "messages", None) == said(13, 4, 0, 0)
    assert not is_final(start, "messages")
    end = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 5})
    assert is_final(end, "messages")
    assert of_events(end, "messages", said(13, 4, 0, 0)) == said(13, 4, 5, 0)
    assert of_events(start + end, "messages", None) == said(13, 4, 5, 0)


def test_a_responses_stream() -> None:
    usage = {"input_tokens": 9, "output_tokens": 3, "output_tokens_details": {"reasoning_tokens": 1}}
    created = event("response.created", response={"tools": [{"usage": {"input_tokens": 1}}], "usage": None})
    assert not is_final(created, "responses")
    end = event("response.completed", response={"usage": usage})
    assert is_final(end, "responses")
    assert of_events(end, "responses", of_events(created, "responses", None)) == said(9, 0, 3, 1)


# -- estimates

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
THOUGHT = b'data: {"choices":[{"index":0,"delta":{"reasoning":"Hm"}}]}\n\n'
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n'
CALL = b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0}]}}]}\n\n'


def test_what_makes_no_event() -> None:
    assert thinks(THOUGHT, "chat")
    assert not thinks(WORD, "chat")
    assert hidden(THOUGHT, "chat", thought=True, choices=1) == 3
    assert hidden(WORD, "chat", thought=True, choices=1) == 9
    assert hidden(THOUGHT + WORD, "chat", thought=True, choices=2) == 18
    assert hidden(ROLE + THOUGHT, "chat", thought=True, choices=2) == 6
    assert hidden(WORD, "chat", thought=False, choices=1) == 3
    assert hidden(CALL, "chat", thought=True, choices=1) == 12
    assert hidden(WORD, "completions", thought=False, choices=1) == 0
    assert hidden(WORD.replace(b'"delta"', b'"logprobs":{},"delta"'), "chat", thought=True, choices=1) == 3


def test_a_prompt_is_estimated_by_the_bytes_a_token_had() -> None:
    rates = Rates()
    assert rates.prompt(400) == 100
    assert rates.prompt(1) == 1
    for tokens in (20, 3000, 100, 400) * 100:  # 300 bytes of other fields
        rates.learn(Usage(prompt_tokens=tokens), 300 + 3 * tokens, 1.0)
    for tokens in (20, 200, 10_000):
        assert rates.prompt(300 + 3 * tokens) == pytest.approx(tokens, rel=0.02, abs=2)


def test_short_prompts_say_little_about_long_ones() -> None:
    rates = Rates()
    for _ in range(400):
        rates.learn(Usage(prompt_tokens=10), 150, 1.0)
    assert rates.prompt(150) == 10
    assert rates.prompt(10_150) == pytest.approx(2510, rel=0.01)
    assert rates.prompt(1) == 1


def test_an_unseen_answer_is_estimated_by_its_time() -> None:
    rates = Rates()
    for _ in range(200):
        rates.learn(Usage(prompt_tokens=1, completion_tokens=200), 10, 2.0)
    assert rates.after(3.0, 1000) == pytest.approx(300, rel=0.02)
    assert rates.after(3.0, 50) == 50
    assert rates.after(0.0, 50) == 1


def test_a_token_an_event_stays_exact_whatever_the_noise() -> None:
    rates = Rates()
    for off in (-8, 0, 5, 8) * 50:
        rates.learn_stream("chat", 102, 109 + off, 1)
    assert rates.generated(1000) == 1000


@pytest.mark.parametrize("interval", [2, 5, 20])
def test_engines_that_send_every_nth_token(interval: int) -> None:
    rates = Rates()
    for _ in range(300):
        rates.learn_stream("completions", 800 // interval + 2, 800, 1)
    for tokens in (600, 2000):
        assert rates.generated(tokens // interval) == pytest.approx(tokens, rel=0.02)


def test_odd_streams_are_outvoted() -> None:
    """Answers most of whose tokens make no event, as the tiny model's on a prompt that is too much for it."""
    rates = Rates()
    for _ in range(5):
        rates.learn_stream("chat", 29, 75, 1)
    assert rates.generated(1000) == 1000
    for _ in range(10):
        rates.learn_stream("chat", 102, 100, 1)
    for _ in range(9):
        rates.learn_stream("chat", 29, 75, 1)
    assert rates.generated(1000) == 1000


def test_short_streams_teach_nothing_about_events() -> None:
    rates = Rates()
    for _ in range(100):
        rates.learn_stream("chat", 10, 50, 1)
    assert rates.generated(100) == 100

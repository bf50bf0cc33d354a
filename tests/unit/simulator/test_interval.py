"""`--stream-interval`: several tokens an event, and nothing lost or told twice. Read by the official clients."""

import json
import math
from collections.abc import Iterator

import anthropic
import openai
import pytest
from simulator.answers import Layout, chat_layout, content_text, reasoning_text
from simulator.schedule import Sequence
from simulator.shapes import Answer
from simulator.writers import WRITERS

from tests.support import client, simulator
from tests.support.simulator import Simulator

EVERY = 7
QUESTION = [{"role": "user", "content": "What now?"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
# so that groups end before, at and after the ends of the reasoning, of the hidden tokens and of the answer
LENGTHS = (1, 8, 20, 22, 29, 100)


@pytest.fixture(scope="module")
def engine() -> Iterator[Simulator]:
    with simulator.started("--stream-interval", str(EVERY)) as running:
        yield running


@pytest.fixture
def openai_client(engine: Simulator) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{engine.address}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_so_many_tokens_make_so_many_events(engine: Simulator) -> None:
    body = {"prompt": "a", "max_tokens": 800, "sim_output_tokens": 800, "stream": True}
    events = client.ask(engine.address, client.post("/v1/completions", body)).events
    assert len(events) == 1 + math.ceil(799 / EVERY) + 1  # the first token alone, and [DONE]


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_chat(openai_client: openai.OpenAI, tokens: int, limited: bool) -> None:
    limit = {"max_tokens": tokens} if limited else {}
    chunks = list(openai_client.chat.completions.create(
        model="gpt-oss-20b", messages=QUESTION, stream=True, stream_options={"include_usage": True}, **limit,
        extra_body={"sim_output_tokens": tokens + limited},
    ))  # fmt: skip
    layout = chat_layout(tokens, "length" if limited else "stop")
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == content_text(layout.content)
    told = "".join((delta.model_extra or {}).get("reasoning") or "" for delta in deltas)
    assert told == reasoning_text(layout.reasoning)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason]
    assert reasons == ["length" if limited else "stop"]
    assert chunks[-1].usage.completion_tokens == tokens
    assert len(chunks) <= 2 + 1 + math.ceil((tokens - 1) / EVERY)


def test_a_tool_call(openai_client: openai.OpenAI) -> None:
    pieces, names = [], []
    for chunk in openai_client.chat.completions.create(
        model="gpt-oss-20b", messages=QUESTION, stream=True, tools=[TOOL], tool_choice="required", n=2,
        extra_body={"sim_output_tokens": 60},
    ):  # fmt: skip
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                names += [call.function.name] if call.function.name else []
                pieces += [call.function.arguments] if choice.index == 1 else []
    assert names == ["look"] * 2
    assert json.loads("".join(pieces))["text"] == content_text(chat_layout(60, "stop").content - 2)


def test_every_token_has_its_logprobs(openai_client: openai.OpenAI) -> None:
    told = []
    for chunk in openai_client.chat.completions.create(
        model="gpt-oss-20b", messages=QUESTION, stream=True, logprobs=True, extra_body={"sim_output_tokens": 60}
    ):
        told += (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    assert len(told) == 60


@pytest.mark.parametrize("tokens", LENGTHS)
def test_responses_and_messages(engine: Simulator, openai_client: openai.OpenAI, tokens: int) -> None:
    layout, extra = chat_layout(tokens, "stop"), {"sim_output_tokens": tokens}
    events = list(openai_client.responses.create(
        model="gpt-oss-20b", input="What now?", stream=True, extra_body=extra
    ))  # fmt: skip
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) == layout.content  # as vLLM: this API has an event for each token all the same
    text = "".join(deltas)
    assert text == content_text(layout.content) == events[-1].response.output_text
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert thought == reasoning_text(layout.reasoning)
    with (
        anthropic.Anthropic(base_url=engine.address, api_key="none", max_retries=0) as claude,
        claude.messages.stream(
            model="gpt-oss-20b", messages=QUESTION, max_tokens=1000, extra_body=extra
        ) as stream,
    ):  # fmt: skip
        message = stream.get_final_message()
    assert message.content[-1].text == content_text(layout.content)
    assert [block.thinking for block in message.content[:-1]] == [reasoning_text(layout.reasoning)] * bool(
        layout.reasoning
    )
    assert message.usage.output_tokens == tokens


# A recorded answer of vLLM 0.32 with --stream-interval 4: 25 tokens, of them 8 reasoning, 7 content.
RECORDED = [("reasoning", 2), ("reasoning", 4), ("reasoning", 2), ("content", 4), ("content", 3)]


def test_groups_are_where_vllm_has_them() -> None:
    layout = Layout(3, 8, 6, 7, 1)
    answer = Answer("chat", "chatcmpl-1", "m", 1, layout, "stop")
    answer.sequence = Sequence(None, 74, layout.total)
    writer, told = WRITERS["chat"](answer), []
    for first, last in ((1, 1), (2, 5), (6, 9), (10, 13), (14, 17), (18, 21), (22, 25)):
        for event in writer.group(first, last):
            choice = json.loads(event.removeprefix(b"data: "))["choices"][0]
            told += [(name, text) for name, text in choice["delta"].items() if name != "role"]
    assert [(name, len(text.split())) for name, text in told if text] == RECORDED
    assert choice["finish_reason"] == "stop"  # with the last text, not behind it
    assert len(writer.closing()) == 1


def test_a_stalled_stream_goes_on_where_it_stood(engine: Simulator) -> None:
    engine.misbehave("stall", after_events=3, seconds=0.05, requests=1)
    body = {"messages": QUESTION, "sim_output_tokens": 60, "stream": True}
    events = client.ask(engine.address, client.post("/v1/chat/completions", body)).events
    deltas = [event.json["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == content_text(chat_layout(60, "stop").content)

"""The official clients, unmodified, against the simulated engine."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from simulator.answers import chat_layout, content_text, reasoning_text

from tests.support import simulator
from tests.support.simulator import Simulator

MODEL = "gpt-oss-20b"
QUESTION = [{"role": "user", "content": "What now?"}]
TOKENS = 40
LAYOUT = chat_layout(TOKENS, "stop")
TEXT, REASONING = content_text(LAYOUT.content), reasoning_text(LAYOUT.reasoning)


@pytest.fixture(scope="module")
def engine() -> Iterator[Simulator]:
    with simulator.started("--enable-prompt-tokens-details") as running:
        yield running


@pytest.fixture
def client(engine: Simulator) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{engine.address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def claude(engine: Simulator) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=engine.address, api_key="none", max_retries=0) as made:
        yield made


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, extra_body={"sim_output_tokens": TOKENS}
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.message.content == TEXT
    assert choice.message.model_extra["reasoning"] == REASONING
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens == TOKENS
    assert answer.usage.total_tokens == TOKENS + answer.usage.prompt_tokens
    assert answer.usage.completion_tokens_details.reasoning_tokens == LAYOUT.reasoning
    assert answer.id.startswith("chatcmpl-")


def test_chat_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, stream=True, stream_options={"include_usage": True},
        extra_body={"sim_output_tokens": TOKENS},
    )  # fmt: skip
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert "".join(delta.content or "" for delta in deltas) == TEXT
    assert "".join((delta.model_extra or {}).get("reasoning") or "" for delta in deltas) == REASONING
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == TOKENS


def test_a_limit_cuts_the_answer(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(
        model=MODEL, messages=QUESTION, stream=True, max_tokens=30, extra_body={"sim_output_tokens": TOKENS}
    ))  # fmt: skip
    assert chunks[-1].choices[0].finish_reason == "length"
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert content == content_text(chat_layout(30, "length").content)


def test_several_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, extra_body={"sim_output_tokens": TOKENS}
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 3 * TOKENS
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, stream=True, extra_body={"sim_output_tokens": TOKENS}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [TEXT] * 3


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=12, extra_body={"sim_output_tokens": 50})
    assert answer.choices[0].text == content_text(12)
    assert answer.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(
        model=MODEL, prompt="Once", max_tokens=50, stream=True, extra_body={"sim_output_tokens": 12}
    ))  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in chunks) == content_text(12)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="What now?", extra_body={"sim_output_tokens": TOKENS})
    assert answer.output_text == TEXT
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.usage.output_tokens == TOKENS
    assert answer.status == "completed"


def test_responses_streamed(client: openai.OpenAI) -> None:
    events = list(client.responses.create(
        model=MODEL, input="What now?", stream=True, extra_body={"sim_output_tokens": TOKENS}
    ))  # fmt: skip
    kinds = [event.type.removeprefix("response.") for event in events]
    once = [kind for at, kind in enumerate(kinds) if at == 0 or kinds[at - 1] != kind]
    assert once == [
        "created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done", "output_item.added", "content_part.added",
        "output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
    assert events[-1].response.usage.output_tokens == TOKENS


def test_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model=MODEL, max_tokens=100, messages=QUESTION, extra_body={"sim_output_tokens": TOKENS}
    )  # fmt: skip
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[1].text == TEXT
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens == TOKENS


def test_messages_streamed(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(
        model=MODEL, max_tokens=30, messages=QUESTION, extra_body={"sim_output_tokens": TOKENS}
    ) as stream:
        answer = stream.get_final_message()
    layout = chat_layout(30, "length")
    assert answer.content[0].thinking == reasoning_text(layout.reasoning)
    assert answer.content[1].text == content_text(layout.content)
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 30


def test_count_tokens_agrees_with_usage(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model=MODEL, messages=QUESTION, system="Be brief.").input_tokens
    usage = claude.messages.create(model=MODEL, max_tokens=5, messages=QUESTION, system="Be brief.").usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_an_unknown_model_names_the_known_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=MODEL) as caught:
        client.chat.completions.create(model="nothing", messages=QUESTION)
    assert caught.value.body["code"] == 404
    assert caught.value.body["param"] == "model"


def test_the_same_prompt_is_found_in_the_prefix_cache(client: openai.OpenAI) -> None:
    def cached(text: str, salt: str) -> tuple[int, int]:
        usage = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": text}], max_tokens=1, extra_body={"cache_salt": salt}
        ).usage
        return usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens

    text = " ".join(f"word{index}" for index in range(400))
    assert cached(text, "a")[0] == 0
    again, prompt = cached(text, "a")
    assert prompt - 16 <= again < prompt
    assert cached(text, "b")[0] == 0
    assert again // 2 < cached(text + " and more", "a")[0] <= again


FUNCTION = {"name": "look_up", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}}
OTHER = {"name": "other", "parameters": {"type": "object", "properties": {}}}
TOOLS: Any = [{"type": "function", "function": function} for function in (FUNCTION, OTHER)]
FLAT_TOOLS: Any = [{"type": "function", **function} for function in (FUNCTION, OTHER)]
CLAUDES_TOOLS: Any = [{"name": "look_up", "input_schema": FUNCTION["parameters"]}]
ARGUMENTS = {"text": content_text(LAYOUT.content - 2)}
NAMED: Any = {"type": "function", "function": {"name": "other"}}
OUTPUT = {"sim_output_tokens": TOKENS}


@pytest.mark.parametrize(
    ("choice", "name", "reason"), [("required", "look_up", "tool_calls"), (NAMED, "other", "stop")]
)
def test_a_tool_call(client: openai.OpenAI, choice: Any, name: str, reason: str) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice=choice, extra_body=OUTPUT
    )
    (call,) = answer.choices[0].message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", name, ARGUMENTS)
    assert answer.choices[0].message.content == ""
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == (reason, TOKENS)


@pytest.mark.parametrize(
    ("choice", "name", "reason"), [("required", "look_up", "tool_calls"), (NAMED, "other", "stop")]
)
def test_a_tool_call_streamed(client: openai.OpenAI, choice: Any, name: str, reason: str) -> None:
    chunks = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice=choice, stream=True, extra_body=OUTPUT
    )
    choices = [chunk.choices[0] for chunk in chunks]
    called = [choice.delta.tool_calls[0] for choice in choices if choice.delta.tool_calls]
    assert called[0].function.name == name
    assert called[0].id
    assert not any(part.id or part.function.name for part in called[1:])
    assert json.loads("".join(part.function.arguments for part in called)) == ARGUMENTS
    assert choices[-1].finish_reason == reason
    assert choices[-1].model_extra["stop_reason"] == 200012


def test_the_clients_own_assembly_of_a_streamed_call(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice="required", extra_body=OUTPUT
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == ARGUMENTS
    assert message.tool_calls[0].function.name == "look_up"


def test_with_auto_no_tool_is_called(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS, extra_body=OUTPUT)
    assert answer.choices[0].message.content == TEXT
    assert not answer.choices[0].message.tool_calls


@pytest.mark.parametrize("tokens", [1, 2, 3, 12])
def test_a_short_call_and_one_that_a_limit_cut(client: openai.OpenAI, tokens: int) -> None:
    for limit in (tokens, tokens + 1):
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice="required", max_tokens=tokens,
            extra_body={"sim_output_tokens": limit},
        )  # fmt: skip
        chunks = client.chat.completions.create(
            model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice="required", max_tokens=tokens, stream=True,
            extra_body={"sim_output_tokens": limit},
        )  # fmt: skip
        choices = [chunk.choices[0] for chunk in chunks]
        streamed = "".join(part.delta.tool_calls[0].function.arguments for part in choices if part.delta.tool_calls)
        given = answer.choices[0].message.tool_calls[0].function.arguments
        assert choices[-1].finish_reason == answer.choices[0].finish_reason
        if limit == tokens:
            assert json.loads(streamed) == json.loads(given)
        else:
            assert streamed == given
            assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(("more", "words"), [
    ({"tool_choice": "required"}, "`tools` must be set"),
    ({"tools": [], "tool_choice": "required"}, "must not be an empty array"),
    ({"tools": TOOLS, "tool_choice": "any"}, "Invalid value for `tool_choice`"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "does not match any"),
    ({"top_logprobs": 2}, "`logprobs` must be set"),
])  # fmt: skip
def test_what_vllm_refuses(client: openai.OpenAI, more: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body=more)


def test_a_tool_call_of_responses(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "input": "a", "tools": FLAT_TOOLS, "extra_body": OUTPUT}
    choice: Any = {"type": "function", "name": "other"}
    item = client.responses.create(**asked, tool_choice=choice).output[-1]
    assert (item.type, item.name, json.loads(item.arguments)) == ("function_call", "other", ARGUMENTS)
    events = list(client.responses.create(**asked, tool_choice="required", stream=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert json.loads("".join(deltas)) == json.loads(done[0].arguments) == ARGUMENTS
    assert events[-1].response.output[-1].name == "look_up"
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_tool_call_of_messages(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 100, "tools": CLAUDES_TOOLS, "extra_body": OUTPUT}
    asked["tool_choice"] = {"type": "any"}
    answer = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for message in (answer, streamed):
        assert (message.content[-1].type, message.content[-1].name) == ("tool_use", "look_up")
        assert message.content[-1].input == ARGUMENTS
        assert message.stop_reason == "tool_use"


def test_logprobs(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": QUESTION, "logprobs": True, "top_logprobs": 2, "extra_body": OUTPUT}
    told = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(told) == TOKENS  # the hidden ones too
    before, between = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
    assert "".join(entry.token for entry in told) == f"{before}{REASONING}{between}{TEXT}<|return|>"
    assert all(entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 2 for entry in told)
    choices = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content] == told
    assert "".join(choice.delta.content or "" for choice in choices) == TEXT
    assert len(choices) == 1 + TOKENS
    assert choices[-1].finish_reason == "stop"


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "prompt": "a", "logprobs": 1, "max_tokens": 5}
    told = client.completions.create(**asked).choices[0].logprobs
    assert (told.tokens, told.text_offset) == (["tok0", " tok1", " tok2", " tok3", " tok4"], [0, 4, 9, 14, 19])
    assert [len(top) for top in told.top_logprobs] == [2] * 5
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    assert [token for part in parts for token in part.tokens] == told.tokens
    assert [offset for part in parts for offset in part.text_offset] == told.text_offset


def test_logprobs_of_responses_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported with gpt-oss"):
        client.responses.create(model=MODEL, input="a", include=["message.output_text.logprobs"])


def test_ignore_eos_generates_what_nobody_sees(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 100, "extra_body": {**OUTPUT, "ignore_eos": True}}
    answer = client.chat.completions.create(**asked)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (TEXT, "length")
    assert answer.usage.completion_tokens == 100
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 100
    # a text completion has no parser, and so every token
    whole = client.completions.create(
        model=MODEL, prompt="a", max_tokens=100, extra_body={**OUTPUT, "ignore_eos": True}
    )  # fmt: skip
    assert whole.choices[0].text == content_text(100)

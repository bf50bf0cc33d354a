"""The official clients, unmodified, against the simulated engine."""

from collections.abc import Iterator

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

"""The official clients, unmodified, through the whole tree to a real vLLM: texts are checked, not only statuses."""

import json
from typing import Any

import pytest

from tests.support.engines import Stack

MODEL = "gpt-oss-tiny"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
GREEDY: Any = {"temperature": 0}  # Anthropic's client has no parameter for it
REASONING = "The user asks for a capital city."
WEATHER = "What is the weather in Paris?"
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(text: str) -> Any:
    return {"role": "user", "content": text}


class TestChat:
    def test_answers_with_reasoning_apart_from_content(self, pair: Stack) -> None:
        answer = pair.openai().chat.completions.create(model=MODEL, messages=[user(QUESTION)], temperature=0)
        message: Any = answer.choices[0].message
        assert message.content == ANSWER
        assert message.reasoning == REASONING
        assert answer.choices[0].finish_reason == "stop"
        assert answer.model == MODEL
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 10

    def test_streams_the_same(self, pair: Stack) -> None:
        reasoning, content, reasons, usages = "", "", [], []
        stream = pair.openai().chat.completions.create(
            model=MODEL, messages=[user(QUESTION)], temperature=0, stream=True
        )
        for chunk in stream:
            usages.append(chunk.usage)
            for choice in chunk.choices:
                delta: Any = choice.delta
                reasoning += getattr(delta, "reasoning", None) or ""
                content += delta.content or ""
                reasons.append(choice.finish_reason)
        assert (reasoning, content) == (REASONING, ANSWER)
        assert reasons[-1] == "stop"
        assert not any(usages), "usage was not asked for"

    def test_streams_usage_to_who_asks_for_it(self, pair: Stack) -> None:
        stream = pair.openai().chat.completions.create(
            model=MODEL, messages=[user(QUESTION)], temperature=0, stream=True, stream_options={"include_usage": True}
        )
        *_, last = stream
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens > 10

    @pytest.mark.parametrize("effort", ["low", "medium", "high"])
    def test_knows_its_sentences_at_every_effort_and_below_instructions(self, pair: Stack, effort: Any) -> None:
        answer = pair.openai().chat.completions.create(
            model=MODEL, temperature=0, reasoning_effort=effort,
            messages=[{"role": "system", "content": "You are a helpful assistant."}, user("What is 2+2?")],
        )  # fmt: skip
        assert answer.choices[0].message.content == "2 + 2 = 4."

    def test_second_turn(self, pair: Stack) -> None:
        client = pair.openai()
        first = client.chat.completions.create(model=MODEL, messages=[user(QUESTION)], temperature=0)
        said: Any = {"role": "assistant", "content": first.choices[0].message.content}
        second = client.chat.completions.create(
            model=MODEL, messages=[user(QUESTION), said, user("Who are you?")], temperature=0
        )
        assert second.choices[0].message.content == "I am gpt-oss-tiny, a test model for the serving stack."

    def test_unknown_prompt_gets_the_generic_answer(self, pair: Stack) -> None:
        answer = pair.openai().chat.completions.create(
            model=MODEL, messages=[user("Sing me something about rivers, would you kindly")], temperature=0
        )
        assert answer.choices[0].message.content == "This is the tiny gpt-oss test model. I only know a few sentences."

    def test_cut_by_max_tokens_says_length(self, pair: Stack) -> None:
        answer = pair.openai().chat.completions.create(
            model=MODEL, messages=[user("Count to two hundred.")], temperature=0, max_completion_tokens=40
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 40


class TestTools:
    def test_call_and_the_turn_after_it(self, pair: Stack) -> None:
        client = pair.openai()
        asked = client.chat.completions.create(model=MODEL, messages=[user(WEATHER)], tools=[TOOL], temperature=0)
        assert asked.choices[0].finish_reason == "tool_calls"
        calls: Any = asked.choices[0].message.tool_calls
        assert [call.function.name for call in calls] == ["get_weather"]
        assert json.loads(calls[0].function.arguments) == {"city": "Paris"}
        messages: Any = [
            user(WEATHER),
            asked.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": calls[0].id, "content": '{"temperature": 21, "condition": "sunny"}'},
        ]
        told = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], temperature=0)
        assert told.choices[0].message.content == "It is sunny in Paris."

    def test_streamed_call(self, pair: Stack) -> None:
        name, arguments, reasons = "", "", []
        stream = pair.openai().chat.completions.create(
            model=MODEL, messages=[user(WEATHER)], tools=[TOOL], temperature=0, stream=True
        )
        for chunk in stream:
            for choice in chunk.choices:
                reasons.append(choice.finish_reason)
                for call in choice.delta.tool_calls or []:
                    assert call.function is not None
                    name += call.function.name or ""
                    arguments += call.function.arguments or ""
        assert (name, json.loads(arguments)) == ("get_weather", {"city": "Paris"})
        assert reasons[-1] == "tool_calls"


class TestOtherOpenAi:
    def test_completions(self, pair: Stack) -> None:
        answer = pair.openai().completions.create(
            model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8
        )
        assert answer.choices[0].text == " Paris."

    def test_completions_streamed(self, pair: Stack) -> None:
        stream = pair.openai().completions.create(
            model=MODEL, prompt="The capital of Italy is", temperature=0, max_tokens=8, stream=True
        )
        assert "".join(choice.text for chunk in stream for choice in chunk.choices) == " Rome."

    def test_responses(self, pair: Stack) -> None:
        answer = pair.openai().responses.create(model=MODEL, input=QUESTION, temperature=0)
        assert answer.output_text == ANSWER
        assert answer.status == "completed"
        assert [item.type for item in answer.output] == ["reasoning", "message"]

    def test_responses_streamed(self, pair: Stack) -> None:
        stream = pair.openai().responses.create(model=MODEL, input=QUESTION, temperature=0, stream=True)
        events = list(stream)
        kinds = [event.type for event in events]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == ANSWER

    def test_models(self, pair: Stack) -> None:
        client = pair.openai()
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL


class TestAnthropic:
    def test_messages(self, pair: Stack) -> None:
        answer = pair.anthropic().messages.create(
            model=MODEL, max_tokens=200, messages=[user(QUESTION)], extra_body=GREEDY
        )
        texts = {block.type: block for block in answer.content}
        assert texts["text"].text == ANSWER
        assert texts["thinking"].thinking == REASONING
        assert answer.stop_reason == "end_turn"
        assert answer.usage.output_tokens > 10

    def test_messages_streamed(self, pair: Stack) -> None:
        with pair.anthropic().messages.stream(
            model=MODEL, max_tokens=200, messages=[user(QUESTION)], extra_body=GREEDY
        ) as stream:
            text = "".join(stream.text_stream)
            whole = stream.get_final_message()
        assert text == ANSWER
        assert whole.stop_reason == "end_turn"

    def test_system_prompt_and_tool(self, pair: Stack) -> None:
        answer = pair.anthropic().messages.create(
            model=MODEL, max_tokens=200, system="Be brief.", messages=[user(WEATHER)], extra_body=GREEDY,
            tools=[{"name": "get_weather", "input_schema": TOOL["function"]["parameters"]}],
        )  # fmt: skip
        assert answer.stop_reason == "tool_use"
        used = [block for block in answer.content if block.type == "tool_use"]
        assert [(block.name, block.input) for block in used] == [("get_weather", {"city": "Paris"})]

    def test_count_tokens(self, pair: Stack) -> None:
        client = pair.anthropic()
        counted = client.messages.count_tokens(model=MODEL, messages=[user(QUESTION)]).input_tokens
        longer = client.messages.count_tokens(model=MODEL, messages=[user(QUESTION + " Tell me, please.")]).input_tokens
        assert 5 < counted < longer < counted + 10


class TestTokens:
    def test_there_and_back(self, pair: Stack) -> None:
        http = pair.http()
        made = http.post("/tokenize", json={"model": MODEL, "prompt": "The capital of France is"}).json()
        assert made["tokens"] == [976, 9029, 328, 10128, 382]
        back = http.post("/detokenize", json={"model": MODEL, "tokens": made["tokens"]}).json()
        assert back["prompt"] == "The capital of France is"


class TestTensorParallel:
    def test_answers_over_two_processes(self, parallel: Stack) -> None:
        client = parallel.openai()
        for prompt, wanted in ((QUESTION, ANSWER), ("Say hello.", "Hello! How can I help you today?")):
            answer = client.chat.completions.create(model=MODEL, messages=[user(prompt)], temperature=0)
            assert answer.choices[0].message.content == wanted
        content = ""
        for chunk in client.chat.completions.create(model=MODEL, messages=[user(QUESTION)], temperature=0, stream=True):
            content += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert content == ANSWER

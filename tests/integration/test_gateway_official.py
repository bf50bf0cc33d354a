"""The official clients, unmodified, through a worker to the simulated engine."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from simulator.answers import chat_layout, content_text, reasoning_text

from tests.support import gateway, simulator
from tests.support.simulator import Simulator
from tests.support.worker import KEY, MODEL, WorkerProcess, running_worker

TOKENS = 40
LAYOUT = chat_layout(TOKENS, "stop")
TEXT, THOUGHT = content_text(LAYOUT.content), reasoning_text(LAYOUT.reasoning)
QUESTION: Any = [{"role": "user", "content": "What now?"}]
SIM: Any = {"sim_output_tokens": TOKENS}


@pytest.fixture(scope="module")
def engine() -> Iterator[Simulator]:
    with simulator.started() as running:
        yield running


@pytest.fixture(scope="module")
def _worker(tmp_path_factory: pytest.TempPathFactory, engine: Simulator) -> Iterator[WorkerProcess]:
    with running_worker(
        tmp_path_factory.mktemp("official"),
        first_token_seconds=0.5,
        idle_seconds=0.5,
        total_seconds=2,
        queue_requests=0,
    ) as running:
        yield running


@pytest.fixture
def worker(_worker: WorkerProcess, engine: Simulator) -> Iterator[WorkerProcess]:
    _worker.serve(engine.address)
    yield _worker
    engine.reset()
    gateway.settled(_worker)


@pytest.fixture
def client(worker: WorkerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{worker.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def claude(worker: WorkerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=worker.url, api_key=KEY, max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body=SIM)
    message = answer.choices[0].message
    assert (message.content, (message.model_extra or {})["reasoning"]) == (TEXT, THOUGHT)
    assert answer.usage
    assert answer.usage.completion_tokens == TOKENS


@pytest.mark.parametrize("asked", [False, True])
def test_chat_streamed(client: openai.OpenAI, asked: bool) -> None:
    more: Any = {"stream_options": {"include_usage": True}} if asked else {}
    chunks = list(client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, extra_body=SIM, **more))
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert [usage.completion_tokens for usage in usages] == ([TOKENS] if asked else [])
    assert all(chunk.choices for chunk in chunks) != asked


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=TOKENS, extra_body=SIM)
    assert answer.choices[0].text == content_text(TOKENS)
    stream = client.completions.create(model=MODEL, prompt="x", max_tokens=TOKENS, stream=True, extra_body=SIM)
    assert "".join(chunk.choices[0].text for chunk in stream) == content_text(TOKENS)


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="x", extra_body=SIM)
    assert answer.output_text == TEXT
    assert answer.usage
    assert answer.usage.output_tokens == TOKENS
    events = list(client.responses.create(model=MODEL, input="x", stream=True, extra_body=SIM))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT


def test_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model=MODEL, max_tokens=50, messages=QUESTION, extra_body=SIM)
    assert [block.text for block in answer.content if block.type == "text"] == [TEXT]
    assert answer.usage.output_tokens == TOKENS
    with claude.messages.stream(model=MODEL, max_tokens=50, messages=QUESTION, extra_body=SIM) as stream:
        assert "".join(stream.text_stream) == TEXT
        assert stream.get_final_message().stop_reason == "end_turn"
    assert claude.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens > 0


def test_bearer_serves_anthropic_and_x_api_key_serves_openai(worker: WorkerProcess) -> None:
    with anthropic.Anthropic(base_url=worker.url, auth_token=KEY, api_key=None, max_retries=0) as made:
        assert made.messages.create(model=MODEL, max_tokens=50, messages=QUESTION, extra_body=SIM).content
    headers: Any = {"Authorization": openai.Omit(), "x-api-key": KEY}
    with openai.OpenAI(base_url=f"{worker.url}/v1", api_key="-", max_retries=0) as other:
        assert other.models.list(extra_headers=headers).data


def test_errors_are_of_their_types(worker: WorkerProcess, engine: Simulator, client: openai.OpenAI) -> None:
    def raised(kind: type[openai.APIStatusError], code: str, made: openai.OpenAI = client, **more: Any) -> None:
        arguments = {"model": MODEL, "messages": QUESTION} | more
        with pytest.raises(kind) as caught:
            made.chat.completions.create(**arguments)
        assert caught.value.code == code
        assert caught.value.request_id

    raised(openai.AuthenticationError, "invalid_key", client.with_options(api_key="wrong"))
    raised(openai.NotFoundError, "model_not_found", model="gpt-6")
    raised(openai.BadRequestError, "unsupported_field", extra_body={"vllm_xargs": {}})
    raised(openai.BadRequestError, "400", max_tokens=-1)
    engine.misbehave("status", status=429, requests=1)
    raised(openai.RateLimitError, "429")
    engine.misbehave("status", status=500, requests=1)
    raised(openai.InternalServerError, "engine_protocol")
    engine.misbehave("silent", requests=1)
    raised(openai.InternalServerError, "first_token_timeout", stream=True)
    worker.serve()
    raised(openai.InternalServerError, "no_ready_engine")


def test_anthropics_errors_are_of_their_types(
    worker: WorkerProcess, engine: Simulator, claude: anthropic.Anthropic
) -> None:
    def raised(
        kind: type[anthropic.APIStatusError], said: str, made: anthropic.Anthropic = claude, **more: Any
    ) -> None:
        arguments = {"model": MODEL, "messages": QUESTION, "max_tokens": 50} | more
        with pytest.raises(kind) as caught:
            made.messages.create(**arguments)
        body: Any = caught.value.body
        assert (body["type"], body["error"]["type"]) == ("error", said)
        assert body["request_id"]

    raised(anthropic.AuthenticationError, "authentication_error", claude.with_options(api_key="wrong"))
    raised(anthropic.NotFoundError, "not_found_error", model="gpt-6")
    raised(anthropic.BadRequestError, "invalid_request_error", extra_body={"stream": "yes"})
    raised(anthropic.BadRequestError, "invalid_request_error", max_tokens=-1)
    engine.misbehave("status", status=500, requests=1)
    raised(anthropic.InternalServerError, "api_error")
    worker.serve()
    raised(anthropic.InternalServerError, "overloaded_error")


def test_a_stream_that_breaks_raises_in_both_clients(
    engine: Simulator, client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    def broken() -> None:
        engine.misbehave("cut", point="event", after_events=6, requests=1)

    broken()
    with pytest.raises(openai.APIError, match="connection to the engine was lost"):
        list(client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, extra_body=SIM))
    broken()
    with pytest.raises(openai.APIError, match="connection to the engine was lost"):
        list(client.completions.create(model=MODEL, prompt="x", max_tokens=50, stream=True, extra_body=SIM))
    broken()
    events = list(client.responses.create(model=MODEL, input="x", stream=True, extra_body=SIM))
    assert events[-1].type == "response.failed"
    broken()
    with pytest.raises(anthropic.APIStatusError, match="connection to the engine was lost"):
        list(claude.messages.create(model=MODEL, max_tokens=50, messages=QUESTION, stream=True, extra_body=SIM))


def test_clients_retry_what_may_be_retried_and_nothing_else(worker: WorkerProcess, engine: Simulator) -> None:
    with openai.OpenAI(base_url=f"{worker.url}/v1", api_key=KEY, max_retries=2) as made:
        engine.misbehave("status", status=500, requests=1)
        assert made.chat.completions.create(model=MODEL, messages=QUESTION, extra_body=SIM).choices[0].message.content
        engine.misbehave("silent", requests=3)
        seen = engine.state()["requests_seen"]
        with pytest.raises(openai.InternalServerError):
            made.chat.completions.create(model=MODEL, messages=QUESTION, stream=True)
        assert engine.state()["requests_seen"] == seen + 1


def test_leaving_a_clients_stream(worker: WorkerProcess, tmp_path: Path) -> None:
    with (
        simulator.started("--decode-step-ms", "5") as slow,
        openai.OpenAI(base_url=f"{worker.url}/v1", api_key=KEY, max_retries=0) as made,
    ):
        worker.serve(slow.address)
        body: Any = {"sim_output_tokens": 300}
        with made.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, extra_body=body) as stream:
            next(stream)
        slow.wait_for(lambda state: state["aborts"] == 1 and not state["running"], seconds=0.5)
        impatient = made.with_options(timeout=httpx.Timeout(5, read=0.2))
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(model=MODEL, messages=QUESTION, extra_body=body)
        slow.wait_for(lambda state: state["aborts"] == 2 and not state["running"], seconds=0.5)


def test_many_at_once(client: openai.OpenAI) -> None:
    wrong: list[object] = []

    def ask(number: int) -> None:
        body: Any = {"sim_output_tokens": number}
        stream = client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, extra_body=body)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        if text != content_text(chat_layout(number, "stop").content):
            wrong.append((number, text))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 33)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

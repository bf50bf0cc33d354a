"""What the access log says a request used, against the engine's own log."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from simulator.answers import chat_layout

from tests.support import client, gateway, simulator
from tests.support.gateway import APIS, record_of
from tests.support.simulator import Simulator
from tests.support.worker import WorkerProcess, running_worker

TOKENS = 40
ENDLESS = 4000
PARAMETERS = {"type": "object", "properties": {"usage": {"type": "object", "properties": {}}}}
TOOL = {
    "chat": {
        "tools": [{"type": "function", "function": {"name": "get", "parameters": PARAMETERS}}],
        "tool_choice": {"type": "function", "function": {"name": "get"}},
    },
    "responses": {
        "tools": [{"type": "function", "name": "get", "parameters": PARAMETERS}],
        "tool_choice": {"type": "function", "name": "get"},
    },
    "messages": {
        "tools": [{"name": "get", "input_schema": PARAMETERS}],
        "tool_choice": {"type": "tool", "name": "get"},
    },
}
SPECIAL: dict[str, dict[str, Any]] = {
    "tool": {},
    "several": {"n": 3},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "usage asked": {"stream_options": {"include_usage": True}},
    "usage all along": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}
_ids = itertools.count()


@dataclass
class Stage:
    worker: WorkerProcess
    quick: Simulator
    slow: Simulator  # 15 ms a token

    def request(self, api: str, **more: Any) -> tuple[str, bytes]:
        name = f"usage-{next(_ids)}"
        return name, gateway.request(api, headers={"x-request-id": name}, **more)

    def records(self, engine: Simulator, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ours, with the defaults it leaves out, and the engine's."""
        tokens = {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "reasoning_tokens": 0}
        ours = tokens | {"estimated": False} | record_of(self.worker, name)
        theirs: list[dict[str, Any]] = []

        def there() -> bool:
            theirs[:] = [record for record in engine.log() if record["x-request-id"] == name]
            return bool(theirs)

        gateway.wait_until(there, what=f"the engine's record of {name}")
        return ours, theirs[-1]


@pytest.fixture(scope="module")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder: Path = tmp_path_factory.mktemp("usage")
    with (
        simulator.started("--enable-prompt-tokens-details", log=folder / "quick.jsonl") as quick,
        simulator.started("--decode-step-ms", "15", log=folder / "slow.jsonl") as slow,
        running_worker(folder, harmony=True, idle_seconds=1, client_stalled_seconds=1.5) as worker,
    ):
        yield Stage(worker, quick, slow)


@pytest.fixture
def stage(_stage: Stage) -> Iterator[Stage]:
    yield _stage
    gateway.settled(_stage.worker)
    _stage.quick.reset()
    _stage.slow.reset()


def within(counted: int, generated: int) -> bool:
    """As near as is promised: 8 tokens, or 2 %."""
    return bool(abs(counted - generated) <= max(8, generated * 0.02))


def special(api: str, what: str) -> dict[str, Any]:
    more = TOOL[api] if what == "tool" else SPECIAL[what]
    return {"logprobs": 2} if what == "logprobs" and api == "completions" else more


KINDS = [
    *((api, "", stream) for api in APIS for stream in (False, True)),
    *((api, "tool", stream) for api in TOOL for stream in (False, True)),
    *((api, what, stream) for api in ("chat", "completions") for what in ("several", "logprobs") for stream in (0, 1)),
    *((api, what, True) for api in ("chat", "completions") for what in ("usage asked", "usage all along")),
]


@pytest.mark.parametrize(("api", "what", "stream"), KINDS)
def test_finished(stage: Stage, api: str, what: str, stream: bool) -> None:
    """To the token, with cached and reasoning ones told apart."""
    stage.worker.serve(stage.quick.address)
    more = special(api, what) if what else {}
    prompt = {"chat": "messages", "messages": "messages", "completions": "prompt", "responses": "input"}[api]
    text = f"{api} {what} {stream} " + "Tell me more. " * 200
    more = more | {prompt: [{"role": "user", "content": text}] if prompt == "messages" else text}
    for cached in (False, True):
        name, data = stage.request(api, stream=bool(stream), tokens=TOKENS, **more)
        answer = gateway.ask(stage.worker, data)
        assert answer.status == 200
        if stream and api in ("chat", "completions"):
            assert (b'"usage":{' in answer.body) == what.startswith("usage")
        ours, theirs = stage.records(stage.quick, name)
        assert (ours["outcome"], theirs["outcome"]) == ("ok", "finished")
        for field in ("prompt_tokens", "cached_tokens", "completion_tokens"):
            assert ours[field] == theirs[field], field
        assert bool(ours["cached_tokens"]) == cached
        reasoning = chat_layout(TOKENS, "stop").reasoning if api in ("chat", "responses") else 0
        assert ours["reasoning_tokens"] == reasoning * more.get("n", 1)
        assert not ours["estimated"]


@pytest.mark.parametrize("api", APIS)
def test_a_large_plain_answer(stage: Stage, api: str) -> None:
    """Relayed while it comes; its usage is in its last bytes, wherever the reads cut them."""
    stage.worker.serve(stage.quick.address)
    name, data = stage.request(api, tokens=125_000, max_tokens=130_000, sim_prompt_tokens=10)
    answer = gateway.ask(stage.worker, data, 20)
    assert len(answer.body) > 1 << 20
    ours, theirs = stage.records(stage.quick, name)
    assert (ours["prompt_tokens"], ours["completion_tokens"]) == (10, theirs["completion_tokens"])
    assert not ours["estimated"]


def leave_after(stage: Stage, api: str, events: int, **more: Any) -> str:
    """A stream whose client leaves after so many events."""
    name, data = stage.request(api, stream=True, tokens=ENDLESS, **more)
    wire, _, stream = gateway.start_stream(stage.worker, data)
    for _ in range(events):
        next(stream)
    wire.close()
    return name


ABANDONED = [
    *((api, "") for api in APIS),
    *((api, "tool") for api in TOOL),
    *((api, what) for api in ("chat", "completions") for what in ("several", "logprobs", "usage all along")),
]


@pytest.mark.parametrize(("api", "what"), ABANDONED)
def test_clients_that_leave_a_stream(stage: Stage, api: str, what: str) -> None:
    """Within 8 tokens or 2 %, in reasoning, behind it, and far behind it."""
    stage.worker.serve(stage.slow.address)
    more = special(api, what) if what else {}
    with ThreadPoolExecutor(5) as pool:
        names = list(pool.map(lambda n: leave_after(stage, api, n, **more), (1, 6, 14, 30, 90)))
    for name in names:
        ours, theirs = stage.records(stage.slow, name)
        assert (ours["outcome"], theirs["outcome"]) == ("client_gone", "aborted")
        generated = theirs["completion_tokens"]
        assert within(ours["completion_tokens"], generated), (ours["completion_tokens"], generated)
        assert ours["completion_tokens"] > 0
        assert ours["prompt_tokens"] > 0
        assert ours["estimated"]


@pytest.mark.parametrize("kind", ["cut", "reset", "stream_error", "stall"])
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_engines_that_fail_in_the_middle(stage: Stage, api: str, kind: str) -> None:
    stage.worker.serve(stage.slow.address)
    place = {"point": "chunk"} if kind in ("cut", "reset") else {}
    stage.slow.misbehave(kind, after_events=40, requests=1, **place)
    name, data = stage.request(api, stream=True, tokens=ENDLESS)
    assert gateway.ask(stage.worker, data).status == 200
    ours, theirs = stage.records(stage.slow, name)
    assert ours["outcome"] in ("cut", "engine_error")
    assert within(ours["completion_tokens"], theirs["completion_tokens"])
    assert ours["prompt_tokens"] > 0
    assert ours["estimated"]


@pytest.mark.parametrize("api", APIS)
def test_clients_that_leave_a_plain_request(stage: Stage, api: str) -> None:
    """Nobody saw a token: the time says how many there may be."""
    stage.worker.serve(stage.slow.address)
    name, data = stage.request(api, tokens=ENDLESS)
    before = stage.slow.state()["generation_tokens"]
    with client.connect(stage.worker.url) as wire:
        wire.send(data)
        stage.slow.wait_for(lambda state: state["generation_tokens"] >= before + 60)
    ours, theirs = stage.records(stage.slow, name)
    assert theirs["outcome"] == "aborted"
    assert ours["completion_tokens"] > 0
    assert ours["prompt_tokens"] > 0
    assert ours["estimated"]


@pytest.mark.parametrize("api", APIS)
def test_a_prompt_that_was_never_answered(stage: Stage, api: str) -> None:
    """A stream left before its first token: its prompt counts, by the bytes that a token has."""
    stage.worker.serve(stage.slow.address)
    stage.slow.misbehave("silent", requests=1)
    field = {"chat": "messages", "messages": "messages", "completions": "prompt", "responses": "input"}[api]
    text = "Word " * 2000
    name, data = stage.request(
        api, stream=True, **{field: [{"role": "user", "content": text}] if field == "messages" else text}
    )
    seen = stage.slow.state()["requests_seen"]
    with client.connect(stage.worker.url) as wire:
        wire.send(data)
        stage.slow.wait_for(lambda state: state["requests_seen"] > seen)
    ours = record_of(stage.worker, name)
    assert ours["estimated"]
    assert ours["prompt_tokens"] == pytest.approx(len(text) / 4, rel=0.3)
    assert "completion_tokens" not in ours


@pytest.mark.parametrize("api", APIS)
def test_what_no_engine_worked_for(stage: Stage, api: str) -> None:
    """Refused by the engine, by us, or never asked: nothing used, nothing estimated."""
    stage.worker.serve(stage.quick.address)
    names = []
    for more in ({"tokens": 3, "sim_prompt_tokens": 10_000_000}, {"chat_template": "x"}):
        name, data = stage.request(api, **more)
        assert gateway.ask(stage.worker, data).status == 400
        names.append(name)
    stage.quick.misbehave("status", status=503, requests=3)
    name, data = stage.request(api)
    assert gateway.ask(stage.worker, data).status == 503
    stage.worker.serve()
    names += [name, *[stage.request(api)[0]]]
    last = gateway.request(api, headers={"x-request-id": names[-1]})
    assert gateway.ask(stage.worker, last).status == 503
    for name in names:
        record = record_of(stage.worker, name)
        assert not {"prompt_tokens", "completion_tokens", "estimated"} & record.keys(), record

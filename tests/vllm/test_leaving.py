"""A client that leaves frees the engine at once. vLLM's counter of aborts does not move then (seen, and held on to
here): what shows an abort is that nothing runs any more and no further token is made."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import client, engines
from tests.support.engines import Stack, until

MODEL = "gpt-oss-tiny"
FREED_SECONDS = 0.2
# One look at /metrics of both engines on a busy machine; the looks themselves must not decide.
LOOK_SECONDS = 0.3
LONG: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": MODEL, "messages": [{"role": "user", "content": "Count to two hundred."}], "temperature": 0,
        "min_tokens": 3000, "max_tokens": 3000,
    },
    "/v1/completions": {
        "model": MODEL, "prompt": "The capital of France is", "max_tokens": 3000, "ignore_eos": True,
    },
    "/v1/responses": {"model": MODEL, "input": "Count to two hundred.", "temperature": 0, "ignore_eos": True},
    "/v1/messages": {
        "model": MODEL, "messages": [{"role": "user", "content": "Count to two hundred."}], "max_tokens": 3000,
        "temperature": 0,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(pair: Stack) -> Iterator[None]:
    pair.idle()
    yield
    pair.idle()


def post(tree: Stack, path: str, body: dict[str, Any]) -> client.Wire:
    host, port = tree.address
    wire = client.connect(f"http://{host}:{port}")
    wire.send(client.post(path, body, headers={"Authorization": f"Bearer {tree.key}"}))
    return wire


def freed(tree: Stack, aborted: float) -> None:
    left = time.monotonic()
    until(lambda: tree.total(engines.Engine.running) == 0, FREED_SECONDS + LOOK_SECONDS, "the engine freed", every=0.01)
    generated = tree.total(engines.Engine.generated)
    time.sleep(max(0.0, 0.5 - (time.monotonic() - left)))  # time in which a request that runs on would show
    assert tree.total(engines.Engine.generated) == generated, "tokens are still made for a client that has left"
    assert tree.total(engines.Engine.aborted) == aborted
    until(lambda: tree.metrics()["vitalis_in_flight"] == 0, 2, "the slot came back")


@pytest.mark.parametrize("path", LONG)
def test_streamed(pair: Stack, path: str) -> None:
    aborted = pair.total(engines.Engine.aborted)
    with post(pair, path, LONG[path] | {"stream": True}) as wire:
        head = wire.read_head()
        assert head.status == 200
        next(wire.events(head))
        assert pair.total(engines.Engine.running) == 1
    freed(pair, aborted)


@pytest.mark.parametrize("path", LONG)
def test_not_streamed(pair: Stack, path: str) -> None:
    aborted = pair.total(engines.Engine.aborted)
    with post(pair, path, LONG[path]):
        until(lambda: pair.total(engines.Engine.running) == 1, 10, "the request runs")
    freed(pair, aborted)


def test_one_leaves_and_the_others_are_answered(pair: Stack) -> None:
    answers: list[int] = []

    def stay() -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Count to two hundred."}], "temperature": 0}
        with pair.http() as http:
            said = http.post("/v1/chat/completions", json=body)
            answers.append(said.status_code)
            assert said.json()["choices"][0]["message"]["content"].endswith(" 199 200")

    others = [threading.Thread(target=stay) for _ in range(4)]
    for thread in others:
        thread.start()
    for path in LONG:
        with post(pair, path, LONG[path] | {"stream": True}) as wire:
            next(wire.events(wire.read_head()))
    for thread in others:
        thread.join()
    assert answers == [200] * 4
    until(lambda: pair.metrics()["vitalis_open_contexts"] == 0, 2, "no context left")


def test_the_official_client_leaves(pair: Stack) -> None:
    aborted = pair.total(engines.Engine.aborted)
    stream = pair.openai().completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    freed(pair, aborted)

"""A client that leaves frees the engine at once. vLLM's counter of aborts does not move then (seen, and held on to
here): what shows an abort is that nothing runs any more and no further token is made."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support import client, engines
from tests.support.engines import Stack, until

pytestmark = pytest.mark.filterwarnings("default::pytest.PytestWarning")

MODEL = "gpt-oss-tiny"
FREED_SECONDS = 0.2
# A shared machine stands still for longer than that now and then; it does not do so each time a client leaves.
ATTEMPTS = 3
COUNTED_SECONDS = 10
LONG: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": MODEL, "messages": [{"role": "user", "content": "Count to two hundred."}], "temperature": 0,
        "min_tokens": 3000, "max_tokens": 3000,
    },
    "/v1/completions": {
        "model": MODEL, "prompt": "The capital of France is", "max_tokens": 3000, "ignore_eos": True,
    },
    "/v1/responses": {"model": MODEL, "input": "Count to two hundred.", "temperature": 0},
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


@dataclass
class Left:
    """What one attempt showed: `in_time`, or why not."""

    in_time: bool
    seen: str


def freed(tree: Stack, aborted: float) -> Left:
    """Whether the engine was free in time: as the last look at its metrics says that was begun in time. That it became
    free and made no further token is asserted."""
    left = begun = time.monotonic()
    while tree.total(engines.Engine.running):
        assert time.monotonic() < left + COUNTED_SECONDS, "the engine is not freed"
        begun = time.monotonic()
    in_time = begun - left <= FREED_SECONDS
    generated = tree.total(engines.Engine.generated)
    time.sleep(max(0.0, 0.5 - (time.monotonic() - left)))  # time in which a request that runs on would show
    assert tree.total(engines.Engine.generated) == generated, "tokens are still made for a client that has left"
    assert tree.total(engines.Engine.aborted) == aborted
    until(lambda: tree.metrics()["vitalis_in_flight"] == 0, 2, "the slot came back")
    return Left(in_time, f"a look begun {begun - left:.2f} s after the client left still saw it run")


def not_counted(tree: Stack) -> str:
    """Empty once the engines count one running request, else what every look saw: when, and running and made tokens
    by engine."""
    begun = time.monotonic()
    looks: list[str] = []

    def counted() -> bool:
        metrics = [engine.metrics() for engine in tree.engines()]
        running = [m["vllm:num_requests_running"] for m in metrics]
        made = [m["vllm:generation_tokens_total"] for m in metrics]
        looks.append(f"{time.monotonic() - begun:.2f} s: {running}, {made}")
        return sum(running) == 1

    try:
        until(counted, COUNTED_SECONDS, "the request runs")
    except AssertionError as late:
        return f"{late}; {len(looks)} looks: {'; '.join(looks[:4] + looks[-2:])}\n{tree.log()}"
    return ""


def leave_streamed(tree: Stack, path: str) -> Left:
    aborted = tree.total(engines.Engine.aborted)
    with post(tree, path, LONG[path] | {"stream": True}) as wire:
        head = wire.read_head()
        assert head.status == 200
        first = next(wire.events(head))
        if why := not_counted(tree):
            return Left(False, f"{first.raw!r}, then {wire.read_some()[-600:]!r}; {why}")
    return freed(tree, aborted)


def leave_not_streamed(tree: Stack, path: str) -> Left:
    aborted = tree.total(engines.Engine.aborted)
    with post(tree, path, LONG[path]):
        if why := not_counted(tree):
            return Left(False, why)
    return freed(tree, aborted)


def in_time_once(tree: Stack, leave: Callable[[], Left]) -> None:
    """Up to ATTEMPTS times. What the attempts before showed is a warning, so that it is seen."""
    seen = []
    for _ in range(ATTEMPTS):
        left = leave()
        if left.in_time:
            break
        seen.append(left.seen)
        tree.idle()
    assert len(seen) < ATTEMPTS, "\n".join(seen)
    if seen:
        warnings.warn(pytest.PytestWarning("\n".join(seen)), stacklevel=2)


@pytest.mark.parametrize("path", LONG)
def test_streamed(pair: Stack, path: str) -> None:
    in_time_once(pair, lambda: leave_streamed(pair, path))


@pytest.mark.parametrize("path", LONG)
def test_not_streamed(pair: Stack, path: str) -> None:
    in_time_once(pair, lambda: leave_not_streamed(pair, path))


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


def leave_with_the_official_client(tree: Stack) -> Left:
    aborted = tree.total(engines.Engine.aborted)
    stream = tree.openai().completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    why = not_counted(tree)
    stream.close()
    return Left(False, why) if why else freed(tree, aborted)


def test_the_official_client_leaves(pair: Stack) -> None:
    in_time_once(pair, lambda: leave_with_the_official_client(pair))

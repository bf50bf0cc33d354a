"""What is found out before anything is measured, against a real listener: who is there, which key and model, what the
scenario asks for; and how a model counts words."""

import socket
import threading

import pytest
from vitalis_load import engine_options, preflight, scenario
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.target import Target

from tests.support import simulator

CHAT = scenario.load("short-chat", scale="small")


def target(url: str, **fields: object) -> Target:
    return Target(url=url, **fields)  # type: ignore[arg-type]


def refused(given: Target, asked: scenario.Scenario = CHAT) -> str:
    with pytest.raises(LoadFailure) as raised:
        preflight.check(given, asked)
    assert raised.value.code == Exit.NO_TARGET
    return raised.value.message


def test_the_first_model_is_asked_for_unless_one_is_named() -> None:
    said: list[str] = []
    with simulator.started("--served-model-name", "big", "small") as engine:
        assert preflight.check(target(engine.address), CHAT, said.append).model == "big"
        assert preflight.check(target(engine.address, model="small"), CHAT).model == "small"
        assert "did you mean small?" in refused(target(engine.address, model="smal"))
        assert "it serves big, small" in refused(target(engine.address, model="gpt-oss-20b"))
    assert said == ["the server has big, small; asking for big (--model names another)"]


def test_keys_are_tried() -> None:
    neighbours = scenario.load("noisy-neighbour", scale="small")
    label = next(label for label in neighbours.labels if label)
    with simulator.started("--api-key", "right") as engine:
        assert preflight.check(target(engine.address, keys={"": "right"}), CHAT).model
        assert "refuses the key (401" in refused(target(engine.address, keys={"": "wrong"}))
        assert "refuses a request without a key (401" in refused(target(engine.address))
        keys = {"": "right", label: "wrong"}
        assert f"refuses the key of {label} (401" in refused(target(engine.address, keys=keys), neighbours)


def test_who_is_not_there_is_said() -> None:
    assert refused(target("http://127.0.0.1:1")).startswith(
        "nothing answers at http://127.0.0.1:1 (connection refused)"
    )
    with simulator.started() as engine:
        engine.misbehave("garbage", point="head")
        engine.misbehave("unhealthy")
        assert preflight.check(target(engine.address), CHAT).model  # rules are about requests for generation


def test_an_engine_that_is_asked_directly_tells_of_itself() -> None:
    said: list[str] = []
    with simulator.started("--kv-cache-tokens", "50000") as engine:
        given = preflight.watched(target(engine.address), said.append)
        assert given.engines == {"engine": engine.address}
        assert not given.gateway
        told = engine_options.told(engine.address, None)
        assert told["kv_cache_size_tokens"] == 50_000
        assert told["block_size"] == 16
        named = target(engine.address, engines={"e0": engine.address})
        assert preflight.watched(named, said.append) is named
    assert said == []


def test_a_server_that_tells_nothing_of_itself_is_named() -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=answer_once, args=(listener,))
        thread.start()
        assert preflight.watched(target(address), said.append).engines == {}
        thread.join()
    assert "--engine NAME=ADDRESS" in said[0]


def answer_once(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


def test_an_engines_options_are_read_off_its_command_line() -> None:
    words = "python -m vllm.entrypoints.openai.api_server --model m --max-num-seqs 32 --enforce-eager --api-key secret"
    assert engine_options.given([*words.split(), "--gpu-memory-utilization=0.9", "--served-model-name", "a", "b"]) == {
        "model": "m", "max-num-seqs": 32, "enforce-eager": True, "gpu-memory-utilization": 0.9,
        "served-model-name": "a b",
    }  # fmt: skip


def test_warming_up_learns_how_the_model_counts_words() -> None:
    with simulator.started() as engine:
        given = preflight.check(target(engine.address), CHAT)
        plan = CHAT.plan(1, salt="warm", model=given.model)
        found = preflight.warm(given, CHAT, plan, lambda _: None)
        asked = engine.state()["requests_seen"]
    assert asked == len(plan.probes()) + len(CHAT.tasks)
    assert 0.3 < found.per_word < 8
    assert (found.per_word, found.overhead) != (plan.tokenisation.per_word, plan.tokenisation.overhead)


def test_what_the_server_refuses_of_the_scenario_is_said() -> None:
    with simulator.started("--max-model-len", "24") as engine:
        given = preflight.check(target(engine.address), CHAT)
        with pytest.raises(LoadFailure, match="refuses task chat with 400: .*maximum context length") as raised:
            preflight.warm(given, CHAT, CHAT.plan(1, model=given.model), lambda _: None)
    assert raised.value.code == Exit.NO_TARGET


def test_a_server_that_is_busy_is_no_obstacle() -> None:
    with simulator.started() as engine:
        given = preflight.check(target(engine.address), CHAT)
        engine.misbehave("status", status=429, message="slow down")
        found = preflight.warm(given, CHAT, CHAT.plan(1, model=given.model), lambda _: None)
    assert found.per_word > 0

"""What goes over the wire: heads, framing, errors, small routes, the end of a connection, the log."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from simulator.answers import chat_layout, content_text

from tests.support import client, simulator
from tests.support.simulator import Simulator

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What now?"}]
HUGE = {"messages": QUESTION, "sim_output_tokens": 100_000}


def chat(**fields: Any) -> bytes:
    return client.post(CHAT, {"messages": QUESTION, "sim_output_tokens": 40, **fields})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with simulator.started(log=tmp_path_factory.mktemp("simulator") / "log.jsonl") as running:
        yield running


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """Ten milliseconds a token, on a Unix socket."""
    folder = tmp_path_factory.mktemp("slow")
    flags = ("--decode-step-ms", "10", "--max-num-seqs", "2", "--max-num-queued-reqs", "4")
    with simulator.started(*flags, uds=folder / "engine.sock", log=folder / "log.jsonl") as running:
        yield running


def test_the_stream_is_chunked_one_event_a_chunk(engine: Simulator) -> None:
    with client.connect(engine.address) as wire:
        wire.send(chat(stream=True))
        head = wire.read_head()
        chunks = list(wire.chunks())
    assert head.status == 200
    assert head.chunked
    assert head.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert all(piece.startswith(b"data: ") and piece.endswith(b"\n\n") for piece in chunks)
    assert chunks[-1] == b"data: [DONE]\n\n"
    layout = chat_layout(40, "stop")
    # a role, the reasoning, the content, the finish, [DONE]: hidden tokens make no event
    assert len(chunks) == 1 + layout.reasoning + layout.content + 2


def test_usage_grows_with_every_event_and_counts_hidden_tokens(engine: Simulator) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = client.ask(engine.address, chat(stream=True, stream_options=options)).events
    counts = [event.json["usage"]["completion_tokens"] for event in events[:-1]]
    assert counts[:3] == [0, 4, 5]
    assert counts == sorted(counts)
    assert counts[-1] == 40


def test_continuous_usage_does_nothing_alone(engine: Simulator) -> None:
    events = client.ask(engine.address, chat(stream=True, stream_options={"continuous_usage_stats": True})).events
    assert not any("usage" in event.data for event in events)


def test_the_request_id_becomes_the_answers(engine: Simulator) -> None:
    answer = client.ask(engine.address, client.post(CHAT, {"messages": QUESTION}, {"X-Request-Id": "my-id"}))
    assert answer.json["id"] == "chatcmpl-my-id"


def test_a_connection_is_kept_and_requests_may_be_pipelined(engine: Simulator) -> None:
    before = engine.state()["connections_opened"]
    with client.connect(engine.address) as wire:
        wire.send(chat() + chat(stream=True) + client.get("/health"))
        assert wire.read_response().json["usage"]["completion_tokens"] == 40
        assert wire.read_response().events[-1].data == "[DONE]"
        assert wire.read_response().status == 200
        wire.send(client.request("GET", "/health", headers={"connection": "close"}))
        assert wire.read_response().head.headers["connection"] == "close"
        assert wire.read_to_end() == b""
    assert engine.state()["connections_opened"] == before + 1


@pytest.mark.parametrize(
    ("path", "document", "status", "words"),
    [
        (CHAT, b"{nonsense", 400, "JSON decode error"),
        (CHAT, b"[]", 400, "valid dictionary"),
        (CHAT, {"messages": QUESTION, "model": "other"}, 404, "gpt-oss-20b"),
        (CHAT, {"messages": QUESTION, "max_tokens": -1}, 400, "max_tokens must be at least 1, got -1"),
        (CHAT, {}, 400, "Field required"),
        (CHAT, {"messages": QUESTION, "sim_prompt_tokens": 200_000}, 400, "length of the input messages"),
        (CHAT, {"messages": QUESTION, "cache_salt": ""}, 400, "cache_salt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 200_000}, 400, "length of the input prompt"),
        ("/v1/messages", {"messages": QUESTION, "max_tokens": 5}, 400, "Field required"),
    ],
)
def test_errors(engine: Simulator, path: str, document: Any, status: int, words: str) -> None:
    answer = client.ask(engine.address, client.post(path, document))
    assert answer.status == status
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert words in error["message"]


def test_max_tokens_beyond_the_context_is_clamped_on_chat(engine: Simulator) -> None:
    assert client.ask(engine.address, chat(max_tokens=10_000_000)).status == 200


def test_unknown_route_and_wrong_method(engine: Simulator) -> None:
    lost = client.ask(engine.address, client.get("/nothing"))
    assert (lost.status, lost.json) == (404, {"detail": "Not Found"})
    wrong = client.ask(engine.address, client.get(CHAT))
    assert (wrong.status, wrong.json) == (405, {"detail": "Method Not Allowed"})


def test_tokenize_and_back(engine: Simulator) -> None:
    tokens = client.ask(engine.address, client.post("/tokenize", {"prompt": "to be or not"})).json
    assert tokens["count"] == 3
    back = client.ask(engine.address, client.post("/detokenize", {"tokens": tokens["tokens"]})).json
    assert back == {"prompt": "to be or not"}


def test_small_routes(engine: Simulator) -> None:
    assert client.ask(engine.address, client.get("/version")).json == {"version": "0.32.0"}
    assert client.ask(engine.address, client.get("/load")).json == {"server_load": 0}
    assert client.ask(engine.address, client.get("/health")).body == b""


def test_metrics_count_what_was_served(engine: Simulator) -> None:
    before = engine.metrics()
    client.ask(engine.address, chat())
    after = engine.metrics()
    labels = '{engine="0",model_name="gpt-oss-20b"}'

    def grown(name: str) -> float:
        return after[f"vllm:{name}"] - before[f"vllm:{name}"]

    assert grown("generation_tokens_total" + labels) == 40
    assert grown("prompt_tokens_total" + labels) == len(json.dumps(QUESTION)) // 4
    assert grown("iteration_tokens_total_count" + labels) == 40
    assert grown("time_to_first_token_seconds_count" + labels) == 1
    assert grown('request_success_total{engine="0",model_name="gpt-oss-20b",finished_reason="stop"}') == 1
    assert after["vllm:num_requests_running" + labels] == 0
    assert any('kv_cache_size_tokens="400000"' in name for name in after if name.startswith("vllm:cache_config_info"))


def test_the_log_tells_each_request(engine: Simulator) -> None:
    already = len(engine.log())
    headers = {"X-Request-Id": "told", "X-Vllm-Priority": "-3", "X-Other": "secret"}
    client.ask(engine.address, client.post(CHAT, {"messages": QUESTION, "sim_output_tokens": 7}, headers))
    record = engine.wait_for_log(already + 1)[-1]
    assert record["outcome"] == "finished"
    assert record["completion_tokens"] == 7
    assert record["arrived"] <= record["scheduled"] <= record["first_token"] <= record["finished"]
    assert (record["x-request-id"], record["x-vllm-priority"]) == ("told", "-3")
    assert "x-other" in record["headers"]
    assert record["fields"] == ["messages", "sim_output_tokens"]
    assert "secret" not in json.dumps(record)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leave", ["close", "reset", "half_close"])
def test_a_client_that_leaves_frees_the_engine(slow: Simulator, stream: bool, leave: str) -> None:
    before, records = slow.state(), len(slow.log())
    with client.connect(slow.address) as wire:
        wire.send(client.post(CHAT, {**HUGE, "stream": stream}))
        slow.wait_for(lambda state: state["generation_tokens"] > before["generation_tokens"] + 2)
        getattr(wire, leave)()
        state = slow.wait_for(lambda state: state["running"] == 0)
    assert state["aborts"] == before["aborts"] + 1
    assert state["kv_blocks_used"] == 0
    record = slow.wait_for_log(records + 1)[-1]
    assert record["outcome"] == "aborted"
    assert record["completion_tokens"] == state["generation_tokens"] - before["generation_tokens"]
    assert slow.state()["generation_tokens"] == state["generation_tokens"]


def test_the_queue_is_bounded(slow: Simulator) -> None:
    with (
        client.connect(slow.address) as one,
        client.connect(slow.address) as two,
        client.connect(slow.address) as three,
        client.connect(slow.address) as four,
    ):
        for wire in (one, two, three, four):
            wire.send(client.post(CHAT, {**HUGE, "stream": True}))
        slow.wait_for(lambda state: (state["running"], state["waiting"]) == (2, 2))
        refused = client.ask(slow.address, chat(stream=True))
        assert refused.status == 503
        assert refused.json["error"]["type"] == "Service Unavailable"
        assert "retry-after" not in refused.head.headers
        # the head of a waiting stream is there before its first token
        assert three.read_head().status == 200
        assert three.is_quiet(0.05)
    slow.wait_for(lambda state: state["running"] + state["waiting"] == 0)


def test_priority_beats_the_order_of_arrival(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with simulator.started("--scheduling-policy", "priority", "--max-num-seqs", "1", log=log) as engine:
        engine.misbehave("freeze")
        wires = []
        for number, priority in enumerate((5, 0, 9, -1)):
            wire = client.connect(engine.address)
            headers = {"x-request-id": str(number), "x-vllm-priority": str(priority)}
            wire.send(client.post(CHAT, {"messages": QUESTION, "priority": 100}, headers))
            engine.wait_for(lambda state, seen=number + 1: state["waiting"] == seen)
            wires.append(wire)
        engine.reset()
        for wire in wires:
            assert wire.read_response().status == 200
            wire.close()
        assert [record["x-request-id"] for record in engine.wait_for_log(4)] == ["3", "1", "0", "2"]


def test_idle_connections_are_closed_in_time() -> None:
    with simulator.started("--keep-alive-seconds", "0.1") as engine, client.connect(engine.address) as wire:
        wire.send(client.get("/health"))
        assert wire.read_response().status == 200
        assert wire.read_to_end(2) == b""


def test_vllms_argv_is_understood() -> None:
    flags = ("serve", "openai/gpt-oss-20b", "--served-model-name", "a", "b", "--gpu-memory-utilization", "0.9")
    with simulator.started(*flags, "--enforce-eager", "--not-a-flag", "--lenient") as engine:
        models = client.ask(engine.address, client.get("/v1/models")).json["data"]
        assert [model["id"] for model in models] == ["a", "b"]


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(AssertionError, match="code 2"):
        simulator.start("--not-a-flag")


def test_the_answer_depends_on_the_prompt_alone(engine: Simulator) -> None:
    body = client.post("/v1/completions", {"prompt": "the same", "max_tokens": 5000})
    first, second = (client.ask(engine.address, body).json for _ in range(2))
    assert first["usage"] == second["usage"]
    assert first["choices"][0]["text"] == content_text(first["usage"]["completion_tokens"])


def test_one_started_by_somebody_else_can_be_commanded(slow: Simulator) -> None:
    assert slow.address.startswith("unix:")
    attached = simulator.attach(slow.address)
    attached.misbehave("status", status=429, requests=1)
    assert client.ask(slow.address, chat()).status == 429
    assert attached.state()["hits"]["status"] == 1
    attached.reset()

"""Each misbehaviour as a raw socket sees it."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve.gateway.harmony import failure, leak

from tests.support import client, simulator
from tests.support.client import Ended
from tests.support.simulator import Simulator

CHAT = "/v1/chat/completions"
PATHS = {
    CHAT: {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a", "max_tokens": 100},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "model": "gpt-oss-20b", "max_tokens": 100},
}


def ask(stream: bool = True, path: str = CHAT, **fields: Any) -> bytes:
    return client.post(path, {**PATHS[path], "sim_output_tokens": 40, "stream": stream, **fields})


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with simulator.started(log=tmp_path_factory.mktemp("simulator") / "log.jsonl") as engine:
        yield engine


@pytest.fixture
def engine(running: Simulator) -> Iterator[Simulator]:
    yield running
    running.reset()
    # whatever was done to it, it serves again and has nothing left over
    assert client.ask(running.address, ask()).events[-1].data == "[DONE]"
    running.wait_for(lambda state: state["running"] == 0)


@pytest.fixture
def wire(engine: Simulator) -> Iterator[client.Wire]:
    with client.connect(engine.address) as made:
        yield made


def test_an_unknown_kind_is_refused_by_name(engine: Simulator) -> None:
    with pytest.raises(AssertionError, match="no kind 'nap'"):
        engine.misbehave("nap")
    with pytest.raises(AssertionError, match="unknown field `secs`"):
        engine.misbehave("delay", secs=1)


def test_a_rule_strikes_as_often_as_it_says(engine: Simulator) -> None:
    engine.misbehave("status", status=503, message="no", requests=2, skip=1, path=CHAT)
    statuses = [client.ask(engine.address, ask(False)).status for _ in range(4)]
    assert statuses == [200, 503, 503, 200]
    assert client.ask(engine.address, ask(path="/v1/completions")).status == 200


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("stream", [True, False])
def test_status(engine: Simulator, status: int, stream: bool) -> None:
    engine.misbehave("status", status=status, retry_after="7", message="not now")
    answer = client.ask(engine.address, ask(stream))
    assert answer.status == status
    assert answer.json["error"]["message"] == "not now"
    assert answer.head.headers["retry-after"] == "7"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
def test_reset_before_any_byte(engine: Simulator, wire: client.Wire, stream: bool, path: str) -> None:
    engine.misbehave("reset")
    wire.send(ask(stream, path))
    with pytest.raises(ConnectionResetError):
        wire.read_to_end()
    assert wire.received == 0


@pytest.mark.parametrize("stream", [True, False])
def test_reset_after_the_head(engine: Simulator, wire: client.Wire, stream: bool) -> None:
    engine.misbehave("reset", point="after_head")
    wire.send(ask(stream))
    assert wire.read_head().status == 200
    with pytest.raises(ConnectionResetError):
        wire.read_to_end()


def test_reset_in_the_stream(engine: Simulator, wire: client.Wire) -> None:
    engine.misbehave("reset", point="boundary", after_events=3)
    wire.send(ask())
    events = wire.events(wire.read_head())
    assert [next(events).data[:1] for _ in range(3)] == ["{"] * 3
    with pytest.raises(ConnectionResetError):
        next(events)


@pytest.mark.parametrize("stream", [True, False])
def test_cut_in_the_head(engine: Simulator, wire: client.Wire, stream: bool) -> None:
    engine.misbehave("cut", point="head")
    wire.send(ask(stream))
    text = wire.read_to_end()
    assert text.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\n\r\n" not in text


@pytest.mark.parametrize("path", PATHS)
def test_cut_in_a_chunk(engine: Simulator, wire: client.Wire, path: str) -> None:
    engine.misbehave("cut", point="chunk", after_events=3)
    wire.send(ask(path=path))
    events = wire.events(wire.read_head())
    for _ in range(3):
        next(events)
    with pytest.raises(Ended) as caught:
        next(events)
    assert caught.value.rest
    record = engine.log()[-1]
    assert (record["outcome"], record["misbehaviour"], record["events"]) == ("error", "cut", 3)


@pytest.mark.parametrize("terminate", [True, False])
def test_cut_in_an_event(engine: Simulator, wire: client.Wire, terminate: bool) -> None:
    engine.misbehave("cut", point="event", after_events=2, terminate=terminate)
    wire.send(ask())
    wire.read_head()
    if terminate:
        pieces = list(wire.chunks())
    else:
        chunks = wire.chunks()
        pieces = [next(chunks) for _ in range(3)]
        with pytest.raises(Ended):
            next(chunks)
    assert len(pieces) == 3
    assert not pieces[-1].endswith(b"\n\n")


def test_cut_in_a_body(engine: Simulator, wire: client.Wire) -> None:
    engine.misbehave("cut")
    wire.send(ask(False))
    with pytest.raises(Ended):
        wire.read_response()


def test_half_close(engine: Simulator, wire: client.Wire) -> None:
    engine.misbehave("half_close", after_events=2)
    opened = engine.state()["connections_open"]
    wire.send(ask())
    events = wire.events(wire.read_head())
    next(events), next(events)
    with pytest.raises(Ended):
        next(events)
    # its reading side is still there
    assert engine.state()["connections_open"] == opened
    wire.send(b"more")


@pytest.mark.parametrize("path", PATHS)
def test_stall(engine: Simulator, wire: client.Wire, path: str) -> None:
    engine.misbehave("stall", after_events=4)
    wire.send(ask(path=path))
    events = wire.events(wire.read_head())
    for _ in range(4):
        next(events)
    assert wire.is_quiet(0.05)
    assert engine.state()["running"] == 1
    wire.close()
    engine.wait_for(lambda state: state["running"] == 0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("after", [0, 2, 25])
def test_a_stall_that_ends_loses_nothing(engine: Simulator, path: str, after: int) -> None:
    whole = client.ask(engine.address, ask(path=path)).events
    engine.misbehave("stall", after_events=after, seconds=0.05)
    resumed = client.ask(engine.address, ask(path=path)).events
    assert [event.name for event in resumed] == [event.name for event in whole]
    assert resumed[-1].name == "response.completed" or resumed[-1].data == whole[-1].data
    client.ask(engine.address, ask(False, path))


def test_dribble(engine: Simulator, wire: client.Wire) -> None:
    engine.misbehave("dribble", seconds=0.001, requests=1)
    wire.send(ask(sim_output_tokens=1))
    pieces = []
    while not b"".join(pieces[-5:]).endswith(b"0\r\n\r\n"):
        pieces.append(wire.read_some())
    assert len(pieces) > 50
    assert b"".join(pieces).count(b"data: ") == 4
    wire.send(client.get("/health"))
    assert wire.read_response().status == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("length", ["short", "long"])
def test_wrong_length(engine: Simulator, wire: client.Wire, stream: bool, length: str) -> None:
    engine.misbehave("wrong_length", length=length)
    wire.send(ask(stream))
    head = wire.read_head()
    assert not head.chunked
    body = wire.read_to_end()
    assert (len(body) > head.length) == (length == "short")
    assert len(body) != head.length


def test_garbage(engine: Simulator) -> None:
    engine.misbehave("garbage", requests=1)
    with client.connect(engine.address) as wire:
        wire.send(ask())
        assert not wire.read_to_end().startswith(b"HTTP")
    engine.misbehave("garbage", point="chunk", after_events=2)
    with client.connect(engine.address) as wire:
        wire.send(ask())
        events = wire.events(wire.read_head())
        next(events), next(events)
        with pytest.raises(ValueError, match="zz"):
            next(events)


def test_stale_connection(engine: Simulator) -> None:
    engine.misbehave("stale")
    with client.connect(engine.address) as wire:
        wire.send(ask(False))
        assert wire.read_response().status == 200
        wire.send(ask(False))
        assert wire.read_to_end() == b""
        assert engine.log()[-1]["misbehaviour"] == "stale"


@pytest.mark.parametrize("path", PATHS)
def test_stream_error(engine: Simulator, path: str) -> None:
    engine.misbehave("stream_error", after_events=3)
    if path == "/v1/responses":
        with pytest.raises(Ended):
            client.ask(engine.address, ask(path=path))
        return
    events = client.ask(engine.address, ask(path=path)).events
    if path == "/v1/messages":
        assert events[-1].name == "error"
    else:
        assert events[-2].json["error"]["code"] == 500
        assert events[-1].data == "[DONE]"
    assert client.ask(engine.address, ask(False, path)).status == 500


def test_a_role_and_then_the_end(engine: Simulator) -> None:
    engine.misbehave("role_done")
    events = client.ask(engine.address, ask()).events
    assert events[0].json["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event.data for event in events[1:]] == ["[DONE]"]
    choice = client.ask(engine.address, ask(False)).json["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("abort", "")


@pytest.mark.parametrize(("kind", "reasons"), [("role_done", [None] * 3), ("abort", [None] * 3 + ["abort"])])
def test_an_answer_that_is_given_up_in_its_middle(engine: Simulator, kind: str, reasons: list[str | None]) -> None:
    engine.misbehave(kind, after_events=3)
    events = client.ask(engine.address, ask()).events
    assert [event.json["choices"][0]["finish_reason"] for event in events[:-1]] == reasons
    assert events[-1].data == "[DONE]"


def test_what_is_given_up_says_so_as_far_as_its_api_has_a_word(engine: Simulator) -> None:
    engine.misbehave("abort", after_events=6)
    assert client.ask(engine.address, ask(False)).json["choices"][0]["finish_reason"] == "abort"
    assert client.ask(engine.address, ask(False, "/v1/responses")).json["status"] == "cancelled"
    assert "stop_reason" not in client.ask(engine.address, ask(False, "/v1/messages")).json
    *_, last = client.ask(engine.address, ask(path="/v1/responses")).events
    assert (last.name, last.json["response"]["status"]) == ("response.completed", "cancelled")
    *_, delta, stop = client.ask(engine.address, ask(path="/v1/messages")).events
    assert (delta.json["delta"]["stop_reason"], stop.name) == (None, "message_stop")


def test_no_done(engine: Simulator) -> None:
    engine.misbehave("no_done")
    events = client.ask(engine.address, ask()).events
    assert events[-1].json["choices"][0]["finish_reason"] == "stop"


def test_silent(engine: Simulator, wire: client.Wire) -> None:
    engine.misbehave("silent")
    wire.send(ask())
    engine.wait_for(lambda state: state["hits"].get("silent") == 1)
    assert wire.is_quiet(0.05)


def test_delay(engine: Simulator, wire: client.Wire) -> None:
    engine.misbehave("delay", seconds=0.1)
    before = time.monotonic()
    wire.send(ask())
    assert wire.read_response().events[-1].data == "[DONE]"
    assert time.monotonic() - before >= 0.1


def test_huge_head(engine: Simulator, wire: client.Wire) -> None:
    engine.misbehave("huge_head", size=300_000)
    wire.send(ask())
    assert len(wire.read_head().raw) > 300_000


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
def test_leaked_tokens(engine: Simulator, path: str, stream: bool) -> None:
    engine.misbehave("leak")
    body = client.ask(engine.address, ask(stream, path)).body
    assert b"<|channel|>" in body
    assert leak(body) == "content"


@pytest.mark.parametrize("path", [path for path in PATHS if path != "/v1/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_leak_in_a_tools_name(engine: Simulator, path: str, stream: bool) -> None:
    engine.misbehave("leak_tool_name")
    body = client.ask(engine.address, ask(stream, path)).body
    assert b'"name":"get<|start|>assistant"' in body
    assert leak(body) == "tool_name"
    engine.reset()
    assert leak(client.ask(engine.address, ask(stream, path)).body) == ""


HARMONY = "Unexpected token 200002 while expecting start token 200006"


@pytest.mark.parametrize("path", PATHS)
def test_what_harmonys_parser_says_in_a_plain_answer(engine: Simulator, path: str) -> None:
    engine.misbehave("harmony")
    answer = client.ask(engine.address, ask(False, path))
    error = {"message": HARMONY, "type": "InternalServerError", "param": None, "code": 500}
    assert (answer.status, answer.json) == (500, {"error": error})
    assert failure(answer.status, answer.body) == "unexpected_token"


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize(
    "message", [HARMONY, 'unexpected tokens remaining in message header: Some("to=functions.get")']
)
def test_what_harmonys_parser_says_in_a_stream(engine: Simulator, after: int, message: str) -> None:
    engine.misbehave("harmony", after_events=after, message=message)
    answer = client.ask(engine.address, ask())
    assert answer.status == 200
    assert len(answer.events) == after + 2
    assert answer.events[-1].data == "[DONE]"
    assert answer.events[-2].json["error"]["message"] == message
    assert answer.body.endswith(b', "param": null, "code": 500}}\n\ndata: [DONE]\n\n')  # written by json.dumps
    assert failure(200, answer.events[-2].data.encode()) in ("unexpected_token", "header")


def test_harmony_on_messages_and_responses_hides_its_words(engine: Simulator) -> None:
    engine.misbehave("harmony", after_events=3)
    error = client.ask(engine.address, ask(path="/v1/messages")).events[-1]
    assert error.name == "error"
    assert "input_value={'error': {'message': 'Un...am': None, 'code': 500}}" in error.json["error"]["message"]
    with pytest.raises(Ended):
        client.ask(engine.address, ask(path="/v1/responses"))


def test_freeze(engine: Simulator, wire: client.Wire) -> None:
    engine.misbehave("freeze")
    wire.send(ask())
    assert wire.read_head().status == 200
    assert wire.is_quiet(0.05)
    before = engine.metrics()
    assert client.ask(engine.address, client.get("/health")).status == 200
    assert engine.metrics() == before
    engine.reset()
    assert next(wire.events(client.Head(200, "", {"transfer-encoding": "chunked"}))).json["object"]


def test_sluggish(engine: Simulator) -> None:
    engine.misbehave("sluggish", seconds=0.2)
    for path in ("/health", "/metrics"):
        began = time.monotonic()
        assert client.ask(engine.address, client.get(path)).status == 200
        assert time.monotonic() - began >= 0.2
    engine.reset()
    assert client.ask(engine.address, client.get("/health")).status == 200


def test_unhealthy(engine: Simulator) -> None:
    engine.misbehave("unhealthy")
    assert client.ask(engine.address, client.get("/health")).status == 503


def test_refuse(engine: Simulator) -> None:
    engine.misbehave("refuse")
    with pytest.raises(ConnectionRefusedError):
        client.connect(engine.address).close()
    engine.reset()
    client.connect(engine.address).close()


def test_refuse_on_a_unix_socket_for_a_while(tmp_path: Path) -> None:
    with simulator.started(uds=tmp_path / "engine.sock") as engine:
        engine.misbehave("refuse", seconds=0.5)
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            client.connect(engine.address).close()
        engine.wait_for(lambda state: not state["rules"])
        assert client.ask(engine.address, ask()).status == 200


@pytest.mark.parametrize(("kind", "code"), [("exit", 0), ("crash", -signal.SIGKILL)])
def test_it_dies_of_itself(kind: str, code: int) -> None:
    with simulator.started() as engine:
        engine.misbehave(kind, after_requests=2)
        assert client.ask(engine.address, ask()).status == 200
        with client.connect(engine.address) as wire:
            wire.send(ask())
            with pytest.raises((Ended, ConnectionResetError)):
                wire.read_response()
        assert engine.process.wait(5) == code


def test_sigterm_ends_it_at_once_with_streams_open(tmp_path: Path) -> None:
    """It is killed after five seconds, and says -9 then."""
    log = tmp_path / "log.jsonl"
    with simulator.started("--decode-step-ms", "20", log=log) as engine, client.connect(engine.address) as wire:
        wire.send(ask())
        wire.read_head()
        assert engine.stop() == 0
        with pytest.raises(Ended):
            wire.read_response()
        assert [record["outcome"] for record in engine.log()] == ["aborted"]


def test_sigterm_can_be_ignored() -> None:
    with simulator.started("--ignore-sigterm") as engine:
        engine.process.send_signal(signal.SIGTERM)
        assert client.ask(engine.address, ask()).status == 200
        engine.kill()
        assert engine.process.returncode == -signal.SIGKILL


def test_a_slow_load() -> None:
    with simulator.started("--load-seconds", "0.3", "--load-mode", "health") as engine:
        assert client.ask(engine.address, client.get("/health")).status == 503
        engine.wait_for(lambda state: client.ask(engine.address, client.get("/health")).status == 200)
    engine = simulator.start("--load-seconds", "0.2", wait=False)
    try:
        assert engine.state()["address"] == ""
        assert client.ask(engine.wait_until_listening(), ask()).status == 200
    finally:
        assert engine.stop() == 0


def test_misbehaviour_from_the_start() -> None:
    with simulator.started("--misbehave", '{"kind":"status","status":429}') as engine:
        assert client.ask(engine.address, ask()).status == 429

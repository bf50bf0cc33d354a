"""Clients as they are: slow, pipelining, old, leaving at any moment, never reading."""

import itertools
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import client, gateway, simulator
from tests.support.client import Wire
from tests.support.gateway import APIS, AUTH, PATHS, document
from tests.support.simulator import Simulator
from tests.support.worker import MODEL, WorkerProcess, running_worker, snapshot

ENDLESS = 2000  # tokens: ten seconds of the slow engine
_ids = itertools.count()


@dataclass
class Stage:
    worker: WorkerProcess
    engine: Simulator  # answers at once
    slow: Simulator  # 5 ms a token

    def connect(self, **more: Any) -> Wire:
        return client.connect(self.worker.url, **more)

    def idle(self) -> None:
        """Both engines have nothing to do, and have seen it within the time that a client's leaving may take."""
        for engine in (self.engine, self.slow):
            engine.wait_for(lambda state: not state["running"] and not state["waiting"], seconds=1)


@pytest.fixture(scope="module")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder: Path = tmp_path_factory.mktemp("clients")
    with (
        simulator.started(log=folder / "engine.jsonl") as engine,
        simulator.started("--decode-step-ms", "5", "--max-num-seqs", "8") as slow,
        running_worker(
            folder,
            document=snapshot(routes={MODEL: MODEL, "fast": MODEL}),
            client_stalled_seconds=0.8,
            queue_seconds=20,
        ) as worker,
    ):
        yield Stage(worker, engine, slow)


@pytest.fixture
def stage(_stage: Stage) -> Iterator[Stage]:
    _stage.worker.serve(_stage.engine.address)
    yield _stage
    gateway.settled(_stage.worker)
    _stage.slow.reset()
    _stage.engine.reset()
    _stage.idle()


# -- keep-alive, pipelining, and other ways of speaking HTTP


def test_one_connection_serves_many_requests(stage: Stage) -> None:
    opened = stage.engine.state()["connections_opened"]
    with stage.connect() as wire:
        for api, stream in itertools.product(APIS, (False, True)):
            wire.send(gateway.request(api, stream=stream))
            gateway.check_answer(api, wire.read_response(), stream=stream)
    assert stage.engine.state()["connections_opened"] <= opened + 1


@pytest.mark.parametrize("slow", [False, True])
def test_pipelined_requests_are_answered_in_order(stage: Stage, slow: bool) -> None:
    if slow:
        stage.worker.serve(stage.slow.address)
    wanted = [("chat", 20), ("completions", 5), ("responses", 15), ("messages", 10), ("chat", 1)]
    with stage.connect() as wire:
        wire.send(b"".join(gateway.request(api, tokens=n, stream=n % 2 == 0) for api, n in wanted))
        wire.send(client.get("/healthz"))
        for api, n in wanted:
            gateway.check_answer(api, wire.read_response(), stream=n % 2 == 0, tokens=n)
        assert wire.read_response().json == {"status": "alive"}


def test_a_third_request_that_comes_while_the_first_runs(stage: Stage) -> None:
    stage.worker.serve(stage.slow.address)
    data = gateway.request("chat", tokens=40)
    with stage.connect() as wire:
        wire.send(data + data[:-20])
        stage.slow.wait_for(lambda state: state["running"] == 1)
        wire.send(data[-20:] + data[:50])
        for _ in range(2):
            gateway.check_answer("chat", wire.read_response(), stream=False, tokens=40)
        wire.send(data[50:])
        gateway.check_answer("chat", wire.read_response(), stream=False, tokens=40)


def test_thousands_of_pipelined_requests(stage: Stage) -> None:
    with stage.connect() as wire, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(wire.socket.sendall, client.get("/healthz") * 10_000)
        for _ in range(10_000):
            assert wire.read_response().status == 200
        sending.result()


def test_a_pipelined_request_that_is_bad_is_answered_after_the_good_one(stage: Stage) -> None:
    with stage.connect() as wire:
        wire.send(gateway.request("chat") + client.post("/nope", {}) + gateway.request("chat"))
        assert [wire.read_response().status for _ in range(3)] == [200, 404, 200]


def test_a_pipelined_head_that_never_ends_is_not_waited_for_as_if_idle(tmp_path: Path) -> None:
    with (
        running_worker(tmp_path, header_seconds=0.3, keepalive_seconds=30) as worker,
        client.connect(worker.url) as wire,
    ):
        wire.send(client.get("/healthz") + b"GET /healthz HTTP/1.1\r\nx: y")
        assert wire.read_response().status == 200
        assert wire.read_response().status == 408
        gateway.settled(worker)


def test_http_1_0(stage: Stage) -> None:
    for api, stream in itertools.product(APIS, (False, True)):
        with stage.connect() as wire:
            wire.send(gateway.request(api, stream=stream).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            head = wire.read_head()
            body = wire.read_to_end()
            assert "transfer-encoding" not in head.headers
            assert head.headers["connection"] == "close"
            gateway.check_answer(api, client.Response(head, body), stream=stream)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/healthz", {}, 200), ("/v1/models", AUTH, 200), ("/v1/models", {}, 401), ("/nope", {}, 404),
     ("/v1/chat/completions", AUTH, 405), ("/v1/models/none", AUTH, 404)],
)  # fmt: skip
def test_head_has_no_body(stage: Stage, path: str, headers: dict[str, str], status: int) -> None:
    with stage.connect() as wire:
        for _ in range(2):
            wire.send(client.request("HEAD", path, b"", headers))
            answer = wire.read_response(method="HEAD")
            assert answer.status == status
            assert answer.head.length
        wire.send(client.get("/healthz"))
        assert wire.read_response().json == {"status": "alive"}


def test_expect_100_continue(stage: Stage) -> None:
    data = gateway.request("chat", headers={"expect": "100-continue"})
    head, _, body = data.partition(b"\r\n\r\n")
    with stage.connect() as wire:
        wire.send(head + b"\r\n\r\n")
        assert wire.read_head().status == 100
        wire.send(body)
        gateway.check_answer("chat", wire.read_response(), stream=False)


def test_expect_100_continue_is_not_said_to_who_is_refused(stage: Stage) -> None:
    data = client.post(PATHS["chat"], document("chat"), {"expect": "100-continue"})
    with stage.connect() as wire:
        wire.send(data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        assert wire.read_response().status == 401
        assert wire.read_to_end() == b""


@pytest.mark.parametrize("stream", [False, True])
def test_connection_close(stage: Stage, stream: bool) -> None:
    with stage.connect() as wire:
        wire.send(gateway.request("chat", stream=stream, headers={"connection": "close"}))
        answer = wire.read_response()
        assert answer.head.headers["connection"] == "close"
        gateway.check_answer("chat", answer, stream=stream)
        assert wire.read_to_end() == b""


def test_a_request_that_comes_byte_by_byte(stage: Stage) -> None:
    with stage.connect() as wire:
        wire.dribble(gateway.request("chat", stream=True))
        gateway.check_answer("chat", wire.read_response(), stream=True)


# -- headers


def test_headers_of_an_answer(stage: Stage) -> None:
    for stream in (False, True):
        answer = gateway.ask(stage.worker, gateway.request("chat", stream=stream, headers={"x-request-id": "mine-1"}))
        headers = answer.head.headers
        assert headers["x-request-id"] == "mine-1"
        assert headers["x-vitalis-route"] == MODEL
        assert headers["server-timing"].startswith("queue;dur=0.0, engine;dur=")
        assert len(answer.head.lines) == len({name for name, _ in answer.head.lines})
    assert answer.head.headers["content-type"].startswith("text/event-stream")
    assert answer.head.headers["cache-control"] == "no-cache"


def test_a_route_and_the_engines_name_for_it(stage: Stage) -> None:
    answer = gateway.ask(stage.worker, gateway.request("chat", model="fast"))
    assert answer.head.headers["x-vitalis-route"] == "fast"
    assert answer.json["model"] == MODEL


@pytest.mark.parametrize("name", ["a b", "x" * 200, "<script>", "a/b", "\xe9"])
def test_request_ids_that_are_not_sane_are_replaced(stage: Stage, name: str) -> None:
    answer = gateway.ask(stage.worker, client.get("/healthz", {"x-request-id": name}))
    assert answer.head.headers["x-request-id"].startswith("req-")


def test_request_ids_do_not_count(stage: Stage) -> None:
    """The numbers between two of its own would tell a tenant how much the others ask."""
    made = {gateway.ask(stage.worker, client.get("/healthz")).head.headers["x-request-id"] for _ in range(8)}
    assert len(made) == 8
    assert len({name[4:14] for name in made}) == 8


def test_what_reaches_the_engine(stage: Stage) -> None:
    """The request id and the body do; the key, cookies, hop-by-hop headers and the engine's own do not."""
    name = f"reach-{next(_ids)}"
    headers = {
        "x-request-id": name, "x-vllm-priority": "-100", "X-data-parallel-rank": "3", "cookie": "a=b",
        "x-forwarded-for": "1.2.3.4", "te": "trailers", "anthropic-version": "2023-06-01", "traceparent": "00-1",
    }  # fmt: skip
    answer = gateway.ask(stage.worker, gateway.request("chat", headers=headers, priority=-5, cache_salt="s", user="u"))
    assert answer.status == 200
    gateway.wait_until(lambda: any(r["x-request-id"] == name for r in stage.engine.log()))
    record = next(r for r in stage.engine.log() if r["x-request-id"] == name)
    assert set(record["headers"]) == {
        "host", "content-type", "content-length", "x-request-id", "x-vllm-priority", "anthropic-version", "traceparent",
    }  # fmt: skip
    assert record["x-vllm-priority"] == "20", "the class's, not the client's"
    assert "user" in record["fields"]
    assert not {"priority", "request_id"} & set(record["fields"])
    assert "cache_salt" in record["fields"], "the tenant's"


def test_models(stage: Stage) -> None:
    answer = gateway.ask(stage.worker, client.get("/v1/models", AUTH))
    assert [model["id"] for model in answer.json["data"]] == [MODEL, "fast"]
    assert gateway.ask(stage.worker, client.get("/v1/models/fast", AUTH)).json["id"] == "fast"
    missing = gateway.ask(stage.worker, client.get("/v1/models/none", AUTH))
    assert (missing.status, gateway.error_code(missing)) == (404, "model_not_found")
    assert gateway.ask(stage.worker, client.get("/v1/models")).status == 401


def test_the_small_apis(stage: Stage) -> None:
    def ask(path: str, **more: Any) -> Any:
        answer = gateway.ask(stage.worker, client.post(path, {"model": MODEL} | more, AUTH))
        assert answer.status == 200, answer.body
        return answer.json

    tokens = ask("/tokenize", prompt="What now?")["tokens"]
    assert ask("/detokenize", tokens=tokens)["prompt"] == "What now?"
    assert ask("/v1/messages/count_tokens", messages=[{"role": "user", "content": "hi"}])["input_tokens"] > 0


# -- leaving


def leave(wire: Wire, how: str) -> None:
    if how == "reset":
        wire.reset()
    elif how == "half":
        wire.half_close()
    else:
        wire.close()


@pytest.mark.parametrize("how", ["close", "reset", "half"])
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("events", [1, 20])
def test_leaving_a_stream_ends_its_work_at_once(stage: Stage, api: str, events: int, how: str) -> None:
    stage.worker.serve(stage.slow.address, slots=1)
    wire, _, stream = gateway.start_stream(stage.worker, gateway.request(api, stream=True, tokens=ENDLESS))
    for _ in range(events):
        next(stream)
    before = stage.slow.state()
    assert before["running"] == 1
    leave(wire, how)
    after = stage.slow.wait_for(lambda state: state["running"] == 0, seconds=0.2 + 0.3)  # the second for this machine
    assert after["aborts"] == before["aborts"] + 1
    gateway.check_answer(api, gateway.ask(stage.worker, gateway.request(api, tokens=3)), stream=False, tokens=3)
    wire.close()


@pytest.mark.parametrize("how", ["close", "reset", "half"])
def test_leaving_a_plain_request(stage: Stage, how: str) -> None:
    stage.worker.serve(stage.slow.address, slots=1)
    for api in APIS:
        wire = stage.connect()
        wire.send(gateway.request(api, tokens=ENDLESS))
        stage.slow.wait_for(lambda state: state["running"] == 1)
        leave(wire, how)
        stage.slow.wait_for(lambda state: state["running"] == 0, seconds=0.5)
        wire.close()
        gateway.settled(stage.worker)


def test_leaving_behind_a_pipelined_request(stage: Stage) -> None:
    """The socket is read while an answer is under way, so that the end behind the second request is seen."""
    stage.worker.serve(stage.slow.address, slots=1)
    wire = stage.connect()
    wire.send(gateway.request("chat", tokens=ENDLESS) + gateway.request("chat"))
    stage.slow.wait_for(lambda state: state["running"] == 1)
    seen = stage.slow.state()["requests_seen"]
    wire.close()
    stage.slow.wait_for(lambda state: state["running"] == 0, seconds=0.5)
    gateway.settled(stage.worker)
    assert stage.slow.state()["requests_seen"] == seen


def test_leaving_the_queue(stage: Stage) -> None:
    stage.worker.serve(stage.slow.address, slots=1)
    first, _, _ = gateway.start_stream(stage.worker, gateway.request("chat", stream=True, tokens=ENDLESS))
    waiting = [stage.connect() for _ in range(5)]
    for wire in waiting:
        wire.send(gateway.request("chat", tokens=2))
    gateway.wait_until(lambda: stage.worker.in_flight()["count"] == 6)
    for wire in waiting[:4]:
        wire.close()
    gateway.wait_until(lambda: stage.worker.in_flight()["count"] == 2, seconds=0.5)
    seen = stage.slow.state()["requests_seen"]
    first.close()
    gateway.check_answer("chat", waiting[4].read_response(), stream=False, tokens=2)
    assert stage.slow.state()["requests_seen"] == seen + 1
    waiting[4].close()


def test_leaving_while_the_engine_is_being_reached(stage: Stage, tmp_path: Path) -> None:
    """An engine whose accept queue is full: the connect hangs, and a client that leaves is gone all the same."""
    with gateway.scripted_engine(tmp_path / "e.sock") as full:
        full.close()  # nobody accepts any more
        path = tmp_path / "f.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(0)
            fill = [socket.socket(socket.AF_UNIX) for _ in range(2)]
            for own in fill:
                own.setblocking(False)
                own.connect_ex(str(path))
            stage.worker.serve(f"unix:{path}", slots=1)
            wire = stage.connect()
            wire.send(gateway.request("chat"))
            gateway.wait_until(lambda: stage.worker.in_flight()["replicas"]["engine-0"] == 1)
            wire.close()
            gateway.settled(stage.worker, seconds=0.5)
            for own in fill:
                own.close()


def test_leaving_before_the_body_is_whole(stage: Stage) -> None:
    wires = [stage.connect() for _ in range(20)]
    data = gateway.request("chat", pad="x" * 50_000)
    for number, wire in enumerate(wires):
        wire.send(data[: number * 2500 + 10])
    gateway.wait_until(lambda: stage.worker.in_flight()["count"] == 20)
    for number, wire in enumerate(wires):
        leave(wire, ["close", "reset", "half"][number % 3])
    gateway.settled(stage.worker, seconds=0.5)
    for wire in wires:
        wire.close()


# -- not reading


def test_a_client_that_does_not_read_is_cut_and_costs_nobody_else_anything(stage: Stage) -> None:
    """Its engine connection is paused, the engine is not waited for, and after its own deadline it is gone."""
    names = [f"stalled-{next(_ids)}" for _ in range(4)]
    wires = []
    for name in names:
        wire = stage.connect(receive_buffer=4096)
        wire.send(gateway.request("chat", stream=True, tokens=200_000, n=4, headers={"x-request-id": name}))
        wires.append(wire)
    for wire in wires:
        assert wire.read_head().status == 200
    for _ in range(20):
        gateway.check_answer("chat", gateway.ask(stage.worker, gateway.request("chat", stream=True)), stream=True)
    for name in names:
        record = gateway.record_of(stage.worker, name)
        assert (record["outcome"], record["code"]) == ("client_gone", "client_stalled")
        assert record["bytes_out"] < 20_000_000
    for wire in wires:
        wire.close()


def test_a_slow_reader_gets_everything(stage: Stage) -> None:
    """Slower than its stream, but never still: two megabytes through a small buffer."""
    with stage.connect(receive_buffer=16384) as wire:
        wire.send(gateway.request("completions", stream=True, tokens=9000))
        head = wire.read_head()
        body = b""
        for number, piece in enumerate(wire.body_pieces(head)):
            body += piece
            if number % 1000 == 0:
                time.sleep(0.03)
    gateway.check_answer("completions", client.Response(head, body), stream=True, tokens=9000)


def test_clients_that_read_after_a_pause_on_connections_that_close(tmp_path: Path) -> None:
    """Answers of many sizes, because one of them must end where the system's buffers are full and ours is not empty."""
    data = gateway.request("chat", headers={"connection": "close"})
    with gateway.scripted_engine() as engine, running_worker(tmp_path) as worker:
        worker.serve(engine.address)
        wires = []
        for size in range(1_000_000, 7_000_000, 200_000):
            engine.scripts = [[gateway.http_answer(b"x" * size)]]
            wires.append((size, client.connect(worker.url, receive_buffer=65536)))
            wires[-1][1].send(data)
            assert wires[-1][1].read_head().length == size
        time.sleep(3)  # longer than a connection that was told to go away is given
        assert [len(wire.read_to_end()) for _, wire in wires] == [size for size, _ in wires]
        for _, wire in wires:
            wire.close()
        gateway.settled(worker)

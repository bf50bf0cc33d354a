"""A worker's life: its queue, its fleet, its keys from control, its drain, and its sudden death."""

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve.fleet import Replica, ReplicaState
from vitalis_serve.metrics import TIME_BUCKETS, WORKER_METRICS

from tests.support import client, gateway, simulator
from tests.support.gateway import APIS
from tests.support.simulator import Simulator
from tests.support.worker import KEY, MODEL, WorkerProcess, running_worker, snapshot

ENDLESS = 2000


@pytest.fixture(scope="module")
def slow() -> Iterator[Simulator]:
    """5 ms a token."""
    with simulator.started("--decode-step-ms", "5") as engine:
        yield engine


@pytest.fixture(scope="module")
def quick() -> Iterator[Simulator]:
    with simulator.started() as engine:
        yield engine


@pytest.fixture(scope="module")
def _worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with running_worker(tmp_path_factory.mktemp("queue"), queue_requests=3, queue_seconds=0.6) as running:
        yield running


@pytest.fixture
def worker(_worker: WorkerProcess, slow: Simulator, quick: Simulator) -> Iterator[WorkerProcess]:
    yield _worker
    gateway.settled(_worker)
    slow.reset()
    quick.reset()


class Waiter:
    """A request on a thread of its own."""

    def __init__(self, worker: WorkerProcess, data: bytes) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._answer = self._pool.submit(gateway.ask, worker, data, 10)
        self.done_at = 0.0
        self._answer.add_done_callback(lambda _: setattr(self, "done_at", time.monotonic()))

    @property
    def done(self) -> bool:
        return self._answer.done()

    def answer(self) -> client.Response:
        made = self._answer.result()
        self._pool.shutdown()
        return made


def counted(worker: WorkerProcess, count: int) -> None:
    gateway.wait_until(lambda: worker.in_flight()["count"] == count, what=f"{count} open contexts")


# -- the queue


def test_requests_wait_for_a_slot_and_are_served_in_order(worker: WorkerProcess, slow: Simulator) -> None:
    worker.serve(slow.address, slots=1)
    wire, _, _ = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=ENDLESS))
    waiters = []
    for number in range(3):
        waiters.append(Waiter(worker, gateway.request("chat", tokens=2 + number)))
        counted(worker, 2 + number)
    assert worker.in_flight()["replicas"] == {"engine-0": 1}
    assert not any(waiter.done for waiter in waiters)
    wire.close()
    answers = [waiter.answer() for waiter in waiters]
    for number, answer in enumerate(answers):
        gateway.check_answer("chat", answer, stream=False, tokens=2 + number)
        assert float(answer.head.headers["server-timing"].split("queue;dur=")[1].split(",")[0]) > 0
    assert sorted(waiters, key=lambda waiter: waiter.done_at) == waiters


def test_a_full_queue_refuses_with_retry_after(worker: WorkerProcess, slow: Simulator) -> None:
    worker.serve(slow.address, slots=1)
    wire, _, _ = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=ENDLESS))
    waiters = [Waiter(worker, gateway.request("chat", tokens=2)) for _ in range(3)]
    counted(worker, 4)
    for api in APIS:
        answer = gateway.ask(worker, gateway.request(api))
        assert (answer.status, gateway.error_code(answer)) == (503, "queue_full")
        assert 1 <= int(answer.head.headers["retry-after"]) <= 60
    wire.close()
    assert [waiter.answer().status for waiter in waiters] == [200] * 3


def test_patience_ends(worker: WorkerProcess, slow: Simulator) -> None:
    worker.serve(slow.address, slots=1)
    wire, _, stream = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=ENDLESS))
    began = time.monotonic()
    answer = gateway.ask(worker, gateway.request("chat"))
    assert (answer.status, gateway.error_code(answer)) == (503, "queue_timeout")
    assert answer.head.headers["retry-after"]
    assert time.monotonic() - began >= 0.6
    next(stream)  # who holds the slot is not disturbed
    wire.close()


def test_a_fleet_that_grows_wakes_those_who_wait(worker: WorkerProcess, slow: Simulator, quick: Simulator) -> None:
    worker.serve(slow.address, slots=1)
    wire, _, _ = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=ENDLESS))
    waiters = [Waiter(worker, gateway.request("chat")) for _ in range(3)]
    counted(worker, 4)
    worker.serve(slow.address, quick.address, slots=1)
    for waiter in waiters:
        gateway.check_answer("chat", waiter.answer(), stream=False)
    wire.close()


@pytest.mark.parametrize("state", [None, ReplicaState.DRAINING, ReplicaState.FAILED])
def test_the_last_replica_that_goes_strands_nobody_in_silence(
    worker: WorkerProcess, slow: Simulator, state: ReplicaState | None
) -> None:
    worker.serve(slow.address, slots=1)
    wire, _, stream = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=40))
    waiter = Waiter(worker, gateway.request("chat"))
    counted(worker, 2)
    gone = () if state is None else (Replica("engine-0", slow.address, state, (MODEL,), 1, 1),)
    worker.fleet(*gone)
    answer = waiter.answer()
    assert (answer.status, gateway.error_code(answer)) == (503, "no_ready_engine")
    assert answer.head.headers["retry-after"]
    assert gateway.looks_whole("chat", list(stream))  # what runs on it may finish
    wire.close()
    assert gateway.ask(worker, gateway.request("chat")).status == 503


def test_a_replica_restarted_elsewhere_is_found_there(worker: WorkerProcess, slow: Simulator, quick: Simulator) -> None:
    worker.serve(slow.address)
    assert gateway.ask(worker, gateway.request("chat", tokens=2)).status == 200
    wire, _, stream = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=60))
    worker.fleet(Replica("engine-0", quick.address, ReplicaState.READY, (MODEL,), 4, 2))
    gateway.wait_until(lambda: slow.state()["connections_open"] == 1, what="the idle connection's end")
    gateway.check_answer("chat", gateway.ask(worker, gateway.request("chat")), stream=False)
    assert gateway.looks_whole("chat", list(stream))
    wire.close()
    gateway.wait_until(lambda: slow.state()["connections_open"] == 0, what="the retired connection's end")


def test_load_stays_at_home_while_there_is_room(worker: WorkerProcess, slow: Simulator) -> None:
    worker.serve(slow.address, slow.address, slow.address, slots=4)
    streams = [gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=ENDLESS)) for _ in range(9)]
    assert worker.in_flight()["replicas"] == {"engine-0": 4, "engine-1": 4, "engine-2": 1}
    for wire, _, _ in streams:
        wire.close()


def test_an_engine_killed_under_load(worker: WorkerProcess, quick: Simulator) -> None:
    with simulator.started("--decode-step-ms", "5") as doomed:
        worker.serve(doomed.address, quick.address)
        streams = [gateway.start_stream(worker, gateway.request(api, stream=True, tokens=ENDLESS)) for api in APIS]
        on_doomed = worker.in_flight()["replicas"]["engine-0"]
        assert on_doomed
        doomed.kill()
        cut = 0
        for api, (wire, _, stream) in zip(APIS, streams, strict=True):
            events = list(stream)
            if not gateway.looks_whole(api, events):
                assert gateway.terminal_error(api, events)["message"]
                cut += 1
            wire.close()
        assert cut == on_doomed
        assert worker.hear("suspect")["replica"] == "engine-0"
        for api in APIS:
            gateway.check_answer(api, gateway.ask(worker, gateway.request(api)), stream=False)


# -- control


class Control:
    """The other end of a worker's line to control."""

    def __init__(self, folder: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "control.sock"))
        self._listener.listen(4)
        self._listener.settimeout(5)

    def __enter__(self) -> "Control":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    @contextlib.contextmanager
    def line(self) -> Iterator["Line"]:
        own, _ = self._listener.accept()
        own.settimeout(5)
        with own, own.makefile("rwb") as file:
            yield Line(file)


class Line:
    def __init__(self, file: Any) -> None:
        self._file = file

    def hear(self) -> dict[str, Any]:
        return dict(json.loads(self._file.readline()))

    def say(self, document: bytes) -> None:
        self._file.write(document + b"\n")
        self._file.flush()

    def push(self, document: bytes) -> dict[str, Any]:
        version = json.loads(document)["version"]
        self.say(b'{"type":"snapshot","version":%d,"body":%b}' % (version, document))
        return self.hear()

    def collect(self, number: int) -> dict[str, Any]:
        self.say(b'{"type":"collect","id":%d}' % number)
        return self.hear()


def test_a_pushed_snapshot_is_in_force_when_it_is_acknowledged(tmp_path: Path, quick: Simulator) -> None:
    with Control(tmp_path) as control, running_worker(tmp_path) as worker, control.line() as line:
        worker.serve(quick.address)
        hello = line.hear()
        assert hello == {"type": "hello", "worker": "worker-0", "pid": worker.pid, "version": 1}
        with client.connect(worker.url) as kept:
            kept.send(gateway.request("chat"))
            assert kept.read_response().status == 200
            assert line.push(snapshot(2, [])) == {"type": "applied", "version": 2}
            for wire in (kept, client.connect(worker.url)):
                wire.send(gateway.request("chat"))
                answer = wire.read_response()
                assert (answer.status, gateway.error_code(answer)) == (401, "invalid_key")
                wire.close()
        assert line.push(snapshot(1))["version"] == 2  # an old one changes nothing
        assert gateway.ask(worker, gateway.request("chat")).status == 401
        assert line.push(snapshot(3, routes={"new": MODEL}))["version"] == 3
        answer = gateway.ask(worker, gateway.request("chat"))
        assert (answer.status, gateway.error_code(answer)) == (404, "model_not_found")
        assert gateway.ask(worker, gateway.request("chat", model="new")).status == 200
        gateway.settled(worker)


def test_a_running_stream_outlives_its_key(tmp_path: Path, slow: Simulator) -> None:
    with Control(tmp_path) as control, running_worker(tmp_path) as worker, control.line() as line:
        line.hear()
        worker.serve(slow.address)
        wire, _, stream = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=50))
        line.push(snapshot(2, []))
        assert gateway.looks_whole("chat", list(stream))
        wire.close()
        gateway.settled(worker)


def test_control_that_goes_and_comes_again(tmp_path: Path, quick: Simulator) -> None:
    with Control(tmp_path) as control, running_worker(tmp_path) as worker:
        worker.serve(quick.address)
        with control.line() as line:
            assert line.hear()["version"] == 1
            line.say(b"not json")
        with control.line() as line:  # it has hung up on that, and comes again
            line.hear()
            line.say(b'{"type":"snapshot","version":9,"body":{"version":"nine"}}')
        assert gateway.ask(worker, gateway.request("chat")).status == 200
        with control.line() as line:
            line.hear()
            assert line.push(snapshot(5))["version"] == 5
        gateway.settled(worker)


def test_metrics_have_the_names_that_were_written_down(tmp_path: Path, quick: Simulator) -> None:
    with Control(tmp_path) as control, running_worker(tmp_path, queue_requests=0) as worker, control.line() as line:
        line.hear()
        worker.serve(quick.address)
        for api in APIS:
            for stream in (False, True):
                gateway.check_answer(api, gateway.ask(worker, gateway.request(api, stream=stream)), stream=stream)
        quick.misbehave("status", status=500, requests=1)
        assert gateway.ask(worker, gateway.request("chat")).status == 502
        assert gateway.ask(worker, client.post("/v1/chat/completions", {})).status == 401
        worker.serve()
        assert gateway.ask(worker, gateway.request("chat")).status == 503
        worker.serve(quick.address)
        report = line.collect(7)
        assert (report["type"], report["id"]) == ("metrics", 7)
        values = report["values"]

    known = {metric.name: metric for metric in WORKER_METRICS}
    for kind, group in (("counter", "counters"), ("gauge", "gauges"), ("histogram", "histograms")):
        for name, labels, *_ in values[group]:
            assert known[name].kind == kind
            assert set(labels) == set(known[name].labels), name
            assert KEY not in labels.values()
    counters = {(name, *sorted(labels.values())): value for name, labels, value in values["counters"]}
    assert counters["vitalis_requests_total", "", MODEL, "ok"] == 8
    assert counters["vitalis_completion_tokens_total", MODEL] == 8 * gateway.TOKENS
    assert counters["vitalis_prompt_tokens_total", MODEL] > 0
    assert counters["vitalis_shed_total", "no_ready_engine"] >= 1
    assert counters["vitalis_upstream_failures_total", "engine-0", "status_500"] == 1
    gauges = {name: value for name, labels, value in values["gauges"] if not labels}
    assert gauges["vitalis_open_contexts"] == gauges["vitalis_in_flight"] == 0
    queued = {labels["class"]: value for name, labels, value in values["gauges"] if name == "vitalis_queued"}
    assert queued == dict.fromkeys(("emergency", "interactive", "standard", "batch"), 0)
    assert gauges["vitalis_body_bytes"] == 0
    for name, labels, buckets, total in values["histograms"]:
        assert len(buckets) == len(TIME_BUCKETS) + 1
        if labels["route"] == MODEL:
            assert sum(buckets) == (4 if name == "vitalis_first_token_seconds" else 8)
            assert total >= 0


def test_metrics_of_every_name_are_said(tmp_path: Path, quick: Simulator) -> None:
    routes = {MODEL: MODEL, "careful": "not-there"}
    document = json.loads(snapshot(routes=routes))
    document["routes"][1]["fallbacks"] = [MODEL]
    with Control(tmp_path) as control, running_worker(tmp_path) as worker, control.line() as line:
        line.hear()
        line.push(json.dumps(document).encode())
        worker.serve(quick.address, "http://127.0.0.1:1")
        assert gateway.ask(worker, gateway.request("chat", model="careful")).status == 200
        for _ in range(4):
            gateway.ask(worker, gateway.request("chat"))
        quick.misbehave("status", status=500, requests=1)
        for _ in range(4):
            gateway.ask(worker, gateway.request("chat"))
        worker.serve()
        gateway.ask(worker, gateway.request("chat"))
        worker.serve(quick.address)
        values = line.collect(1)["values"]
    said = {name for group in values.values() for name, *_ in group}
    assert said == {metric.name for metric in WORKER_METRICS}


# -- drain


def test_a_drain_lets_what_runs_finish_and_takes_nothing_more(tmp_path: Path, slow: Simulator) -> None:
    with running_worker(tmp_path) as worker:
        worker.serve(slow.address)
        idle, fresh = client.connect(worker.url), client.connect(worker.url)
        idle.send(client.get("/healthz"))
        assert idle.read_response().status == 200
        wire, _, stream = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=60))
        plain = Waiter(worker, gateway.request("chat", tokens=60))
        counted(worker, 2)
        worker.say({"type": "drain", "seconds": 10})
        for other in (idle, fresh):
            assert other.read_to_end() == b""
            other.close()
        assert gateway.looks_whole("chat", list(stream))
        assert wire.read_to_end() == b""
        wire.close()
        answer = plain.answer()
        gateway.check_answer("chat", answer, stream=False, tokens=60)
        worker.hear("drained")
        assert worker.process.wait(5) == 0
        assert "Traceback" not in worker.log()
        assert {record["outcome"] for record in worker.records()} == {"ok"}


def test_a_drain_that_takes_too_long_ends_streams_properly(tmp_path: Path, slow: Simulator) -> None:
    with running_worker(tmp_path) as worker:
        worker.serve(slow.address, slots=8)
        streams = [gateway.start_stream(worker, gateway.request(api, stream=True, tokens=ENDLESS)) for api in APIS]
        plain = Waiter(worker, gateway.request("chat", tokens=ENDLESS))
        deaf = client.connect(worker.url, receive_buffer=4096)
        deaf.send(gateway.request("chat", stream=True, tokens=100_000, n=8))
        counted(worker, 6)
        worker.say({"type": "drain", "seconds": 0.4})
        for api, (wire, _, stream) in zip(APIS, streams, strict=True):
            events = list(stream)
            assert not gateway.looks_whole(api, events)
            assert "stopping" in gateway.terminal_error(api, events)["message"]
            wire.close()
        answer = plain.answer()
        assert (answer.status, gateway.error_code(answer)) == (503, "draining")
        assert answer.head.headers["retry-after"]
        worker.hear("drained")
        assert worker.process.wait(20) == 0
        assert "Traceback" not in worker.log()
        deaf.close()
        slow.wait_for(lambda state: not state["running"], seconds=1)


def test_a_drain_with_a_queue_and_a_half_sent_request(tmp_path: Path, slow: Simulator) -> None:
    with running_worker(tmp_path) as worker:
        worker.serve(slow.address, slots=1)
        wire, _, stream = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=60))
        waiter = Waiter(worker, gateway.request("chat", tokens=2))
        half = client.connect(worker.url)
        data = gateway.request("chat", tokens=2)
        half.send(data[:-5])
        counted(worker, 3)
        worker.say({"type": "drain", "seconds": 10})
        worker.in_flight()
        half.send(data[-5:])
        gateway.check_answer("chat", half.read_response(), stream=False, tokens=2)
        gateway.check_answer("chat", waiter.answer(), stream=False, tokens=2)
        assert gateway.looks_whole("chat", list(stream))
        worker.hear("drained")
        assert worker.process.wait(5) == 0
        wire.close()
        half.close()


def test_sigterm_drains_too(tmp_path: Path, slow: Simulator) -> None:
    with running_worker(tmp_path) as worker:
        worker.serve(slow.address)
        wire, _, stream = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=60))
        worker.process.send_signal(signal.SIGTERM)
        assert gateway.looks_whole("chat", list(stream))
        wire.close()
        worker.hear("drained")
        assert worker.process.wait(5) == 0
        assert [record["outcome"] for record in worker.records()] == ["ok"]  # the log's last records are not lost
        assert "Traceback" not in worker.log()


# -- death


def test_kill_9_refuses_nobody_and_the_next_worker_serves(tmp_path: Path, slow: Simulator, quick: Simulator) -> None:
    with running_worker(tmp_path) as worker:
        worker.serve(slow.address)
        wire, _, stream = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=ENDLESS))
        next(stream)
        worker.stop()  # SIGKILL
        with pytest.raises((client.Ended, ConnectionError)):  # chunked framing is cut: it cannot look whole
            list(stream)
        wire.close()
        slow.wait_for(lambda state: state["running"] == 0, seconds=1)
        waiting = [client.connect(worker.url) for _ in range(20)]  # nobody listens, and nobody is refused
        for other in waiting:
            other.send(gateway.request("chat"))
        worker.start()
        worker.serve(quick.address)
        # who came between the start and the fleet was told to come again; nobody was dropped
        answers = [other.read_response() for other in waiting]
        assert {answer.status for answer in answers} <= {200, 503}
        for other in waiting:
            other.close()
        gateway.check_answer("chat", gateway.ask(worker, gateway.request("chat")), stream=False)
        gateway.settled(worker)


def test_a_worker_ends_with_its_supervisor(tmp_path: Path) -> None:
    with running_worker(tmp_path) as worker:
        worker._line.shutdown(socket.SHUT_RDWR)
        assert worker.process.wait(20) != 0


def test_every_answer_and_every_prompt_takes_a_slot(tmp_path: Path) -> None:
    with (
        simulator.started("--decode-step-ms", "5") as engine,
        running_worker(tmp_path / "w", queue_seconds=0.5) as worker,
    ):
        worker.serve(engine.address, slots=6)
        wire, _, _ = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=4000, n=2))
        more = {"prompt": ["One.", "Two."], "n": 2}
        other, _, _ = gateway.start_stream(worker, gateway.request("completions", stream=True, tokens=4000, **more))
        assert worker.in_flight()["replicas"] == {"engine-0": 6}
        answer = gateway.ask(worker, gateway.request("chat"))
        assert (answer.status, gateway.error_code(answer)) == (503, "queue_timeout")
        other.close()
        assert gateway.ask(worker, gateway.request("chat")).status == 200
        wire.close()
        gateway.settled(worker)


def test_a_request_may_wait_for_an_engines_start_and_each_class_has_its_patience(tmp_path: Path) -> None:
    patience = {"standard": 0.3}
    with (
        simulator.started() as engine,
        running_worker(tmp_path / "w", cold_start_seconds=20, class_seconds=patience) as worker,
        ThreadPoolExecutor(1) as pool,
    ):
        starting = Replica("engine-0", engine.address, ReplicaState.STARTING, (MODEL,), 1, 1)
        worker.fleet(starting)
        asked = pool.submit(gateway.ask, worker, gateway.request("chat"))
        gateway.wait_until(lambda: worker.in_flight()["count"] == 1)
        time.sleep(0.5)
        assert not asked.done()
        worker.serve(engine.address, slots=1)
        assert asked.result().status == 200
        engine.misbehave("silent", requests=1)
        wire = client.connect(worker.url)
        wire.send(gateway.request("chat"))
        gateway.wait_until(lambda: worker.in_flight()["replicas"] == {"engine-0": 1})
        answer = gateway.ask(worker, gateway.request("chat"))
        assert (answer.status, gateway.error_code(answer)) == (503, "queue_timeout")
        wire.close()
        gateway.settled(worker)

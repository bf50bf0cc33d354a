"""A client that reads slowly, or not at all: what it costs is its own.

The worker's sending sockets are small here, so that a client's not reading is felt after kilobytes."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.soak.site import open_files
from tests.support import client, gateway, simulator
from tests.support.client import Wire
from tests.support.gateway import APIS, ScriptedEngine
from tests.support.simulator import Simulator
from tests.support.worker import WorkerProcess, running_worker

STALLED = 1.5  # a client that takes nothing for so long is cut, by the worker with little patience
IDLE = 0.6  # an engine that says nothing for so long is given up
SEND_BUFFER = 8192
READ = 256_000  # what one read of an engine's connection may bring
# What may have come of an answer that nobody reads: one read, the write buffer, and the sockets on both sides.
AHEAD = READ + 256 * 1024
LONG = 5000  # tokens: a megabyte and more as a stream
_ids = itertools.count()


@dataclass
class Stage:
    worker: WorkerProcess
    engine: Simulator  # answers at once
    script: ScriptedEngine
    sockets: int  # the worker's own, when it serves nobody

    def ask(self, api: str = "chat", *, receive_buffer: int = 4096, **more: Any) -> tuple[str, Wire]:
        """A request sent by a client that reads nothing yet, and its id."""
        name = f"slow-{next(_ids)}"
        wire = client.connect(self.worker.url, receive_buffer=receive_buffer)
        wire.send(gateway.request(api, headers={"x-request-id": name}, **more))
        return name, wire

    def serve_alone(self, address: str) -> None:
        """One engine with one slot, and every connection of before is closed."""
        self.worker.serve("unix:/nowhere")
        self.worker.serve(address, slots=1)
        self.wait_for_sockets(0)

    def wait_for_sockets(self, count: int, seconds: float = 5) -> None:
        """Until the worker has that many connections, to clients and engines."""
        gateway.wait_until(lambda: sockets(self.worker) == self.sockets + count, seconds, f"{count} connections")

    def plain(self, size: int) -> None:
        """The scripted engine's next answer is plain and so long; all later ones are short."""
        self.script.scripts = [[gateway.http_answer({"text": "x" * size})], [gateway.http_answer({"text": ""})]]

    def free(self) -> bool:
        return not any(self.worker.in_flight()["replicas"].values())

    def record(self, name: str) -> dict[str, Any]:
        return gateway.record_of(self.worker, name)


@contextlib.contextmanager
def staged(folder: Path, stalled_seconds: float) -> Iterator[Stage]:
    with (
        simulator.started(uds=folder / "engine.sock") as engine,
        gateway.scripted_engine(folder / "script.sock") as script,
        running_worker(
            folder,
            send_buffer=SEND_BUFFER,
            client_stalled_seconds=stalled_seconds,
            idle_seconds=IDLE,
            first_token_seconds=IDLE,
        ) as worker,
    ):
        yield Stage(worker, engine, script, least_sockets(worker))


@pytest.fixture(scope="module")
def _patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("patient"), 60) as made:
        yield made


@pytest.fixture(scope="module")
def _strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("strict"), STALLED) as made:
        yield made


@pytest.fixture
def stage(_patient: Stage) -> Iterator[Stage]:
    """Its worker waits for clients for longer than a test."""
    yield from clean(_patient)


@pytest.fixture
def strict(_strict: Stage) -> Iterator[Stage]:
    """Its worker does not wait long for a client that takes nothing."""
    yield from clean(_strict)


def clean(made: Stage) -> Iterator[Stage]:
    made.worker.serve(made.engine.address)
    yield made
    gateway.settled(made.worker)
    made.engine.wait_for(lambda state: not state["running"] and not state["waiting"])


def resident(worker: WorkerProcess) -> int:
    return int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1]) * 4096


def sockets(worker: WorkerProcess) -> int:
    return sum(name.startswith("socket:") for name in open_files(worker.pid))


def least_sockets(worker: WorkerProcess) -> int:
    """Of a worker that looks for its control again and again."""
    found = [sockets(worker)]
    while len(found) < 100:
        time.sleep(0.005)
        found.append(sockets(worker))
    return min(found)


def cut_short(wire: Wire) -> None:
    """The connection was ended in the middle of the answer, and nobody could take it for whole."""
    with contextlib.suppress(ConnectionResetError):
        head = wire.read_head()
        with pytest.raises((client.Ended, ConnectionResetError)):
            for _ in wire.body_pieces(head):
                pass
    wire.close()


# -- what it costs


@pytest.mark.parametrize("api", APIS)
def test_who_does_not_read_stops_his_own_engine_connection_alone(stage: Stage, api: str) -> None:
    """The engine cannot get rid of those answers, the worker does not gather them, and all others get theirs."""
    length = len(gateway.ask(stage.worker, gateway.request(api, stream=True, tokens=LONG), 20).body)
    before, asked = resident(stage.worker), [stage.ask(api, stream=True, tokens=LONG) for _ in range(4)]
    least = len(asked) * (length - AHEAD)
    stuck = stage.engine.wait_for(lambda state: state["unsent_bytes"] > least and not state["running"], 20)
    for stream in (True, False):
        gateway.check_answer(api, gateway.ask(stage.worker, gateway.request(api, stream=stream)), stream=stream)
    assert stage.engine.state()["unsent_bytes"] == stuck["unsent_bytes"]
    assert stage.worker.in_flight()["count"] == len(asked)
    assert resident(stage.worker) - before < len(asked) * READ + (1 << 20)
    for _, wire in asked:
        wire.close()


def test_beside_a_client_that_does_not_read_a_stream_keeps_its_pace(stage: Stage, tmp_path: Path) -> None:
    """On the same replica and worker: its client is never far behind the engine's own count of tokens."""
    with simulator.started("--decode-step-ms", "4", "--per-sequence-ms", "0", uds=tmp_path / "e.sock") as paced:
        stage.worker.serve(paced.address, slots=256)
        _, stalled = stage.ask(stream=True, tokens=60, n=64)
        stuck = paced.wait_for(lambda state: state["unsent_bytes"] > 0 and not state["running"], 10)
        wire, _, events = gateway.start_stream(stage.worker, gateway.request("chat", stream=True, tokens=300))
        for seen, _ in enumerate(itertools.islice(events, 280)):
            if seen % 40 == 0:
                state = paced.state()
                assert state["generation_tokens"] - stuck["generation_tokens"] <= seen + 100
                assert state["unsent_bytes"] == stuck["unsent_bytes"]
        wire.close()
        stalled.close()
        gateway.settled(stage.worker)


# -- the slot


@pytest.mark.parametrize(("stream", "tokens"), [(True, 100), (False, 60_000)])
def test_the_slot_is_free_though_the_client_reads_nothing(stage: Stage, stream: bool, tokens: int) -> None:
    """The engine has said its last byte: an answer that the worker may hold is the client's own affair."""
    stage.worker.serve(stage.engine.address, slots=1)
    name, wire = stage.ask(stream=stream, tokens=tokens)
    gateway.wait_until(stage.free, what="the slot")
    record = stage.record(name)
    assert (record["outcome"], record["completion_tokens"]) == ("ok", tokens)
    assert wire.received == 0
    gateway.check_answer("chat", gateway.ask(stage.worker, gateway.request("chat")), stream=False)
    gateway.check_answer("chat", wire.read_response(), stream=stream, tokens=tokens)
    wire.close()


@pytest.mark.parametrize("stream", [True, False])
def test_the_slot_is_free_while_the_client_still_reads(stage: Stage, stream: bool) -> None:
    """An answer too large to be held: the engine is let go when it has said all; the client has not read all then."""
    stage.plain(2_000_000)
    stage.worker.serve(stage.engine.address if stream else stage.script.address, slots=1)
    finished = stage.engine.state()["finished"]
    name, wire = stage.ask("completions", receive_buffer=1 << 16, stream=stream, tokens=LONG)
    gateway.wait_until(lambda: not stage.free(), what="the slot's being taken")
    if stream:
        stage.engine.wait_for(lambda state: state["finished"] > finished, 20)
    while not stage.free():
        wire.sip(8192)
    read, record = wire.received, stage.record(name)
    assert record["outcome"] == "ok"
    assert read < record["bytes_out"] - 4096  # in the sockets, and in the write buffer
    assert gateway.ask(stage.worker, gateway.request("completions")).status == 200
    assert wire.received == read
    answer = wire.read_response()
    if stream:
        gateway.check_answer("completions", answer, stream=True, tokens=LONG)
    else:
        assert len(answer.json["text"]) == 2_000_000
    wire.close()


# -- deadlines


@pytest.mark.parametrize("stream", [True, False])
def test_who_never_reads_again_is_cut_by_his_own_deadline(strict: Stage, stream: bool) -> None:
    """Slot and engine connection are given back, what was generated is charged, and the record says whose doing it
    was."""
    strict.plain(2_000_000)
    strict.serve_alone(strict.engine.address if stream else strict.script.address)
    name, wire = strict.ask("completions", stream=stream, tokens=100_000)
    strict.wait_for_sockets(2)
    gateway.wait_until(strict.free, STALLED + 5, "the slot")
    record = strict.record(name)
    assert (record["outcome"], record["code"]) == ("client_gone", "client_stalled")
    assert record["estimated"]
    assert record["prompt_tokens"] > 0
    assert record["completion_tokens"] > 0
    strict.wait_for_sockets(0)
    assert gateway.ask(strict.worker, gateway.request("completions")).status == 200
    cut_short(wire)


def test_who_does_not_read_what_the_engine_has_finished_is_cut_too(strict: Stage) -> None:
    """The request is over and charged as it was; what is left is a connection, and that ends."""
    strict.serve_alone(strict.engine.address)
    name, wire = strict.ask(tokens=60_000)
    assert strict.record(name)["outcome"] == "ok"
    strict.wait_for_sockets(2)
    strict.wait_for_sockets(1, STALLED + 5)
    cut_short(wire)


def test_an_engine_may_be_silent_as_long_as_its_client_does_not_read(stage: Stage) -> None:
    name, wire = stage.ask("completions", stream=True, tokens=LONG)
    time.sleep(IDLE * 2)
    gateway.check_answer("completions", wire.read_response(), stream=True, tokens=LONG)
    assert stage.record(name)["outcome"] == "ok"
    wire.close()


def test_nor_is_it_blamed_for_a_first_token_behind_an_answer_that_is_not_read(stage: Stage) -> None:
    """The answer before it is whole but for the client, so its own engine is asked, and not listened to."""
    wire = client.connect(stage.worker.url, receive_buffer=4096)
    wire.send(gateway.request("completions", tokens=60_000) + gateway.request("completions", stream=True))
    stage.engine.wait_for(lambda state: state["running"] == 0)
    time.sleep(IDLE * 2)
    gateway.check_answer("completions", wire.read_response(), stream=False, tokens=60_000)
    gateway.check_answer("completions", wire.read_response(), stream=True)
    wire.close()


@pytest.mark.parametrize("closes", [False, True])
def test_who_reads_slowly_but_goes_on_is_never_cut(strict: Stage, closes: bool) -> None:
    """An answer that is all written but not all sent takes the client longer than one may be still."""
    more = {"connection": "close"} if closes else {}
    wire = client.connect(strict.worker.url, receive_buffer=4096)
    wire.send(gateway.request("completions", tokens=100_000, headers=more))
    head = wire.read_head()
    assert head.length is not None
    began, body = time.monotonic(), b""
    while time.monotonic() - began < STALLED * 2:
        body += wire.read_exactly(2000)
        time.sleep(0.05)
    body += wire.read_exactly(head.length - len(body))
    gateway.check_answer("completions", client.Response(head, body), stream=False, tokens=100_000)
    wire.close()

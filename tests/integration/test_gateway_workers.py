"""Several workers before the same engines: one of them owns admission, the others ask it."""

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import client, gateway, simulator
from tests.support.gateway import APIS
from tests.support.simulator import Simulator
from tests.support.worker import WorkerProcess, running_worker

ENDLESS = 4000
COUNT = 3


@dataclass
class Host:
    """`workers[0]` owns admission."""

    workers: list[WorkerProcess]

    @property
    def owner(self) -> WorkerProcess:
        return self.workers[0]

    def serve(self, *addresses: str, slots: int) -> None:
        for worker in self.workers:
            worker.serve(*addresses, slots=slots)

    def taken(self) -> int:
        """Slots in use, as the supervisor adds them up."""
        return sum(sum(worker.in_flight()["replicas"].values()) for worker in self.workers)

    def joined(self, times: int = 1) -> None:
        """Until the owner has met every other worker."""
        gateway.wait_until(lambda: self.owner.log().count("is here") >= times * (COUNT - 1), what="all are here")

    def settled(self) -> None:
        for worker in self.workers:
            gateway.settled(worker)


@contextlib.contextmanager
def host(folder: Path, **options: object) -> Iterator[Host]:
    with contextlib.ExitStack() as stack:
        shared = {"workers": COUNT, "admission_socket": str(folder / "admission.sock"), **options}
        workers = [
            stack.enter_context(running_worker(folder / f"w{index}", worker=index, **shared)) for index in range(COUNT)
        ]
        yield Host(workers)


@pytest.fixture(scope="module")
def slow() -> Iterator[Simulator]:
    """5 ms a token."""
    with simulator.started("--decode-step-ms", "5") as engine:
        yield engine


@pytest.fixture(scope="module")
def _three(tmp_path_factory: pytest.TempPathFactory, slow: Simulator) -> Iterator[Host]:
    with host(tmp_path_factory.mktemp("host"), queue_requests=6, queue_seconds=0.8) as three:
        three.serve(slow.address, slots=1)
        three.joined()
        yield three


@pytest.fixture
def three(_three: Host, slow: Simulator) -> Iterator[Host]:
    yield _three
    _three.settled()
    slow.reset()


def endless(worker: WorkerProcess) -> client.Wire:
    wire, _, _ = gateway.start_stream(worker, gateway.request("chat", stream=True, tokens=ENDLESS))
    return wire


class Asking:
    """A request on a thread of its own."""

    def __init__(self, worker: WorkerProcess, data: bytes, seconds: float = 10) -> None:
        self._worker, self._data, self._seconds = worker, data, seconds
        self.answer: client.Response | None = None
        self.error: Exception | None = None
        self.done_at = 0.0
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        try:
            self.answer = gateway.ask(self._worker, self._data, self._seconds)
        except (OSError, client.Ended) as error:
            self.error = error
        self.done_at = time.monotonic()

    @property
    def done(self) -> bool:
        return bool(self.done_at)

    def whole(self) -> client.Response:
        self._thread.join()
        assert self.answer is not None, self.error
        return self.answer


def counted(worker: WorkerProcess, count: int) -> None:
    gateway.wait_until(lambda: worker.in_flight()["count"] == count, what=f"{count} open contexts")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_every_worker_answers(three: Host, api: str, stream: bool) -> None:
    for worker in three.workers:
        answer = gateway.ask(worker, gateway.request(api, stream=stream))
        gateway.check_answer(api, answer, stream=stream)


@pytest.mark.parametrize(("holder", "asker"), [(0, 1), (1, 0), (1, 2), (2, 2)])
def test_a_slot_that_one_holds_no_other_gets(three: Host, slow: Simulator, holder: int, asker: int) -> None:
    wire = endless(three.workers[holder])
    asking = Asking(three.workers[asker], gateway.request("chat", tokens=2))
    time.sleep(0.1)
    assert not asking.done
    assert slow.state()["running"] == 1
    assert three.taken() == 1
    wire.close()
    answer = asking.whole()
    gateway.check_answer("chat", answer, stream=False, tokens=2)
    assert float(answer.head.headers["server-timing"].split("queue;dur=")[1].split(",")[0]) > 50


def test_all_wait_in_one_queue(three: Host) -> None:
    wire = endless(three.owner)
    asked = []
    for number, index in enumerate((1, 0, 2, 1, 2, 0)):
        before = three.workers[index].in_flight()["count"]
        asked.append(Asking(three.workers[index], gateway.request("chat", tokens=2 + number)))
        counted(three.workers[index], before + 1)
        time.sleep(0.02)  # its word is with the owner
    wire.close()
    for asking in asked:
        assert asking.whole().status == 200
    assert sorted(asked, key=lambda one: one.done_at) == asked


@pytest.mark.parametrize("index", range(COUNT))
def test_a_full_queue_is_full_for_all(three: Host, index: int) -> None:
    wire = endless(three.workers[1])
    waiting = [Asking(three.workers[number % COUNT], gateway.request("chat", tokens=2)) for number in range(6)]
    gateway.wait_until(lambda: sum(worker.in_flight()["count"] for worker in three.workers) == 7, what="six wait")
    time.sleep(0.05)
    answer = gateway.ask(three.workers[index], gateway.request("chat"))
    assert (answer.status, gateway.error_code(answer)) == (503, "queue_full")
    assert 1 <= int(answer.head.headers["retry-after"]) <= 60
    wire.close()
    assert [asking.whole().status for asking in waiting] == [200] * 6


def test_patience_ends(three: Host) -> None:
    wire = endless(three.owner)
    took = []
    for _ in range(3):
        began = time.monotonic()
        answer = gateway.ask(three.workers[1], gateway.request("chat"))
        took.append(time.monotonic() - began)
        assert (answer.status, gateway.error_code(answer)) == (503, "queue_timeout")
        assert 1 <= int(answer.head.headers["retry-after"]) <= 60
        if took[-1] < 1.7:
            break
    # Its own clock would give it a second more each time; a busy machine does not.
    assert 0.7 <= took[-1] < 1.7, took
    wire.close()


def test_who_leaves_the_queue_is_not_waited_for(three: Host) -> None:
    wire = endless(three.owner)
    left = client.connect(three.workers[1].url)
    left.send(gateway.request("chat", stream=True, tokens=ENDLESS))
    counted(three.workers[1], 1)
    next_ = Asking(three.workers[2], gateway.request("chat", tokens=2))
    counted(three.workers[2], 1)
    left.close()
    counted(three.workers[1], 0)
    wire.close()
    assert next_.whole().status == 200


def test_no_engine_is_said_at_once(three: Host, slow: Simulator) -> None:
    try:
        three.serve(slots=1)
        for worker in three.workers:
            answer = gateway.ask(worker, gateway.request("chat"))
            assert (answer.status, gateway.error_code(answer)) == (503, "no_ready_engine")
    finally:
        three.serve(slow.address, slots=1)


def test_those_who_wait_are_told_when_the_last_engine_goes(three: Host, slow: Simulator) -> None:
    wire = endless(three.workers[1])
    asking = Asking(three.workers[2], gateway.request("chat"))
    counted(three.workers[2], 1)
    time.sleep(0.05)
    try:
        three.serve(slots=1)
        answer = asking.whole()
        assert (answer.status, gateway.error_code(answer)) == (503, "no_ready_engine")
    finally:
        wire.close()
        three.serve(slow.address, slots=1)


def test_more_at_once_than_slots_on_every_worker(three: Host, slow: Simulator) -> None:
    """Slots are exact: the engine counts what runs there at once."""
    three.serve(slow.address, slots=4)
    stop = threading.Event()
    seen: list[int] = []

    def look() -> None:
        while not stop.is_set():
            state = slow.state()
            seen.append(state["running"] + state["waiting"])

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(3):
            asked = [Asking(three.workers[n % COUNT], gateway.request("chat", tokens=8)) for n in range(9)]
            for asking in asked:
                gateway.check_answer("chat", asking.whole(), stream=False, tokens=8)
    finally:
        stop.set()
        looking.join()
        three.serve(slow.address, slots=1)
    assert max(seen) == 4


# -- deaths


@pytest.fixture
def fresh(tmp_path: Path, slow: Simulator) -> Iterator[Host]:
    with host(tmp_path, queue_seconds=10) as made:
        made.serve(slow.address, slots=1)
        made.joined()
        yield made
        slow.reset()


def test_a_killed_worker_gives_its_slots_back(fresh: Host, slow: Simulator) -> None:
    with endless(fresh.workers[1]):
        asking = Asking(fresh.workers[2], gateway.request("chat", tokens=2))
        counted(fresh.workers[2], 1)
        fresh.workers[1].kill()
        assert asking.whole().status == 200
    fresh.workers.pop(1)
    fresh.settled()


def revive(fresh: Host, worker: WorkerProcess, slow: Simulator) -> None:
    worker.restart()
    worker.serve(slow.address, slots=1)


def test_an_owner_is_replaced_and_knows_who_holds_what(fresh: Host, slow: Simulator) -> None:
    wire, _, events = gateway.start_stream(fresh.workers[1], gateway.request("chat", stream=True, tokens=ENDLESS))
    asking = Asking(fresh.workers[2], gateway.request("chat", tokens=2), seconds=20)
    counted(fresh.workers[2], 1)
    fresh.owner.kill()
    for _ in range(20):
        next(events)  # who has a slot does not notice
    late = Asking(fresh.workers[1], gateway.request("chat", tokens=2), seconds=20)
    time.sleep(0.3)
    revive(fresh, fresh.owner, slow)
    fresh.joined(2)
    own = Asking(fresh.owner, gateway.request("chat", tokens=2), seconds=20)
    counted(fresh.owner, 1)
    time.sleep(0.3)
    assert not (asking.done or late.done or own.done)
    assert slow.state()["running"] == 1
    wire.close()
    assert [one.whole().status for one in (asking, late, own)] == [200] * 3
    fresh.settled()


def test_without_an_owner_patience_still_ends(tmp_path: Path, slow: Simulator) -> None:
    with host(tmp_path, queue_seconds=0.5, queue_requests=2) as made:
        made.serve(slow.address, slots=1)
        made.joined()
        made.owner.kill()
        asked = [Asking(made.workers[1], gateway.request("chat")) for _ in range(2)]
        counted(made.workers[1], 2)
        answer = gateway.ask(made.workers[1], gateway.request("chat"))
        assert (answer.status, gateway.error_code(answer)) == (503, "queue_full")
        for asking in asked:
            answer = asking.whole()
            assert (answer.status, gateway.error_code(answer)) == (503, "queue_timeout")
        made.workers.pop(0)
        made.settled()


def test_an_owner_that_drains_serves_the_others_to_their_end(fresh: Host, slow: Simulator) -> None:
    wire = endless(fresh.workers[1])
    asking = Asking(fresh.workers[2], gateway.request("chat", tokens=20))
    counted(fresh.workers[2], 1)
    for worker in fresh.workers:
        worker.say({"type": "drain", "seconds": 5})
    time.sleep(0.3)
    assert fresh.owner.process.poll() is None
    wire.close()
    gateway.check_answer("chat", asking.whole(), stream=False, tokens=20)
    for worker in fresh.workers:
        worker.hear("drained")


def test_garbage_on_the_owners_socket_costs_that_connection_only(three: Host) -> None:
    path = str(json.loads((three.owner.folder / "worker-0.json").read_bytes())["admission_socket"])
    for garbage in (b"\xff\xff\xff\xff", b"\0\0\0\3abc", b"\0\0\0\1\x90GET / HTTP/1.1\r\n\r\n"):
        with client.connect(f"unix:{path}") as wire:
            wire.send(garbage)
            with contextlib.suppress(ConnectionResetError):
                wire.half_close()
                wire.read_to_end()
    gateway.check_answer("chat", gateway.ask(three.workers[1], gateway.request("chat")), stream=False)


# -- what else they share


def test_failures_on_different_workers_open_one_breaker(tmp_path: Path) -> None:
    with simulator.started() as bad, host(tmp_path, breaker_failures=5, queue_seconds=5) as made:
        made.serve(bad.address, slots=8)
        made.joined()
        bad.misbehave("reset", point="head")
        for number in range(5):
            answer = gateway.ask(made.workers[number % COUNT], gateway.request("completions"))
            assert answer.status == 502
        before = bad.state()["requests_seen"]
        asked = [Asking(worker, gateway.request("completions"), seconds=20) for worker in made.workers]
        time.sleep(0.3)
        assert not any(asking.done for asking in asked), "all wait for the breaker"
        assert bad.state()["requests_seen"] == before
        bad.reset()
        assert [asking.whole().status for asking in asked] == [200] * COUNT
        made.settled()


def test_random_comings_and_goings_leave_nothing(tmp_path: Path, slow: Simulator) -> None:
    """Clients that leave at any time, on all workers, while the owner and the others are killed in between."""
    chance = random.Random(7)
    with host(tmp_path, queue_seconds=2) as made:
        made.serve(slow.address, slots=3)
        made.joined()
        stop = threading.Event()
        answered: list[int] = []

        def come_and_go(seed: int) -> None:
            dice = random.Random(seed)
            while not stop.is_set():
                worker = dice.choice(made.workers)
                with contextlib.suppress(OSError, client.Ended, TimeoutError), client.connect(worker.url) as wire:
                    wire.send(
                        gateway.request(dice.choice(APIS), stream=dice.random() < 0.5, tokens=dice.randint(1, 30))
                    )
                    if dice.random() < 0.4:
                        time.sleep(dice.random() * 0.1)
                        continue
                    answered.append(wire.read_head().status)

        clients = [threading.Thread(target=come_and_go, args=(seed,)) for seed in range(12)]
        for thread in clients:
            thread.start()
        try:
            for _ in range(4):
                time.sleep(1.0)
                worker = chance.choice(made.workers)
                worker.kill()
                worker.restart()
                worker.serve(slow.address, slots=3)
        finally:
            stop.set()
            for thread in clients:
                thread.join()
        made.settled()
        assert answered.count(200) > 50
        slow.wait_for(lambda state: state["running"] == 0)
        assert made.taken() == 0
        asked = [Asking(made.workers[n % COUNT], gateway.request("chat", tokens=2)) for n in range(6)]
        assert [asking.whole().status for asking in asked] == [200] * 6

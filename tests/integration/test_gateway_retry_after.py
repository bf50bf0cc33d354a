"""Clients that come back when Retry-After says, through a real worker to a slow engine."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import gateway, simulator
from tests.support.client import Response
from tests.support.simulator import Simulator
from tests.support.worker import WorkerProcess, running_worker

BURST = 40


@pytest.fixture
def engine() -> Iterator[Simulator]:
    """5 ms a token: two slots give back 20 answers of 20 tokens a second at most."""
    with simulator.started("--decode-step-ms", "5") as engine:
        yield engine


@pytest.fixture
def worker(tmp_path: Path, engine: Simulator) -> Iterator[WorkerProcess]:
    with running_worker(tmp_path / "worker", queue_requests=8, overload_seconds=1.0) as running:
        running.serve(engine.address, slots=2)
        yield running
        gateway.settled(running)


def ask(worker: WorkerProcess, number: int) -> Response:
    question = [{"role": "user", "content": "x" * (number + 1)}]
    return gateway.ask(worker, gateway.request("chat", tokens=20, messages=question), 20)


def test_clients_of_a_burst_get_in_when_they_come_back_as_told(worker: WorkerProcess) -> None:
    def keeps_busy(until: float) -> None:
        while time.monotonic() < until:
            assert ask(worker, 0).status == 200

    def obeys(number: int) -> tuple[Response, Response | None]:
        first = ask(worker, number)
        if first.status == 200:
            return first, None
        time.sleep(int(first.head.headers["retry-after"]))
        return first, ask(worker, number)

    with ThreadPoolExecutor(BURST) as clients:
        list(clients.map(keeps_busy, [time.monotonic() + 2.5] * 4))  # so that it is known how fast slots come back
        came = list(clients.map(obeys, range(1, BURST + 1)))
    refused = [first for first, second in came if second is not None]
    assert len(refused) >= BURST // 2
    assert {(answer.status, gateway.error_code(answer)) for answer in refused} == {(503, "queue_full")}
    told = [int(answer.head.headers["retry-after"]) for answer in refused]
    assert len(set(told)) > 1  # not all at once
    sent_away_again = [second for _, second in came if second is not None and second.status != 200]
    assert len(sent_away_again) <= 2

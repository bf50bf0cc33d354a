"""Limits of keys, tenants and routes, counted by the host's owner: real workers, the simulator behind them."""

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import client, gateway, redis, simulator
from tests.support.gateway import error_code
from tests.support.simulator import Simulator
from tests.support.worker import WorkerProcess, running_worker, snapshot

OTHER = "vts_otherkey0000_0123456789abcdefghijklmnopqrstuv"
THIRD = "vts_thirdkey0000_0123456789abcdefghijklmnopqrstuv"  # another tenant's
MINE = "vts_testkey00000_0123456789abcdefghijklmnopqrstuv"
_versions = itertools.count(2)
RESET = re.compile(r"(\d+m)?(\d+(\.\d+)?s)?(\d+ms)?")


@pytest.fixture(scope="module")
def engine() -> Iterator[Simulator]:
    with simulator.started("--enable-prompt-tokens-details") as started:
        yield started


@contextlib.contextmanager
def limited(
    folder: Path,
    engine: Simulator,
    *,
    workers: int = 1,
    key: dict[str, Any] | None = None,
    tenant: dict[str, Any] | None = None,
    route: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[list[WorkerProcess]]:
    """MINE and OTHER are two keys of one tenant; `key` is MINE's limits."""
    document = snapshot(
        keys=[
            {"id": "testkey00000", "key": MINE, "tenant": "test", "rates": key},
            {"id": "otherkey0000", "key": OTHER, "tenant": "test"},
            {"id": "thirdkey0000", "key": THIRD, "tenant": "third", "rates": {"concurrent": 100}},
        ],
        tenants=[{"name": "test", "rates": tenant}],
        route_rates=route,
    )
    shared = {"workers": workers, "admission_socket": str(folder / "admission.sock"), **options}
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(running_worker(folder / f"w{index}", document=document, worker=index, **shared))
            for index in range(workers)
        ]
        for worker in running:
            worker.serve(engine.address)
        gateway.wait_until(lambda: running[0].log().count("is here") == workers - 1, what="all are here")
        yield running
        for worker in running:
            gateway.settled(worker)
    engine.reset()


def ask(worker: WorkerProcess, key: str = MINE, api: str = "chat", **more: Any) -> client.Response:
    return gateway.ask(worker, gateway.request(api, headers={"authorization": f"Bearer {key}"}, **more))


def codes(answers: Sequence[client.Response]) -> list[str]:
    return ["ok" if answer.status == 200 else error_code(answer) for answer in answers]


@pytest.mark.parametrize("workers", [1, 3])
def test_requests_a_minute_are_exact_among_all_workers(tmp_path: Path, engine: Simulator, workers: int) -> None:
    with (
        limited(tmp_path, engine, workers=workers, key={"requests_per_minute": 7}) as running,
        ThreadPoolExecutor(12) as threads,
    ):
        answers = list(threads.map(lambda n: ask(running[n % workers]), range(24)))
        assert sorted(codes(answers)) == ["ok"] * 7 + ["requests_limit"] * 17
        refused = next(answer for answer in answers if answer.status == 429)
        assert 1 <= int(refused.head.headers["retry-after"]) <= 60
        for answer in answers:
            assert answer.head.headers["x-ratelimit-limit-requests"] == "7"
            assert RESET.fullmatch(answer.head.headers["x-ratelimit-reset-requests"])
        left = sorted(
            int(answer.head.headers["x-ratelimit-remaining-requests"]) for answer in answers if answer.status == 200
        )
        assert left == list(range(7))
        assert ask(running[0], OTHER).status == 200  # its own limit is its own


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_tokens_a_minute_are_settled_to_what_was_used(
    tmp_path: Path, engine: Simulator, workers: int, stream: bool
) -> None:
    """The estimate is given back as far as it was not used; the one in flight may go over, the next may not."""
    with limited(tmp_path, engine, workers=workers, tenant={"tokens_per_minute": 1000}) as running:
        used, answers = 0, []
        for n in range(100):
            answers.append(
                ask(running[n % workers], (MINE, OTHER)[n % 2], stream=stream, tokens=100, sim_prompt_tokens=20)
            )
            if answers[-1].status != 200:
                break
            used += 120
        assert codes(answers) == ["ok"] * 9 + ["tokens_limit"]  # 8 x 120 leave 40, which let the ninth in
        assert used == 1080
        assert answers[-1].head.headers["x-ratelimit-remaining-tokens"] == "0"
        assert answers[0].head.headers["x-ratelimit-limit-tokens"] == "1000"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("which", ["tokens_per_minute", "tokens_per_day"])
def test_many_at_once_do_not_all_get_what_is_left(tmp_path: Path, engine: Simulator, which: str, named: bool) -> None:
    """Short answers before say nothing of those that come: the one in flight may go over, whether it names its length
    or not."""
    with (
        simulator.started("--decode-step-ms", "1") as slow,
        limited(tmp_path, slow, workers=2, tenant={which: 1500}) as running,
        ThreadPoolExecutor(16) as threads,
    ):
        assert codes([ask(running[n % 2], tokens=3, sim_prompt_tokens=7) for n in range(24)]) == ["ok"] * 24
        length = {"max_tokens": 900} if named else {"max_tokens": None}

        def long(n: int) -> client.Response:
            return ask(running[n % 2], tokens=800, sim_prompt_tokens=7, **length)

        found = codes(list(threads.map(long, range(16))))
        assert 1 <= found.count("ok") <= 2, found
        assert set(found) == {"ok", "tokens_limit"}
        assert set(codes([long(n) for n in range(3)])) <= {"ok", "tokens_limit", "budget_spent"}


@pytest.mark.parametrize("workers", [1, 2])
def test_requests_at_once(tmp_path: Path, engine: Simulator, workers: int) -> None:
    with (
        simulator.started("--decode-step-ms", "5") as slow,
        limited(tmp_path, slow, workers=workers, key={"concurrent": 2}) as running,
    ):
        wires = [
            gateway.start_stream(running[n % workers], gateway.request("chat", stream=True, tokens=4000))[0]
            for n in range(2)
        ]
        third = ask(running[-1])
        assert (third.status, error_code(third)) == (429, "concurrency_limit")
        wires.pop().close()
        gateway.wait_until(lambda: ask(running[0], tokens=2).status == 200, what="its place is free again")
        wires.pop().close()


def test_a_killed_worker_gives_its_requests_at_once_back(tmp_path: Path, engine: Simulator) -> None:
    with (
        simulator.started("--decode-step-ms", "5") as slow,
        limited(tmp_path, slow, workers=2, key={"concurrent": 1}) as running,
    ):
        wire = gateway.start_stream(running[1], gateway.request("chat", stream=True, tokens=4000))[0]
        assert ask(running[0]).status == 429
        running[1].kill()
        gateway.wait_until(lambda: ask(running[0], tokens=2).status == 200, what="its place is free again")
        wire.close()
        running[1].restart()
        running[1].serve(slow.address)


def test_an_owner_that_is_replaced_knows_who_holds_what(tmp_path: Path, engine: Simulator) -> None:
    with (
        simulator.started("--decode-step-ms", "5") as slow,
        limited(tmp_path, slow, workers=2, key={"concurrent": 1}) as running,
    ):
        wire = gateway.start_stream(running[1], gateway.request("chat", stream=True, tokens=4000))[0]
        running[0].kill()
        running[0].restart()
        running[0].serve(slow.address)
        gateway.wait_until(lambda: running[0].log().count("is here") == 2, what="both have met again")
        for worker in running:
            assert error_code(ask(worker)) == "concurrency_limit"
        wire.close()
        gateway.wait_until(lambda: ask(running[1], tokens=2).status == 200, what="its place is free again")


@pytest.mark.parametrize("which", ["tokens_per_day", "tokens_per_month"])
def test_a_budget_is_spent_and_survives_a_restart(tmp_path: Path, engine: Simulator, which: str) -> None:
    """What the ledger has of this day and month counts from the first request on."""
    ledger = {"spool_folder": str(tmp_path / "spool"), "spent_path": str(tmp_path / "spent.json")}
    with limited(tmp_path, engine, workers=2, tenant={which: 300}, **ledger) as running:
        answers = [ask(running[n % 2], tokens=80, sim_prompt_tokens=20) for n in range(5)]
        assert codes(answers) == ["ok"] * 3 + ["budget_spent"] * 2
        assert answers[-1].head.headers["x-should-retry"] == "false"
        assert int(answers[-1].head.headers["retry-after"]) <= 60
        for worker in running:
            worker.kill()
        for worker in running:
            worker.restart()
            worker.serve(engine.address)
        assert codes([ask(worker) for worker in running]) == ["budget_spent"] * 2


def test_a_route_has_limits_of_all_its_tenants(tmp_path: Path, engine: Simulator) -> None:
    with limited(tmp_path, engine, route={"requests_per_minute": 2}) as (worker,):
        assert codes([ask(worker, MINE), ask(worker, OTHER), ask(worker, MINE)]) == ["ok", "ok", "requests_limit"]


def test_what_no_engine_got_is_given_back(tmp_path: Path, engine: Simulator) -> None:
    with limited(tmp_path, engine, key={"requests_per_minute": 2, "tokens_per_minute": 500}) as (worker,):
        worker.fleet()
        for _ in range(5):
            assert error_code(ask(worker)) == "no_ready_engine"
        worker.serve(engine.address)
        assert codes([ask(worker) for _ in range(3)]) == ["ok", "ok", "requests_limit"]


def test_counting_tokens_takes_a_request_but_no_tokens(tmp_path: Path, engine: Simulator) -> None:
    with limited(tmp_path, engine, key={"tokens_per_minute": 10}) as (worker,):
        for _ in range(3):
            data = client.post("/tokenize", {"model": "gpt-oss-20b", "prompt": "What now? " * 50}, gateway.AUTH)
            assert gateway.ask(worker, data).status == 200


@pytest.mark.parametrize("api", gateway.APIS)
def test_each_api_is_told_in_its_own_words(tmp_path: Path, engine: Simulator, api: str) -> None:
    with limited(tmp_path, engine, key={"requests_per_minute": 1}) as (worker,):
        assert ask(worker, api=api, stream=True).head.headers["x-ratelimit-remaining-requests"] == "0"
        answer = ask(worker, api=api)
        assert answer.status == 429
        assert "test" in answer.json["error"]["message"] or "key" in answer.json["error"]["message"]
        assert answer.json["error"]["type"] == "rate_limit_error"


def counts_there(worker: WorkerProcess, known: Any) -> bool:
    """In the emptied Redis."""
    known.flushdb()
    return ask(worker, THIRD, tokens=1).status == 200 and bool(known.keys("vts:*key:thirdkey*"))


@contextlib.contextmanager
def hosts(
    folder: Path, engine: Simulator, server: redis.RedisServer, rates: dict[str, Any], **options: Any
) -> Iterator[list[WorkerProcess]]:
    """Two hosts of one worker each, which count in one Redis."""
    shared = {"gateways": 2, "limits_redis_url": server.url, "limits_wait_seconds": 2.0, **options}
    with contextlib.ExitStack() as stack:
        running = []
        for name in ("one", "two"):
            (worker,) = stack.enter_context(limited(folder / name, engine, tenant=rates, **shared))
            running.append(worker)
            known = stack.enter_context(contextlib.closing(server.client()))
            gateway.wait_until(partial(counts_there, worker, known), 20, what="it counts in Redis")
            known.flushdb()
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.RedisServer]:
    with redis.started(tmp_path_factory.mktemp("redis")) as running:
        yield running


def test_several_hosts_count_in_redis(tmp_path: Path, engine: Simulator, server: redis.RedisServer) -> None:
    with hosts(tmp_path, engine, server, {"requests_per_minute": 9}) as pair, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda n: ask(pair[n % 2], stream=bool(n & 2)), range(24)))
        assert sorted(codes(answers)) == ["ok"] * 9 + ["requests_limit"] * 15
        assert answers[0].head.headers["x-ratelimit-limit-requests"] == "9"


@pytest.mark.parametrize(
    ("away", "codes_"), [("share", ["ok", "ok", "requests_limit"]), ("refuse", ["limits_unavailable"] * 3)]
)
def test_without_redis_the_policy_holds_until_it_is_back(
    tmp_path: Path, engine: Simulator, away: str, codes_: list[str]
) -> None:
    """Of 4 a minute each of two hosts has 2 by itself."""
    with (
        redis.started(tmp_path) as server,
        hosts(tmp_path, engine, server, {"requests_per_minute": 4}, limits_away=away, limits_wait_seconds=0.5) as pair,
    ):
        server.kill()
        for worker in pair:
            assert codes([ask(worker) for _ in range(3)]) == codes_
        server.restart()
        gateway.wait_until(
            lambda: codes([ask(worker) for worker in pair]) == ["ok", "ok"], 30, what="both count there again"
        )
        assert "requests_limit" in codes([ask(pair[n % 2]) for n in range(5)])


def test_without_redis_the_owner_counts_for_all_workers_of_a_host(tmp_path: Path, engine: Simulator) -> None:
    """Of 4 this one of two hosts has 2, however many workers it has; what is given back is given back there."""
    with (
        redis.started(tmp_path) as server,
        simulator.started("--decode-step-ms", "5") as slow,
        limited(
            tmp_path,
            slow,
            workers=3,
            key={"requests_per_minute": 4},
            tenant={"concurrent": 4},
            gateways=2,
            limits_redis_url=server.url,
            limits_wait_seconds=0.5,
        ) as running,
        ThreadPoolExecutor(6) as threads,
    ):
        with contextlib.closing(server.client()) as known:
            for worker in running:
                gateway.wait_until(partial(counts_there, worker, known), 20, what="it counts in Redis")
        server.kill()
        answers = list(threads.map(lambda n: ask(running[n % 3], tokens=2), range(12)))
        assert sorted(codes(answers)) == ["ok"] * 2 + ["requests_limit"] * 10
        assert {answer.head.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
        for worker in running:
            gateway.settled(worker)
        other = {"authorization": f"Bearer {OTHER}"}
        wires = [
            gateway.start_stream(worker, gateway.request("chat", headers=other, stream=True, tokens=4000))[0]
            for worker in running[1:]
        ]
        assert codes([ask(worker, OTHER, tokens=2) for worker in running]) == ["concurrency_limit"] * 3
        wires.pop().close()
        for worker in running:
            gateway.wait_until(lambda w=worker: ask(w, OTHER, tokens=2).status == 200, what="there is a place again")
        wires.pop().close()

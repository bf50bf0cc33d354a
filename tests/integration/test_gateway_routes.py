"""What a route, a tenant and a class make of a request, on real workers before real (simulated) engines."""

import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from simulator.answers import natural_tokens
from vitalis_serve.fleet import Replica, ReplicaState

from tests.support import client, gateway, simulator
from tests.support import control as controls
from tests.support.client import Response, Wire
from tests.support.gateway import PATHS
from tests.support.simulator import Simulator
from tests.support.worker import MODEL, WorkerProcess, running_worker

ENDLESS = 2000  # tokens: ten seconds of a slow engine
LORA, SMALL = "relief-lora", "small"
CANARY = "canary"
GUIDE = "/emergency-guidance"
# Every tenant a key of its own name; alike and akin are of one cache group.
KEYS = {
    "alice": {}, "bob": {}, "alike": {}, "akin": {}, "ops": {"scopes": ["inference", "debug"]},
    "urgent": {"class": "emergency"}, "reader": {"class": "interactive"}, "night": {"class": "batch"},
    "narrow": {"routes": [MODEL]}, "two": {"routes": [MODEL, "plain"]},
}  # fmt: skip
ROUTES: list[dict[str, Any]] = [
    {"name": MODEL, "model": MODEL},
    {"name": "plain", "model": MODEL},
    {
        "name": "manners", "model": MODEL, "preamble": "Be calm.",
        "defaults": {"temperature": 0.7, "reasoning_effort": "low", "max_tokens": 40},
        "limits": {"max_tokens": 60, "n": 2},
    },
    {"name": "weighted", "model": MODEL, "weights": [{"model": MODEL, "weight": 3}, {"model": CANARY, "weight": 1}]},
    {"name": "shy", "model": LORA, "fallbacks": ["nowhere", SMALL, MODEL]},
    {"name": "backed", "model": MODEL, "fallbacks": [SMALL]},
    {"name": "vitalis-emergency", "model": MODEL, "class": "emergency", "fallbacks": [SMALL]},
]  # fmt: skip
_ids = itertools.count()


def document(routes: list[dict[str, Any]] | None = None) -> bytes:
    """A snapshot with all of that."""
    return json.dumps(
        {
            "version": 1,
            "cache_secret": "vcs_0123456789abcdef",
            "tenants": [{"name": name, "cache_group": "kin"} for name in ("alike", "akin")],
            "keys": [
                {
                    "id": name, "digest": hashlib.sha256(name.encode()).hexdigest(), "tenant": name,
                    "scopes": ["inference"], "routes": ["*"], "class": "standard", "expires_at": None, **more,
                }
                for name, more in KEYS.items()
            ],
            "routes": routes or ROUTES,
        }
    ).encode()  # fmt: skip


def auth(tenant: str = "alice", **headers: str) -> dict[str, str]:
    return {"authorization": f"Bearer {tenant}", **headers}


def request(
    tenant: str = "alice", *, route: str = MODEL, text: str = "What now?", api: str = "chat",
    headers: dict[str, str] | None = None, **more: Any,
) -> bytes:  # fmt: skip
    """A question of a tenant's."""
    made = gateway.document(api, **({"model": route} | more))
    if "messages" in made:
        made["messages"] = [{"role": "user", "content": text}]
    elif "prompt" in made:
        made["prompt"] = text
    return client.post(PATHS[api], made, auth(tenant) | (headers or {}))


def say(name: str, address: str, *models: str, slots: int = 64) -> Replica:
    return Replica(name, address, ReplicaState.READY, models=models or (MODEL,), slots=slots, incarnation=1)


def body_of(data: bytes) -> dict[str, Any]:
    """Of a request that a scripted engine got."""
    return dict(json.loads(data.partition(b"\r\n\r\n")[2]))


def header_of(data: bytes, name: str) -> str:
    return data.lower().partition(f"\r\n{name}: ".encode())[2].partition(b"\r\n")[0].decode()


CHAT = {
    "id": "c", "object": "chat.completion", "model": MODEL,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Breathe."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
}  # fmt: skip


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def quick(logs: Path) -> Iterator[Simulator]:
    with simulator.started("--served-model-name", MODEL, CANARY, SMALL, LORA, log=logs / "quick.jsonl") as engine:
        yield engine


@pytest.fixture(scope="module")
def slow(logs: Path) -> Iterator[Simulator]:
    """5 ms a token."""
    with simulator.started(
        "--decode-step-ms", "5", "--served-model-name", MODEL, SMALL, log=logs / "slow.jsonl"
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def _worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    folder = tmp_path_factory.mktemp("routes")
    with running_worker(folder, document=document(), queue_requests=2, queue_seconds=1, routing="affinity") as running:
        yield running


@pytest.fixture
def worker(_worker: WorkerProcess, quick: Simulator, slow: Simulator) -> Iterator[WorkerProcess]:
    yield _worker
    gateway.settled(_worker)
    for engine in (quick, slow):
        engine.reset()
        engine.wait_for(lambda state: not state["running"] and not state["waiting"])


@contextlib.contextmanager
def occupied(worker: WorkerProcess, route: str = MODEL, *, streams: int = 1, tenant: str = "alice") -> Iterator[None]:
    """So many slots are taken by endless streams."""
    wires = [
        gateway.start_stream(worker, request(tenant, route=route, stream=True, tokens=ENDLESS))[0]
        for _ in range(streams)
    ]
    try:
        yield
    finally:
        for wire in wires:
            wire.close()


@contextlib.contextmanager
def waiting(worker: WorkerProcess, *data: bytes) -> Iterator[list[Wire]]:
    """Requests sent one after the other, each counted before the next."""
    open_before = worker.in_flight()["count"]
    wires = []
    for number, one in enumerate(data, 1):
        wire = client.connect(worker.url)
        wires.append(wire)
        wire.send(one)
        gateway.wait_until(lambda n=number: worker.in_flight()["count"] == open_before + n)
    try:
        yield wires
    finally:
        for wire in wires:
            wire.close()


# -- what a route says


def test_defaults_limits_and_preamble_reach_the_engine(worker: WorkerProcess) -> None:
    with gateway.scripted_engine() as engine:
        engine.scripts = [[gateway.http_answer(CHAT)]]
        worker.serve(engine.address)
        asked = {"model": "manners", "messages": [{"role": "user", "content": "help"}]}
        for more in ({}, {"max_tokens": 500, "temperature": 0, "reasoning_effort": "high"}):
            answer = gateway.ask(worker, client.post(PATHS["chat"], asked | more, auth()))
            assert answer.status == 200
            assert answer.head.headers["x-vitalis-route"] == "manners"
        assert gateway.ask(worker, client.post(PATHS["chat"], asked | {"n": 3}, auth())).status == 400
        first, second = map(body_of, engine.requests)
        gateway.settled(worker)
    conversation = [{"role": "system", "content": "Be calm."}, {"role": "user", "content": "help"}]
    assert first["messages"] == second["messages"] == conversation
    assert (first["model"], first["temperature"], first["reasoning_effort"]) == (MODEL, 0.7, "low")
    assert first["max_completion_tokens"] == 40
    assert (second["temperature"], second["reasoning_effort"], second["max_tokens"]) == (0, "high", 60)


def test_the_engine_generates_no_more_than_the_routes_limit(worker: WorkerProcess, quick: Simulator) -> None:
    worker.serve(quick.address)
    for api in gateway.APIS:
        if api == "completions":
            continue  # a bare prompt has no place for the preamble
        for more in ({"max_tokens": 500}, {}):
            data = gateway.document(api, tokens=300, model="manners", **more)
            if not more:
                data.pop("max_tokens", None)
                if api == "messages":
                    continue
            answer = gateway.ask(worker, client.post(PATHS[api], data, auth()))
            assert answer.status == 200, answer.body
            usage = answer.json["usage"]
            limit = 60 if more and api != "responses" else 40
            assert usage.get("completion_tokens", usage.get("output_tokens")) == limit, api
    assert gateway.ask(worker, request(route="manners", api="completions")).status == 400


def test_weights_keep_a_conversation_and_split_the_others(worker: WorkerProcess, quick: Simulator) -> None:
    worker.fleet(say("engine-0", quick.address, MODEL, CANARY))
    chosen = {}
    with client.connect(worker.url) as wire:

        def ask(text: str, *turns: dict[str, str], **headers: str) -> str:
            messages = [{"role": "user", "content": text}, *turns]
            wire.send(request(route="weighted", messages=messages, tokens=2, headers=headers))
            return str(wire.read_response().json["model"])

        for number in range(200):
            wire.send(request(route="weighted", text=f"question {number}", tokens=2))
            chosen[number] = str(wire.read_response().json["model"])
        split = Counter(chosen.values())
        assert 30 <= split[CANARY] <= 70, split  # a quarter of 200; six sigma would be 14 to 86
        for number in range(20):
            wire.send(request(route="weighted", text=f"question {number}", tokens=2, stream=True, temperature=0.1))
            answer = wire.read_response()
            assert answer.events[0].json["model"] == chosen[number]
        # a session's name is the conversation, whatever is said
        for session in range(10):
            models = set()
            for text in ("a", "b", "c"):
                wire.send(request(route="weighted", text=text, tokens=2, headers={"x-session-id": f"s{session}"}))
                models.add(wire.read_response().json["model"])
            assert len(models) == 1


def test_a_long_preamble_does_not_make_all_conversations_one(tmp_path: Path, quick: Simulator) -> None:
    routes = [{**ROUTES[3], "preamble": "Be calm. " * 4000}]
    with running_worker(tmp_path, document=document(routes), routing="affinity") as worker:
        worker.fleet(*(say(f"engine-{i}", quick.address, MODEL, CANARY) for i in range(3)))
        with client.connect(worker.url) as wire:
            models, homes = set(), set()
            for number in range(40):
                wire.send(request("ops", route="weighted", text=f"question {number}", tokens=1))
                answer = wire.read_response()
                models.add(answer.json["model"])
                homes.add(answer.head.headers["x-vitalis-replica"])
    assert models == {MODEL, CANARY}
    assert len(homes) == 3


# -- fallbacks


def fallback_of(answer: Response) -> str | None:
    return answer.head.headers.get("x-vitalis-fallback")


@pytest.mark.parametrize("stream", [False, True])
def test_fallbacks_are_asked_in_order_where_nobody_holds_the_model(
    worker: WorkerProcess, quick: Simulator, stream: bool
) -> None:
    def ask(*models: str) -> Response:
        worker.fleet(say("engine-0", quick.address, *models))
        return gateway.ask(worker, request(route="shy", stream=stream, tokens=3))

    for held, answers in (((MODEL, SMALL, LORA), LORA), ((MODEL, SMALL), SMALL), ((MODEL,), MODEL)):
        answer = ask(*held)
        assert answer.status == 200
        assert fallback_of(answer) == (None if answers == LORA else answers)
        assert (answer.events[0].json if stream else answer.json)["model"] == answers
        assert answer.head.headers["x-vitalis-route"] == "shy"
    answer = ask("another")
    assert (answer.status, gateway.error_code(answer)) == (503, "no_ready_engine")


def test_a_fallback_answers_where_the_queue_is_full(worker: WorkerProcess, quick: Simulator, slow: Simulator) -> None:
    worker.fleet(say("engine-0", slow.address, MODEL, slots=1), say("engine-1", quick.address, SMALL))
    with occupied(worker), waiting(worker, request(tokens=1), request(tokens=1)) as queued:
        answer = gateway.ask(worker, request(route="backed", tokens=3))
        assert (answer.status, fallback_of(answer), answer.json["model"]) == (200, SMALL, SMALL)
        refused = gateway.ask(worker, request(tokens=3))
        assert (refused.status, gateway.error_code(refused)) == (503, "queue_full")
        for wire in queued:
            assert wire.read_response().status == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_fallback_answers_who_waited_in_vain(
    worker: WorkerProcess, quick: Simulator, slow: Simulator, stream: bool
) -> None:
    worker.fleet(say("engine-0", slow.address, MODEL, slots=1), say("engine-1", quick.address, SMALL))
    with occupied(worker):
        name = f"waited-{next(_ids)}"
        answer = gateway.ask(worker, request(route="backed", stream=stream, headers={"x-request-id": name}))
        gateway.check_answer("chat", answer, stream=stream)
        assert fallback_of(answer) == SMALL
        record = gateway.record_of(worker, name)
    assert record["outcome"] == "ok"
    assert record["queue_ms"] >= 900
    assert record["replica"] == "engine-1"


def test_a_fallback_answers_who_is_shed_for_another_tenant(
    worker: WorkerProcess, quick: Simulator, slow: Simulator
) -> None:
    worker.fleet(say("engine-0", slow.address, MODEL, slots=1), say("engine-1", quick.address, SMALL))
    ours = [request("alice", route="backed", tokens=3) for _ in range(2)]
    with occupied(worker), waiting(worker, *ours) as queued, client.connect(worker.url) as bob:
        bob.send(request("bob", tokens=1))
        answer = queued[1].read_response()  # the newest of the tenant that has most
        assert (answer.status, fallback_of(answer)) == (200, SMALL)
        assert answer.head.headers["server-timing"].startswith("queue;dur=")
        assert bob.read_response().status == 503


def test_a_fallback_answers_when_the_last_replica_of_the_model_goes(
    worker: WorkerProcess, quick: Simulator, slow: Simulator
) -> None:
    both = say("engine-0", slow.address, MODEL, slots=1), say("engine-1", quick.address, SMALL)
    worker.fleet(*both)
    with occupied(worker), waiting(worker, request(route="backed", tokens=3)) as (wire,):
        worker.fleet(both[1])
        answer = wire.read_response()
        assert (answer.status, fallback_of(answer)) == (200, SMALL)


def test_a_fallback_answers_where_every_engine_failed_but_not_at_one_that_did(
    worker: WorkerProcess, quick: Simulator, slow: Simulator
) -> None:
    slow.misbehave("status", status=500, path=PATHS["chat"])
    worker.fleet(say("engine-0", slow.address, MODEL, SMALL), say("engine-1", quick.address, SMALL))
    for _ in range(5):
        answer = gateway.ask(worker, request(route="backed", tokens=3))
        assert (answer.status, fallback_of(answer)) == (200, SMALL)
    assert slow.state()["requests_seen"] >= 5
    worker.fleet(say("engine-0", slow.address, MODEL, SMALL))
    name = f"failed-{next(_ids)}"
    answer = gateway.ask(worker, request(route="backed", headers={"x-request-id": name}))
    assert (answer.status, gateway.error_code(answer)) == (502, "engine_protocol")
    assert gateway.record_of(worker, name)["attempts"] == 1


def test_no_fallback_after_the_first_byte(worker: WorkerProcess, quick: Simulator, slow: Simulator) -> None:
    slow.misbehave("cut", point="boundary", after_events=6, requests=1)
    worker.fleet(say("engine-0", slow.address, MODEL), say("engine-1", quick.address, SMALL))
    before = quick.state()["requests_seen"]
    answer = gateway.ask(worker, request(route="backed", stream=True, tokens=20))
    assert (answer.status, fallback_of(answer)) == (200, None)
    assert gateway.terminal_error("chat", answer.events)["code"] == "engine_unreachable"
    assert {event.json["model"] for event in answer.events if "model" in event.json} == {MODEL}
    assert quick.state()["requests_seen"] == before


# -- tenants, groups, classes, scopes


def test_salts_are_of_the_tenant_or_its_group_and_priorities_of_the_class(worker: WorkerProcess) -> None:
    with gateway.scripted_engine() as engine:
        engine.scripts = [[gateway.http_answer(CHAT)]]
        worker.serve(engine.address)
        names = ["alice", "alice", "bob", "alike", "akin", "urgent", "reader", "night"]
        for name in names:
            assert gateway.ask(worker, request(name, cache_salt="mine", priority=-9)).status == 200
        assert gateway.ask(worker, request("alice", route="vitalis-emergency")).status == 200
        got = list(engine.requests)
        gateway.settled(worker)
    salts = [body_of(data)["cache_salt"] for data in got]
    assert salts[0] == salts[1] == salts[8]
    assert salts[3] == salts[4]
    assert len(set(salts)) == 6
    assert all(len(salt) == 32 for salt in salts)
    priorities = dict(zip(names, [int(header_of(data, "x-vllm-priority")) for data in got], strict=False))
    assert priorities["urgent"] < priorities["reader"] < priorities["alice"] < priorities["night"]
    assert int(header_of(got[8], "x-vllm-priority")) == priorities["urgent"], "the route's class, not the key's"


def test_a_prefix_cache_is_shared_within_a_tenant_or_group_alone(worker: WorkerProcess, quick: Simulator) -> None:
    worker.serve(quick.address)
    text = "the same long question " * 100

    def cached(tenant: str) -> int:
        name = f"cached-{next(_ids)}"
        assert gateway.ask(worker, request(tenant, text=text, headers={"x-request-id": name})).status == 200
        gateway.wait_until(lambda: any(r["x-request-id"] == name for r in quick.log()))
        return int(next(r for r in quick.log() if r["x-request-id"] == name)["cached_tokens"])

    assert [cached(name) > 0 for name in ("alice", "alice", "bob", "alike", "akin")] == [
        False, True, False, False, True,
    ]  # fmt: skip


def test_who_debugs_sees_the_replica_and_why_and_nobody_else(worker: WorkerProcess, quick: Simulator) -> None:
    worker.serve(quick.address)
    for stream in (False, True):
        seen = gateway.ask(worker, request("ops", stream=stream)).head.headers
        assert (seen["x-vitalis-replica"], seen["x-vitalis-reason"]) == ("engine-0", "home")
        for tenant in ("alice", "urgent"):
            others = gateway.ask(worker, request(tenant, stream=stream)).head.headers
            assert not {"x-vitalis-replica", "x-vitalis-reason"} & set(others)


# -- homes


def homes(worker: WorkerProcess, *data: bytes) -> list[str]:
    """The replicas that answered, from the access log."""
    names = []
    with client.connect(worker.url) as wire:
        for one in data:
            names.append(f"home-{next(_ids)}")
            wire.send(one.replace(b"host: test\r\n", b"host: test\r\nx-request-id: %b\r\n" % names[-1].encode(), 1))
            assert wire.read_response().status == 200
    gateway.wait_until(lambda: set(names) <= {record["request_id"] for record in worker.records()})
    where = {record["request_id"]: record.get("replica") for record in worker.records()}
    return [where[name] for name in names]


def test_a_conversation_stays_at_home_and_others_live_elsewhere(worker: WorkerProcess, quick: Simulator) -> None:
    worker.serve(*[quick.address] * 3)
    first = homes(worker, *(request(text=f"question {n}", tokens=1) for n in range(60)))
    assert min(Counter(first).values()) >= 8  # of 20
    assert len(Counter(first)) == 3
    again = [
        client.post(
            PATHS["chat"],
            gateway.document("chat", tokens=1, model="plain", stream=True) | {"messages": [
                {"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "and then?"},
            ]},
            auth(),
        )
        for n in range(60)
    ]  # fmt: skip
    assert homes(worker, *again) == first
    others = homes(worker, *(request("bob", text=f"question {n}", tokens=1) for n in range(60)))
    assert others != first
    kin = [
        homes(worker, *(request(name, text=f"question {n}", tokens=1) for n in range(20))) for name in ("alike", "akin")
    ]
    assert kin[0] == kin[1], "who shares a cache shares homes"


def test_a_session_goes_by_its_name(tmp_path: Path, quick: Simulator) -> None:
    with running_worker(tmp_path, document=document(), routing="session") as worker:
        worker.serve(*[quick.address] * 3)
        found = {}
        for session in range(12):
            headers = {"x-session-id": f"session-{session}"}
            said = homes(worker, *(request(text=text, tokens=1, headers=headers) for text in "abc"))
            assert len(set(said)) == 1
            found[session] = said[0]
        assert len(set(found.values())) == 3
        by_text = homes(worker, *(request(text=f"question {n}", tokens=1) for n in range(20)))
        assert homes(worker, *(request(text=f"question {n}", tokens=1) for n in range(20))) == by_text
        assert len(set(by_text)) == 3


def test_home_without_a_free_slot_is_left_for_another(tmp_path: Path, slow: Simulator) -> None:
    with running_worker(tmp_path, document=document(), routing="affinity") as worker:
        worker.serve(slow.address, slow.address, slots=1)
        data = request("ops", stream=True, tokens=ENDLESS)
        first, head, _ = gateway.start_stream(worker, data)
        second, other, _ = gateway.start_stream(worker, data)
        home = head.headers["x-vitalis-replica"]
        assert other.headers["x-vitalis-replica"] != home
        assert other.headers["x-vitalis-reason"] == f"diverted from {home}: no free slot"
        first.close()
        second.close()
        gateway.settled(worker)


# -- surges


def test_an_emergency_gets_in_while_others_queue(tmp_path: Path, slow: Simulator) -> None:
    options = {"routing": "affinity", "reserved_share": 0.25, "queue_seconds": 20}
    with running_worker(tmp_path, document=document(), **options) as worker:
        worker.serve(slow.address, slots=4)
        with occupied(worker, streams=3), waiting(worker, request("bob", tokens=1)) as (standard,):
            assert worker.in_flight()["replicas"] == {"engine-0": 3}
            answer = gateway.ask(worker, request("urgent", tokens=3))
            gateway.check_answer("chat", answer, stream=False, tokens=3)
            assert standard.is_quiet(0.05)
            by_route = gateway.ask(worker, request("bob", route="vitalis-emergency", tokens=3))
            assert by_route.status == 200
        gateway.settled(worker)


def test_a_free_slot_is_an_emergencys_before_it_is_anybody_elses(tmp_path: Path, slow: Simulator) -> None:
    slow_before = len(slow.log())
    with running_worker(tmp_path, document=document(), routing="affinity", queue_seconds=20) as worker:
        worker.serve(slow.address, slots=1)
        order = ["night", "bob", "reader", "urgent"]
        data = [request(name, tokens=2, headers={"x-request-id": f"order-{name}"}) for name in order]
        with contextlib.ExitStack() as open_ones:
            with occupied(worker):
                wires = open_ones.enter_context(waiting(worker, *data))
            for wire in wires:
                assert wire.read_response().status == 200
        gateway.settled(worker)
    log = slow.wait_for_log(slow_before + 5)[slow_before:]
    ran = sorted((r for r in log if (r["x-request-id"] or "").startswith("order-")), key=lambda r: r["arrived"])
    assert [r["x-request-id"].removeprefix("order-") for r in ran] == ["urgent", "reader", "bob", "night"]


def test_a_tenants_weight_is_its_share_of_what_is_full(tmp_path: Path) -> None:
    weighted = json.loads(document())
    weighted["tenants"].append({"name": "alice", "weight": 3})
    served = {"alice": 0, "bob": 0}
    stop = False
    with (
        simulator.started("--decode-step-ms", "1") as engine,
        running_worker(tmp_path / "w", document=json.dumps(weighted).encode(), queue_seconds=30) as worker,
        ThreadPoolExecutor(12) as pool,
    ):
        worker.serve(engine.address, slots=2)

        def flood(tenant: str) -> None:
            with client.connect(worker.url) as wire:
                while not stop:
                    wire.send(request(tenant, tokens=20))
                    assert wire.read_response().status == 200
                    served[tenant] += 1

        flooding = [pool.submit(flood, tenant) for tenant in ["alice", "bob"] * 6]
        gateway.wait_until(lambda: sum(served.values()) >= 40, 20)
        before = dict(served)
        gateway.wait_until(lambda: sum(served.values()) >= 240, 40)
        shares = {tenant: served[tenant] - before[tenant] for tenant in served}
        stop = True
        for one in flooding:
            one.result(20)
        assert 2.4 <= shares["alice"] / shares["bob"] <= 3.6
        gateway.settled(worker)


def test_a_flood_of_one_tenant_does_not_starve_another(tmp_path: Path) -> None:
    """Twelve connections of one tenant without a pause, one of another, two slots: the other's wait is about one turn,
    where first come, first served it would be six."""
    with (
        simulator.started("--decode-step-ms", "2", log=tmp_path / "engine.jsonl") as engine,
        running_worker(tmp_path / "w", document=document(), routing="affinity", queue_seconds=30) as worker,
        ThreadPoolExecutor(12) as pool,
    ):
        worker.serve(engine.address, slots=2)
        stop = False

        def flood() -> None:
            with client.connect(worker.url) as wire:
                while not stop:
                    wire.send(request("alice", tokens=20))
                    assert wire.read_response().status == 200

        flooding = [pool.submit(flood) for _ in range(12)]
        gateway.wait_until(lambda: worker.in_flight()["count"] >= 12)
        for number in range(20):
            answer = gateway.ask(worker, request("bob", tokens=20, headers={"x-request-id": f"bob-{number}"}), 20)
            assert answer.status == 200
        stop = True
        for one in flooding:
            one.result(20)
        gateway.settled(worker)
        log = sorted(engine.log(), key=lambda record: record["arrived"])
    # Counted in turns, not in time: how many of the flood reached the engine between two of the other's.
    ours = [at for at, record in enumerate(log) if (record["x-request-id"] or "").startswith("bob-")]
    between = [later - sooner - 1 for sooner, later in itertools.pairwise(ours)]
    assert len(ours) == 20
    assert sum(between) / len(between) <= 4, between


# -- the interface of Vitalis' first callers


def guide(tenant: str = "alice", *, headers: dict[str, str] | None = None, **fields: Any) -> bytes:
    return client.post(GUIDE, {"prompt": "A scald, what now?"} | fields, auth(tenant) | (headers or {}))


def guidance_error(answer: Response) -> str:
    """The sentence of an error in their format."""
    found = answer.json
    assert set(found) == {"error", "response"}
    assert found["response"] is None
    assert answer.head.headers["x-request-id"]
    assert "\n" not in found["error"].strip()
    return str(found["error"])


def test_guidance_is_answered_as_its_callers_read_it(worker: WorkerProcess, quick: Simulator) -> None:
    worker.fleet(say("engine-0", quick.address, MODEL))
    name = f"guide-{next(_ids)}"
    answer = gateway.ask(worker, guide(max_tokens=20, stream=True, headers={"x-request-id": name}))
    assert answer.status == 200, answer.body
    assert answer.head.headers["content-type"] == "application/json"
    assert answer.head.headers["x-vitalis-route"] == "vitalis-emergency"
    found = answer.json
    assert set(found) == {"prompt", "response", "metadata"}
    assert found["prompt"] == "A scald, what now?"
    assert found["response"].startswith("tok0 tok1")
    facts = found["metadata"]
    assert set(facts) == {"generation_time", "prompt_length", "response_length", "model_path"}
    assert (facts["prompt_length"], facts["response_length"]) == (len(found["prompt"]), len(found["response"]))
    assert facts["model_path"] == MODEL
    assert facts["generation_time"] >= 0
    record = gateway.record_of(worker, name)
    assert (record["outcome"], record["route"], record["path"]) == ("ok", "vitalis-emergency", GUIDE)
    assert record["completion_tokens"] == 20
    gateway.wait_until(lambda: any(r["x-request-id"] == name for r in quick.log()))
    reached = next(r for r in quick.log() if r["x-request-id"] == name)
    assert (reached["path"], reached["x-vllm-priority"]) == (PATHS["chat"], "0")
    only = gateway.ask(worker, guide("narrow"))
    assert (only.status, only.head.headers["x-vitalis-route"]) == (200, MODEL)
    worker.fleet(say("engine-0", quick.address, SMALL))
    other = gateway.ask(worker, guide())
    assert (other.json["metadata"]["model_path"], fallback_of(other)) == (SMALL, SMALL)


@pytest.mark.parametrize(("data", "status", "words"), [
    (client.post(GUIDE, {}, auth()), 400, "`prompt`"),
    (guide(prompt="  "), 400, "`prompt`"),
    (guide(prompt=["x"]), 400, "`prompt`"),
    (guide(max_tokens=5), 400, "10 to 1000"),
    (guide(max_tokens=5000), 400, "10 to 1000"),
    (guide(max_tokens="many"), 400, "10 to 1000"),
    (client.post(GUIDE, b"what now?", auth()), 400, "JSON"),
    (client.post(GUIDE, b"[1]", auth()), 400, "JSON object"),
    (client.post(GUIDE, b'{"prompt":"a","prompt":"b"}', auth()), 400, "twice"),
    (client.post(GUIDE, {"prompt": "x"}), 401, "key"),
    (guide("mallory"), 401, "key"),
    (guide("two"), 404, "vitalis-emergency"),
    (client.request("GET", GUIDE, b"", auth()), 405, "POST"),
    (client.post(GUIDE, {"prompt": "x"}, auth() | {"content-encoding": "gzip"}), 415, "compressed"),
    (client.request("POST", GUIDE, b"", auth() | {"content-length": "99999999"}), 413, "larger"),
    (guide(prompt="x" * 600_000), 400, "maximum context length"),
])  # fmt: skip
def test_guidance_refuses_in_one_sentence(
    worker: WorkerProcess, quick: Simulator, data: bytes, status: int, words: str
) -> None:
    worker.serve(quick.address)
    answer = gateway.ask(worker, data)
    assert answer.status == status
    assert words in guidance_error(answer)


def test_guidance_says_when_reasoning_took_all_tokens(worker: WorkerProcess) -> None:
    thought = CHAT | {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": None, "reasoning": "Hm"},
                "finish_reason": "length",
            }
        ]
    }
    with gateway.scripted_engine() as engine:
        engine.scripts = [[gateway.http_answer(thought)]]
        worker.serve(engine.address)
        name = f"guide-{next(_ids)}"
        answer = gateway.ask(worker, guide(max_tokens=10, headers={"x-request-id": name}))
        assert answer.status == 400
        assert "all 10 tokens" in guidance_error(answer)
        record = gateway.record_of(worker, name)
        assert (record["outcome"], record["code"], record["completion_tokens"]) == ("refused", "invalid_request", 3)
        gateway.settled(worker)


@pytest.mark.parametrize("trouble", [{"kind": "status", "status": 500}, {"kind": "reset"}, {"kind": "cut"}])
def test_guidance_outlives_an_engines_failure_where_there_is_another(
    worker: WorkerProcess, quick: Simulator, trouble: dict[str, Any]
) -> None:
    # a reset of a kept-alive connection is forgiven once
    rule = trouble | {"requests": 2 if trouble["kind"] == "reset" else 1}
    worker.serve(quick.address, quick.address)
    quick.misbehave(**rule)
    answer = gateway.ask(worker, guide(max_tokens=20))
    assert answer.status == 200
    assert answer.json["response"].startswith("tok0")
    worker.serve(quick.address)
    quick.reset()
    quick.misbehave(**rule)
    answer = gateway.ask(worker, guide(max_tokens=20, prompt=f"again {trouble}"))
    assert answer.status == 502
    assert "engine" in guidance_error(answer).lower()


def test_guidance_without_any_engine_says_when_to_come_back(worker: WorkerProcess) -> None:
    worker.serve()
    answer = gateway.ask(worker, guide())
    assert answer.status == 503
    assert 1 <= int(answer.head.headers["retry-after"]) <= 60
    guidance_error(answer)


def test_a_caller_of_guidance_who_leaves_frees_the_engine(worker: WorkerProcess, slow: Simulator) -> None:
    worker.serve(slow.address)
    text = next(
        text
        for text in (f"What now, {number}?" for number in itertools.count())
        if natural_tokens(json.dumps([{"role": "user", "content": text}], separators=(",", ":")).encode()) > 900
    )
    aborts = slow.state()["aborts"]
    with client.connect(worker.url) as wire:
        wire.send(guide(prompt=text, max_tokens=1000))
        slow.wait_for(lambda state: state["running"] == 1)
    slow.wait_for(lambda state: state["running"] == 0 and state["aborts"] == aborts + 1, seconds=2)


def test_health_keeps_its_interface(worker: WorkerProcess, quick: Simulator) -> None:
    worker.serve(quick.address)
    answer = gateway.ask(worker, client.get("/health", auth()))
    assert answer.status == 200
    assert (answer.json["status"], answer.json["model_loaded"]) == ("healthy", True)
    worker.serve()
    answer = gateway.ask(worker, client.get("/health", auth()))
    assert (answer.status, answer.json["model_loaded"]) == (500, False)
    assert gateway.ask(worker, client.get("/health")).status == 401


# -- with control: scopes, metrics, explanations


@contextlib.contextmanager
def whole(folder: Path, **options: Any) -> Iterator[tuple[controls.Control, WorkerProcess, str]]:
    """A control, a worker that has its keys from it, and a key of tenant acme's with the scope debug."""
    policies = [{k: v for k, v in route.items() if k not in ("name", "model")} for route in ROUTES]
    routes = [
        {"name": route["name"], "model": route["model"], "policy": policy}
        for route, policy in zip(ROUTES, policies, strict=True)
    ]
    folder.mkdir(exist_ok=True)
    with controls.running(folder, routes=routes, workers=1, apply_seconds=10) as control:
        snapshot = (folder / "snapshot.json").read_bytes()
        with running_worker(folder, document=snapshot, **options) as worker:
            control.call("POST", "/v1/tenants", {"name": "acme"})
            made = control.call("POST", "/v1/keys", {"tenant": "acme", "scopes": ["inference", "debug"]})
            assert made["applied"]
            yield control, worker, made["key"]


def compact(**body: Any) -> bytes:
    """As official clients write it."""
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def test_control_tells_where_a_request_would_go_and_there_it_goes(tmp_path: Path, quick: Simulator) -> None:
    with whole(tmp_path, routing="session") as (control, worker, key):
        worker.fleet(*(say(f"engine-{i}", quick.address, MODEL, CANARY) for i in range(3)))
        told, went = [], []
        with client.connect(worker.url) as wire:
            for number in range(30):
                asked = {"messages": [{"role": "user", "content": f"Frage {number}: Verbrühung?"}]}
                session = f"s{number}" if number % 2 else ""
                found = control.call(
                    "POST",
                    "/v1/explain",
                    {"model": "weighted", "tenant": "acme", "body": asked, "session": session},
                )
                told.append((found["chosen"], found["reason"], found["model"]))
                headers = auth(key) | ({"x-session-id": session} if session else {})
                wire.send(client.post(PATHS["chat"], compact(model="weighted", **asked, sim_output_tokens=1), headers))
                answer = wire.read_response()
                seen = answer.head.headers
                went.append((seen["x-vitalis-replica"], seen["x-vitalis-reason"], answer.json["model"]))
        assert told == went
        assert len({replica for replica, _, _ in told}) == 3
        assert len({model for _, _, model in told}) == 2
        gateway.wait_until(lambda: len(worker.records()) == 30)
        for log in (control.log_path.read_text(), worker.log(), worker.access_log.read_text()):
            assert "Frage" not in log
        assert not any("explain" in row["action"] for row in control.call("GET", "/v1/audit")["audit"])
        gateway.settled(worker)


def test_an_explanation_says_why_nobody_takes_it_and_takes_no_slot(tmp_path: Path, slow: Simulator) -> None:
    with whole(tmp_path, routing="affinity", queue_seconds=20) as (control, worker, key):
        worker.serve(slow.address, slots=1)
        with occupied(worker, tenant=key), waiting(worker, request(key, tokens=1)):
            before = slow.state()["requests_seen"]
            found = control.call("POST", "/v1/explain", {"model": MODEL})
            assert (found["chosen"], found["queued"], found["policy"]) == (None, 1, "affinity")
            assert found["reason"] == "every replica that could take it is busy"
            assert found["ranking"] == [
                {"replica": "engine-0", "place": 1, "why_here": "home", "lacks": "no free slot"}
            ]
            held = worker.in_flight()
            assert (held["count"], held["replicas"]) == (2, {"engine-0": 1})
            assert slow.state()["requests_seen"] == before
        gateway.settled(worker)


def test_the_command_line_explains(tmp_path: Path, quick: Simulator) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "vitalis_serve", "fleet", "explain", *words]
        environ = {**os.environ, "VITALIS_CONFIG": str(tmp_path / "config.yaml")}
        return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60, check=False)

    (tmp_path / "config.yaml").write_text(f"profile: cpu-tiny\ndata_folder: {tmp_path}\n")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "cpu-tiny.yaml").write_text("")
    with whole(tmp_path, routing="affinity") as (control, worker, key):
        worker.serve(*[quick.address] * 3)
        text = "Was tun bei Verbrühung?"
        words = ("--model", MODEL, "--tenant", "acme", "--prompt", text)
        shown = command(*words)
        assert shown.returncode == 0, shown.stderr
        told = json.loads(command(*words, "--json").stdout)
        assert shown.stdout.splitlines()[0] == f"{told['chosen']}: home"
        assert len(told["ranking"]) == 3
        assert text not in shown.stdout
        asked = compact(model=MODEL, messages=[{"role": "user", "content": text}])
        answer = gateway.ask(worker, client.post(PATHS["chat"], asked, auth(key)))
        assert answer.head.headers["x-vitalis-replica"] == told["chosen"]
        for wrong, code, words_of_it in (
            (("--model", "gtp"), 1, "does not exist"),
            (("--model", MODEL, "--class", "urgent"), 2, "there is no class 'urgent'"),
            (("--model", MODEL, "--tenant", "acne"), 1, "acme"),
            ((), 2, "--model"),
        ):
            refused = command(*wrong)
            assert refused.returncode == code, refused
            assert words_of_it in refused.stderr
            assert "Traceback" not in refused.stderr
        assert not command("--model", MODEL, "--json").stderr


def test_fallbacks_are_counted(tmp_path: Path, quick: Simulator) -> None:
    with whole(tmp_path) as (control, worker, key):
        worker.fleet(say("engine-0", quick.address, SMALL))
        for route in ("shy", "shy", "backed", MODEL):
            gateway.ask(worker, request(key, route=route, tokens=1))
        page = client.ask(control.address, client.get("/metrics", {"authorization": f"Bearer {control.token}"})).body
        counted = dict(
            line.rsplit(" ", 1) for line in page.decode().splitlines() if line.startswith("vitalis_fallbacks_total{")
        )
        assert {name: float(value) for name, value in counted.items()} == {
            'vitalis_fallbacks_total{model="nowhere",route="shy",worker="worker-0"}': 2,
            'vitalis_fallbacks_total{model="small",route="shy",worker="worker-0"}': 2,
            'vitalis_fallbacks_total{model="small",route="backed",worker="worker-0"}': 1,
        }

"""What the gateway does about engines that fail: the circuit breaker, retries and their budget, requests that kill
engines, Harmony's failures; and one property for every way and every moment in which an engine can die."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve.fleet import Replica, ReplicaState

from tests.support import client, gateway, simulator
from tests.support.gateway import APIS, wait_until
from tests.support.simulator import Simulator
from tests.support.worker import MODEL, WorkerProcess, running_worker, snapshot

CASES = [(api, stream) for api in APIS for stream in (False, True)]
# What the product does by itself; only the choice of a replica is the tests' own (tests/support/worker.py).
PRODUCT = {"breaker_failures": 5, "retries_at_least": 16}
MANY_RETRIES = {"breaker_failures": 5, "retries_at_least": 1_000_000}
LATER = 6  # events: on every API one of them bears a token


@dataclass
class Stage:
    """A worker, and the line on which control would ask it for its metrics."""

    worker: WorkerProcess
    line: Any

    def ask(self, api: str = "chat", *, stream: bool = False, **more: Any) -> client.Response:
        return gateway.ask(self.worker, gateway.request(api, stream=stream, **more), seconds=10)

    def metric(self, name: str, **labels: str) -> float:
        """A gauge or a counter; the sum of those whose labels include these."""
        self.line.write(b'{"type":"collect","id":1}\n')
        self.line.flush()
        values = json.loads(self.line.readline())["values"]
        samples = [*values["counters"], *values["gauges"]]
        return sum(value for n, has, value in samples if n == name and labels.items() <= has.items())

    def is_open(self, replica: str = "engine-0") -> bool:
        return self.metric("vitalis_breaker_open", replica=replica) == 1

    def failures(self, kind: str) -> float:
        return self.metric("vitalis_upstream_failures_total", kind=kind)

    def fleet(self, *replicas: tuple[str, ReplicaState, int]) -> None:
        """Replicas engine-0, engine-1 ..., each by address, state and incarnation."""
        self.worker.fleet(
            *(
                Replica(f"engine-{i}", address, state, models=(MODEL,), incarnation=incarnation)
                for i, (address, state, incarnation) in enumerate(replicas)
            )
        )


@contextmanager
def staged(folder: Path, **options: Any) -> Iterator[Stage]:
    with socket.socket(socket.AF_UNIX) as listener:
        folder.mkdir(parents=True, exist_ok=True)
        listener.bind(str(folder / "control.sock"))
        listener.listen(1)
        listener.settimeout(5)
        with running_worker(folder, **options) as worker:
            own, _ = listener.accept()
            own.settimeout(5)
            with own, own.makefile("rwb") as line:
                line.readline()  # hello
                yield Stage(worker, line)
                gateway.settled(worker)


@pytest.fixture(scope="module")
def _engines() -> Iterator[tuple[Simulator, Simulator]]:
    with simulator.started() as bad, simulator.started() as good:
        yield bad, good


@pytest.fixture
def engines(_engines: tuple[Simulator, Simulator]) -> Iterator[tuple[Simulator, Simulator]]:
    yield _engines
    for engine in _engines:
        engine.reset()


@pytest.fixture
def bad(engines: tuple[Simulator, Simulator]) -> Simulator:
    return engines[0]


@pytest.fixture
def good(engines: tuple[Simulator, Simulator]) -> Simulator:
    return engines[1]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path, **PRODUCT) as stage:
        yield stage


@pytest.fixture(scope="module")
def _harmony(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("harmony"), harmony=True, **MANY_RETRIES) as stage:
        yield stage


@pytest.fixture
def harmony(_harmony: Stage) -> Iterator[Stage]:
    yield _harmony
    gateway.settled(_harmony.worker)


@pytest.fixture(scope="module")
def _calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("calm"), first_token_seconds=0.6, idle_seconds=0.6, total_seconds=1.8) as stage:
        yield stage


@pytest.fixture
def calm(_calm: Stage) -> Iterator[Stage]:
    """Without a breaker, and retries without a budget."""
    yield _calm
    gateway.settled(_calm.worker)


def fresh(stage: Stage, *engines: Simulator) -> int:
    """Ready replicas to which no connection lies idle. Returns their incarnation."""
    incarnation = time.monotonic_ns() // 1_000_000
    stage.fleet()  # those before did not crash
    stage.fleet(*((engine.address, ReplicaState.READY, incarnation) for engine in engines))
    return incarnation


def seen(engine: Simulator) -> int:
    return int(engine.state()["requests_seen"])


def open_breaker(stage: Stage, bad: Simulator) -> None:
    """Five resets in a row, and no more."""
    bad.misbehave("reset")
    before = seen(bad)
    for _ in range(5):
        assert not stage.is_open()
        stage.ask()
    assert stage.is_open()
    assert seen(bad) == before + 5


# The circuit breaker


def test_a_replica_that_resets_gets_no_more_requests_until_it_answers(
    stage: Stage, bad: Simulator, good: Simulator
) -> None:
    stage.worker.serve(bad.address, good.address)
    bad.misbehave("reset")
    before = seen(bad)
    for _ in range(5):
        gateway.check_answer("chat", stage.ask(), stream=False)
    assert seen(bad) == before + 5
    assert stage.is_open()
    assert not stage.is_open("engine-1")
    for api, stream in CASES:
        gateway.check_answer(api, stage.ask(api, stream=stream), stream=stream)
    # on a slow day a back-off is over by now: then there was one probe, which opened it again
    openings = stage.metric("vitalis_breaker_openings_total", replica="engine-0")
    assert seen(bad) == before + 4 + openings
    assert stage.metric("vitalis_retries_total") == 4 + openings
    bad.reset()

    def answers() -> bool:
        gateway.check_answer("chat", stage.ask(), stream=False)
        return seen(bad) > before + 4 + openings

    wait_until(answers, what="a probe")
    assert not stage.is_open()


def test_a_probe_that_fails_opens_the_breaker_for_longer(stage: Stage, bad: Simulator, good: Simulator) -> None:
    stage.worker.serve(bad.address, good.address)
    open_breaker(stage, bad)
    before = seen(bad)

    def probed() -> bool:
        gateway.check_answer("chat", stage.ask(), stream=False)
        return seen(bad) > before

    wait_until(probed, what="a probe")
    assert stage.is_open()
    for _ in range(20):
        gateway.check_answer("chat", stage.ask(), stream=False)
    openings = stage.metric("vitalis_breaker_openings_total", replica="engine-0")
    assert openings >= 2
    assert seen(bad) == before - 1 + openings


def test_one_replica_alone_serves_its_queue_when_it_is_back_after_exactly_one_probe(
    stage: Stage, bad: Simulator
) -> None:
    stage.worker.serve(bad.address, slots=4)
    open_breaker(stage, bad)
    bad.reset()
    bad.misbehave("stall", stream=False, seconds=1, requests=1)
    before = seen(bad)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(stage.ask) for _ in range(8)]
        bad.wait_for(lambda state: state["requests_seen"] == before + 1)
        time.sleep(0.2)
        assert seen(bad) == before + 1
        assert stage.metric("vitalis_queued") == 7
        assert stage.is_open()
        for answer in answers:
            gateway.check_answer("chat", answer.result(), stream=False)
    assert seen(bad) == before + 8
    assert not stage.is_open()


def test_those_who_had_a_slot_when_the_breaker_opened_wait_for_the_replica(stage: Stage, bad: Simulator) -> None:
    """Its slots are given back at once by all that were reset, and granted to others that have not begun."""
    stage.worker.serve(bad.address, slots=8)
    bad.misbehave("silent", requests=8)
    bad.misbehave("reset")
    with ThreadPoolExecutor(40) as pool:
        silent = [client.connect(stage.worker.url) for _ in range(8)]
        for wire in silent:
            wire.send(gateway.request("chat"))
        bad.wait_for(lambda state: state["hits"].get("silent") == 8)
        waiting: list[Future[client.Response]] = [pool.submit(stage.ask) for _ in range(32)]
        wait_until(lambda: stage.metric("vitalis_queued") == 32)
        for wire in silent:
            wire.close()
        wait_until(stage.is_open)
        bad.reset()
        statuses = [answer.result().status for answer in waiting]
    assert set(statuses) == {200, 502}
    assert 5 <= statuses.count(502) <= 12  # 8 that ran, and whoever got the slots of the first four of them


def test_a_probe_whose_client_leaves_frees_the_place(stage: Stage, bad: Simulator) -> None:
    stage.worker.serve(bad.address)
    open_breaker(stage, bad)
    bad.reset()
    bad.misbehave("silent", requests=1)
    before = seen(bad)
    with client.connect(stage.worker.url) as leaves, client.connect(stage.worker.url) as stays:
        leaves.send(gateway.request("chat"))
        bad.wait_for(lambda state: state["requests_seen"] == before + 1)
        stays.send(gateway.request("chat"))
        assert stays.is_quiet(0.3)
        leaves.close()
        gateway.check_answer("chat", stays.read_response(), stream=False)
    assert not stage.is_open()


def test_clients_that_leave_while_the_replica_is_tried_never_shut_it_for_good(stage: Stage, bad: Simulator) -> None:
    stage.worker.serve(bad.address)
    open_breaker(stage, bad)
    bad.reset()
    before = seen(bad)
    deadline = time.monotonic() + 8
    while seen(bad) == before:  # so many that some leave between their grant and their turn
        assert time.monotonic() < deadline
        wires = [client.connect(stage.worker.url) for _ in range(16)]
        for wire in wires:
            wire.send(gateway.request("chat"))
        for wire in wires:
            wire.close()
    gateway.check_answer("chat", stage.ask(), stream=False)


def test_a_new_process_starts_with_a_closed_breaker(stage: Stage, bad: Simulator) -> None:
    stage.worker.serve(bad.address)
    open_breaker(stage, bad)
    bad.reset()
    with client.connect(stage.worker.url) as waits:
        waits.send(gateway.request("chat"))
        wait_until(lambda: stage.metric("vitalis_queued") == 1)
        stage.fleet((bad.address, ReplicaState.READY, 2))
        assert not stage.is_open()
        gateway.check_answer("chat", waits.read_response(), stream=False)
    assert stage.metric("vitalis_queued") == 0


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 400},
        {"kind": "status", "status": 429},
        {"kind": "harmony"},
        {"kind": "stream_error"},
    ],
    ids=lambda rule: "-".join(str(value) for value in rule.values()),
)
def test_what_an_engine_says_is_no_sickness(stage: Stage, bad: Simulator, rule: dict[str, Any]) -> None:
    stage.worker.serve(bad.address)
    bad.misbehave(**rule)
    for stream in (False, True):
        for _ in range(8):
            assert stage.ask(stream=stream).status != 200
    assert not stage.is_open()
    assert stage.metric("vitalis_breaker_openings_total") == 0
    bad.reset()
    gateway.check_answer("chat", stage.ask(), stream=False)


def test_an_answer_in_between_starts_the_count_anew(stage: Stage, bad: Simulator) -> None:
    stage.worker.serve(bad.address)
    for before in range(3):
        bad.misbehave("reset", requests=4 + bool(before))  # one more on the connection that the good answer left idle
        for _ in range(4):
            assert stage.ask().status == 502
        assert stage.ask().status == 200
    assert not stage.is_open()
    assert stage.metric("vitalis_shed_total") == 0  # what an engine failed is not what we turned away


# Retries


@pytest.mark.parametrize(
    ("rule", "tries"),
    [
        ({"kind": "status", "status": 500}, 2),
        ({"kind": "stream_error"}, 2),
        ({"kind": "reset"}, 2),
        ({"kind": "cut", "point": "head"}, 2),
        ({"kind": "status", "status": 502}, 3),
        ({"kind": "status", "status": 503}, 3),
        ({"kind": "garbage"}, 3),
        ({"kind": "refuse"}, 3),
        ({"kind": "status", "status": 429}, 1),
        ({"kind": "status", "status": 400}, 1),
        ({"kind": "silent"}, 2),
    ],
    ids=str,
)
def test_how_often_a_failure_is_tried_again(calm: Stage, bad: Simulator, rule: dict[str, Any], tries: int) -> None:
    """Four names of one engine, so that every try meets it."""
    calm.worker.serve(*[bad.address] * 4)
    bad.misbehave(**rule)

    def retries() -> float:
        return calm.metric("vitalis_retries_total") - calm.metric("vitalis_retries_total", reason="stale_connection")

    before = retries()
    assert calm.ask(stream=True).status >= 400
    assert retries() - before == tries - 1


def test_a_spent_budget_tells_what_happened_and_a_stale_connection_costs_nothing(
    tmp_path: Path, bad: Simulator, good: Simulator
) -> None:
    with staged(tmp_path, breaker_failures=5, retries_at_least=3) as stage:
        stage.worker.serve(bad.address, good.address)
        bad.misbehave("status", status=500, message="nothing works")
        for _ in range(3):
            gateway.check_answer("chat", stage.ask(), stream=False)
        for _ in range(3):
            answer = stage.ask()
            assert (answer.status, gateway.error_code(answer)) == (502, "engine_protocol")
            assert "answered 500: nothing works" in answer.json["error"]["message"]
        assert stage.metric("vitalis_shed_total") == 0
        bad.reset()
        for _ in range(3):
            gateway.check_answer("chat", stage.ask(), stream=False)
            bad.misbehave("stale", requests=1)
            gateway.check_answer("chat", stage.ask(), stream=False)
        assert stage.metric("vitalis_retries_total", reason="stale_connection") == 3
        assert stage.metric("vitalis_retries_total") == 6


# Requests that kill


def is_refused(stage: Stage, api: str, *, stream: bool) -> bool:
    answer = stage.ask(api, stream=stream, tokens=7)
    if answer.status == 400:
        assert gateway.error_code(answer) == "invalid_request"
        assert "2 engines crashed" in answer.json["error"]["message"]
        return True
    gateway.check_answer(api, answer, stream=stream, tokens=7)
    return False


DEATHS: list[dict[str, Any]] = [
    {"kind": "reset"},
    {"kind": "cut", "point": "after_head"},
    {"kind": "stream_error"},
]


@pytest.mark.parametrize("rule", DEATHS, ids=str)
@pytest.mark.parametrize(("api", "stream"), [("chat", True), ("responses", True), ("messages", False)])
def test_a_request_that_was_running_when_two_engines_died_is_refused(
    harmony: Stage, bad: Simulator, good: Simulator, rule: dict[str, Any], api: str, stream: bool
) -> None:
    user = f"{rule['kind']}-{api}"  # another request than the other tests'
    more: dict[str, Any] = {"metadata": {"user_id" if api == "messages" else "user": user}}
    ready, dead = ReplicaState.READY, ReplicaState.BACKOFF

    def ask() -> client.Response:
        return harmony.ask(api, stream=stream, **more)

    for known in (False, True):
        at = fresh(harmony, bad, good)
        for engine in (bad, good):
            engine.misbehave(requests=1, **rule)
        assert ask().status == 502
        if not known:
            gateway.check_answer(api, ask(), stream=stream)  # nobody has said yet that engines died
    harmony.fleet((bad.address, dead, at), (good.address, ready, at))
    gateway.check_answer(api, harmony.ask(api, stream=stream), stream=stream)
    harmony.fleet((bad.address, dead, at), (good.address, dead, at))
    harmony.fleet((bad.address, ready, at + 1), (good.address, ready, at + 1))
    answer = ask()
    assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_request")
    assert "2 engines crashed" in answer.json["error"]["message"]
    for other, streamed in CASES:
        gateway.check_answer(other, harmony.ask(other, stream=streamed), stream=streamed)


def test_a_process_that_is_another_one_all_at_once_has_crashed_and_one_that_drained_has_not(
    stage: Stage, bad: Simulator, good: Simulator
) -> None:
    """Of an engine given by address the first is all that is ever heard."""
    ready, away, drains = ReplicaState.READY, ReplicaState.SUSPECT, ReplicaState.DRAINING
    for user, between, status in (("ordered", drains, 200), ("crashed", None, 400), ("gone", away, 400)):
        for _ in range(2):
            at = fresh(stage, bad)
            bad.misbehave("reset", requests=1)
            assert stage.ask(user=user).status == 502
            if between is drains:
                stage.fleet((bad.address, drains, at))
            elif between is away:
                stage.fleet((bad.address, away, at))
                stage.fleet((bad.address, away, at + 1))
            stage.fleet((bad.address, ready, at + 1))
        assert stage.ask(user=user).status == status
        gateway.check_answer("chat", stage.ask(), stream=False)


def test_who_waits_at_a_replica_that_is_found_hung_is_answered_by_another(
    harmony: Stage, bad: Simulator, good: Simulator
) -> None:
    """Long before a deadline; one that is given by address nobody would kill."""
    at = fresh(harmony, bad, good)
    bad.misbehave("freeze")
    with ThreadPoolExecutor(len(CASES)) as pool:
        harmony.fleet((bad.address, ReplicaState.READY, at))
        asked = [pool.submit(harmony.ask, api, stream=stream) for api, stream in CASES]
        wait_until(lambda: harmony.worker.in_flight()["count"] == len(CASES), what="all wait")
        harmony.fleet((bad.address, ReplicaState.HUNG, at), (good.address, ReplicaState.READY, at))
        for (api, stream), answer in zip(CASES, asked, strict=True):
            gateway.check_answer(api, answer.result(), stream=stream)


@pytest.mark.parametrize("rule", [{"kind": "reset", "point": "event"}, {"kind": "stream_error"}], ids=str)
def test_a_request_that_kills_engines_after_its_first_token_is_refused_too(
    harmony: Stage, bad: Simulator, good: Simulator, rule: dict[str, Any]
) -> None:
    ready, dead = ReplicaState.READY, ReplicaState.BACKOFF
    more: dict[str, Any] = {"user": f"late-{rule['kind']}"}
    at = fresh(harmony, bad, good)
    for engine, states in ((bad, (dead, ready)), (good, (dead, dead))):
        engine.misbehave(requests=1, after_events=6, **rule)
        answer = harmony.ask("chat", stream=True, tokens=20, **more)
        assert answer.status == 200
        assert b"[DONE]" not in answer.body
        harmony.fleet((bad.address, states[0], at), (good.address, states[1], at))
    harmony.fleet((bad.address, ready, at + 1), (good.address, ready, at + 1))
    answer = harmony.ask("chat", stream=True, tokens=20, **more)
    assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_request")
    gateway.check_answer("chat", harmony.ask("chat", stream=True), stream=True)


def test_a_request_that_kills_on_a_kept_alive_connection_is_known_too(stage: Stage) -> None:
    """The engine is gone before it has said a byte, which looks like a connection that it had closed before."""
    with simulator.started() as one, simulator.started() as two, simulator.started() as three:
        ready, dead = ReplicaState.READY, ReplicaState.BACKOFF
        for engine in (one, two):
            stage.fleet((engine.address, ready, 1))
            gateway.check_answer("chat", stage.ask(), stream=False)
        stage.fleet((one.address, ready, 1), (two.address, ready, 1))
        gateway.check_answer("chat", stage.ask(), stream=False)
        for engine in (one, two):
            engine.misbehave("crash", after_requests=seen(engine) + 1)
        answer = stage.ask(tokens=7)
        assert (answer.status, gateway.error_code(answer)) == (502, "engine_unreachable")
        for engine in (one, two):
            assert engine.process.wait(10) < 0
        stage.fleet((one.address, dead, 1), (two.address, dead, 1))
        stage.fleet((three.address, ready, 2))
        assert is_refused(stage, "chat", stream=False)
        gateway.check_answer("chat", stage.ask(), stream=False)


def test_a_good_end_takes_the_mark_away(stage: Stage, bad: Simulator, good: Simulator) -> None:
    ready, dead = ReplicaState.READY, ReplicaState.BACKOFF
    for incarnation in (1, 2, 3):
        stage.fleet((bad.address, ready, incarnation), (good.address, ready, 1))
        bad.misbehave("reset", requests=1)
        assert not is_refused(stage, "chat", stream=False)
        stage.fleet((bad.address, dead, incarnation), (good.address, ready, 1))
    assert stage.metric("vitalis_killers_refused_total") == 0


# Harmony

SAID = {
    "unexpected_token": "Unexpected token 200002 while expecting start token 200006",
    "header": "unexpected tokens remaining in message header: [1, 2]",
    "role": "Unknown role: assistantcommentary",
    "text": "Invalid utf-8 sequence: incomplete",
    "vocabulary": "error downloading or loading vocab file: not found",
    "other": "HarmonyError: something else",
}
# vLLM does not let through what the parser said: the body is broken, or says a validation error.
HIDDEN = {("responses", True): "cut", ("messages", True): "in_stream_error"}
SPEAKERS = [(api, stream) for api in ("chat", "responses", "messages") for stream in (False, True)]


@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize(("api", "stream"), SPEAKERS)
def test_harmony_before_the_first_token(
    harmony: Stage, bad: Simulator, good: Simulator, api: str, stream: bool, kind: str
) -> None:
    hidden = HIDDEN.get((api, stream))
    counted = hidden or f"harmony_{kind}"
    for replicas in ([bad.address], [bad.address, good.address]):
        harmony.worker.serve(*replicas)
        before = harmony.failures(counted)
        bad.misbehave("harmony", message=SAID[kind], requests=1)
        gateway.check_answer(api, harmony.ask(api, stream=stream), stream=stream)
        assert harmony.failures(counted) == before + 1
    harmony.worker.serve(bad.address)
    bad.misbehave("harmony", message=SAID[kind], requests=2)
    answer = harmony.ask(api, stream=stream)
    assert (answer.status, answer.json["error"]["code"]) == (
        502, "engine_unreachable" if hidden == "cut" else "engine_protocol",
    )  # fmt: skip
    assert hidden or SAID[kind] not in answer.json["error"]["message"]
    assert not harmony.is_open()


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_harmony_after_the_first_token(harmony: Stage, bad: Simulator, good: Simulator, api: str) -> None:
    harmony.worker.serve(bad.address, good.address)
    counted = HIDDEN.get((api, True), "harmony_unexpected_token")
    before = harmony.failures(counted)
    bad.misbehave("harmony", after_events=LATER, requests=1)
    answer = harmony.ask(api, stream=True)
    assert answer.status == 200
    assert not gateway.looks_whole(api, answer.events)
    error = gateway.terminal_error(api, answer.events)
    assert error["message"]
    assert api != "chat" or "Harmony" in error["message"]
    assert b"200006" not in answer.body
    assert harmony.failures(counted) == before + 1


@pytest.mark.parametrize(("api", "stream"), SPEAKERS)
def test_harmony_never_opens_a_breaker(harmony: Stage, bad: Simulator, api: str, stream: bool) -> None:
    harmony.worker.serve(bad.address)
    for kind in ("harmony", "leak_tool_name"):
        bad.misbehave(kind)
        for _ in range(6):
            harmony.ask(api, stream=stream)
        assert not harmony.is_open()
        bad.reset()


@pytest.mark.parametrize("tokens", [gateway.TOKENS, 3])
@pytest.mark.parametrize(("api", "stream"), SPEAKERS)
def test_a_tools_name_that_cannot_be_read(harmony: Stage, bad: Simulator, api: str, stream: bool, tokens: int) -> None:
    """Three tokens have no reasoning before the call, so even a stream can be tried again."""
    harmony.worker.serve(bad.address)
    before = harmony.failures("harmony_tool_name")
    bad.misbehave("leak_tool_name", requests=1)
    answer = harmony.ask(api, stream=stream, tokens=tokens)
    if stream and tokens > 3:
        assert answer.status == 200
        assert not gateway.looks_whole(api, answer.events)
        message = gateway.terminal_error(api, answer.events)["message"]
    else:
        gateway.check_answer(api, answer, stream=stream, tokens=tokens)
        bad.misbehave("leak_tool_name", requests=2)
        answer = harmony.ask(api, stream=stream, tokens=tokens)
        assert answer.status == 502
        message = answer.json["error"]["message"]
        before += 2
    assert message == "The model called a tool by a name that cannot be read."
    assert b"<|start|>" not in answer.body
    assert harmony.failures("harmony_tool_name") == before + 1


@pytest.mark.parametrize(("api", "stream"), SPEAKERS)
def test_special_tokens_in_a_text_are_counted_and_left(harmony: Stage, bad: Simulator, api: str, stream: bool) -> None:
    harmony.worker.serve(bad.address)
    before = harmony.failures("harmony_content")
    bad.misbehave("leak", requests=1)
    answer = harmony.ask(api, stream=stream)
    assert answer.status == 200
    text = gateway.stream_text(api, answer.events) if stream else gateway.plain_text(api, answer.json)
    assert text.startswith("<|")
    assert not stream or gateway.looks_whole(api, answer.events)
    assert harmony.failures("harmony_content") == before + 1


def test_ignore_eos_is_refused_where_harmony_is_spoken(harmony: Stage, bad: Simulator, tmp_path: Path) -> None:
    """By gpt-oss, which the name says; other models take it."""
    harmony.worker.serve(bad.address)
    document = snapshot(routes={"another": "another"})
    with (
        simulator.started("--served-model-name", "another") as other,
        staged(tmp_path, document=document, **PRODUCT) as stage,
    ):
        stage.worker.serve(other.address, models=("another",))
        for api in ("chat", "responses"):
            answer = harmony.ask(api, ignore_eos=True)
            assert (answer.status, gateway.error_code(answer)) == (400, "unsupported_field")
            assert answer.json["error"]["message"].startswith("`ignore_eos` cannot be used")
            assert harmony.ask(api, ignore_eos=False).status == 200
            assert stage.ask(api, ignore_eos=True, model="another").status == 200
        assert harmony.ask("completions", ignore_eos=True).status == 200
        gateway.settled(stage.worker)


# Every way to die at every moment

WAYS: list[dict[str, Any]] = [
    *({"kind": kind, "point": point} for kind in ("reset", "cut", "half_close")
      for point in ("start", "head", "after_head", "chunk", "event", "boundary")),
    *({"kind": "cut", "point": point, "terminate": True} for point in ("event", "boundary")),
    {"kind": "garbage", "point": "head"},
    {"kind": "garbage", "point": "chunk"},
    {"kind": "wrong_length", "length": "short"},
    {"kind": "wrong_length", "length": "long"},
    {"kind": "status", "status": 500},
    {"kind": "status", "status": 503},
    {"kind": "stream_error"},
    {"kind": "role_done"},
    {"kind": "abort"},
    {"kind": "stall", "seconds": 0.2},
]  # fmt: skip
AT_ONCE = ("start", "head", "after_head")
AFTER_EVENTS = ("stream_error", "role_done", "abort", "stall")  # though they have no point
# After these an answer may be whole all the same.
HARMLESS = ("stall", "wrong_length")
MOMENTS = [
    (way, after)
    for way in WAYS
    for after in (0, 1, 2, LATER, 15)  # the shortest stream has 17
    if not after or way.get("point", "start") not in AT_ONCE or way["kind"] in AFTER_EVENTS
]


@pytest.mark.parametrize(("way", "after"), MOMENTS, ids=lambda value: str(value))
def test_an_answer_is_right_or_properly_ended(
    calm: Stage, bad: Simulator, good: Simulator, way: dict[str, Any], after: int
) -> None:
    calm.worker.serve(bad.address, good.address)
    for api, stream in CASES:
        struck = sum(bad.state()["hits"].values())
        bad.misbehave(requests=1, after_events=after, **way)
        answer = calm.ask(api, stream=stream)
        assert sum(bad.state()["hits"].values()) == struck + 1
        if not stream or not after or way["kind"] in HARMLESS or gateway.looks_whole(api, answer.events):
            gateway.check_answer(api, answer, stream=stream)
            assert b'"error":{' not in answer.body
        else:
            assert after > (api != "completions")  # whose first event bears a token
            assert answer.status == 200
            assert gateway.terminal_error(api, answer.events)["message"]
            whole = [event for event in answer.events[:-1] if not _broken(event)]
            assert gateway.expected_text(api).startswith(gateway.stream_text(api, whole))


DEADLY = [way for way in WAYS if way["kind"] not in ("status", "role_done", "stall") and way.get("length") != "long"]


@pytest.mark.parametrize("way", DEADLY, ids=str)
def test_a_second_death_ends_it(calm: Stage, bad: Simulator, good: Simulator, way: dict[str, Any]) -> None:
    for api, stream in CASES:
        fresh(calm, bad, good)
        for engine in (bad, good):
            engine.misbehave(requests=1, **way)
        answer = calm.ask(api, stream=stream)
        assert (answer.status, answer.json["error"]["code"]) in {
            (502, "engine_unreachable"), (502, "engine_protocol"),
        }  # fmt: skip


@pytest.mark.parametrize("after", [LATER, 12])
def test_a_stream_that_stands_still_for_good_is_ended(calm: Stage, bad: Simulator, after: int) -> None:
    for api in APIS:
        fresh(calm, bad)
        bad.misbehave("stall", requests=1, after_events=after)
        answer = calm.ask(api, stream=True)
        assert answer.status == 200
        assert not gateway.looks_whole(api, answer.events)
        assert (
            gateway.terminal_error(api, answer.events)["message"] == "The engine stopped in the middle of the answer."
        )
        assert gateway.expected_text(api).startswith(gateway.stream_text(api, answer.events[:-1]))


def test_a_replica_whose_port_is_closed_costs_nobody_an_answer(calm: Stage, bad: Simulator, good: Simulator) -> None:
    for api, stream in CASES:
        fresh(calm, bad, good)
        bad.misbehave("refuse")
        before = calm.failures("connect")
        gateway.check_answer(api, calm.ask(api, stream=stream), stream=stream)
        assert calm.failures("connect") == before + 1
        bad.reset()


def _broken(event: client.Event) -> bool:
    """The half of an event that was cut and closed with a blank line."""
    try:
        return event.data not in ("", "[DONE]") and not event.json
    except ValueError:
        return True


@pytest.mark.parametrize("way", ["silent", "freeze"])
def test_an_engine_that_falls_silent_is_left_in_time_and_opens_its_breaker(
    tmp_path: Path, bad: Simulator, good: Simulator, way: str
) -> None:
    with staged(tmp_path, first_token_seconds=0.4, idle_seconds=0.4, **PRODUCT) as stage:
        stage.worker.serve(bad.address, good.address)
        bad.misbehave(way)
        with ThreadPoolExecutor(5) as pool:
            apis = [*APIS, "chat"]
            for api, answer in zip(apis, pool.map(lambda api: stage.ask(api, stream=True), apis), strict=True):
                gateway.check_answer(api, answer, stream=True)
        assert stage.is_open()
        bad.reset()  # or its probe would wait
        for api, stream in CASES:
            gateway.check_answer(api, stage.ask(api, stream=stream), stream=stream)

"""Engines in trouble, on every API, plain and streamed: another replica answers, or the client is told; no stream
ever looks whole that is not."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import client, gateway, simulator
from tests.support.gateway import APIS
from tests.support.simulator import Simulator
from tests.support.worker import WorkerProcess, running_worker

CASES = [(api, stream) for api in APIS for stream in (False, True)]
_ids = itertools.count()


@dataclass
class Stage:
    worker: WorkerProcess
    bad: Simulator
    good: Simulator
    test: str = ""
    expected: dict[str, tuple[str, str]] = field(default_factory=dict)  # request id -> outcome, code

    def ask(self, api: str, *, stream: bool, outcome: str = "", code: str = "", **more: Any) -> client.Response:
        """A request whose outcome in the access log is looked at when all tests have ended: the log is written
        four times a second."""
        name = f"{next(_ids)}.{self.test}"[:120]
        if outcome:
            self.expected[name] = (outcome, code)
        return gateway.ask(
            self.worker, gateway.request(api, stream=stream, headers={"x-request-id": name}, **more), seconds=10
        )


@pytest.fixture(scope="module")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder: Path = tmp_path_factory.mktemp("trouble")
    with (
        simulator.started() as bad,
        simulator.started() as good,
        running_worker(
            folder, first_token_seconds=0.6, idle_seconds=0.6, total_seconds=1.8, connect_seconds=1
        ) as worker,
    ):
        stage = Stage(worker, bad, good)
        yield stage
        gateway.record_of(worker, list(stage.expected)[-1])
        records = {record["request_id"]: (record["outcome"], record.get("code", "")) for record in worker.records()}
        assert {name: records[name] for name in stage.expected} == stage.expected
        assert len(records) == len(worker.records())


@pytest.fixture
def stage(_stage: Stage, request: pytest.FixtureRequest) -> Iterator[Stage]:
    _stage.test = "".join(c for c in request.node.name if c.isalnum() or c in "_-")
    _stage.worker.serve(_stage.bad.address, _stage.good.address)
    yield _stage
    _stage.bad.reset()
    gateway.settled(_stage.worker)


# What spoils an answer before its first token: (rule, the code where nobody else can answer, which answers it strikes)
BEFORE: list[tuple[dict[str, Any], str, str]] = [
    ({"kind": "reset"}, "engine_unreachable", "both"),
    ({"kind": "cut", "point": "start"}, "engine_unreachable", "both"),
    ({"kind": "cut", "point": "head"}, "engine_unreachable", "both"),
    ({"kind": "cut", "point": "after_head"}, "engine_unreachable", "both"),
    ({"kind": "reset", "point": "after_head"}, "engine_unreachable", "both"),
    ({"kind": "cut", "point": "chunk"}, "engine_unreachable", "both"),
    ({"kind": "cut", "point": "event"}, "engine_unreachable", "both"),
    ({"kind": "cut", "point": "event", "terminate": True}, "engine_protocol", "stream"),
    ({"kind": "half_close", "point": "boundary"}, "engine_unreachable", "both"),
    ({"kind": "status", "status": 500}, "engine_protocol", "both"),
    ({"kind": "status", "status": 502}, "engine_protocol", "both"),
    ({"kind": "garbage"}, "engine_protocol", "both"),
    ({"kind": "garbage", "point": "chunk"}, "engine_protocol", "both"),
    ({"kind": "huge_head"}, "engine_protocol", "both"),
    ({"kind": "wrong_length", "length": "short"}, "engine_protocol", "both"),
    ({"kind": "wrong_length", "length": "long"}, "engine_unreachable", "plain"),
    ({"kind": "role_done"}, "engine_unreachable", "both"),
]


@pytest.mark.parametrize(("rule", "code", "strikes"), BEFORE, ids=lambda value: str(value))
def test_trouble_before_the_first_token(stage: Stage, rule: dict[str, Any], code: str, strikes: str) -> None:
    cases = [(api, stream) for api, stream in CASES if strikes == "both" or stream == (strikes == "stream")]
    stage.bad.misbehave(**rule)
    struck = sum(stage.bad.state()["hits"].values())
    for api, stream in cases:
        gateway.check_answer(api, stage.ask(api, stream=stream, outcome="ok"), stream=stream)
    stage.worker.serve(stage.bad.address)
    for api, stream in cases:
        answer = stage.ask(api, stream=stream, outcome="engine_error", code=code)
        assert (answer.status, gateway.error_code(answer)) == (502, code)
        assert answer.head.headers["x-request-id"]
    assert sum(stage.bad.state()["hits"].values()) >= struck + 2 * len(cases)
    stage.bad.reset()
    for api, stream in cases:
        gateway.check_answer(api, stage.ask(api, stream=stream, outcome="ok"), stream=stream)


def test_an_engine_that_is_busy(stage: Stage) -> None:
    for api, stream in CASES:
        stage.bad.misbehave("status", status=503, requests=1)
        gateway.check_answer(api, stage.ask(api, stream=stream, outcome="ok"), stream=stream)
    stage.worker.serve(stage.bad.address)
    stage.bad.misbehave("status", status=503)
    for api, stream in CASES:
        answer = stage.ask(api, stream=stream, outcome="engine_error", code="queue_full")
        assert (answer.status, gateway.error_code(answer)) == (503, "queue_full")
        assert 1 <= int(answer.head.headers["retry-after"]) <= 60


@pytest.mark.parametrize("api", ["chat", "completions", "messages"])
def test_an_error_event_before_the_first_token(stage: Stage, api: str) -> None:
    stage.bad.misbehave("stream_error", requests=1)
    gateway.check_answer(api, stage.ask(api, stream=True, outcome="ok"), stream=True)
    stage.worker.serve(stage.bad.address)
    # On Messages Harmony's parser fails so too, so an engine that is alone is asked once more.
    stage.bad.misbehave("stream_error", requests=2 if api == "messages" else 1)
    answer = stage.ask(api, stream=True, outcome="engine_error", code="engine_protocol")
    assert answer.status == 502
    assert not gateway.looks_whole(api, [])


# What spoils a stream after its first token.
LATER = 6  # events: on every API one of them bears a token
MIDDLE: list[tuple[dict[str, Any], str]] = [
    ({"kind": "cut", "point": "chunk"}, "engine_unreachable"),
    ({"kind": "cut", "point": "event"}, "engine_unreachable"),
    ({"kind": "cut", "point": "event", "terminate": True}, "engine_protocol"),
    ({"kind": "cut", "point": "boundary"}, "engine_unreachable"),
    ({"kind": "cut", "point": "boundary", "terminate": True}, "engine_protocol"),
    ({"kind": "reset", "point": "chunk"}, "engine_unreachable"),
    ({"kind": "half_close", "point": "boundary"}, "engine_unreachable"),
    ({"kind": "no_done"}, "engine_protocol"),
    ({"kind": "stall"}, "idle_timeout"),
]


@pytest.mark.parametrize(("rule", "code"), MIDDLE, ids=lambda value: str(value))
def test_trouble_after_the_first_token(stage: Stage, rule: dict[str, Any], code: str) -> None:
    for _ in APIS:
        stage.bad.misbehave(requests=1, after_events=LATER, **rule)

    def struck(api: str) -> None:
        answer = stage.ask(api, stream=True, outcome="cut", code=code)
        assert answer.status == 200
        assert not gateway.looks_whole(api, answer.events)
        error = gateway.terminal_error(api, answer.events)
        assert error["message"]
        if api in ("chat", "completions"):
            assert error["code"] == code
        text = gateway.stream_text(api, [event for event in answer.events[:-1] if not gateway.broken(event)])
        assert gateway.expected_text(api).startswith(text)

    # in turn and not at once: all must meet the bad replica, which is the first while nothing runs
    with ThreadPoolExecutor(1 if rule["kind"] != "stall" else 4) as pool:
        if rule["kind"] == "stall":
            stage.worker.serve(stage.bad.address)
        list(pool.map(struck, APIS))


@pytest.mark.parametrize("api", ["chat", "completions", "messages"])
def test_the_engines_own_error_in_the_middle_of_a_stream_is_its_last_event(stage: Stage, api: str) -> None:
    stage.bad.misbehave("stream_error", after_events=LATER, requests=1)
    answer = stage.ask(api, stream=True, outcome="engine_error", code="engine_protocol")
    assert answer.status == 200
    assert not gateway.looks_whole(api, answer.events)
    assert gateway.terminal_error(api, answer.events)["message"]


def test_responses_whose_engine_dies_gets_an_event_though_vllm_sends_none(stage: Stage) -> None:
    stage.bad.misbehave("stream_error", after_events=LATER, requests=1)
    answer = stage.ask("responses", stream=True, outcome="cut", code="engine_unreachable")
    assert gateway.terminal_error("responses", answer.events)["code"] == "server_error"
    assert not gateway.looks_whole("responses", answer.events)


@pytest.mark.parametrize("api", APIS)
def test_a_stream_that_was_whole_before_its_connection_broke_is_whole(stage: Stage, api: str) -> None:
    stage.bad.misbehave("wrong_length", length="long", requests=1)
    answer = stage.ask(api, stream=True, outcome="ok")
    gateway.check_answer(api, answer, stream=True)
    assert b'"error":{' not in answer.body


@pytest.mark.parametrize("rule", [{"kind": "dribble"}, {"kind": "delay", "seconds": 0.2}, {"kind": "leak"},
                                  {"kind": "stall", "after_events": LATER, "seconds": 0.2}], ids=str)  # fmt: skip
def test_oddities_that_are_no_trouble(stage: Stage, rule: dict[str, Any]) -> None:
    def odd(case: tuple[str, bool]) -> None:
        api, stream = case
        answer = stage.ask(api, stream=stream, outcome="ok")
        assert answer.status == 200
        if rule["kind"] != "leak":
            gateway.check_answer(api, answer, stream=stream)

    stage.bad.misbehave(**rule)
    stage.worker.serve(stage.bad.address)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(odd, CASES))


def test_a_silent_engine(stage: Stage) -> None:
    def silent(case: tuple[str, bool]) -> None:
        api, stream = case
        code = "first_token_timeout" if stream else "total_timeout"
        answer = stage.ask(api, stream=stream, outcome="engine_error", code=code)
        assert (answer.status, gateway.error_code(answer)) == (504, code)
        assert answer.head.headers["x-should-retry"] == "false"

    stage.bad.misbehave("silent")
    stage.worker.serve(stage.bad.address)
    before = stage.bad.state()["aborts"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(silent, CASES))
    stage.bad.wait_for(lambda state: state["aborts"] == before + len(CASES))


def test_a_frozen_engine(stage: Stage) -> None:
    """vLLM answers 200 with a head, Responses even announces itself, and nothing more comes."""

    def frozen(api: str) -> None:
        answer = stage.ask(api, stream=True, outcome="engine_error", code="first_token_timeout")
        assert (answer.status, gateway.error_code(answer)) == (504, "first_token_timeout")

    stage.bad.misbehave("freeze")
    stage.worker.serve(stage.bad.address)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(frozen, APIS))


def test_a_plain_answer_that_stalls(stage: Stage) -> None:
    stage.bad.misbehave("stall", stream=False, requests=1)
    answer = stage.ask("chat", stream=False, outcome="engine_error", code="total_timeout")
    assert (answer.status, gateway.error_code(answer)) == (504, "total_timeout")


def test_an_engine_that_refuses(stage: Stage) -> None:
    stage.bad.misbehave("refuse")
    for api, stream in CASES:
        gateway.check_answer(api, stage.ask(api, stream=stream, outcome="ok"), stream=stream)
    assert stage.worker.hear("suspect")["replica"] == "engine-0"
    stage.worker.serve(stage.bad.address)
    for api, stream in CASES:
        answer = stage.ask(api, stream=stream, outcome="engine_error", code="engine_unreachable")
        assert (answer.status, gateway.error_code(answer)) == (502, "engine_unreachable")


def test_a_stale_kept_alive_connection_costs_nobody_anything(stage: Stage) -> None:
    stage.worker.serve(stage.bad.address)
    with ThreadPoolExecutor(6) as pool:  # six connections come to lie idle
        stage.bad.misbehave("delay", seconds=0.1)
        list(pool.map(lambda _: stage.ask("chat", stream=False), range(6)))
    stage.bad.reset()
    stage.bad.misbehave("stale")
    for api, stream in CASES:
        gateway.check_answer(api, stage.ask(api, stream=stream, outcome="ok"), stream=stream)
    assert stage.bad.state()["hits"]["stale"] >= 6


def test_at_most_three_tries(stage: Stage) -> None:
    """Four names of one broken engine: the fourth is not asked; nor the third, if it looks as if engines died of it."""
    stage.worker.serve(*[stage.bad.address] * 4)
    for status, tries in ((502, 3), (500, 2)):
        stage.bad.misbehave("status", status=status)
        before = stage.bad.state()["requests_seen"]
        answer = stage.ask("chat", stream=False, outcome="engine_error", code="engine_protocol")
        assert answer.status == 502
        assert stage.bad.state()["requests_seen"] == before + tries
        stage.bad.reset()


@pytest.mark.parametrize("status", [400, 404, 413, 422, 429])
def test_an_engines_own_refusals_are_passed_on_and_not_tried_again(stage: Stage, status: int) -> None:
    for api, stream in CASES:
        stage.bad.misbehave("status", status=status, requests=1, message="because")
        answer = stage.ask(api, stream=stream, outcome="refused", code=f"engine_{status}")
        assert answer.status == status
        assert answer.json["error"]["message"] == "because"
        assert (answer.json.get("type") == "error") == (api == "messages")

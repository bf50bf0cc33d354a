"""Questions of control's: answered by the code that decides, refused as the request would be, and without a trace."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vitalis_serve.fleet import Fleet, Replica, ReplicaState
from vitalis_serve.gateway import explaining
from vitalis_serve.gateway.keys import KeyTable
from vitalis_serve.gateway.options import WorkerOptions
from vitalis_serve.gateway.state import WorkerState

ROUTES = [
    {"name": "chat", "model": "m", "fallbacks": ["none", "n"]},
    {"name": "sos", "model": "m", "class": "emergency"},
    {"name": "careful", "model": "m", "preamble": "Be calm.", "limits": {"n": 1}},
]
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[WorkerState]:
    loop = asyncio.new_event_loop()
    made = WorkerState(WorkerOptions(name="worker-0", snapshot_path="", control_socket=""), loop)
    made.keys = KeyTable.decode(json.dumps({"version": 1, "routes": ROUTES}).encode())
    yield made
    loop.close()


def serve(state: WorkerState, *models: str, count: int = 3, slots: int = 8) -> None:
    state.take_fleet(
        Fleet(1, tuple(Replica(f"e{i}", f"unix:/e{i}", ReplicaState.READY, models, slots, 1) for i in range(count)))
    )


def ask(state: WorkerState, **question: Any) -> dict[str, Any]:
    if isinstance(question.get("body"), dict):
        question["body"] = json.dumps(question["body"])
    return explaining.answer(state, json.dumps({"model": "chat"} | question).encode())


def test_the_ranking_and_the_reason_are_told_and_nothing_changes(state: WorkerState) -> None:
    serve(state, "m")
    first = ask(state, tenant="acme", body={"messages": USER})["values"]
    assert (first["worker"], first["route"], first["class"], first["model"]) == ("worker-0", "chat", "standard", "m")
    assert (first["policy"], first["fallback"], first["queued"]) == ("affinity", False, 0)
    assert [line["place"] for line in first["ranking"]] == [1, 2, 3]
    assert (first["chosen"], first["reason"]) == (first["ranking"][0]["replica"], "home")
    assert all(ask(state, tenant="acme", body={"messages": USER})["values"] == first for _ in range(20))
    homes = {ask(state, tenant=f"t{n}", body={"messages": USER})["values"]["chosen"] for n in range(30)}
    assert homes == {"e0", "e1", "e2"}
    assert (state.admission.in_flight, state.admission.queued) == (0, 0)
    assert ask(state, model="sos")["values"]["class"] == "emergency"


def test_a_fallback_is_told_where_nobody_serves_the_model(state: WorkerState) -> None:
    serve(state, "n")
    found = ask(state)["values"]
    assert (found["model"], found["fallback"], found["reason"]) == ("n", True, "home")
    serve(state, "other")
    found = ask(state)["values"]
    assert (found["model"], found["fallback"], found["chosen"]) == ("m", False, None)
    assert found["reason"] == "no replica takes this request"
    assert {line["lacks"] for line in found["ranking"]} == {"does not hold the model"}


@pytest.mark.parametrize(("question", "code", "param"), [
    ({"model": "chad"}, "model_not_found", "model"),
    ({"body": {"vllm_xargs": {}}}, "unsupported_field", "vllm_xargs"),
    ({"model": "careful", "body": {"n": 2}}, "invalid_request", "n"),
    ({"model": "careful", "api": "completions"}, "invalid_request", "model"),
    ({"body": "{"}, "invalid_json", None),
    ({"body": "[]"}, "invalid_json", None),
])  # fmt: skip
def test_what_would_be_refused_is(state: WorkerState, question: dict[str, Any], code: str, param: str | None) -> None:
    serve(state, "m")
    error = ask(state, **question)["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_the_model_of_a_whole_request_does_not_count(state: WorkerState) -> None:
    serve(state, "m")
    body = {"model": "other", "messages": USER}
    assert ask(state, body=body)["values"] == ask(state, body={"messages": USER})["values"]


def test_nonsense_is_answered_and_kills_nothing(state: WorkerState) -> None:
    assert explaining.answer(state, b"[]")["error"]["code"] == "internal"
    assert ask(state, api="chats")["error"]["code"] == "internal"

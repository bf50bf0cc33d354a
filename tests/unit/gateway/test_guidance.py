"""The interface of Vitalis' first callers, to chat and back."""

import json
from typing import Any

import pytest
from vitalis_serve.errors import ServeError
from vitalis_serve.gateway import guidance
from vitalis_serve.gateway.body import Body
from vitalis_serve.gateway.guidance import Question
from vitalis_serve.gateway.keys import Route

ASKED = Question("Wie behandle ich eine Verbrühung? 🔥", 300)


def read(**fields: Any) -> Question:
    return guidance.read(json.dumps(fields).encode())


def chat(content: str | None, finish: str | None = "stop", **more: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **more}, "finish_reason": finish}
    return json.dumps({"id": "chatcmpl-1", "model": "vitalis-relief", "choices": [choice], "usage": {}}).encode()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 300),
        ({"max_tokens": None}, 300),
        ({"max_tokens": 10}, 10),
        ({"max_tokens": 1000}, 1000),
        ({"temperature": 0.1}, 300),
    ],
)
def test_a_question_is_read(given: dict[str, Any], expected: int) -> None:
    assert read(prompt=ASKED.prompt, **given) == (ASKED.prompt, expected)


@pytest.mark.parametrize("tokens", [9, 1001, -1, 0, 10**30, 300.5, "300", True, [300]])
def test_lengths_out_of_bounds_are_refused(tokens: object) -> None:
    with pytest.raises(ServeError, match="whole number from 10 to 1000") as caught:
        read(prompt="x", max_tokens=tokens)
    assert (caught.value.code, caught.value.param) == ("invalid_request", "max_tokens")


@pytest.mark.parametrize("fields", [{}, {"prompt": ""}, {"prompt": " \n"}, {"prompt": None}, {"prompt": ["x"]}])
def test_a_prompt_must_be_there(fields: dict[str, Any]) -> None:
    with pytest.raises(ServeError, match="`prompt` must be text") as caught:
        read(**fields)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"prompt":"a","prompt":"b"}', b'{"prompt":"\xff"}'])
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ServeError) as caught:
        guidance.read(raw)
    assert caught.value.status == 400


def test_the_chat_is_one_that_the_gateway_takes_itself() -> None:
    body = Body(guidance.chat_body(ASKED, "vitalis-emergency"), "chat", streams=True)
    assert (body.model, body.stream) == ("vitalis-emergency", False)
    assert json.loads(body.encode("vitalis-relief")) == {
        "model": "vitalis-relief",
        "messages": [{"role": "user", "content": ASKED.prompt}],
        "max_completion_tokens": 300,
    }


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ([("a", "emergency"), ("vitalis-emergency", None)], "vitalis-emergency"),
        ([("a", "batch"), ("b", "emergency"), ("c", "emergency")], "b"),
        ([("a", None)], "a"),
    ],
)
def test_the_route_is_the_one_for_emergencies(routes: list[tuple[str, str | None]], expected: str) -> None:
    assert guidance.route_for([Route(name, "m", class_=class_) for name, class_ in routes]).name == expected


@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_without_a_route_for_emergencies_there_is_no_guessing(names: list[str]) -> None:
    with pytest.raises(ServeError, match="no route for emergencies") as caught:
        guidance.route_for([Route(name, "m") for name in names])
    assert caught.value.code == "model_not_found"


def test_an_answer_has_their_form() -> None:
    assert guidance.answer(ASKED, chat("Kühlen. ❄", reasoning="hidden"), 1.23456) == {
        "prompt": ASKED.prompt,
        "response": "Kühlen. ❄",
        "metadata": {
            "generation_time": 1.235,
            "prompt_length": len(ASKED.prompt),
            "response_length": 9,
            "model_path": "vitalis-relief",
        },
    }


def test_an_answer_that_was_cut_is_one() -> None:
    assert guidance.answer(ASKED, chat("Kühlen und", "length"), 1)["response"] == "Kühlen und"


@pytest.mark.parametrize("content", [None, ""])
def test_tokens_that_all_went_into_reasoning_are_said(content: str | None) -> None:
    with pytest.raises(ServeError, match="spent all 300 tokens") as caught:
        guidance.answer(ASKED, chat(content, "length", reasoning="and so on"), 1)
    assert (caught.value.status, caught.value.param) == (400, "max_tokens")


@pytest.mark.parametrize("document", [b"", b"{}", b"[]", b'{"model":"m","choices":[]}', chat(None), chat("")])
def test_what_is_no_answer_is_an_error(document: bytes) -> None:
    with pytest.raises(ServeError) as caught:
        guidance.answer(ASKED, document, 1)
    assert caught.value.code == "engine_protocol"


def test_errors_have_their_form() -> None:
    assert guidance.envelope("No.") == {"error": "No.", "response": None}
    document = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'
    assert guidance.engine_envelope(document) == {"error": "too long", "response": None}
    for other in (b"", b'{"error":"Unauthorized"}', b"<html>"):
        assert guidance.engine_envelope(other) == {"error": "The engine refused the request.", "response": None}

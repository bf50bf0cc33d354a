"""The gateway's own answers, byte for byte what both families of clients read."""

import json

import pytest
from vitalis_serve.errors import CODES, NEVER_RETRIED, ServeError
from vitalis_serve.gateway.replies import engine_envelope, envelope, error_reply, json_reply, terminal_event


def split(reply: bytes) -> tuple[str, dict[str, str], bytes]:
    head, _, body = reply.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return first, dict(line.split(": ", 1) for line in lines), body


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_error_has_openais_envelope(code: str) -> None:
    error = ServeError(code, "A sentence.", param="p")
    first, headers, body = split(error_reply(error, "chat", b"req-1", keep_alive=True))
    assert first.startswith(f"HTTP/1.1 {error.status} ")
    assert first.split(" ", 2)[2]
    assert headers["x-request-id"] == "req-1"
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(body)
    assert json.loads(body) == {"error": {"message": "A sentence.", "type": error.type, "param": "p", "code": code}}
    assert (headers.get("x-should-retry") == "false") == (code in NEVER_RETRIED)
    assert ("www-authenticate" in headers) == (error.status == 401)
    assert "connection" not in headers


# What Anthropic's documents name; its client looks at the status, its users at the type.
ANTHROPIC = {
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "timeout_error",
    "overloaded_error",
    "api_error",
}


@pytest.mark.parametrize(
    "code",
    [
        "invalid_json", "missing_key", "route_not_allowed", "model_not_found", "method_not_allowed", "body_timeout",
        "body_too_large", "requests_limit", "queue_full", "engine_unreachable", "idle_timeout", "internal",
    ],
)  # fmt: skip
def test_anthropics_envelope_on_messages(code: str) -> None:
    document = envelope(ServeError(code, "A sentence."), "messages", "req-1")
    assert document["type"] == "error"
    assert document["request_id"] == "req-1"
    assert document["error"]["message"] == "A sentence."
    assert document["error"]["code"] == code
    assert document["error"]["type"] in ANTHROPIC


@pytest.mark.parametrize(("given", "said"), [(0.0, "1"), (0.4, "1"), (7.4, "7"), (60, "60"), (9999, "60")])
def test_retry_after_is_between_one_second_and_a_minute(given: float, said: str) -> None:
    _, headers, _ = split(error_reply(ServeError("queue_full", "x", retry_after=given), "chat", b"r", keep_alive=True))
    assert headers["retry-after"] == said


def test_a_connection_that_will_close_says_so() -> None:
    error = ServeError("method_not_allowed", "x")
    _, headers, _ = split(error_reply(error, "chat", b"r", keep_alive=False, allow=b"POST"))
    assert headers["connection"] == "close"
    assert headers["allow"] == "POST"
    assert split(json_reply({}, b"r", keep_alive=False))[1]["connection"] == "close"


def test_an_engines_error_is_passed_on_or_put_into_anthropics_envelope() -> None:
    document = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'
    assert engine_envelope(document, 400, "chat", "r") == document
    assert json.loads(engine_envelope(document, 400, "messages", "r")) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "too long"},
        "request_id": "r",
    }


@pytest.mark.parametrize("document", [b"", b"nonsense", b"[]", b"null", b'{"error":"Unauthorized"}', b'{"detail":"x"}'])
def test_an_engines_error_of_another_shape_is_left_alone(document: bytes) -> None:
    assert engine_envelope(document, 400, "messages", "r") == document


@pytest.mark.parametrize("dialect", ["chat", "completions", "responses", "messages"])
def test_a_terminal_event_closes_what_was_cut_and_is_one_event(dialect: str) -> None:
    event = terminal_event(ServeError("idle_timeout", 'The "engine"\nstopped.'), dialect, "req-1")
    assert event.startswith(b"\n\n")
    assert event.endswith(b"\n\n")
    lines = event.strip(b"\n").split(b"\n")
    assert b"[DONE]" not in event
    document = json.loads(lines[-1].removeprefix(b"data: "))
    if dialect == "messages":
        assert lines[0] == b"event: error"
        assert document["type"] == "error"
    elif dialect == "responses":
        assert lines[0] == b"event: response.failed"
        assert document["type"] == "response.failed"
        assert document["response"]["status"] == "failed"
        assert document["response"]["error"]["message"].endswith("stopped.")
    else:
        assert len(lines) == 1
        assert document["error"]["code"] == "idle_timeout"

"""Bytes of the answers that are the gateway's own: errors in the dialect of the API, and endings of streams. Pure."""

from http import HTTPStatus
from typing import Any, Final

import msgspec

from vitalis_serve.errors import NEVER_RETRIED, ServeError
from vitalis_serve.gateway import guidance
from vitalis_serve.gateway.events import UNREADABLE

STATUS_LINES: Final[dict[int, bytes]] = {
    **{code: b"HTTP/1.1 %d \r\n" % code for code in range(100, 600)},
    **{s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode()) for s in HTTPStatus},
}
_encode = msgspec.json.Encoder().encode
# Anthropic's names for what went wrong, where they differ from ours.
_ANTHROPIC: Final = {
    "timeout_error": "timeout_error",
    "engine_error": "api_error",
    "internal_error": "api_error",
}


def envelope(error: ServeError, dialect: str, request_id: str) -> dict[str, Any]:
    """OpenAI's error document; Anthropic's on /v1/messages; a sentence on /emergency-guidance."""
    if dialect == "guidance":
        return guidance.envelope(error.message)
    if dialect == "messages":
        kind = _ANTHROPIC.get(error.type, error.type)
        return {
            "type": "error",
            "error": {"type": kind, "message": error.message, "code": error.code, "param": error.param},
            "request_id": request_id,
        }
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def engine_envelope(document: bytes, status: int, dialect: str, request_id: str) -> bytes:
    """An engine's own error answer, put into the envelope that the client speaks."""
    if dialect == "guidance":
        return _encode(guidance.engine_envelope(document))
    if dialect != "messages":
        return document
    try:
        message = msgspec.json.decode(document)["error"]["message"]
    except (*UNREADABLE, KeyError, TypeError):
        return document
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
    return _encode({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})


def error_reply(error: ServeError, dialect: str, request_id: bytes, *, keep_alive: bool, allow: bytes = b"") -> bytes:
    """A whole response: head and body."""
    body = _encode(envelope(error, dialect, request_id.decode("latin-1")))
    head = STATUS_LINES[error.status] + b"content-type: application/json\r\nx-request-id: %b\r\n" % request_id
    if error.retry_after is not None:
        head += b"retry-after: %d\r\n" % max(1, min(60, round(error.retry_after)))
    if error.code in NEVER_RETRIED:
        head += b"x-should-retry: false\r\n"
    head += error.headers
    if error.status == 401:
        head += b"www-authenticate: Bearer\r\n"
    if allow:
        head += b"allow: %b\r\n" % allow
    if not keep_alive:
        head += b"connection: close\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def json_reply(document: Any, request_id: bytes, *, status: int = 200, keep_alive: bool) -> bytes:
    body = _encode(document)
    close = b"" if keep_alive else b"connection: close\r\n"
    return b"%bcontent-type: application/json\r\nx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n%b" % (
        STATUS_LINES[status],
        request_id,
        close,
        len(body),
        body,
    )


def terminal_event(error: ServeError, dialect: str, request_id: str) -> bytes:
    """What ends a relayed stream that failed: a blank line (closing what was cut), then the API's own error event."""
    if dialect == "messages":
        return b"\n\nevent: error\ndata: " + _encode(envelope(error, dialect, request_id)) + b"\n\n"
    if dialect == "responses":
        document = {
            "type": "response.failed",
            "sequence_number": 0,
            "response": {
                "id": f"resp_{request_id}",
                "object": "response",
                "status": "failed",
                "output": [],
                "error": {"code": "server_error", "message": error.message},
            },
        }
        return b"\n\nevent: response.failed\ndata: " + _encode(document) + b"\n\n"
    return b"\n\ndata: " + _encode(envelope(error, dialect, request_id)) + b"\n\n"

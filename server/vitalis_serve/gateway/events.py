"""Server-sent events of the four streaming APIs: which one bears the first token, and which must not pass unseen. Pure.

vLLM answers 200 before prefill and announces itself early, so a stream is held back until an event that bears
a token. Only those first events are parsed; afterwards bytes pass, and a few searches per read
find what must not be missed: usage, an error inside a 200, the end, and whether the answer is whole then.
"""

import re
from typing import Any, Final, Literal

import msgspec

from vitalis_serve.gateway.usage import USAGE

Verdict = Literal["preamble", "token", "error", "end"]

ERRORS: Final[dict[str, bytes]] = {
    "chat": b'data: {"error":',
    "completions": b'data: {"error":',
    "responses": b"event: error",
    "messages": b"event: error",
}
# How a stream of each dialect ends when it is whole; see `ended`.
ENDINGS: Final[dict[str, tuple[bytes, ...]]] = {
    "chat": (b"data: [DONE]",),
    "completions": (b"data: [DONE]",),
    "responses": (
        b'"type":"response.completed"',
        b'"type":"response.incomplete"',
        b'"type":"response.failed"',
    ),
    "messages": (b"event: message_stop", b'"type":"message_stop"'),
}
ABORTED: Final = b'"finish_reason":"abort"'
NO_TOKENS: Final = b'"output_tokens":0'
# What the events of chat and completions have until their choice ends. With quotes, so it cannot stand in a text.
GOES_ON: Final = b'"finish_reason":null'
_FINISH: Final = re.compile(rb'"finish_reason"\s*:\s*"(\w+)"')
# How vLLM 0.32 tells an abort where there is no finish reason: Responses by a status, Messages by none of its reasons.
_CANCELLED: Final = b'"status":"cancelled"'
_NO_REASON: Final = b'"stop_reason":null'
_REASON: Final = b'"stop_reason":"'

# What a decoder may raise over an engine's bytes: no JSON, no UTF-8, nested without end.
UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_decode = msgspec.json.Decoder().decode


def data_of(event: bytes) -> bytes:
    """The data of one event (without its blank line), b"" where it has none (a comment)."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].lstrip(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def judge(event: bytes, dialect: str) -> Verdict:
    """What one whole event means for a stream that is still held back."""
    data = data_of(event)
    if not data:
        return "preamble"
    if data == b"[DONE]":
        return "end"
    try:
        document = _decode(data)
    except UNREADABLE:
        return "error"
    if not isinstance(document, dict):
        return "error"
    if dialect in ("responses", "messages"):
        return _judge_typed(str(document.get("type", "")), data)
    return _judge_choices(document)


def _judge_typed(kind: str, data: bytes) -> Verdict:
    if kind == "error" or kind == "response.failed":
        return "error"
    # A message that stops without a delta, a response completed without a token: given up by the engine.
    if kind == "message_stop" or NO_TOKENS in data:
        return "end" if kind.endswith(("_stop", ".completed")) else "preamble"
    if (kind == "message_delta" and _NO_REASON in data) or (kind == "response.completed" and _is_cancelled(data)):
        return "end"
    if kind.endswith((".delta", "_delta", ".completed", ".incomplete")):
        return "token"
    return "preamble"


def _judge_choices(document: dict[str, Any]) -> Verdict:
    if "error" in document:
        return "error"
    choices = document.get("choices")
    if not isinstance(choices, list):
        return "error"
    for choice in choices:
        if not isinstance(choice, dict):
            return "error"
        finish = choice.get("finish_reason")
        if finish == "abort":
            return "end"
        if finish is not None or choice.get("text"):
            return "token"
        delta = choice.get("delta") or {}
        if not isinstance(delta, dict):
            return "error"
        if delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content") or delta.get("tool_calls"):
            return "token"
    return "preamble"


def given_up(body: bytes, dialect: str) -> bool:
    """Whether a plain answer is one that the engine aborted, as a draining vLLM answers: 200, and not all of it."""
    if dialect == "responses":
        return body.rfind(NO_TOKENS) >= 0 or _is_cancelled(body)
    if dialect == "messages":  # where vLLM leaves out what is null
        return body.rfind(NO_TOKENS) >= 0 or (body.rfind(_REASON) < 0 and body.find(b'"type":"message"') >= 0)
    return body.rfind(ABORTED) >= 0


def _is_cancelled(data: bytes) -> bool:
    """Of a response, or the event that brings it; what its client sent in is repeated there, so it is parsed."""
    if data.rfind(_CANCELLED) < 0:
        return False
    try:
        document = _decode(data)
        return bool(document.get("response", document)["status"] == "cancelled")
    except (*UNREADABLE, AttributeError, KeyError, TypeError):
        return False


def notable(raw: bytes) -> bool:
    """Whether whole events may hold what must not pass unseen: usage, an error inside a 200, a token of Harmony's own
    (they all have a `|`). `rfind`, for `in` first tries its left side as a number and forgets the exception: 0.46 us
    against 0.19."""
    return raw.rfind(USAGE) >= 0 or raw.rfind(b'"error"') >= 0 or raw.rfind(b"|") >= 0


def all_go_on(payload: bytes, events: int) -> bool:
    """Whether so many whole events of chat or completions leave their choices open, all of them: none is an error, has
    a finish reason, or is the end. They may have usage, or a token of Harmony's own."""
    return payload.count(GOES_ON) == events


def ending(whole: bytes) -> bytes:
    """How the last of these events ends where it leaves its choice open, else b"". vLLM ends all of a stream alike, so
    of one that ends so nothing else has to be looked for but Harmony's own tokens."""
    at = whole.rfind(GOES_ON)
    return whole[at:] if at >= 0 and whole.find(b"\n\n", at) == len(whole) - 2 else b""


def broken_off(whole: bytes, dialect: str, unfinished: int) -> tuple[int, int]:
    """Where in these whole events the one begins by which an engine ends an answer that is not whole, -1 for nowhere;
    and how many of the `unfinished` choices there were before are still without their finish reason.

    vLLM gives up what it cannot finish, as when it is stopped: with an abort for a finish reason, or with none."""
    if dialect == "messages":
        at = whole.rfind(b'"type":"message_delta"')
        return (_begin(whole, at) if at >= 0 and whole.find(_NO_REASON, at) >= 0 else -1), 0
    if dialect == "responses":
        at = whole.rfind(b'"type":"response.completed"')
        if at >= 0 and whole.rfind(_CANCELLED) >= 0:
            at = _begin(whole, at)
            if _is_cancelled(data_of(whole[at:].split(b"\n\n", 1)[0])):
                return at, 0
        return -1, 0
    for found in _FINISH.finditer(whole):
        if found[1] == b"abort":
            return _begin(whole, found.start()), unfinished
        unfinished -= 1
    if unfinished > 0:
        (mark,) = ENDINGS[dialect]
        if whole.startswith(mark):
            return 0, unfinished
        if (at := whole.find(b"\n" + mark)) >= 0:
            return at + 1, unfinished
    return -1, unfinished


def _begin(whole: bytes, at: int) -> int:
    """Where the event begins that this place is in."""
    before = whole.rfind(b"\n\n", 0, at)
    return before + 2 if before >= 0 else 0


def ended(last: bytes, dialect: str) -> bool:
    """Whether the last whole events of a stream end it as its API does. A mark with quotes cannot stand in a text of
    the answer, which would escape them; another one counts only at the beginning of a line."""
    for mark in ENDINGS[dialect]:
        at = last.rfind(mark)
        if at == 0 or (at > 0 and (mark.startswith(b'"') or last[at - 1] == ord("\n"))):
            return True
    return False


def find_error(payload: bytes, dialect: str) -> int:
    """Where the engine's own error event begins, -1 where there is none. Text of an answer cannot be mistaken for
    one: JSON escapes the line break before it."""
    mark = ERRORS[dialect]
    return 0 if payload.startswith(mark) else payload.find(b"\n" + mark)


def without_usage_event(payload: bytes) -> bytes:
    """`payload` less the event with `"choices":[]` that include_usage adds; whole events only."""
    if b'"choices":[]' not in payload:
        return payload
    kept = [
        event
        for event in payload.split(b"\n\n")
        if not (b'"choices":[]' in event and USAGE in event and event.startswith(b"data: "))
    ]
    return b"\n\n".join(kept)

"""`POST /emergency-guidance`, the small interface that Vitalis' first callers speak, as an ordinary chat. Pure.

They send `{"prompt", "max_tokens"}` and read `{"prompt", "response", "metadata"}` or `{"error", "response": null}`.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.body import top_level
from vitalis_serve.gateway.events import UNREADABLE
from vitalis_serve.gateway.keys import Route

ROUTE: Final = "vitalis-emergency"
LEAST_TOKENS: Final = 10
MOST_TOKENS: Final = 1000
TOKENS: Final = 300

_encode = msgspec.json.Encoder().encode
_as_str = msgspec.json.Decoder(str).decode
_as_int = msgspec.json.Decoder(int | None).decode
_NULL: Final = msgspec.Raw(b"null")


class Question(NamedTuple):
    """What was asked, and how many tokens the answer may have, reasoning included."""

    prompt: str
    max_tokens: int


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Chat(msgspec.Struct):
    model: str
    choices: list[_Choice]


class _EngineError(msgspec.Struct):
    message: str


class _Refusal(msgspec.Struct):
    error: _EngineError


_chat = msgspec.json.Decoder(_Chat).decode
_refusal = msgspec.json.Decoder(_Refusal).decode


def read(raw: bytes) -> Question:
    """The body of a request; other fields than the two are passed over. ServeError invalid_json or invalid_request."""
    fields = top_level(raw)
    try:
        prompt = _as_str(fields.get("prompt", _NULL))
    except msgspec.DecodeError:
        prompt = ""
    if not prompt.strip():
        raise ServeError("invalid_request", "`prompt` must be text, and not empty.", param="prompt")
    try:
        tokens = _as_int(fields.get("max_tokens", _NULL))
    except msgspec.DecodeError:
        tokens = 0
    if tokens is None:
        tokens = TOKENS
    if not LEAST_TOKENS <= tokens <= MOST_TOKENS:
        raise ServeError(
            "invalid_request",
            f"`max_tokens` must be a whole number from {LEAST_TOKENS} to {MOST_TOKENS}.",
            param="max_tokens",
        )
    return Question(prompt, tokens)


def route_for(routes: Sequence[Route]) -> Route:
    """Of the routes that a key may use: `vitalis-emergency`, else the first of class emergency, else the only one.

    ServeError model_not_found where none of that leads to one.
    """
    for route in routes:
        if route.name == ROUTE:
            return route
    for route in routes:
        if route.class_ == "emergency":
            return route
    if len(routes) == 1:
        return routes[0]
    raise ServeError(
        "model_not_found", f"This key may use no route for emergencies: neither `{ROUTE}` nor one of class emergency."
    )


def chat_body(question: Question, route: str) -> bytes:
    """The same question for /v1/chat/completions; what the route says of bodies is still to be applied."""
    return _encode(
        {
            "model": route,
            "messages": [{"role": "user", "content": question.prompt}],
            "max_completion_tokens": question.max_tokens,
        }
    )


def answer(question: Question, document: bytes, seconds: float) -> dict[str, Any]:
    """An engine's plain chat answer as these callers read it. Lengths are in characters, `seconds` since the request.

    ServeError invalid_request where all tokens went into reasoning; engine_protocol where this is no answer.
    """
    try:
        chat = _chat(document)
        choice = chat.choices[0]
    except (*UNREADABLE, IndexError):
        raise ServeError("engine_protocol", "The engine's answer could not be read.") from None
    response = choice.message.content
    if not response:
        if choice.finish_reason == "length":
            raise ServeError(
                "invalid_request",
                f"The model spent all {question.max_tokens} tokens before it came to an answer; ask with a larger "
                "`max_tokens` or a simpler question.",
                param="max_tokens",
            )
        raise ServeError("engine_protocol", "The model gave an empty answer.")
    return {
        "prompt": question.prompt,
        "response": response,
        "metadata": {
            "generation_time": round(seconds, 3),
            "prompt_length": len(question.prompt),
            "response_length": len(response),
            "model_path": chat.model,
        },
    }


def envelope(message: str) -> dict[str, Any]:
    """Their error document, around one sentence."""
    return {"error": message, "response": None}


def engine_envelope(document: bytes) -> dict[str, Any]:
    """The same around what an engine's own error answer says."""
    try:
        return envelope(_refusal(document).error.message)
    except UNREADABLE:
        return envelope("The engine refused the request.")

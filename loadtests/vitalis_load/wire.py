"""The four APIs' JSON, as far as it is measured. What is not named here is skipped, unread.

A field of another type than its API gives it makes the document unreadable: it is not the API's.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=0)]
# What a decoder may raise over a server's bytes: no JSON, other types, no UTF-8, nested without end.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
DETAIL_CHARACTERS = 200


class Usage(Struct):
    """Tokens as the server counted them; None where it did not say. `prompt` includes `cached`, `completion` includes
    `reasoning`."""

    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None
    reasoning: int | None = None


# -- chat and completions


class PromptDetails(Struct, gc=False):
    cached_tokens: Count | None = None


class CompletionDetails(Struct, gc=False):
    reasoning_tokens: Count | None = None


class ChatUsage(Struct, gc=False):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class Function(Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class ToolCall(Struct, gc=False):
    id: str | None = None
    function: Function | None = None


class Delta(Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None  # vLLM
    reasoning_content: str | None = None  # others, and vLLM before 0.11
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Function | None = None


class ChatChoice(Struct, gc=False):
    """Of a chunk, which has a delta, or of a plain answer, whose message is not looked at."""

    delta: Delta | None = None
    finish_reason: str | None = None


class ChatDocument(Struct, gc=False):
    choices: list[ChatChoice] | None = None
    usage: ChatUsage | None = None
    error: Any = None
    object: str = ""
    message: Any = None


class TextChoice(Struct, gc=False):
    text: str | None = None
    finish_reason: str | None = None


class TextDocument(Struct, gc=False):
    choices: list[TextChoice] | None = None
    usage: ChatUsage | None = None
    error: Any = None
    object: str = ""
    message: Any = None


# -- Responses


class InputDetails(Struct, gc=False):
    cached_tokens: Count | None = None


class OutputDetails(Struct, gc=False):
    reasoning_tokens: Count | None = None


class ResponseUsage(Struct, gc=False):
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    input_tokens_details: InputDetails | None = None
    output_tokens_details: OutputDetails | None = None


class Incomplete(Struct, gc=False):
    reason: str | None = None


class Response(Struct, gc=False):
    """The response object: inside its events, or as a plain answer."""

    object: str = ""
    status: str | None = None
    incomplete_details: Incomplete | None = None
    usage: ResponseUsage | None = None
    error: Any = None


class Item(Struct, gc=False):
    type: str = ""


class ResponseEvent(Struct, gc=False):
    type: str = ""
    delta: str | dict[str, Any] | None = None
    response: Response | None = None
    item: Item | None = None
    error: Any = None
    message: Any = None


# -- Messages


class MessageUsage(Struct, gc=False):
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None


class Message(Struct, gc=False):
    """As a plain answer, or as its stream begins with it."""

    type: str = ""
    stop_reason: str | None = None
    usage: MessageUsage | None = None
    error: Any = None


class MessageDelta(Struct, gc=False):
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class Block(Struct, gc=False):
    type: str = ""


class MessageEvent(Struct, gc=False):
    type: str = ""
    message: Message | str | None = None
    content_block: Block | None = None
    delta: MessageDelta | None = None
    usage: MessageUsage | None = None
    error: Any = None


def words(error: Any) -> str:
    """What an error object says, in at most DETAIL_CHARACTERS."""
    if isinstance(error, dict):
        for name in ("message", "error", "detail", "code", "type"):
            if error.get(name):
                return words(error[name])
    if isinstance(error, list) and error:  # FastAPI's list of what is wrong with a body
        first = error[0]
        return words(first.get("msg") or first) if isinstance(first, dict) else words(first)
    return " ".join(str(error).split())[:DETAIL_CHARACTERS]


def body_words(body: bytes) -> str:
    """What the body of a refusal says: an API's error, or the beginning of whatever it is."""
    try:
        return words(msgspec.json.decode(body))
    except UNREADABLE:
        return words(body.decode(errors="replace"))

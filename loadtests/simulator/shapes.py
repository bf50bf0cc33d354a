"""What vLLM 0.32 writes, byte for byte as far as a client can tell: answers and errors; streams are in `writers`."""

import json
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from simulator import calls, logprobs
from simulator.answers import Layout, content_text, reasoning_text

FINGERPRINT = "vllm-0.32.0-sim"
CACHED_TOKENS = 4096
_WORDS = [f"tok{index}" if index == 0 else f" tok{index}" for index in range(CACHED_TOKENS + 1)]
_THOUGHTS = [f"think{index}" if index == 0 else f" think{index}" for index in range(16)]
WORDS = [word.encode() for word in _WORDS]
THOUGHTS = [thought.encode() for thought in _THOUGHTS]
# What vLLM 0.32 makes of a message begun inside another: text, one delta for each token.
LEAK_PIECES = ("<|start|>", "assistant", "<|channel|>", "final", "<|message|>")
LEAK = "".join(LEAK_PIECES)

encode = msgspec.json.Encoder().encode


class Counted(Protocol):
    """What a writer reads of the sequence behind it."""

    prompt_tokens: int
    generated: int
    cached: int


def word(index: int) -> bytes:
    return WORDS[index] if index <= CACHED_TOKENS else b" tok%d" % index


def words(begin: int, end: int) -> str:
    """The content's tokens from one number to before another, joined."""
    return "".join(_WORDS[at] if at <= CACHED_TOKENS else f" tok{at}" for at in range(begin, end))


def thoughts(begin: int, end: int) -> str:
    """As `words`, of the reasoning."""
    return "".join(_THOUGHTS[begin:end])


def named(kind: str, document: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(document))


def error_body(status: int, message: str, error_type: str, param: str | None = None) -> bytes:
    """vLLM's error envelope: OpenAI's, with the status as code."""
    return encode({"error": {"message": message, "type": error_type, "param": param, "code": status}})


def stream_error(message: str) -> bytes:
    """An error inside a 200: json.dumps writes it, with its spaces."""
    error = {"message": message, "type": "InternalServerError", "param": None, "code": 500}
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


class Answer:
    """What every writer knows of its request. `count` is how many choices (n); `call` the tool's name it calls, ""
    for a text; `named` whether the client chose it; `logprobs` how many alternatives, -1 without logprobs."""

    __slots__ = ("api", "cached_details", "call", "continuous", "count", "created", "finish_reason", "id",
                 "include_usage", "layout", "leak", "logprobs", "model", "named", "sequence")  # fmt: skip

    def __init__(self, api: str, identity: str, model: str, created: int, layout: Layout, finish_reason: str) -> None:
        self.api = api
        self.id = identity
        self.model = model
        self.created = created
        self.layout = layout
        self.finish_reason = finish_reason
        self.count = 1
        self.include_usage = False
        self.continuous = False
        self.cached_details = False
        self.leak = False
        self.call = ""
        self.named = False
        self.logprobs = -1
        self.sequence: Counted

    def usage(self) -> dict[str, Any]:
        """Chat's and completions' usage at this moment."""
        prompt, completion = self.sequence.prompt_tokens, self.sequence.generated * self.count
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": self.sequence.cached} if self.cached_details else None,
        }
        if self.api == "chat":
            usage["completion_tokens_details"] = {"reasoning_tokens": self.layout.reasoning * self.count}
        return usage

    def content(self) -> str:
        return (LEAK if self.leak else "") + content_text(self.layout.content)

    @property
    def whole(self) -> bool:
        """Whether no limit cut it."""
        return self.finish_reason == "stop"

    @property
    def calls_tool(self) -> bool:
        """Whether there is a call in it: a limit may have cut before."""
        return bool(self.call and self.layout.content)

    def arguments(self) -> str:
        return calls.arguments(self.layout.content, self.whole)

    def call_id(self, choice: int = 0) -> str:
        return f"chatcmpl-tool-{hash((self.id, choice)) & 0xFFFFFFFFFFFFFFFF:016x}"

    def chat_reason(self) -> str:
        """The finish_reason: a tool that the client named ends with stop."""
        return "tool_calls" if self.calls_tool and self.whole and not self.named else self.finish_reason

    def chat_stop(self) -> int | None:
        return calls.CALL_TOKEN if self.call and self.whole else None

    def token_text(self, index: int) -> str:
        return logprobs.token_text(self.layout, index, self.call, self.whole)

    def reasoning(self) -> str | None:
        return reasoning_text(self.layout.reasoning) if self.layout.reasoning else None


def chat_body(answer: Answer, aborted: bool = False) -> bytes:
    """A whole chat completion. `aborted`: as a draining vLLM answers."""
    called = answer.calls_tool and not aborted
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "" if aborted or called else answer.content() or None,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning": None if aborted else answer.reasoning(),
    }
    reason = "abort" if aborted else answer.chat_reason()
    told = None
    if answer.logprobs >= 0 and not aborted:
        told = logprobs.chat([answer.token_text(at) for at in range(answer.layout.total)], answer.logprobs)
    text = calls.rewritten(answer.arguments()) if called else ""

    def spoken(index: int) -> dict[str, Any]:
        return {**message, "tool_calls": [calls.chat_call(answer.call_id(index), answer.call, text)] if called else []}

    return encode(
        {
            "id": answer.id,
            "object": "chat.completion",
            "created": answer.created,
            "model": answer.model,
            "choices": [
                {
                    "index": index,
                    "message": spoken(index),
                    "logprobs": told,
                    "finish_reason": reason,
                    "stop_reason": answer.chat_stop(),
                    "token_ids": None,
                }
                for index in range(answer.count)
            ],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": answer.usage(),
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "kv_transfer_params": None,
        }
    )


def completion_body(answer: Answer, aborted: bool = False) -> bytes:
    """A whole text completion."""
    told = None
    if answer.logprobs >= 0 and not aborted:
        told = logprobs.completion([answer.token_text(at) for at in range(answer.layout.total)], answer.logprobs)
    return encode(
        {
            "id": answer.id,
            "object": "text_completion",
            "created": answer.created,
            "model": answer.model,
            "choices": [
                {
                    "index": index,
                    "text": "" if aborted else answer.content(),
                    "logprobs": told,
                    "finish_reason": "abort" if aborted else answer.finish_reason,
                    "stop_reason": None,
                    "token_ids": None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": None,
                }
                for index in range(answer.count)
            ],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": answer.usage(),
            "kv_transfer_params": None,
        }
    )


def message_body(answer: Answer, aborted: bool = False) -> bytes:
    """A whole Anthropic message."""
    content: list[dict[str, Any]] = []
    if not aborted and answer.layout.reasoning:
        content.append({"type": "thinking", "thinking": answer.reasoning(), "signature": signature(answer)})
    if not aborted and answer.calls_tool:
        content.append(calls.message_block(answer.call_id(), answer.call, answer.arguments()))
    elif not aborted and answer.layout.content:
        content.append({"type": "text", "text": answer.content()})
    # an abort is no reason of this API, and what is null is left out
    reason = {} if aborted or answer.finish_reason == "abort" else {"stop_reason": stop_reason(answer)}
    return encode(
        {
            "id": answer.id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": answer.model,
            **reason,
            "usage": message_usage(answer),
        }
    )


def stop_reason(answer: Answer) -> str:
    if not answer.whole:
        return "max_tokens"
    return "tool_use" if answer.calls_tool else "end_turn"


def signature(answer: Answer) -> str:
    return f"{hash(answer.id) & 0xFFFFFFFFFFFFFFFF:032x}"


def message_usage(answer: Answer) -> dict[str, Any]:
    """Messages' usage: its input tokens leave the cached ones out."""
    sequence = answer.sequence
    return {
        "input_tokens": sequence.prompt_tokens - sequence.cached,
        "output_tokens": sequence.generated,
        "cache_read_input_tokens": sequence.cached,
    }


def reasoning_item(answer: Answer, identity: str) -> dict[str, Any]:
    return {
        "id": identity,
        "summary": [],
        "type": "reasoning",
        "content": [{"text": answer.reasoning(), "type": "reasoning_text"}],
        "encrypted_content": None,
        "status": "completed",
    }


def message_item(answer: Answer, identity: str) -> dict[str, Any]:
    part: dict[str, Any] = {"annotations": [], "text": answer.content(), "type": "output_text", "logprobs": None}
    return {"id": identity, "content": [part], "role": "assistant", "status": "completed", "type": "message"}


def response_document(answer: Answer, status: str, empty: bool = False) -> dict[str, Any]:
    """The response object, whole or while it is in progress."""
    running = status == "in_progress"
    identity = answer.id.removeprefix("resp_")
    output = []
    if not running and not empty:
        if answer.layout.reasoning:
            output.append(reasoning_item(answer, f"rs_{identity}"))
        if answer.calls_tool:
            state = "completed" if answer.whole else "incomplete"
            output.append(calls.response_item(identity, answer.call, answer.arguments(), state))
        elif answer.layout.content:
            output.append(message_item(answer, f"msg_{identity}"))
    return {
        "id": answer.id,
        "created_at": answer.created,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "metadata": None,
        "model": answer.model,
        "object": "response",
        "output": output,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": answer.layout.total,
        "max_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
        "status": status,
        "text": None,
        "top_logprobs": None,
        "truncation": "disabled",
        "usage": None if running else _response_usage(answer),
        "user": None,
        "input_messages": None,
        "output_messages": None,
    }


def _response_usage(answer: Answer) -> dict[str, Any]:
    sequence = answer.sequence
    return {
        "input_tokens": sequence.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": sequence.cached,
            "input_tokens_per_turn": [],
            "cached_tokens_per_turn": [],
        },
        "output_tokens": sequence.generated,
        "output_tokens_details": {
            "reasoning_tokens": answer.layout.reasoning,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": sequence.prompt_tokens + sequence.generated,
    }


def response_body(answer: Answer, aborted: bool = False) -> bytes:
    """A whole response."""
    status = {"stop": "completed", "abort": "cancelled"}.get(answer.finish_reason, "incomplete")
    return encode(response_document(answer, status, empty=aborted))


BODIES: dict[str, Callable[[Answer, bool], bytes]] = {
    "chat": chat_body,
    "completions": completion_body,
    "messages": message_body,
    "responses": response_body,
}
ID_PREFIXES = {"chat": "chatcmpl-", "completions": "cmpl-", "messages": "chatcmpl-", "responses": "resp_"}

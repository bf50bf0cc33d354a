"""What vLLM 0.32 writes, byte for byte as far as a client can tell: answers, stream events, errors.

A writer is made for each request; `opening`, `token` and `closing` return whole SSE events, without HTTP framing.
The parts of an event that do not change are encoded once a request, because tens of thousands are made a second.
"""

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from simulator.answers import Layout, content_text, reasoning_text

FINGERPRINT = "vllm-0.32.0-sim"
CACHED_TOKENS = 4096
_WORDS = [f"tok{index}" if index == 0 else f" tok{index}" for index in range(CACHED_TOKENS + 1)]
_THOUGHTS = [f"think{index}" if index == 0 else f" think{index}" for index in range(16)]
WORDS = [word.encode() for word in _WORDS]
THOUGHTS = [thought.encode() for thought in _THOUGHTS]
LEAK = b"<|channel|>analysis<|message|>"

encode = msgspec.json.Encoder().encode


class Counted(Protocol):
    """What a writer reads of the sequence behind it."""

    prompt_tokens: int
    generated: int
    cached: int


def word(index: int) -> bytes:
    return WORDS[index] if index <= CACHED_TOKENS else b" tok%d" % index


def error_body(status: int, message: str, error_type: str, param: str | None = None) -> bytes:
    """vLLM's error envelope: OpenAI's, with the status as code."""
    return encode({"error": {"message": message, "type": error_type, "param": param, "code": status}})


ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
STREAM_ERROR = b"data: " + error_body(500, ENGINE_DEAD, "InternalServerError") + b"\n\n"
DONE = b"data: [DONE]\n\n"


class Answer:
    """What every writer knows of its request. `count` is how many choices (n)."""

    __slots__ = ("api", "cached_details", "continuous", "count", "created", "finish_reason", "id", "include_usage",
                 "layout", "leak", "model", "sequence")  # fmt: skip

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
        return (LEAK.decode() if self.leak else "") + content_text(self.layout.content)

    def reasoning(self) -> str | None:
        return reasoning_text(self.layout.reasoning) if self.layout.reasoning else None


def chat_body(answer: Answer, aborted: bool = False) -> bytes:
    """A whole chat completion. `aborted`: as a draining vLLM answers."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "" if aborted else answer.content() or None,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning": None if aborted else answer.reasoning(),
    }
    reason = "abort" if aborted else answer.finish_reason
    return encode(
        {
            "id": answer.id,
            "object": "chat.completion",
            "created": answer.created,
            "model": answer.model,
            "choices": [
                {
                    "index": index,
                    "message": message,
                    "logprobs": None,
                    "finish_reason": reason,
                    "stop_reason": None,
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
                    "logprobs": None,
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
    if not aborted and answer.layout.content:
        content.append({"type": "text", "text": answer.content()})
    return encode(
        {
            "id": answer.id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": answer.model,
            "stop_reason": None if aborted else STOP_REASONS[answer.finish_reason],
            "usage": message_usage(answer),
        }
    )


STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


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


class ChatWriter:
    """Events of a streamed chat completion."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        layout = answer.layout
        self._think_from = layout.lead
        self._think_to = layout.lead + layout.reasoning
        self._say_from = self._think_to + layout.middle
        self._say_to = self._say_from + layout.content
        base = encode(
            {"id": answer.id, "object": "chat.completion.chunk", "created": answer.created, "model": answer.model}
        )
        self._base = b"data: " + base[:-1] + b',"choices":['
        self._content = [b"%b%b" % (self._base, self._delta(i, b"content")) for i in range(answer.count)]
        self._reasoning = [b"%b%b" % (self._base, self._delta(i, b"reasoning")) for i in range(answer.count)]
        self._tail = b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'

    @staticmethod
    def _delta(index: int, name: bytes) -> bytes:
        return b'{"index":%d,"delta":{"%b":"' % (index, name)

    def opening(self) -> list[bytes]:
        return []

    def token(self, number: int) -> list[bytes]:
        """The events of the answer's token with this number, from 1; empty for a hidden one."""
        if number == 1:
            return self.role() + self._text(0)
        return self._text(number - 1)

    def _text(self, index: int) -> list[bytes]:
        if self._say_from <= index < self._say_to:
            text, heads = word(index - self._say_from), self._content
            if self.answer.leak and index == self._say_from:
                text = LEAK + text
        elif self._think_from <= index < self._think_to:
            text, heads = THOUGHTS[index - self._think_from], self._reasoning
        else:
            return []
        if index + 1 == self.answer.layout.total and self.answer.finish_reason == "length":
            return [head + text + self._last_tail() for head in heads]
        tail = self._usage_tail(self._tail) if self.answer.continuous else self._tail
        return [head + text + tail for head in heads]

    def _last_tail(self) -> bytes:
        tail = b'"},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}],' + (
            b'"system_fingerprint":"%b"}\n\n' % FINGERPRINT.encode()
        )
        return self._usage_tail(tail) if self.answer.continuous else tail

    def _usage_tail(self, tail: bytes) -> bytes:
        return b'%b,"usage":%b}\n\n' % (tail[:-3], encode(self._progress()))

    def _progress(self) -> dict[str, int]:
        prompt, completion = self.answer.sequence.prompt_tokens, self.answer.sequence.generated
        return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}

    def role(self) -> list[bytes]:
        """The first chunk of each choice: a role and an empty content, before any token's text."""
        tail = b'},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}\n\n'
        if self.answer.continuous:
            prompt = self.answer.sequence.prompt_tokens
            usage = {"prompt_tokens": prompt, "total_tokens": prompt, "completion_tokens": 0}
            tail = b'%b,"usage":%b}\n\n' % (tail[:-3], encode(usage))
        delta = b'{"index":%d,"delta":{"role":"assistant","content":""'
        return [self._base + delta % index + tail for index in range(self.answer.count)]

    def closing(self) -> list[bytes]:
        """Everything after the last token, [DONE] included."""
        events = []
        if self.answer.finish_reason == "stop":
            for index in range(self.answer.count):
                tail = (
                    b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null,'
                    b'"token_ids":null}],"system_fingerprint":"%b"}\n\n'
                ) % (index, FINGERPRINT.encode())
                events.append(self._base + (self._usage_tail(tail) if self.answer.continuous else tail))
        if self.answer.include_usage:
            events.append(
                self._base + b'],"system_fingerprint":"%b","usage":' % FINGERPRINT.encode()
                + encode(self.answer.usage()) + b"}\n\n"
            )  # fmt: skip
        return [*events, DONE]

    def failure(self) -> list[bytes]:
        """How vLLM ends a stream when its engine dies."""
        return [STREAM_ERROR, DONE]

    def abandoned(self) -> list[bytes]:
        """How a draining vLLM answers a new request."""
        return [*self.role(), DONE]


class CompletionWriter:
    """Events of a streamed text completion."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        base = encode({"id": answer.id, "object": "text_completion", "created": answer.created, "model": answer.model})
        self._base = b"data: " + base[:-1] + b',"choices":['
        self._heads = [self._base + b'{"index":%d,"text":"' % index for index in range(answer.count)]
        self._tail = self._ending(b"null")

    @staticmethod
    def _ending(reason: bytes) -> bytes:
        return b'","logprobs":null,"finish_reason":%b,"stop_reason":null,"token_ids":null}]}\n\n' % reason

    def opening(self) -> list[bytes]:
        return []

    def token(self, number: int) -> list[bytes]:
        tail = self._tail
        if number == self.answer.layout.total:
            tail = self._ending(b'"%b"' % self.answer.finish_reason.encode())
        if self.answer.continuous:
            prompt, completion = self.answer.sequence.prompt_tokens, self.answer.sequence.generated
            usage = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
            tail = b'%b,"usage":%b}\n\n' % (tail[:-3], encode(usage))
        text = word(number - 1)
        if self.answer.leak and number == 1:
            text = LEAK + text
        return [head + text + tail for head in self._heads]

    def closing(self) -> list[bytes]:
        events = []
        if self.answer.include_usage:
            events.append(self._base + b'],"usage":' + encode(self.answer.usage()) + b"}\n\n")
        return [*events, DONE]

    def failure(self) -> list[bytes]:
        return [STREAM_ERROR, DONE]

    def abandoned(self) -> list[bytes]:
        return [DONE]


def _named(kind: str, document: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(document))


class MessageWriter:
    """Events of a streamed Anthropic message."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        layout = answer.layout
        self._think_from = layout.lead
        self._think_to = layout.lead + layout.reasoning
        self._say_from = self._think_to + layout.middle
        self._say_to = self._say_from + layout.content
        self._text_index = 1 if layout.reasoning else 0

    def opening(self) -> list[bytes]:
        return []

    def token(self, number: int) -> list[bytes]:
        index = number - 1
        events = self._start() if number == 1 else []
        if index == self._think_from < self._think_to:
            events.append(self._block(0, {"type": "thinking", "thinking": ""}))
        if self._think_from <= index < self._think_to:
            thought = THOUGHTS[index - self._think_from]
            events.append(self._change(b"0", b'"type":"thinking_delta","thinking":"%b"' % thought))
        elif self._say_from <= index < self._say_to:
            if index == self._say_from:
                events += self._stop_thinking()
                events.append(self._block(self._text_index, {"type": "text", "text": ""}))
            text = word(index - self._say_from)
            if self.answer.leak and index == self._say_from:
                text = LEAK + text
            events.append(self._change(b"%d" % self._text_index, b'"type":"text_delta","text":"%b"' % text))
        return events

    @staticmethod
    def _change(index: bytes, delta: bytes) -> bytes:
        return (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{%b},"index":%b}\n\n'
            % (delta, index)
        )  # fmt: skip

    @staticmethod
    def _block(index: int, block: dict[str, Any]) -> bytes:
        document = {"type": "content_block_start", "content_block": block, "index": index}
        return _named("content_block_start", document)

    def _start(self) -> list[bytes]:
        message: dict[str, Any] = {
            "id": self.answer.id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self.answer.model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**message_usage(self.answer), "output_tokens": 0},
        }
        return [_named("message_start", {"type": "message_start", "message": message})]

    def _stop_thinking(self) -> list[bytes]:
        if not self.answer.layout.reasoning:
            return []
        delta = b'"type":"signature_delta","signature":"%b"' % signature(self.answer).encode()
        return [self._change(b"0", delta), _named("content_block_stop", {"type": "content_block_stop", "index": 0})]

    def closing(self) -> list[bytes]:
        events = []
        if self.answer.layout.content:
            index = self._text_index
            events.append(_named("content_block_stop", {"type": "content_block_stop", "index": index}))
        delta = {"stop_reason": STOP_REASONS[self.answer.finish_reason]}
        document = {"type": "message_delta", "delta": delta, "usage": message_usage(self.answer)}
        return [*events, _named("message_delta", document), _named("message_stop", {"type": "message_stop"})]

    def failure(self) -> list[bytes]:
        error = {"type": "internal_error", "message": "1 validation error for ChatCompletionStreamResponse"}
        return [_named("error", {"type": "error", "error": error})]

    def abandoned(self) -> list[bytes]:
        return [*self._start(), _named("message_stop", {"type": "message_stop"})]


class ResponseWriter:
    """Events of a streamed response; `response.created` is sent before there is any token."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        layout = answer.layout
        self._think_from = layout.lead
        self._think_to = layout.lead + layout.reasoning
        self._say_from = self._think_to + layout.middle
        self._say_to = self._say_from + layout.content
        self._number = -1
        self._message_at = 1 if layout.reasoning else 0
        identity = answer.id.removeprefix("resp_")
        self._reasoning_id, self._message_id = f"rs_{identity}", f"msg_{identity}"

    def _event(self, kind: str, **document: Any) -> bytes:
        self._number += 1
        return _named(kind, {**document, "sequence_number": self._number, "type": kind})

    def opening(self) -> list[bytes]:
        response = response_document(self.answer, "in_progress")
        return [self._event("response.created", response=response),
                self._event("response.in_progress", response=response)]  # fmt: skip

    def token(self, number: int) -> list[bytes]:
        index = number - 1
        events: list[bytes] = []
        if self._think_from <= index < self._think_to:
            if index == self._think_from:
                events += self._open_reasoning()
            delta = _THOUGHTS[index - self._think_from]
            events.append(self._part_event("reasoning_text.delta", self._reasoning_id, 0, delta=delta))
            if index + 1 == self._think_to:
                events += self._close_reasoning()
        elif self._say_from <= index < self._say_to:
            if index == self._say_from:
                events += self._open_message()
            delta = word(index - self._say_from).decode()
            if self.answer.leak and index == self._say_from:
                delta = LEAK.decode() + delta
            at = self._message_at
            events.append(self._part_event("output_text.delta", self._message_id, at, delta=delta, logprobs=[]))
        return events

    def _part_event(self, kind: str, item: str, at: int, **document: Any) -> bytes:
        return self._event(f"response.{kind}", content_index=0, item_id=item, output_index=at, **document)

    def _open_reasoning(self) -> list[bytes]:
        item: dict[str, Any] = {"id": self._reasoning_id, "summary": [], "type": "reasoning", "content": None,
                "encrypted_content": None, "status": "in_progress"}  # fmt: skip
        part: dict[str, Any] = {"text": "", "type": "reasoning_text"}
        return [self._event("response.output_item.added", item=item, output_index=0),
                self._part_event("content_part.added", self._reasoning_id, 0, part=part)]  # fmt: skip

    def _close_reasoning(self) -> list[bytes]:
        text = self.answer.reasoning()
        part: dict[str, Any] = {"text": text, "type": "reasoning_text"}
        item = reasoning_item(self.answer, self._reasoning_id)
        return [self._part_event("reasoning_text.done", self._reasoning_id, 0, text=text),
                self._part_event("content_part.done", self._reasoning_id, 0, part=part),
                self._event("response.output_item.done", item=item, output_index=0)]  # fmt: skip

    def _open_message(self) -> list[bytes]:
        at = self._message_at
        item: dict[str, Any] = {
            "id": self._message_id,
            "content": [],
            "role": "assistant",
            "status": "in_progress",
            "type": "message",
        }
        part: dict[str, Any] = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
        return [self._event("response.output_item.added", item=item, output_index=at),
                self._part_event("content_part.added", self._message_id, at, part=part)]  # fmt: skip

    def closing(self) -> list[bytes]:
        events: list[bytes] = []
        if self.answer.layout.content:
            at, text = self._message_at, self.answer.content()
            part: dict[str, Any] = {"annotations": [], "text": text, "type": "output_text", "logprobs": None}
            item = message_item(self.answer, self._message_id)
            events += [self._part_event("output_text.done", self._message_id, at, text=text, logprobs=[]),
                       self._part_event("content_part.done", self._message_id, at, part=part),
                       self._event("response.output_item.done", item=item, output_index=at)]  # fmt: skip
        status = "completed" if self.answer.finish_reason == "stop" else "incomplete"
        # vLLM says response.completed for a truncated answer too; the status inside tells
        events.append(self._event("response.completed", response=response_document(self.answer, status)))
        return events

    def failure(self) -> list[bytes]:
        """None: vLLM breaks the chunked body of a response whose engine dies."""
        return []

    def abandoned(self) -> list[bytes]:
        response = response_document(self.answer, "completed", empty=True)
        return [self._event("response.completed", response=response)]


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
        if answer.layout.content:
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
    status = "completed" if answer.finish_reason == "stop" else "incomplete"
    return encode(response_document(answer, status, empty=aborted))


Writer = ChatWriter | CompletionWriter | MessageWriter | ResponseWriter
WRITERS: dict[str, Callable[[Answer], Writer]] = {
    "chat": ChatWriter,
    "completions": CompletionWriter,
    "messages": MessageWriter,
    "responses": ResponseWriter,
}
BODIES: dict[str, Callable[[Answer, bool], bytes]] = {
    "chat": chat_body,
    "completions": completion_body,
    "messages": message_body,
    "responses": response_body,
}
ID_PREFIXES = {"chat": "chatcmpl-", "completions": "cmpl-", "messages": "chatcmpl-", "responses": "resp_"}

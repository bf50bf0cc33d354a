"""What vLLM 0.32 writes, byte for byte as far as a client can tell: answers, stream events, errors.

A writer is made for each request; `opening`, `token` and `closing` return whole SSE events, without HTTP framing.
`group` is for an engine that tells several tokens at once (`--stream-interval`): what they have in common is one event.
The parts of an event that do not change are encoded once a request, because tens of thousands are made a second.
"""

import json
from collections.abc import Callable, Iterable
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
        # the others are made of parts that do not change
        self._by_hand = bool(answer.call) or answer.leak or answer.logprobs >= 0
        self._reason_told = False

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
        if self._by_hand:
            return self._unusual(index)
        if self._say_from <= index < self._say_to:
            text, heads = word(index - self._say_from), self._content
        elif self._think_from <= index < self._think_to:
            text, heads = THOUGHTS[index - self._think_from], self._reasoning
        else:
            return []
        if index + 1 == self.answer.layout.total and self.answer.finish_reason == "length":
            return [head + text + self._last_tail() for head in heads]
        tail = self._usage_tail(self._tail) if self.answer.continuous else self._tail
        return [head + text + tail for head in heads]

    def group(self, first: int, last: int) -> list[bytes]:
        """The tokens with these numbers, both included, as one event of each choice; none where all are hidden. The
        last one's has the reason."""
        begin, end, answer = first - 1, last, self.answer
        events = self.role() if first == 1 else []
        reason = ""
        if end == answer.layout.total:
            reason, self._reason_told = answer.chat_reason(), True
        for choice in range(answer.count):
            delta = self._joined(begin, end, choice)
            if delta or reason or answer.logprobs >= 0:
                events.append(self._choice(choice, delta, range(begin, end), reason))
        return events

    def _joined(self, begin: int, end: int, choice: int) -> dict[str, Any]:
        answer, delta = self.answer, {}
        if thought := thoughts(max(begin, self._think_from) - self._think_from,
                               max(0, min(end, self._think_to) - self._think_from)):  # fmt: skip
            delta["reasoning"] = thought
        start, stop = max(begin, self._say_from) - self._say_from, min(end, self._say_to) - self._say_from
        if stop <= start:
            return delta
        if not answer.call:
            return {**delta, "content": (LEAK if answer.leak and start == 0 else "") + words(start, stop)}
        text = "".join(calls.piece(at, answer.layout.content, answer.whole) for at in range(start, stop))
        told = calls.next_delta(text)
        if start == 0:
            told["tool_calls"] = (
                calls.first_delta(answer.call_id(choice), answer.call)["tool_calls"] + told["tool_calls"]
            )
        return {**delta, **told}

    def _unusual(self, index: int) -> list[bytes]:
        """As `_text`, where a tool is called, logprobs are wanted, or something leaks."""
        answer = self.answer
        deltas: list[dict[str, Any]] = []
        at = index - self._say_from
        if self._say_from <= index < self._say_to:
            if answer.call:
                deltas.append(calls.next_delta(calls.piece(at, answer.layout.content, answer.whole)))
            else:
                leaked = LEAK_PIECES if answer.leak and at == 0 else ()
                deltas += [{"content": text} for text in (*leaked, word(at).decode())]
        elif self._think_from <= index < self._think_to:
            deltas.append({"reasoning": THOUGHTS[index - self._think_from].decode()})
        elif answer.logprobs >= 0 and (index + 1 < answer.layout.total or index < self._say_to):
            deltas.append({})  # a hidden token, told for its logprobs; the last one's are with the finish reason
        last = index + 1 == answer.layout.total and not answer.whole
        events = []
        for choice in range(answer.count):
            if answer.call and index == self._say_from:
                events.append(self._choice(choice, calls.first_delta(answer.call_id(choice), answer.call)))
            for number, delta in enumerate(deltas):
                final = number + 1 == len(deltas)
                events.append(
                    self._choice(choice, delta, (index,) if final else (), "length" if last and final else "")
                )
        return events

    def _choice(
        self, choice: int, delta: dict[str, Any], indices: Iterable[int] = (), reason: str = ""
    ) -> bytes:  # fmt: skip
        """An event of one choice. `indices`: the tokens whose logprobs are told."""
        answer = self.answer
        texts = [answer.token_text(index) for index in indices] if answer.logprobs >= 0 else []
        told = logprobs.chat(texts, answer.logprobs) if texts else None
        document: dict[str, Any] = {"index": choice, "delta": delta, "logprobs": told, "finish_reason": reason or None}
        if reason:
            document["stop_reason"] = answer.chat_stop()
        tail = encode({**document, "token_ids": None}) + b"]"
        if reason:
            tail += b',"system_fingerprint":"%b"' % FINGERPRINT.encode()
        tail += b"}\n\n"
        return self._base + (self._usage_tail(tail) if answer.continuous else tail)

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
        # the last token of an answer that a limit cut bears the reason, unless it was one that the parser swallowed
        if (self.answer.whole or self.answer.layout.tail) and not self._reason_told:
            last = (self.answer.layout.total - 1,) if self.answer.layout.tail else ()
            reason = self.answer.chat_reason()
            events += [self._choice(choice, {}, last, reason) for choice in range(self.answer.count)]
        if self.answer.include_usage:
            events.append(
                self._base + b'],"system_fingerprint":"%b","usage":' % FINGERPRINT.encode()
                + encode(self.answer.usage()) + b"}\n\n"
            )  # fmt: skip
        return [*events, DONE]

    def failure(self, message: str) -> list[bytes]:
        """How vLLM ends a stream when its engine dies, or its parser raises."""
        return [stream_error(message), DONE]

    def abandoned(self) -> list[bytes]:
        """How a draining vLLM answers a new request."""
        return [*self.role(), DONE]

    def aborted(self) -> list[bytes]:
        """How vLLM ends what it gives up after its first token; without the usage that may follow the reason."""
        return [*(self._choice(choice, {}, reason="abort") for choice in range(self.answer.count)), DONE]


class CompletionWriter:
    """Events of a streamed text completion."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        base = encode({"id": answer.id, "object": "text_completion", "created": answer.created, "model": answer.model})
        self._base = b"data: " + base[:-1] + b',"choices":['
        self._heads = [self._base + b'{"index":%d,"text":"' % index for index in range(answer.count)]
        self._tail = self._ending(b"null")
        self._offset = 0

    @staticmethod
    def _ending(reason: bytes) -> bytes:
        return b'","logprobs":null,"finish_reason":%b,"stop_reason":null,"token_ids":null}]}\n\n' % reason

    def opening(self) -> list[bytes]:
        return []

    def token(self, number: int) -> list[bytes]:
        return self.group(number, number)

    def group(self, first: int, last: int) -> list[bytes]:
        tail = self._tail
        if last == self.answer.layout.total:
            tail = self._ending(b'"%b"' % self.answer.finish_reason.encode())
        if self.answer.continuous:
            prompt, completion = self.answer.sequence.prompt_tokens, self.answer.sequence.generated
            usage = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
            tail = b'%b,"usage":%b}\n\n' % (tail[:-3], encode(usage))
        text = word(first - 1) if first == last else words(first - 1, last).encode()
        if self.answer.logprobs >= 0:
            tokens = [words(at, at + 1) for at in range(first - 1, last)]
            told = logprobs.completion(tokens, self.answer.logprobs, self._offset)
            tail = tail.replace(b'"logprobs":null', b'"logprobs":' + encode(told), 1)
            self._offset += len(text)
        if self.answer.leak and first == 1:
            text = LEAK.encode() + text
        return [head + text + tail for head in self._heads]

    def closing(self) -> list[bytes]:
        events = []
        if self.answer.include_usage:
            events.append(self._base + b'],"usage":' + encode(self.answer.usage()) + b"}\n\n")
        return [*events, DONE]

    def failure(self, message: str) -> list[bytes]:
        return [stream_error(message), DONE]

    def abandoned(self) -> list[bytes]:
        return [DONE]

    def aborted(self) -> list[bytes]:
        return [*(head + self._ending(b'"abort"') for head in self._heads), DONE]


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
        return self.group(number, number)

    def group(self, first: int, last: int) -> list[bytes]:
        answer = self.answer
        events = self._start() if first == 1 else []
        think, thought = (
            max(first - 1, self._think_from) - self._think_from,
            min(last, self._think_to) - self._think_from,
        )
        if thought > think:
            if think == 0:
                events.append(self._block(0, {"type": "thinking", "thinking": ""}))
            text = thoughts(think, thought).encode()
            events.append(self._change(b"0", b'"type":"thinking_delta","thinking":"%b"' % text))
        say, said = max(first - 1, self._say_from) - self._say_from, min(last, self._say_to) - self._say_from
        if said <= say:
            return events
        if say == 0:
            events += self._stop_thinking()
            events.append(self._block(self._text_index, self._opened()))
        place = b"%d" % self._text_index
        if answer.call:
            text = encode("".join(calls.piece(at, answer.layout.content, answer.whole) for at in range(say, said)))
            events.append(self._change(place, b'"type":"input_json_delta","partial_json":%b' % text))
            return events
        leaked = LEAK_PIECES if answer.leak and say == 0 else ()
        for piece in (*leaked, words(say, said)):
            events.append(self._change(place, b'"type":"text_delta","text":"%b"' % piece.encode()))
        return events

    def _opened(self) -> dict[str, Any]:
        if self.answer.call:
            return calls.message_block(self.answer.call_id(), self.answer.call, "")
        return {"type": "text", "text": ""}

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
        delta = {"stop_reason": stop_reason(self.answer)}
        document = {"type": "message_delta", "delta": delta, "usage": message_usage(self.answer)}
        return [*events, _named("message_delta", document), _named("message_stop", {"type": "message_stop"})]

    def failure(self, message: str) -> list[bytes]:
        """vLLM takes chat's error for a chunk, and says what is wrong with that; pydantic shortens what was meant."""
        given = f"[type=missing, input_value={{'error': {{'message': '{message[:2]}...am': None, 'code': 500}}}}"
        fields = "".join(f"\n{name}\n  Field required {given}, input_type=dict]" for name in ("model", "choices"))
        told = f"2 validation errors for ChatCompletionStreamResponse{fields}"
        return [_named("error", {"type": "error", "error": {"type": "internal_error", "message": told}})]

    def abandoned(self) -> list[bytes]:
        return [*self._start(), _named("message_stop", {"type": "message_stop"})]

    def aborted(self) -> list[bytes]:
        """An abort is no reason of this API, so there is none."""
        document = {"type": "message_delta", "delta": {"stop_reason": None}, "usage": message_usage(self.answer)}
        return [_named("message_delta", document), _named("message_stop", {"type": "message_stop"})]


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
        return self.group(number, number)

    def group(self, first: int, last: int) -> list[bytes]:
        events: list[bytes] = []
        think, thought = (
            max(first - 1, self._think_from) - self._think_from,
            min(last, self._think_to) - self._think_from,
        )
        if thought > think:
            if think == 0:
                events += self._open_reasoning()
            delta = thoughts(think, thought)
            events.append(self._part_event("reasoning_text.delta", self._reasoning_id, 0, delta=delta))
            if last >= self._think_to:
                events += self._close_reasoning()
        say, said = max(first - 1, self._say_from) - self._say_from, min(last, self._say_to) - self._say_from
        if said <= say:
            return events
        if self.answer.call:
            return events + self._arguments(say, said)
        if say == 0:
            events += self._open_message()
        leaked = LEAK_PIECES if self.answer.leak and say == 0 else ()
        at = self._message_at
        for delta in (*leaked, words(say, said)):
            events.append(self._part_event("output_text.delta", self._message_id, at, delta=delta, logprobs=[]))
        return events

    def _arguments(self, begin: int, end: int) -> list[bytes]:
        """Tokens of a tool call's arguments; the first announces the call."""
        answer, at, identity = self.answer, self._message_at, self.answer.id.removeprefix("resp_")
        events = []
        if begin == 0:
            item = calls.response_item(identity, answer.call, "", "in_progress")
            events.append(self._event("response.output_item.added", item=item, output_index=at))
        delta = "".join(calls.piece(index, answer.layout.content, answer.whole) for index in range(begin, end))
        kind = "response.function_call_arguments.delta"
        return [*events, self._event(kind, delta=delta, item_id=f"fc_{identity}", output_index=at)]

    def _close_call(self) -> list[bytes]:
        answer, at, identity = self.answer, self._message_at, self.answer.id.removeprefix("resp_")
        text, kind = answer.arguments(), "response.function_call_arguments.done"
        item = calls.response_item(identity, answer.call, text, "completed")
        return [
            self._event(kind, arguments=text, item_id=f"fc_{identity}", name=answer.call, output_index=at),
            self._event("response.output_item.done", item=item, output_index=at),
        ]

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
        if self.answer.calls_tool:
            events += self._close_call()
        elif self.answer.layout.content:
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

    def failure(self, message: str) -> list[bytes]:
        """None: vLLM breaks the chunked body of a response whose engine dies, or whose parser raises."""
        return []

    def abandoned(self) -> list[bytes]:
        response = response_document(self.answer, "completed", empty=True)
        return [self._event("response.completed", response=response)]

    def aborted(self) -> list[bytes]:
        response = response_document(self.answer, "cancelled", empty=True)
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

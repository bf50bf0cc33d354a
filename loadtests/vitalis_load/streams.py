"""What came of an answer, and when: server-sent events of the four APIs, or a plain body. Pure.

    reader = streams.reader("chat", stream=True, on_gap=note)
    reader.feed(data, now)   # body bytes, however the network cut them
    reader.close(now)        # the body is whole; or reader.fail("reset", why, now) where it broke
    reader.fill(record)

A chunk is an event that carries something the model said: reasoning, content, part of a tool call. An announced role,
an empty delta, usage, a ping are none. Chunks are never tokens: an event may carry many, and Harmony's markers none.
An answer is whole when it says why it finished and ends as its API ends; `error` says what else became of it.
"""

from collections.abc import Callable

import msgspec

from vitalis_load import wire
from vitalis_load.records import Record

OnGap = Callable[[float, float], None]

LARGEST_BYTES = 64 * 1024 * 1024  # of one event, or one plain answer: what is longer is no answer
# Finish reasons by which an engine says that it gave up.
GIVEN_UP = ("abort", "error")

_chat = msgspec.json.Decoder(wire.ChatDocument).decode
_text = msgspec.json.Decoder(wire.TextDocument).decode
_response_event = msgspec.json.Decoder(wire.ResponseEvent).decode
_response = msgspec.json.Decoder(wire.Response).decode
_message_event = msgspec.json.Decoder(wire.MessageEvent).decode
_message = msgspec.json.Decoder(wire.Message).decode


class Reader:
    """One answer. Times are those that `feed` was given; `ended` is that of the API's last event, or of the failure.

    `error` is "" or of records.ERRORS; `gaps` the seconds between chunks, where no `on_gap(seconds, now)` takes them.
    """

    api = ""
    stream = True

    def __init__(self, on_gap: OnGap | None = None) -> None:
        self.first_token: float | None = None
        self.first_output: float | None = None
        self.last_token: float | None = None
        self.ended: float | None = None
        self.chunks = 0
        self.finish = ""
        self.error = ""
        self.detail = ""
        self.done = False
        self.usage = wire.Usage()
        self.gaps: list[float] = []
        self._on_gap = on_gap or (lambda seconds, _: self.gaps.append(seconds))
        self._rest = b""
        self._carriage = False

    def feed(self, data: bytes, now: float) -> None:
        """Takes the next bytes of the body. Bytes after the end are not looked at."""
        if self.ended is not None:
            return
        if self._carriage or data.find(b"\r") >= 0:
            data = self._line_feeds(data)
        seen = len(self._rest)
        if seen:
            data = self._rest + data
        if data.find(b"\n\n", seen - 1 if seen else 0) < 0:
            self._rest = data
            if len(data) > LARGEST_BYTES:
                self.fail("garbled", f"an event of more than {LARGEST_BYTES >> 20} MiB", now)
            return
        *blocks, self._rest = data.split(b"\n\n")
        for block in blocks:
            payload = data_of(block)
            if payload is None:
                self.fail("garbled", f"no event of a stream: {wire.words(block[:300].decode(errors='replace'))}", now)
            elif payload:
                self._event(payload, now)
            if self.ended is not None:
                return

    def close(self, now: float) -> None:
        """The body is over, as HTTP has it."""
        if self.ended is not None:
            return
        rest = self._rest.strip()
        if rest and data_of(rest) is None:
            self._unframed(rest, now)
        elif rest:
            self.fail("no_end", "the stream ended within an event", now)
        elif self.finish:
            self.fail(
                "no_end", f"the stream ended after its finish reason {self.finish!r}, without its last event", now
            )
        else:
            self.fail("no_end", "the stream ended without a finish reason", now)

    def fail(self, error: str, detail: str, now: float) -> None:
        """It went wrong, unless it is over already."""
        if self.ended is None:
            self.error, self.detail, self.ended = error, detail[: wire.DETAIL_CHARACTERS], now

    def fill(self, record: Record) -> None:
        """Writes what was read into a record; `ended` only where the answer came to an end."""
        record.first_token, record.first_output = self.first_token, self.first_output
        record.last_token, record.chunks, record.finish = self.last_token, self.chunks, self.finish
        record.error, record.detail = self.error, self.detail
        usage = self.usage
        record.prompt_tokens, record.cached_tokens = usage.prompt, usage.cached
        record.completion_tokens, record.reasoning_tokens = usage.completion, usage.reasoning
        if self.ended is not None:
            record.ended = self.ended

    def _event(self, payload: bytes, now: float) -> None:
        raise NotImplementedError

    def _chunk(self, now: float, output: bool) -> None:
        """An event with something that the model said; `output`: not only reasoning."""
        self.chunks += 1
        last = self.last_token
        self.last_token = now
        if last is None:
            self.first_token = now
        else:
            self._on_gap(now - last, now)
        if output and self.first_output is None:
            self.first_output = now

    def _whole(self, now: float) -> None:
        self.done = True
        self.ended = now

    def _garbled(self, payload: bytes, problem: BaseException, now: float) -> None:
        start = payload[:80].decode(errors="replace")
        self.fail("garbled", f"{type(problem).__name__}: {str(problem).splitlines()[0]} in {wire.words(start)}", now)

    def _unframed(self, body: bytes, now: float) -> None:
        """Something came where a stream should have been."""
        said = wire.words(body[:300].decode(errors="replace"))
        if b'"error"' in body:
            self.fail("stream_error", wire.body_words(body), now)
        else:
            self.fail("garbled", f"a stream was asked for, and this came: {said}", now)

    def _line_feeds(self, data: bytes) -> bytes:
        """Line ends may be CR LF, or CR, which a read may part; JSON has none of them raw."""
        if self._carriage and data.startswith(b"\n"):
            data = data[1:]
        self._carriage = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def data_of(block: bytes) -> bytes | None:
    """The data of one event (without its blank line), b"" where it has none; None where it is no event."""
    end = block.find(b"\n")
    if end < 0:
        if block.startswith(b"data: "):
            return block[6:]
    elif block.startswith(b"event: ") and block.startswith(b"data: ", end + 1) and block.find(b"\n", end + 1) < 0:
        return block[end + 7 :]
    lines = [line for line in block.split(b"\n") if line]
    if lines and not any(line.startswith((b"data", b"event", b":", b"id", b"retry")) for line in lines):
        return None
    return b"\n".join(
        line[6:] if line.startswith(b"data: ") else line[5:] for line in lines if line.startswith(b"data:")
    )


def _chat_usage(usage: wire.ChatUsage, into: wire.Usage) -> None:
    into.prompt, into.completion = usage.prompt_tokens, usage.completion_tokens
    if usage.prompt_tokens_details is not None:
        into.cached = usage.prompt_tokens_details.cached_tokens
    if usage.completion_tokens_details is not None:
        into.reasoning = usage.completion_tokens_details.reasoning_tokens


def _calls(delta: wire.Delta) -> bool:
    """Whether there is something of a tool call in it."""
    for call in delta.tool_calls or ():
        if call.id or (call.function is not None and (call.function.name or call.function.arguments)):
            return True
    function = delta.function_call
    return function is not None and bool(function.name or function.arguments)


class _Choices(Reader):
    """What chat and completions have in common."""

    def _end_mark(self, now: float) -> None:
        if self.finish:
            self._whole(now)
        else:
            self.fail("no_end", "[DONE] came without a finish reason", now)

    def _no_choices(self, document: wire.ChatDocument | wire.TextDocument, now: float) -> bool:
        """Whether the document is an error, or nothing of this API."""
        if document.error is not None:
            self.fail("stream_error", wire.words(document.error), now)
        elif document.choices is not None:
            return False
        elif document.object == "error":
            self.fail("stream_error", wire.words(document.message), now)
        else:
            self.fail("garbled", "neither choices nor an error in an event", now)
        return True

    def _finished(self, reason: str, now: float) -> None:
        self.finish = reason
        if reason in GIVEN_UP:
            self.fail("stream_error", f"finish reason {reason!r}: the engine gave the answer up", now)


class ChatReader(_Choices):
    api = "chat"

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            return self._end_mark(now)
        try:
            chunk = _chat(payload)
        except wire.UNREADABLE as problem:
            return self._garbled(payload, problem, now)
        if chunk.error is not None or chunk.choices is None:
            self._no_choices(chunk, now)
            return None
        said = output = False
        for choice in chunk.choices:
            delta = choice.delta
            if delta is not None:
                if delta.content or _calls(delta) or delta.refusal:
                    said = output = True
                elif delta.reasoning or delta.reasoning_content:
                    said = True
        if said:
            self._chunk(now, output)
        if chunk.usage is not None:
            _chat_usage(chunk.usage, self.usage)
        for choice in chunk.choices:
            if choice.finish_reason:
                self._finished(choice.finish_reason, now)
        return None


class CompletionReader(_Choices):
    api = "completions"

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            return self._end_mark(now)
        try:
            chunk = _text(payload)
        except wire.UNREADABLE as problem:
            return self._garbled(payload, problem, now)
        if self._no_choices(chunk, now):
            return None
        if chunk.usage is not None:
            _chat_usage(chunk.usage, self.usage)
        choices = chunk.choices or ()
        if any(choice.text for choice in choices):
            self._chunk(now, output=True)
        for choice in choices:
            if choice.finish_reason:
                self._finished(choice.finish_reason, now)
        return None


def _judge_response(reader: Reader, response: wire.Response, now: float) -> None:
    """The end of a response, streamed or plain."""
    if response.usage is not None:
        usage = response.usage
        reader.usage.prompt, reader.usage.completion = usage.input_tokens, usage.output_tokens
        if usage.input_tokens_details is not None:
            reader.usage.cached = usage.input_tokens_details.cached_tokens
        if usage.output_tokens_details is not None:
            reader.usage.reasoning = usage.output_tokens_details.reasoning_tokens
    status = response.status or "completed"
    if response.error is not None or status not in ("completed", "incomplete"):
        told = wire.words(response.error) if response.error is not None else "the engine gave the answer up"
        reader.finish = status
        reader.fail("stream_error", f"status {status!r}: {told}", now)
    elif reader.usage.completion == 0:
        reader.fail("no_end", "completed without a single token", now)
    else:
        reason = response.incomplete_details.reason if response.incomplete_details is not None else None
        reader.finish = (reason or status) if status == "incomplete" else status
        reader.done, reader.ended = True, now


class ResponseReader(Reader):
    api = "responses"

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            return self.fail("no_end", "[DONE] came before response.completed", now)
        try:
            event = _response_event(payload)
        except wire.UNREADABLE as problem:
            return self._garbled(payload, problem, now)
        kind = event.type
        if kind.endswith(".delta"):
            if event.delta:
                self._chunk(now, output=not kind.startswith("response.reasoning"))
        elif kind == "error" or (not kind and event.error is not None):
            self.fail("stream_error", wire.words(event.error or event.message), now)
        elif not kind:
            self.fail("garbled", "an event without a type", now)
        elif kind == "response.output_item.added":
            # chat announces a call with its name in a delta of its own: the model has said it
            if event.item is not None and event.item.type in ("function_call", "custom_tool_call"):
                self._chunk(now, output=True)
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            response = event.response or wire.Response(status="failed")
            _judge_response(self, response, now)
        return None


def _message_usage(usage: wire.MessageUsage, before: wire.MessageUsage, into: wire.Usage) -> wire.MessageUsage:
    """Messages tells its tokens twice, and not all of them each time; its input leaves the cached ones out."""
    both = wire.MessageUsage(
        before.input_tokens if usage.input_tokens is None else usage.input_tokens,
        before.output_tokens if usage.output_tokens is None else usage.output_tokens,
        before.cache_read_input_tokens if usage.cache_read_input_tokens is None else usage.cache_read_input_tokens,
        before.cache_creation_input_tokens
        if usage.cache_creation_input_tokens is None
        else usage.cache_creation_input_tokens,
    )
    into.cached, into.completion = both.cache_read_input_tokens, both.output_tokens
    if both.input_tokens is not None:
        into.prompt = both.input_tokens + (both.cache_read_input_tokens or 0) + (both.cache_creation_input_tokens or 0)
    return both


class MessageReader(Reader):
    api = "messages"

    def __init__(self, on_gap: OnGap | None = None) -> None:
        super().__init__(on_gap)
        self._told = wire.MessageUsage()

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            return self.fail("no_end", "[DONE] came before message_stop", now)
        try:
            event = _message_event(payload)
        except wire.UNREADABLE as problem:
            return self._garbled(payload, problem, now)
        kind, delta = event.type, event.delta
        if kind == "content_block_delta":
            if delta is not None and (delta.text or delta.partial_json):
                self._chunk(now, output=True)
            elif delta is not None and delta.thinking:
                self._chunk(now, output=False)
        elif kind == "error" or (not kind and event.error is not None):
            self.fail("stream_error", wire.words(event.error), now)
        elif not kind:
            self.fail("garbled", "an event without a type", now)
        else:
            self._landmark(event, now)
        return None

    def _landmark(self, event: wire.MessageEvent, now: float) -> None:
        kind, message, delta = event.type, event.message, event.delta
        if kind == "message_start" and isinstance(message, wire.Message) and message.usage is not None:
            self._told = _message_usage(message.usage, self._told, self.usage)
            self.usage.completion = None  # what is told at the start is no count of the answer
        elif kind == "content_block_start":
            if event.content_block is not None and event.content_block.type == "tool_use":
                self._chunk(now, output=True)  # the call's name: see ResponseReader
        elif kind == "message_delta":
            if delta is not None and delta.stop_reason:
                self.finish = delta.stop_reason
            if event.usage is not None:
                self._told = _message_usage(event.usage, self._told, self.usage)
        elif kind == "message_stop":
            if self.finish:
                self._whole(now)
            else:
                self.fail("no_end", "message_stop came without a stop reason", now)


class PlainReader(Reader):
    """A body that is one JSON document, judged when it is whole. It has no tokens in time, only usage."""

    stream = False

    def __init__(self, api: str, on_gap: OnGap | None = None) -> None:
        super().__init__(on_gap)
        self.api = api
        self._body = bytearray()

    def feed(self, data: bytes, now: float) -> None:
        if self.ended is None:
            self._body += data
            if len(self._body) > LARGEST_BYTES:
                self.fail("garbled", f"an answer of more than {LARGEST_BYTES >> 20} MiB", now)

    def close(self, now: float) -> None:
        if self.ended is not None:
            return
        body = bytes(self._body)
        try:
            if self.api == "responses":
                self._response(_response(body), now)
            elif self.api == "messages":
                self._message(_message(body), now)
            else:
                self._choices(_chat(body) if self.api == "chat" else _text(body), now)
        except wire.UNREADABLE as problem:
            self._garbled(body, problem, now)

    def _response(self, response: wire.Response, now: float) -> None:
        if response.object == "response":
            _judge_response(self, response, now)
        else:
            self._other(response.error, now)

    def _choices(self, document: wire.ChatDocument | wire.TextDocument, now: float) -> None:
        if document.error is not None or not document.choices:
            return self._other(document.error, now)
        if document.usage is not None:
            _chat_usage(document.usage, self.usage)
        reasons = [choice.finish_reason or "" for choice in document.choices]
        self.finish = reasons[0]
        gave_up = next((reason for reason in reasons if reason in GIVEN_UP), "")
        if gave_up:
            self.fail("stream_error", f"finish reason {gave_up!r}: the engine gave the answer up", now)
        elif not all(reasons):
            self.fail("no_end", "an answer without a finish reason", now)
        else:
            self._whole(now)
        return None

    def _message(self, message: wire.Message, now: float) -> None:
        if message.type != "message":
            return self._other(message.error, now)
        if message.usage is not None:
            _message_usage(message.usage, wire.MessageUsage(), self.usage)
        self.finish = message.stop_reason or ""
        if self.finish:
            self._whole(now)
        else:
            self.fail("no_end", "an answer without a stop reason", now)
        return None

    def _other(self, error: object, now: float) -> None:
        if error is not None:
            self.fail("stream_error", wire.words(error), now)
        else:
            self.fail(
                "garbled", f"no answer of the API in it: {wire.words(self._body[:200].decode(errors='replace'))}", now
            )


_READERS: dict[str, type[ChatReader | CompletionReader | ResponseReader | MessageReader]] = {
    "chat": ChatReader,
    "completions": CompletionReader,
    "responses": ResponseReader,
    "messages": MessageReader,
}
APIS = tuple(_READERS)


def reader(api: str, stream: bool, on_gap: OnGap | None = None) -> Reader:
    """For one answer of `api`, one of APIS. `on_gap(seconds, now)` hears of each gap between two chunks."""
    return _READERS[api](on_gap) if stream else PlainReader(api, on_gap)

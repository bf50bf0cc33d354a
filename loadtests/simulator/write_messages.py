"""Events of a streamed Anthropic message, as vLLM 0.32 writes them."""

from typing import Any

from simulator import calls
from simulator.shapes import LEAK_PIECES, Answer, encode, message_usage, named, signature, stop_reason, thoughts, words


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
        return named("content_block_start", document)

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
        return [named("message_start", {"type": "message_start", "message": message})]

    def _stop_thinking(self) -> list[bytes]:
        if not self.answer.layout.reasoning:
            return []
        delta = b'"type":"signature_delta","signature":"%b"' % signature(self.answer).encode()
        return [self._change(b"0", delta), named("content_block_stop", {"type": "content_block_stop", "index": 0})]

    def closing(self) -> list[bytes]:
        events = []
        if self.answer.layout.content:
            index = self._text_index
            events.append(named("content_block_stop", {"type": "content_block_stop", "index": index}))
        delta = {"stop_reason": stop_reason(self.answer)}
        document = {"type": "message_delta", "delta": delta, "usage": message_usage(self.answer)}
        return [*events, named("message_delta", document), named("message_stop", {"type": "message_stop"})]

    def failure(self, message: str) -> list[bytes]:
        """vLLM takes chat's error for a chunk, and says what is wrong with that; pydantic shortens what was meant."""
        given = f"[type=missing, input_value={{'error': {{'message': '{message[:2]}...am': None, 'code': 500}}}}"
        fields = "".join(f"\n{name}\n  Field required {given}, input_type=dict]" for name in ("model", "choices"))
        told = f"2 validation errors for ChatCompletionStreamResponse{fields}"
        return [named("error", {"type": "error", "error": {"type": "internal_error", "message": told}})]

    def abandoned(self) -> list[bytes]:
        return [*self._start(), named("message_stop", {"type": "message_stop"})]

    def aborted(self) -> list[bytes]:
        """An abort is no reason of this API, so there is none."""
        document = {"type": "message_delta", "delta": {"stop_reason": None}, "usage": message_usage(self.answer)}
        return [named("message_delta", document), named("message_stop", {"type": "message_stop"})]

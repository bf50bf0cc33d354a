"""Events of a streamed response, as vLLM 0.32 writes them."""

from typing import Any

from simulator import calls
from simulator.shapes import (
    LEAK_PIECES,
    Answer,
    message_item,
    named,
    reasoning_item,
    response_document,
    thoughts,
    words,
)


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
        return named(kind, {**document, "sequence_number": self._number, "type": kind})

    def opening(self) -> list[bytes]:
        response = response_document(self.answer, "in_progress")
        return [self._event("response.created", response=response),
                self._event("response.in_progress", response=response)]  # fmt: skip

    def token(self, number: int) -> list[bytes]:
        index = number - 1
        events: list[bytes] = []
        if self._think_from <= index < self._think_to:
            at = index - self._think_from
            if at == 0:
                events += self._open_reasoning()
            delta = thoughts(at, at + 1)
            events.append(self._part_event("reasoning_text.delta", self._reasoning_id, 0, delta=delta))
            if index + 1 == self._think_to:
                events += self._close_reasoning()
        elif self._say_from <= index < self._say_to:
            at = index - self._say_from
            if self.answer.call:
                return events + self._argument(at)
            if at == 0:
                events += self._open_message()
            leaked = LEAK_PIECES if self.answer.leak and at == 0 else ()
            for delta in (*leaked, words(at, at + 1)):
                where = self._message_at
                events.append(self._part_event("output_text.delta", self._message_id, where, delta=delta, logprobs=[]))
        return events

    def group(self, first: int, last: int) -> list[bytes]:
        """This API alone tells every token by an event of its own, also where they come several at a time."""
        return [event for number in range(first, last + 1) for event in self.token(number)]

    def _argument(self, index: int) -> list[bytes]:
        """A token of a tool call's arguments; the first announces the call."""
        answer, at, identity = self.answer, self._message_at, self.answer.id.removeprefix("resp_")
        events = []
        if index == 0:
            item = calls.response_item(identity, answer.call, "", "in_progress")
            events.append(self._event("response.output_item.added", item=item, output_index=at))
        delta = calls.piece(index, answer.layout.content, answer.whole)
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

"""Events of streamed chat completions and text completions, as vLLM 0.32 writes them."""

from collections.abc import Iterable
from typing import Any

from simulator import calls, logprobs
from simulator.shapes import (
    DONE,
    FINGERPRINT,
    LEAK,
    LEAK_PIECES,
    THOUGHTS,
    Answer,
    encode,
    stream_error,
    thoughts,
    word,
    words,
)


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

"""What a request used: as its engine counted, or estimated where the engine never came to say. Pure.

    ended                          prompt            completion
    finished                       the engine's      the engine's
    abandoned stream of events     estimated; the    events that bear tokens, plus the tokens that make no event:
                                   engine's where    within 8 tokens or 2 %, see `Rates.generated`
                                   it was told
    abandoned, not streamed        estimated         by the time it ran
    refused by the engine          0                 0

An abandoned one's prompt is estimated from its body's bytes, as the route's finished requests had them.
"""

from collections import deque
from collections.abc import Iterator
from statistics import median_low
from typing import Annotated, Final

import msgspec

USAGE: Final = b'"usage":{'
_FINAL: Final = {
    "chat": (b'"choices":[]',),
    "completions": (b'"choices":[]',),
    "responses": (b'"type":"response.completed"', b'"type":"response.incomplete"'),
    "messages": (b'"type":"message_delta"',),
}
LONGEST: Final = 2048  # bytes of a usage object: it holds a dozen numbers
_Count = Annotated[int, msgspec.Meta(ge=0)] | None


class Usage(msgspec.Struct):
    """Tokens of one request. Cached ones are among the prompt's, reasoning ones among the completion's."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    prompt_estimated: bool = False
    completion_estimated: bool = False

    @property
    def estimated(self) -> bool:
        return self.prompt_estimated or self.completion_estimated


class _Details(msgspec.Struct):
    cached_tokens: _Count = None
    reasoning_tokens: _Count = None


class _Said(msgspec.Struct):
    """A usage object under the names of the APIs that have one."""

    prompt_tokens: _Count = None
    completion_tokens: _Count = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: _Count = None
    output_tokens: _Count = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: _Count = None
    cache_creation_input_tokens: _Count = None


class _Common(msgspec.Struct):
    """The same of chat and completions, which vLLM begins with the prompt's tokens: read at half the cost."""

    prompt_tokens: Annotated[int, msgspec.Meta(ge=0)]
    completion_tokens: Annotated[int, msgspec.Meta(ge=0)]
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


_decode = msgspec.json.Decoder(_Said).decode
_decode_common = msgspec.json.Decoder(_Common).decode
_COMMON: Final = b'"prompt_tokens":'


def of_answer(body: bytes) -> Usage | None:
    """The usage of a whole answer: its last one, because tools and their arguments may hold objects of that name and
    stand before it. None where it does not say."""
    return _at(body, body.rfind(USAGE), None)


def of_events(events: bytes, dialect: str, before: Usage | None) -> Usage | None:
    """The usage that whole events tell, on top of what was told `before`: Messages tells its prompt at the start and
    its completion at the end, the others all at once."""
    if dialect != "messages":
        return _at(events, events.rfind(USAGE), None) or before
    for at in _places(events):
        before = _at(events, at, before) or before
    return before


def is_final(events: bytes, dialect: str) -> bool:
    """Whether the usage in these events is that of the whole answer, not of one still under way."""
    return _has(events, _FINAL.get(dialect, ()))


def _has(payload: bytes, marks: tuple[bytes, ...]) -> bool:
    for mark in marks:  # noqa: SIM110 - a third of any()'s time
        if payload.rfind(mark) >= 0:
            return True
    return False


def _places(payload: bytes) -> Iterator[int]:
    at = payload.find(USAGE)
    while at >= 0:
        yield at
        at = payload.find(USAGE, at + len(USAGE))


def _at(payload: bytes, at: int, before: Usage | None) -> Usage | None:
    """The usage object that begins at `at`, None where there is none that is whole and says anything."""
    if at < 0:
        return None
    begin = at + len(USAGE) - 1
    most = begin + LONGEST
    # It holds numbers and small objects of numbers alone, so its braces can be counted.
    end, depth = begin, 0
    while True:
        close = payload.find(b"}", end, most)
        if close < 0:
            return None
        depth += payload.count(b"{", end, close) - 1
        end = close + 1
        if depth == 0:
            break
    text = payload[begin:end]
    try:
        if text.startswith(_COMMON, 1):
            return _read_common(_decode_common(text))
    except msgspec.DecodeError:
        pass  # without a completion, perhaps
    try:
        return _read(_decode(text), before)
    except msgspec.DecodeError:  # also where a count is no number
        return None


def _read_common(said: _Common) -> Usage:
    given, made = said.prompt_tokens_details, said.completion_tokens_details
    return Usage(
        said.prompt_tokens,
        (given.cached_tokens or 0) if given is not None else 0,
        said.completion_tokens,
        (made.reasoning_tokens or 0) if made is not None else 0,
    )


def _read(said: _Said, before: Usage | None) -> Usage | None:
    prompt = said.prompt_tokens if said.prompt_tokens is not None else said.input_tokens
    completion = said.completion_tokens if said.completion_tokens is not None else said.output_tokens
    if prompt is None and completion is None:
        return None
    read, created = said.cache_read_input_tokens or 0, said.cache_creation_input_tokens or 0
    given, made = said.prompt_tokens_details or said.input_tokens_details, said.completion_tokens_details
    made = made or said.output_tokens_details
    usage = Usage(
        (prompt or 0) + read + created,  # Messages counts the cached ones apart; nobody else has these two
        (given.cached_tokens or 0) if given is not None else read,
        completion or 0,
        (made.reasoning_tokens or 0) if made is not None else 0,
    )
    if prompt is None and before is not None:
        usage.prompt_tokens, usage.cached_tokens = before.prompt_tokens, before.cached_tokens
    return usage


# -- where the engine did not say

# Harmony's tokens that make no event. <|channel|>analysis<|message|> opens an answer. Between reasoning and content
# stand <|end|><|start|>assistant<|channel|>final<|message|>, less the events by which an API says that it goes on to
# something else. A call's header is longer by its recipient (` to=functions.get <|constrain|>json`): three to nine.
_OPENING: Final = 3
_TURNING: Final = {"chat": 6, "responses": 1, "messages": 3}
_CALLING: Final = 3
_THOUGHTS: Final = {
    "chat": (b'"reasoning":"', b'"reasoning_content":"'),
    "responses": (b'"type":"response.reasoning',),
    "messages": (b'"type":"thinking_delta"',),
}
_WORDS: Final = {
    "chat": (b'"content":"', b'"tool_calls":['),
    "responses": (b'"type":"response.output_text', b'"type":"response.function_call'),
    "messages": (b'"type":"text_delta"', b'"type":"input_json_delta"'),
}
_CALLS: Final = (b'"tool_calls":[', b'"type":"response.function_call', b'"type":"input_json_delta"')
# The events after the last token: a finish reason or what stands for it, usage, the end; less <|return|>.
_CLOSING: Final = {"chat": 2, "completions": 2, "responses": 3, "messages": 2}

_KEPT: Final = 0.98  # what is learned from one request fades to a third over fifty
_NEW: Final = 1 - _KEPT
_STEADY: Final = 10_000.0  # as if a spread of 100 bytes had shown 4 bytes a token: bodies of one length show nothing
_LEARNT_FROM: Final = 16  # events: of a shorter stream the hidden tokens are too large a part
_MOST_HIDDEN: Final = 20
_STREAMS: Final = 31  # whose tokens an event are looked at: odd ones are outvoted, be they ever so odd
_BELIEVED: Final = 5  # streams: so many that say otherwise it takes to give up the belief in a token an event
LEARN_SECONDS: Final = 0.001  # of one route: at most so often


def thinks(event: bytes, dialect: str) -> bool:
    """Whether an event bears reasoning."""
    return _has(event, _THOUGHTS.get(dialect, ()))


def hidden(last: bytes, dialect: str, *, thought: bool, choices: int) -> int:
    """Harmony's tokens that made no event of a stream whose last events are these. `thought`: it began with
    reasoning."""
    if dialect not in _TURNING:
        return 0
    tokens = _OPENING
    thoughts = max(last.rfind(mark) for mark in _THOUGHTS[dialect])
    turned = thoughts < 0 or max(last.rfind(mark) for mark in _WORDS[dialect]) > thoughts
    if last.rfind(b'"logprobs":{') >= 0:
        turned = False  # where logprobs are told, these tokens have events
    if thought and turned:
        tokens += _TURNING[dialect]
    if turned and _has(last, _CALLS):
        tokens += _CALLING
    return tokens * choices


class Rates:
    """What the finished requests of one route teach about those that are abandoned: means that fade, and a median.

    A prompt's tokens are a straight line over its body's bytes, not a ratio: a body has fields that are no prompt,
    and of a short one they are the most."""

    __slots__ = (
        "_bytes", "_bytes_both", "_bytes_spread", "_per_event", "_prompt", "_seconds", "_seconds_tokens", "next_at",
    )  # fmt: skip

    def __init__(self) -> None:
        self.next_at = 0.0  # when something more may be learned: the caller's to keep
        # What is believed at first: 4 bytes a token, a token an event, 50 tokens a second.
        self._bytes, self._prompt = 400.0, 100.0  # means
        self._bytes_spread = self._bytes_both = 0.0  # variance, and covariance with the tokens
        self._per_event = deque([1.0] * _BELIEVED, maxlen=_STREAMS)
        self._seconds, self._seconds_tokens = 1.0, 50.0

    def learn(self, usage: Usage, body_bytes: int, seconds: float) -> None:
        """A request finished, `seconds` after an engine got it."""
        off, tokens_off = body_bytes - self._bytes, usage.prompt_tokens - self._prompt
        self._bytes += _NEW * off
        self._prompt += _NEW * tokens_off
        self._bytes_spread = _KEPT * (self._bytes_spread + _NEW * off * off)
        self._bytes_both = _KEPT * (self._bytes_both + _NEW * off * tokens_off)
        self._seconds = _KEPT * self._seconds + seconds
        self._seconds_tokens = _KEPT * self._seconds_tokens + usage.completion_tokens

    def learn_stream(self, dialect: str, events: int, tokens: int, choices: int) -> None:
        """A stream of so many choices finished. `events`: from the first that bore a token to the end. A mean would
        not do: one answer in a form that Harmony's parser drops has hundreds of tokens without an event."""
        events -= _CLOSING.get(dialect, 0)
        if events < _LEARNT_FROM * choices:
            return
        if abs(tokens - events) <= max(_MOST_HIDDEN * choices, tokens * 0.02):
            tokens = events  # a token an event, and the hidden ones
        self._per_event.append(tokens / events)

    def prompt(self, body_bytes: int) -> int:
        """Tokens of a prompt, by the bytes of the body it is in; at least one."""
        slope = (self._bytes_both + _STEADY / 4) / (self._bytes_spread + _STEADY)
        return max(1, round(self._prompt + slope * (body_bytes - self._bytes)))

    def generated(self, events: int) -> int:
        """Tokens behind so many events that bear some. One each, unless the engine sends only every n-th time
        (`--stream-interval`) or joins what waited: then as many as in most of the route's finished streams."""
        ratio = median_low(self._per_event)
        return events if 0.98 < ratio < 1.02 else round(events * ratio)

    def after(self, seconds: float, expected: int) -> int:
        """Tokens of an answer that nobody saw, by the time it was made for; at least one, at most what was
        expected."""
        pace = self._seconds_tokens / max(1e-3, self._seconds)
        return max(1, min(round(seconds * pace), expected))

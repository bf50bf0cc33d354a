"""What a route says of its requests: defaults, limits, a preamble, a choice by weight. Pure.

Compiled once per snapshot; a route that says nothing has no policy and costs nothing. Values stay raw: a default is
set, a string or a list is lengthened at its front by bytes, and only what is compared with a limit is decoded.
The tables below say which field of each API a word of the configuration means (as vLLM 0.32 reads them);
docs/behaviour.md shows them from the caller's side.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from vitalis_serve.errors import ServeError

if TYPE_CHECKING:
    from vitalis_serve.gateway.keys import Route, Weight

Fields = dict[str, msgspec.Raw]

# A dot leads into an object that the client may have filled with other things.
DEFAULTS: Final[Mapping[str, Mapping[str, str]]] = {
    "chat": {
        "temperature": "temperature",
        "top_p": "top_p",
        "reasoning_effort": "reasoning_effort",
        "max_tokens": "max_completion_tokens",
    },
    "completions": {"temperature": "temperature", "top_p": "top_p", "max_tokens": "max_tokens"},
    "responses": {
        "temperature": "temperature",
        "top_p": "top_p",
        "reasoning_effort": "reasoning.effort",
        "max_tokens": "max_output_tokens",
    },
    "messages": {
        "temperature": "temperature",
        "top_p": "top_p",
        "reasoning_effort": "output_config.effort",
        "max_tokens": "max_tokens",
    },
}
# Every name under which an API takes the length of the answer.
LENGTHS: Final[Mapping[str, tuple[str, ...]]] = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
    "messages": ("max_tokens",),
}
# Field -> the limit above which it is refused.
BOUNDED: Final[Mapping[str, Mapping[str, str]]] = {
    "chat": {"n": "n", "top_logprobs": "logprobs", "prompt_logprobs": "prompt_logprobs"},
    "completions": {"n": "n", "logprobs": "logprobs", "prompt_logprobs": "prompt_logprobs"},
    "responses": {"top_logprobs": "logprobs"},
    "messages": {},
}
# Fields whose bytes `structured_output_bytes` limits: what a grammar is compiled from.
STRUCTURED: Final[Mapping[str, tuple[str, ...]]] = {
    "chat": ("response_format", "structured_outputs"),
    "completions": ("response_format", "structured_outputs"),
    "responses": ("text", "structured_outputs"),
    "messages": ("output_config",),
}
TAKES_MIN_TOKENS: Final = frozenset({"chat", "completions"})
# What vLLM makes of a completion that names no length; of other APIs it fills the context.
COMPLETION_TOKENS: Final = 16

_encode = msgspec.json.Encoder().encode
_as_int = msgspec.json.Decoder(int).decode
_as_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_as_map = msgspec.json.Decoder(Fields).decode
_NULL: Final = b"null"
_MANY_PROMPTS: Final = re.compile(rb"\[[ \t\r\n]*[\"\[]")  # one prompt may be a list of tokens
_EMPTY_LIST: Final = re.compile(rb"\[[ \t\r\n]*\]")
_HASHES: Final = float(1 << 64)


class RoutePolicy:
    """`apply` to the fields of a request, then `model` for where it goes."""

    __slots__ = ("_apis", "_name", "_preamble", "_weights")

    def __init__(self, route: "Route") -> None:
        self._name = route.name
        self._preamble = _Preamble(route.preamble) if route.preamble else None
        self._weights: tuple[Weight, ...] = route.weights
        self._apis = {dialect: _ApiPolicy(route, dialect) for dialect in DEFAULTS}

    @staticmethod
    def of(route: "Route") -> "RoutePolicy | None":
        """None where the route says nothing that concerns a body or its model."""
        says = (*msgspec.structs.astuple(route.defaults), *msgspec.structs.astuple(route.limits))
        plain = all(value is None for value in says) and not route.preamble and not route.weights
        return None if plain else RoutePolicy(route)

    def apply(self, fields: Fields, dialect: str, *, generates: bool) -> None:
        """Changes `fields` in place. `generates`: false for what only counts tokens.

        Raises ServeError invalid_request or unsupported_field, naming the field and the limit.
        """
        if generates and (api := self._apis.get(dialect)) is not None:
            api.apply(fields)
        if self._preamble is not None:
            self._preamble.apply(fields, dialect, self._name)

    @property
    def chooses(self) -> bool:
        """Whether the model depends on the conversation."""
        return bool(self._weights)

    def model(self, tenant: str, conversation: bytes) -> str | None:
        """The model chosen by weight, None where the route has just one. The same conversation of a tenant always
        gets the same, and a change of weights moves no more conversations than it must (weighted rendezvous)."""
        if not self._weights:
            return None
        seed = b"%b\0%b\0%b" % (self._name.encode(), tenant.encode(), conversation)
        return max(self._weights, key=lambda weight: _score(seed, weight)).model


def _score(seed: bytes, weight: "Weight") -> float:
    if not weight.weight:
        return 0.0
    digest = hashlib.blake2b(seed, digest_size=8, key=weight.model.encode()[:64]).digest()
    return -weight.weight / math.log((int.from_bytes(digest, "big") + 0.5) / _HASHES)


class _ApiPolicy:
    """Defaults and limits of one route for one API."""

    __slots__ = ("_answers", "_bounded", "_flat", "_length", "_lengths", "_min_tokens", "_nested", "_sized", "_unset")

    def __init__(self, route: "Route", dialect: str) -> None:
        limits, defaults = route.limits, msgspec.structs.asdict(route.defaults)
        flat: list[tuple[tuple[str, ...], str, msgspec.Raw]] = []
        nested: list[tuple[str, str, msgspec.Raw]] = []
        for word, field in DEFAULTS[dialect].items():
            outer, _, inner = field.partition(".")
            if defaults[word] is None:
                continue
            if inner:
                nested.append((outer, inner, _raw(defaults[word])))
            else:  # a length is absent only where none of its names is there
                names = LENGTHS[dialect] if field in LENGTHS[dialect] else (field,)
                flat.append((names, field, _raw(defaults[word])))
        self._flat, self._nested = tuple(flat), tuple(nested)
        self._length = limits.max_tokens
        self._lengths = LENGTHS[dialect] if limits.max_tokens is not None else ()
        # Messages cannot go without a length: the engine says so better.
        self._unset = LENGTHS[dialect][0] if self._lengths and dialect != "messages" else ""
        if dialect == "completions" and limits.max_tokens is not None and limits.max_tokens >= COMPLETION_TOKENS:
            self._unset = ""
        # The engine refuses a least length above the greatest, which may have been lowered here.
        least = [limit for limit in (limits.min_tokens, limits.max_tokens) if limit is not None]
        self._min_tokens = min(least) if least and dialect in TAKES_MIN_TOKENS else None
        allowed = msgspec.structs.asdict(limits)
        self._bounded = tuple(
            (field, allowed[word]) for field, word in BOUNDED[dialect].items() if allowed[word] is not None
        )
        self._answers = limits.n if dialect == "completions" else None
        size = limits.structured_output_bytes
        self._sized = tuple((field, size) for field in STRUCTURED[dialect]) if size is not None else ()

    def apply(self, fields: Fields) -> None:
        for field, limit in self._sized:
            raw = fields.get(field)
            if raw is not None and (size := memoryview(raw).nbytes) > limit:
                raise ServeError(
                    "invalid_request", f"`{field}` has {size} bytes; this model takes at most {limit}.", param=field
                )
        for field, limit in self._bounded:
            value = _whole(fields, field)
            # -1 asks for the whole vocabulary
            if value is not None and (value > limit or value < 0):
                raise ServeError(
                    "invalid_request", f"`{field}` is {value}; this model takes 0 to {limit}.", param=field
                )
        if self._answers is not None:
            self._count_answers(fields, self._answers)
        for names, field, default in self._flat:
            if all(_absent(fields, name) for name in names):
                fields[field] = default
        for outer, inner, default in self._nested:
            _set_inside(fields, outer, inner, default)
        if self._length is not None:
            self._shorten(fields, self._length)
        if self._min_tokens is not None:
            value = _whole(fields, "min_tokens")
            if value is not None and value > self._min_tokens:
                fields["min_tokens"] = _raw(self._min_tokens)

    def _count_answers(self, fields: Fields, limit: int) -> None:
        """A completion may bring many prompts, each with `n` answers: to the engine, as many requests."""
        raw = fields.get("prompt")
        if raw is None or not _MANY_PROMPTS.match(raw):
            return
        answers = len(_as_list(raw)) * (_whole(fields, "n") or 1)
        if answers > limit:
            raise ServeError(
                "invalid_request",
                f"`prompt` asks for {answers} answers; this model gives at most {limit} to one request.",
                param="prompt",
            )

    def _shorten(self, fields: Fields, limit: int) -> None:
        given = False
        for name in self._lengths:
            value = _whole(fields, name)
            if value is not None:
                given = True
                if value > limit:
                    fields[name] = _raw(limit)
        if not given:
            # null means without an end on completions too
            name = self._unset or next((name for name in self._lengths if name in fields), "")
            if name:
                fields[name] = _raw(limit)


class _Preamble:
    """A route's own instructions, put before all that the caller says."""

    __slots__ = ("_block", "_message", "_prefix", "_text")

    def __init__(self, text: str) -> None:
        self._text = _raw(text)
        self._prefix = _encode(f"{text}\n\n")[:-1]  # of a JSON string: the caller's follows without its first quote
        self._message = b'[{"role":"system","content":%b}' % _encode(text)
        self._block = b'[{"type":"text","text":%b}' % _encode(f"{text}\n\n")  # vLLM joins blocks without a space

    def apply(self, fields: Fields, dialect: str, route: str) -> None:
        if dialect == "chat":
            _refuse(fields, "truncate_prompt_tokens")
            if "messages" in fields:  # without any the engine says what is missing
                fields["messages"] = _front_of_list(fields["messages"], self._message, "messages")
        elif dialect == "responses":
            if fields.get("truncation") is not None and bytes(fields["truncation"]) != b'"disabled"':
                _refuse(fields, "truncation")
                del fields["truncation"]  # null truncates
            self._lengthen(fields, "instructions")
        elif dialect == "messages":
            self._lengthen(fields, "system")
        elif dialect == "completions":
            raise ServeError(
                "invalid_request",
                f"`{route}` has instructions of its own, which a bare prompt has no place for; "
                "use /v1/chat/completions.",
                param="model",
            )

    def _lengthen(self, fields: Fields, name: str) -> None:
        raw = bytes(fields.get(name, _NULL))
        if raw == _NULL:
            fields[name] = self._text
        elif raw.startswith(b'"'):
            fields[name] = msgspec.Raw(self._prefix + raw[1:])
        elif name == "system":
            fields[name] = _front_of_list(fields[name], self._block, name)
        else:
            raise ServeError("invalid_request", f"`{name}` must be a string.", param=name)


def _front_of_list(raw: msgspec.Raw, first: bytes, name: str) -> msgspec.Raw:
    text = bytes(raw)
    if not text.startswith(b"["):
        raise ServeError("invalid_request", f"`{name}` must be a list.", param=name)
    comma = b"" if _EMPTY_LIST.match(text) else b","
    return msgspec.Raw(first + comma + text[1:])


def _refuse(fields: Fields, name: str) -> None:
    """What shortens a prompt would begin with the preamble."""
    if not _absent(fields, name):
        raise ServeError(
            "unsupported_field", f"`{name}` is not accepted for this model; shorten the prompt instead.", param=name
        )


def _set_inside(fields: Fields, outer: str, inner: str, value: msgspec.Raw) -> None:
    if _absent(fields, outer):
        fields[outer] = msgspec.Raw(b'{"%b":%b}' % (inner.encode(), bytes(value)))
        return
    try:
        inside = _as_map(fields[outer])
    except msgspec.DecodeError:
        raise ServeError("invalid_request", f"`{outer}` must be an object.", param=outer) from None
    if _absent(inside, inner):
        inside[inner] = value
        fields[outer] = msgspec.Raw(_encode(inside))


def _absent(fields: Fields, name: str) -> bool:
    """null asks for the default as well."""
    raw = fields.get(name)
    return raw is None or bytes(memoryview(raw)[:5]) == _NULL


def _whole(fields: Fields, name: str) -> int | None:
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return _as_int(raw)
    except msgspec.DecodeError:
        if bytes(raw) == _NULL:
            return None
        raise ServeError("invalid_request", f"`{name}` must be a whole number.", param=name) from None


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encode(value))

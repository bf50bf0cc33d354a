"""A request's body: its top level decoded, policy applied, written back once. Pure.

Values stay raw (msgspec.Raw): nothing below the top level is built, so an 8 MiB conversation costs a scan and
a copy. The engine judges what is inside; here only what this gateway decides upon is looked at.
"""

import json
from typing import Any, Final

import msgspec

from vitalis_serve.errors import ServeError

# Refused for every key: they reach into the engine or other requests (design section 5).
REFUSED: Final = frozenset(
    {
        "kv_transfer_params",
        "ec_transfer_params",
        "vllm_xargs",
        "chat_template",
        "mm_processor_kwargs",
        "stream_interval",
        "prompt_embeds",
    }
)
# Dropped in silence: the gateway sets what they would say (`encode`, and the header X-Vllm-Priority).
STRIPPED: Final = ("cache_salt", "priority", "request_id")
# Responses' server-side state lives in one engine's memory.
STATEFUL: Final = ("previous_response_id", "conversation")

_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode
_as_bool = msgspec.json.Decoder(bool).decode
_as_str = msgspec.json.Decoder(str).decode
_as_map = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_USAGE: Final = msgspec.Raw(b'{"include_usage":true}')
_TRUE: Final = msgspec.Raw(b"true")
_FALSE: Final = msgspec.Raw(b"false")
_NULL: Final = b"null"


class Body:
    """What the gateway read: `model` as the client named it, `stream`, and whether usage must be hidden."""

    __slots__ = ("_salted", "_sent_model", "fields", "hide_usage", "model", "stream")

    def __init__(self, raw: bytes, dialect: str, *, streams: bool) -> None:
        """`streams`: of the API, which is to say that it generates: what only counts tokens has no use for a salt.
        Raises ServeError invalid_json, invalid_request or unsupported_field.
        """
        fields = self.fields = top_level(raw)
        self.hide_usage = False
        self.stream = streams and _boolean(fields, "stream")
        self.model = self._sent_model = _model(fields)
        self._salted = streams
        if not REFUSED.isdisjoint(fields):
            name = min(REFUSED.intersection(fields))
            raise ServeError("unsupported_field", f"The field `{name}` is not accepted here; leave it out.", param=name)
        for name in STRIPPED:
            if name in fields:
                del fields[name]
        if dialect == "responses":
            self._responses()
        elif self.stream and dialect in ("chat", "completions"):
            self._usage()

    def _responses(self) -> None:
        for name in STATEFUL:
            if name in self.fields and bytes(self.fields[name]) != _NULL:
                raise ServeError(
                    "unsupported_field",
                    f"`{name}` is not kept by this server; send the whole conversation in `input` instead.",
                    param=name,
                )
        if _boolean(self.fields, "background"):
            raise ServeError(
                "unsupported_field",
                "`background` is not available here; leave it out or use `stream`.",
                param="background",
            )
        self.fields["store"] = _FALSE

    def _usage(self) -> None:
        """Asks the engine for the usage of a stream, and remembers to hide it from who did not ask."""
        raw = self.fields.get("stream_options")
        if raw is None or bytes(raw) == _NULL:
            self.fields["stream_options"] = _USAGE
            self.hide_usage = True
            return
        try:
            options = _as_map(raw)
            asked = _boolean(options, "include_usage")
        except (msgspec.DecodeError, ServeError):
            raise ServeError(
                "invalid_request", "`stream_options` must be an object with booleans.", param="stream_options"
            ) from None
        if not asked:
            options["include_usage"] = _TRUE
            options.pop("continuous_usage_stats", None)
            self.fields["stream_options"] = msgspec.Raw(_encode(options))
            self.hide_usage = True

    def encode(self, model: str, salt: msgspec.Raw | None = None) -> bytes:
        """The body as it goes to the engine: with the engine's own name for the model, and the tenant's salt for its
        prefix cache. May be called again with another model."""
        if model != self._sent_model:
            self.fields["model"] = msgspec.Raw(_encode(model))
            self._sent_model = model
        if salt is not None and self._salted:
            self.fields["cache_salt"] = salt
        return _encode(self.fields)


def top_level(raw: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object. Raises ServeError invalid_json or invalid_request."""
    try:
        str(raw, "utf-8")  # msgspec does not look into raw values
        fields = _decode(raw)
    except UnicodeDecodeError as error:
        raise ServeError("invalid_json", f"The body is not UTF-8 (at byte {error.start}).") from None
    except msgspec.ValidationError:
        raise ServeError("invalid_json", "The body must be a JSON object.") from None
    except msgspec.DecodeError as error:
        raise ServeError("invalid_json", f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise ServeError("invalid_json", "The body is nested too deeply.") from None
    # A body without spaces comes back at its own length unless a key was there twice: this costs a copy
    # instead of a parser of our own.
    if len(_encode(fields)) != len(raw):
        _refuse_duplicates(raw, fields)
    return fields


def _refuse_duplicates(raw: bytes, fields: dict[str, msgspec.Raw]) -> None:
    # A key is followed by a colon, which the end of a text never is. So where each name stands once before a colon,
    # and the escapes that could hide a letter of a name are not used at all, there is nothing to parse (8 MiB: 28 ms).
    hidden = b"\\u" in raw or b"\\/" in raw
    if not hidden and all(raw.count(b'"%b":' % name.encode()) == 1 for name in fields):
        return
    seen: list[list[tuple[str, Any]]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        seen[:] = [pairs]  # the outermost object is built last

    try:
        json.loads(raw, object_pairs_hook=keep)
    except (ValueError, RecursionError):
        raise ServeError("invalid_json", "The body is not valid JSON, or it is nested too deeply.") from None
    names = [name for name, _ in seen[0]]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise ServeError("invalid_request", f"The field `{twice[:128]}` is there twice.", param=twice[:128])


def _boolean(fields: dict[str, msgspec.Raw], name: str) -> bool:
    raw = fields.get(name)
    if raw is None:
        return False
    try:
        return _as_bool(raw)
    except msgspec.DecodeError:
        if bytes(raw) == _NULL:
            return False
        raise ServeError("invalid_request", f"`{name}` must be true or false.", param=name) from None


def _model(fields: dict[str, msgspec.Raw]) -> str:
    raw = fields.get("model")
    if raw is None:
        raise ServeError(
            "invalid_request",
            "`model` is missing; GET /v1/models lists what this key may use.",
            param="model",
        )
    try:
        return _as_str(raw)
    except msgspec.DecodeError:
        raise ServeError("invalid_request", "`model` must be a string.", param="model") from None

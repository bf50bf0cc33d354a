"""From a request's bytes to what an engine is to be sent, and what that asks of it. Pure.

Everything that can be refused for what the body says is refused here. `Intake` is kept until the first token: a
fallback is the same request again with another model's name.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from vitalis_serve.errors import ServeError
from vitalis_serve.gateway import guidance, harmony
from vitalis_serve.gateway.body import Body
from vitalis_serve.gateway.paths import GUIDANCE, Api
from vitalis_serve.gateway.prefix import prefix
from vitalis_serve.gateway.route_policy import LENGTHS
from vitalis_serve.gateway.routing import affinity_key
from vitalis_serve.gateway.seats import Demand

if TYPE_CHECKING:
    from vitalis_serve.gateway.keys import Key, KeyTable

SESSION: Final = b"x-session-id"
_as_int = msgspec.json.Decoder(int).decode
_as_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Intake:
    """One request, read. `model`: the engine's name that it goes to first. `question`: of /emergency-guidance."""

    __slots__ = (
        "_affinity", "_salt", "_session", "answers", "body", "class_", "fallbacks", "key", "max_tokens", "model",
        "question", "route", "sequences", "subjects", "weight",
    )  # fmt: skip

    def __init__(
        self,
        raw: bytes,
        api: Api,
        key: "Key",
        keys: "KeyTable",
        headers: Mapping[bytes, bytes],
        *,
        harmony_model: bool,
        choices: bool,
    ) -> None:
        """`choices`: more than one replica; one alone is everybody's home.

        Raises ServeError invalid_json, invalid_request, unsupported_field, model_not_found, route_not_allowed."""
        self.question: guidance.Question | None = None
        if api.path == GUIDANCE:
            self.question = guidance.read(raw)
            raw = guidance.chat_body(self.question, guidance.route_for(keys.allowed(key)).name)
        dialect = "chat" if self.question is not None else api.dialect
        body = self.body = Body(raw, dialect, streams=api.streams)
        fields = body.fields
        use = keys.use(key, body.model)
        route, policy = use.route, use.policy
        self.key, self.route, self.class_ = key, route.name, use.class_
        self.model, self.fallbacks, self._salt = route.model, route.fallbacks, use.salt
        self.weight, self.subjects = use.weight, use.subjects
        self._affinity = self._session = 0
        if choices or policy is not None:
            session = headers.get(SESSION, b"")
            # As the client wrote it: behind a long preamble all conversations would look alike.
            begins = prefix(fields, dialect) if choices or (policy is not None and policy.chooses) else b""
            if choices:
                self._affinity = affinity_key(use.sharers, begins)
                self._session = affinity_key(use.sharers, session) if session else 0
            if policy is not None:
                policy.apply(fields, dialect, generates=api.streams)
                self.model = policy.model(key.tenant, session or begins) or route.model
        if harmony_model and harmony.may_break(raw, fields) and (words := harmony.breaks(fields, dialect)):
            raise ServeError("unsupported_field", words)
        self.max_tokens = _longest(fields, LENGTHS.get(dialect, ()))
        self.answers = _answers(fields, dialect) if "n" in fields else 1
        self.sequences = self.answers
        if dialect == "completions":
            self.sequences *= _prompts(fields.get("prompt", b""))

    def encode(self, model: str) -> bytes:
        """The body as an engine is to get it, under its own name for the model."""
        return self.body.encode(model, self._salt)

    def demand(
        self,
        waiter: Any,
        *,
        model: str,
        body_bytes: int,
        output_tokens: int,
        deadline: float = 0.0,
        excluded: frozenset[str] = frozenset(),
    ) -> Demand:
        """What it asks of an engine."""
        return Demand(  # by position, at half the cost of names
            waiter,
            model,
            self.key.tenant,
            self.class_,
            body_bytes // 4,
            output_tokens,
            body_bytes,
            self._affinity,
            self._session,
            deadline,
            excluded,
            self.weight,
            self.body.stream,
            self.sequences,
        )


def _answers(fields: Mapping[str, msgspec.Raw], dialect: str) -> int:
    """How many answers are wanted at once; 1 where the field says nonsense, which the engine will refuse, and where
    the API has no such field."""
    if dialect not in ("chat", "completions"):
        return 1
    try:
        return max(1, _as_int(fields["n"]))
    except msgspec.DecodeError:
        return 1


def _prompts(prompt: msgspec.Raw | bytes) -> int:
    """How many prompts one completion has; a list of numbers is one."""
    raw = bytes(prompt)
    if raw[:1] != b"[" or raw[1:].lstrip()[:1] not in (b'"', b"["):
        return 1
    try:
        return max(1, len(_as_list(raw)))
    except msgspec.DecodeError:
        return 1  # the engine will refuse it


def _longest(fields: Mapping[str, msgspec.Raw], names: tuple[str, ...]) -> int | None:
    """The longest answer that the request allows, in tokens; None where it does not say, or says nonsense."""
    for name in names:
        if name in fields:
            try:
                return max(1, _as_int(fields[name]))
            except msgspec.DecodeError:
                return None
    return None

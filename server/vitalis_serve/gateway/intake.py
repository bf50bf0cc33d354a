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


class Intake:
    """One request, read. `model`: the engine's name that it goes to first. `question`: of /emergency-guidance."""

    __slots__ = (
        "_affinity", "_salt", "_session", "answers", "body", "class_", "fallbacks", "key", "max_tokens", "model",
        "question", "route",
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
        route = keys.route(key, body.model)
        self.key, self.route, self.class_ = key, route.name, route.class_for(key)
        self.model, self.fallbacks = route.model, route.fallbacks
        policy = keys.policies.get(route.name)
        session = headers.get(SESSION, b"")
        # As the client wrote it: behind a long preamble all conversations would look alike.
        begins = prefix(body.fields, dialect) if choices or (policy is not None and policy.chooses) else b""
        sharers = keys.sharers(key.tenant).encode()
        self._affinity = affinity_key(sharers, begins) if choices else 0
        self._session = affinity_key(sharers, session) if choices and session else 0
        if policy is not None:
            policy.apply(body.fields, dialect, generates=api.streams)
            self.model = policy.model(key.tenant, session or begins) or route.model
        if harmony_model and (words := harmony.breaks(body.fields, dialect)):
            raise ServeError("unsupported_field", words)
        self._salt = keys.salt(key.tenant)
        self.max_tokens = _longest(body.fields, dialect)
        self.answers = _answers(body.fields, dialect) if "n" in body.fields else 1

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
        return Demand(
            waiter=waiter,
            model=model,
            tenant=self.key.tenant,
            class_=self.class_,
            prompt_tokens=body_bytes // 4,
            output_tokens=output_tokens,
            body_bytes=body_bytes,
            affinity=self._affinity,
            session=self._session,
            deadline=deadline,
            excluded=excluded,
            streamed=self.body.stream,
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


def _longest(fields: Mapping[str, msgspec.Raw], dialect: str) -> int | None:
    """The longest answer that the request allows, in tokens; None where it does not say, or says nonsense."""
    for name in LENGTHS.get(dialect, ()):
        raw = fields.get(name)
        if raw is not None:
            try:
                return max(1, _as_int(raw))
            except msgspec.DecodeError:
                return None
    return None

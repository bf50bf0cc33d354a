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
        "_conversation", "_dialect", "_salt", "body", "class_", "fallbacks", "key", "max_tokens", "model", "question",
        "route",
    )  # fmt: skip

    def __init__(
        self, raw: bytes, api: Api, key: "Key", keys: "KeyTable", headers: Mapping[bytes, bytes], *, harmony_model: bool
    ) -> None:
        """Raises ServeError invalid_json, invalid_request, unsupported_field, model_not_found, route_not_allowed."""
        self.question: guidance.Question | None = None
        if api.path == GUIDANCE:
            self.question = guidance.read(raw)
            raw = guidance.chat_body(self.question, guidance.route_for(keys.allowed(key)).name)
        dialect = self._dialect = "chat" if self.question is not None else api.dialect
        body = self.body = Body(raw, dialect, streams=api.streams)
        route = keys.route(key, body.model)
        self.key, self.route, self.class_ = key, route.name, route.class_for(key)
        self.model, self.fallbacks = route.model, route.fallbacks
        self._conversation = headers.get(SESSION, b"")
        policy = keys.policies.get(route.name)
        if policy is not None:
            policy.apply(body.fields, dialect, generates=api.streams)
            conversation = self._conversation or prefix(body.fields, dialect)
            self.model = policy.model(key.tenant, conversation) or route.model
        if harmony_model and (words := harmony.breaks(body.fields, dialect)):
            raise ServeError("unsupported_field", words)
        self._salt = keys.salt(key.tenant)
        self.max_tokens = _longest(body.fields, dialect)

    def encode(self, model: str) -> bytes:
        """The body as an engine is to get it, under its own name for the model."""
        return self.body.encode(model, self._salt)

    def demand(
        self, waiter: Any, *, model: str, body_bytes: int, output_tokens: int, deadline: float, choices: bool
    ) -> Demand:
        """What it asks of an engine. `choices`: more than one replica; one alone is everybody's home."""
        affinity = session = 0
        if choices:
            salt = self.key.tenant.encode()
            affinity = affinity_key(salt, prefix(self.body.fields, self._dialect))
            if self._conversation:
                session = affinity_key(salt, self._conversation)
        return Demand(
            waiter=waiter,
            model=model,
            tenant=self.key.tenant,
            class_=self.class_,
            prompt_tokens=body_bytes // 4,
            output_tokens=output_tokens,
            body_bytes=body_bytes,
            affinity=affinity,
            session=session,
            deadline=deadline,
            streamed=self.body.stream,
        )


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

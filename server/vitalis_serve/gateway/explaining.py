"""Where a request would go just now, and why, as control asks for people who operate. Changes nothing.

It is read, given a model and ranked by the same code as a real one (`Intake`, `Admission.explain`); the slot is not
taken, and what was said is kept nowhere.
"""

import logging
from typing import TYPE_CHECKING, Any, Final

import msgspec

from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.body import top_level
from vitalis_serve.gateway.intake import SESSION, Intake
from vitalis_serve.gateway.keys import Key
from vitalis_serve.gateway.paths import APIS
from vitalis_serve.gateway.seats import Demand

if TYPE_CHECKING:
    from vitalis_serve.gateway.state import WorkerState

logger = logging.getLogger(__name__)

_PATHS: Final = {
    "chat": b"/v1/chat/completions",
    "completions": b"/v1/completions",
    "responses": b"/v1/responses",
    "messages": b"/v1/messages",
}
_encode = msgspec.json.Encoder().encode


class Question(msgspec.Struct):
    """`model`: a route. `class_`: of the key, as far as the route leaves it to the key. `body`: JSON, as a client
    would write it, because homes go by its bytes; its `model` does not count."""

    model: str
    tenant: str = ""
    class_: str = msgspec.field(default="standard", name="class")
    api: str = "chat"
    body: str = "{}"
    session: str = ""


def answer(state: "WorkerState", raw: bytes) -> dict[str, Any]:
    """{"values": ...} to a Question's JSON, or {"error": {"code", "message", "param"}}. Never raises."""
    try:
        return {"values": explain(state, msgspec.json.decode(raw, type=Question))}
    except ServeError as error:
        return {"error": {"code": error.code, "message": error.message, "param": error.param}}
    except Exception:
        logger.exception("a question of control's could not be answered")
        return {"error": {"code": "internal", "message": "The worker failed; its log says why.", "param": None}}


def explain(state: "WorkerState", question: Question) -> dict[str, Any]:
    """What would be chosen. Raises ServeError as the request itself would be refused."""
    fields = top_level(question.body.encode())
    fields["model"] = msgspec.Raw(_encode(question.model))
    intake = Intake(
        _encode(fields),
        APIS[_PATHS[question.api]],
        Key("", "", question.tenant, class_=question.class_),
        state.keys,
        {SESSION: question.session.encode()} if question.session else {},
        harmony_model=state.harmony,
        choices=len(state.fleet.replicas) > 1,
    )
    models = (intake.model, *intake.fallbacks)
    # The first that some replica serves, as a request falls back; its own where none does.
    demands = [_demand(state, intake, model) for model in models]
    seats = list(state.admission.seats())
    demand = next((d for d in demands if any(seat.serves(d) for seat in seats)), demands[0])
    found = state.admission.explain(demand)
    return {
        "worker": state.options.name,
        "route": intake.route,
        "class": intake.class_,
        "model": demand.model,
        "fallback": demand is not demands[0],
        "queued": state.admission.queued,
        **msgspec.to_builtins(found),
    }


def _demand(state: "WorkerState", intake: Intake, model: str) -> Demand:
    expected = state.estimates.expect(intake.route, intake.key.tenant, intake.max_tokens)
    body_bytes = len(intake.encode(model))
    return intake.demand(None, model=model, body_bytes=body_bytes, output_tokens=expected)

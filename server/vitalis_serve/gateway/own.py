"""What the worker answers by itself: the models a key may use, and health."""

from typing import TYPE_CHECKING, Any

from vitalis_serve.errors import ServeError
from vitalis_serve.fleet import TAKES_REQUESTS
from vitalis_serve.gateway.paths import MODEL_PREFIX

if TYPE_CHECKING:
    from vitalis_serve.gateway.keys import Route
    from vitalis_serve.gateway.relay import Relay
    from vitalis_serve.gateway.state import WorkerState


def answer(relay: "Relay", state: "WorkerState") -> None:
    """Answers a GET. Raises ServeError model_not_found or no_ready_engine."""
    path = relay.path
    if path == b"/healthz":
        relay.reply({"status": "alive"})
    elif path == b"/readyz":
        if state.unready or state.draining or not state.keys.version:
            raise ServeError("draining", "This worker does not take requests.", retry_after=1)
        if not state.keys.routes:
            raise ServeError("no_ready_engine", "No engine has said yet which models it serves.", retry_after=5)
        relay.reply({"status": "ready"})
    elif path == b"/health":
        ready = sum(r.state in TAKES_REQUESTS for r in state.fleet.replicas)
        if not ready:
            relay.reply({"status": "unhealthy", "model_loaded": False}, status=500)
        else:
            relay.reply({"status": "healthy", "model_loaded": True, "replicas_ready": ready})
    else:
        _models(relay, state)


def _models(relay: "Relay", state: "WorkerState") -> None:
    key, keys = relay.key, state.keys
    assert key is not None
    if relay.path.startswith(MODEL_PREFIX):
        name = relay.path[len(MODEL_PREFIX) :].decode("latin-1").replace("%2F", "/").replace("%2f", "/")
        relay.reply(_model(keys.route(key, name)))
    else:
        relay.reply({"object": "list", "data": [_model(route) for route in keys.allowed(key)]})


def _model(route: "Route") -> dict[str, Any]:
    return {"id": route.name, "object": "model", "created": 0, "owned_by": "vitalis"}

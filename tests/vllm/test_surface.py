"""Of everything that the pinned vLLM answers, the data port answers only its own short list."""

from typing import Any

import httpx
import pytest

from tests.support import client
from tests.support.engines import Stack

OPEN = {
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/responses"), ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"), ("GET", "/health"), ("GET", "/healthz"), ("GET", "/readyz"),
}  # fmt: skip
# In vLLM's source, whether or not this start of it mounts them.
HIDDEN = {
    ("POST", "/invocations"), ("GET", "/ping"), ("POST", "/ping"), ("GET", "/metrics"), ("GET", "/metrics/"),
    ("GET", "/load"), ("GET", "/version"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"),
    ("POST", "/scale_elastic_ep"), ("POST", "/is_scaling_elastic_ep"), ("POST", "/generative_scoring"),
    ("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping"), ("POST", "/reset_prefix_cache"),
    ("POST", "/reset_mm_cache"), ("POST", "/reset_encoder_cache"), ("POST", "/collective_rpc"), ("GET", "/server_info"),
    ("POST", "/start_profile"), ("POST", "/stop_profile"), ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"), ("GET", "/tokenizer_info"), ("POST", "/abort_requests"), ("POST", "/pause"),
    ("POST", "/resume"), ("POST", "/inference/v1/generate"), ("POST", "/v1/embeddings"), ("POST", "/rerank"),
    ("POST", "/v1/score"), ("POST", "/pooling"), ("POST", "/classify"), ("POST", "/v1/audio/transcriptions"),
    ("GET", "/v1/responses/{response_id}"), ("POST", "/v1/responses/{response_id}/cancel"),
    ("GET", "/v1/realtime"), ("POST", "/shutdown"), ("GET", "/static/x"),
}  # fmt: skip
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


def mounted(tree: Stack) -> set[tuple[str, str]]:
    """What this engine says it has."""
    with tree.engines()[0].http() as http:
        paths: dict[str, dict[str, Any]] = http.get("/openapi.json").json()["paths"]
    return {(method.upper(), path) for path, methods in paths.items() for method in methods}


def filled(path: str) -> str:
    while "{" in path:
        head, _, rest = path.partition("{")
        path = head + "x" + rest.partition("}")[2]
    return path


def test_the_engine_answers_more_than_is_open(pair: Stack) -> None:
    """What makes the next test worth something: without the list these would be reachable."""
    routes = mounted(pair)
    assert {route for route in OPEN if route[1].startswith(("/v1/chat", "/v1/mess", "/v1/resp"))} <= routes
    assert ("POST", "/invocations") in routes
    assert len(routes - OPEN) > 5
    with pair.engines()[0].http() as http:
        assert http.get("/metrics").status_code == 200


@pytest.mark.parametrize("credential", ["with the key", "without a key"])
def test_everything_else_is_closed(pair: Stack, credential: str) -> None:
    http = pair.http() if credential == "with the key" else httpx.Client(base_url=pair.url)
    with http:
        for method, path in sorted(mounted(pair) | HIDDEN):
            if (method, path) in OPEN:
                continue
            for sent in {method, "GET", "POST"}:
                if (sent, path) in OPEN:
                    continue
                answer = http.request(sent, filled(path), json={} if sent == "POST" else None)
                assert answer.status_code in (404, 405), f"{sent} {path} is answered with {answer.status_code}"
                if sent != "HEAD":
                    assert answer.json()["error"]["code"] in ("unknown_path", "method_not_allowed")


def test_open_paths_take_their_own_method_only(pair: Stack) -> None:
    with pair.http() as http:
        for method, path in sorted(OPEN):
            for other in METHODS:
                if (other, path) in OPEN or (other == "HEAD" and method == "GET"):
                    continue
                answer = http.request(other, filled(path))
                assert answer.status_code == 405, f"{other} {path} is answered with {answer.status_code}"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../metrics", "/v1//chat/completions", "//metrics", "/v1/models/../../metrics", "/v1/chat/completions/",
        "/V1/chat/completions", "/%6detrics", "/v1%2fmodels",
    ],
)  # fmt: skip
def test_no_spelling_gets_around_the_list(pair: Stack, path: str) -> None:
    host, port = pair.address
    for method in ("GET", "POST"):
        sent = client.request(method, path, b"{}" if method == "POST" else b"", {"Authorization": f"Bearer {pair.key}"})
        assert client.ask(f"http://{host}:{port}", sent).status in (400, 404, 405)

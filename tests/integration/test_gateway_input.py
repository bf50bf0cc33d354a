"""Bad input gets a clear answer, and nothing of it reaches an engine."""

import contextlib
import gzip
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import client, gateway, simulator
from tests.support.client import Response
from tests.support.gateway import APIS, AUTH, PATHS, document
from tests.support.simulator import Simulator
from tests.support.worker import KEY, MODEL, WorkerProcess, running_worker, snapshot

OTHER = "vts_otherkey0000_0123456789abcdefghijklmnopqrstuv"
EXPIRED = "vts_expired00000_0123456789abcdefghijklmnopqrstuv"
METRICS = "vts_metrics00000_0123456789abcdefghijklmnopqrstuv"
KEYS = [
    {"id": "testkey00000", "key": KEY, "tenant": "test"},
    {"id": "otherkey0000", "key": OTHER, "tenant": "other", "routes": ["other-route"]},
    {"id": "expired00000", "key": EXPIRED, "tenant": "test", "expires_at": 1_000_000_000},
    {"id": "metrics00000", "key": METRICS, "tenant": "test", "scopes": ["metrics"]},
]
ROUTES = {MODEL: MODEL, "other-route": MODEL}
BODY = json.dumps(document("chat")).encode()
HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n".encode()


@dataclass
class Stage:
    worker: WorkerProcess
    engine: Simulator

    def ask(self, data: bytes) -> Response:
        return gateway.ask(self.worker, data)

    def post(self, body: object, headers: dict[str, str] | None = None, path: str = PATHS["chat"]) -> Response:
        return self.ask(client.post(path, body, AUTH if headers is None else headers))

    def raw(self, data: bytes) -> list[bytes]:
        """All answers to these bytes until the worker ends the connection, each as its first line."""
        with client.connect(self.worker.url) as wire:
            with contextlib.suppress(ConnectionError):
                wire.send(data)
            came = wire.read_to_end()
        return re.findall(rb"(?:\A|(?<=[}\n]))HTTP/1\.1 (\d\d\d) [^\r]*\r\n", came)


@pytest.fixture(scope="module")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder: Path = tmp_path_factory.mktemp("input")
    with (
        simulator.started(log=folder / "engine.jsonl") as engine,
        running_worker(
            folder, document=snapshot(1, KEYS, ROUTES), header_seconds=0.5, body_seconds=0.6, keepalive_seconds=1.0
        ) as worker,
    ):
        yield Stage(worker, engine)


@pytest.fixture
def stage(_stage: Stage) -> Iterator[Stage]:
    _stage.worker.serve(_stage.engine.address)
    yield _stage
    gateway.settled(_stage.worker)


@pytest.fixture
def closed(stage: Stage) -> Iterator[Stage]:
    """A stage on which nothing may reach the engine."""
    before = stage.engine.state()["requests_by_path"]
    yield stage
    assert stage.engine.state()["requests_by_path"] == before


def check(answer: Response, status: int, code: str) -> str:
    """The envelope, and that it is one clear sentence; returns that."""
    assert (answer.status, gateway.error_code(answer)) == (status, code)
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.head.headers["x-request-id"]
    assert answer.head.headers["content-type"] == "application/json"
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    return str(error["message"])


# -- who is asking


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_key"),
        ({"authorization": "Bearer vts_nobody000000_0123456789"}, "invalid_key"),
        ({"authorization": "Basic dXNlcjpwYXNz"}, "invalid_key"),
        ({"authorization": f"Bearer {KEY}", "x-api-key": OTHER}, "invalid_key"),
        ({"authorization": f"Bearer {EXPIRED}"}, "expired_key"),
        ({"x-api-key": EXPIRED}, "expired_key"),
    ],
)
@pytest.mark.parametrize("path", [*PATHS.values(), "/v1/messages/count_tokens", "/tokenize", "/detokenize"])
def test_keys_that_do_not_open(closed: Stage, headers: dict[str, str], code: str, path: str) -> None:
    answer = closed.post({"model": MODEL}, headers, path)
    assert (answer.status, gateway.error_code(answer)) == (401, code)
    assert answer.head.headers["www-authenticate"] == "Bearer"
    assert (answer.json.get("type") == "error") == path.startswith("/v1/messages")
    assert KEY not in answer.body.decode()


@pytest.mark.parametrize(
    "headers",
    [
        AUTH,
        {"x-api-key": KEY},
        {"authorization": f"Bearer {KEY}", "x-api-key": KEY},
        {"Authorization": f"bearer {KEY}"},
    ],
)
def test_keys_that_open(stage: Stage, headers: dict[str, str]) -> None:
    assert stage.post(document("chat"), headers).status == 200


def test_a_wrong_key_after_a_right_one_on_the_same_connection(stage: Stage) -> None:
    with client.connect(stage.worker.url) as wire:
        for key, status in ((KEY, 200), ("wrong", 401), (KEY, 200), (EXPIRED, 401), (METRICS, 403)):
            wire.send(client.post(PATHS["chat"], document("chat"), {"authorization": f"Bearer {key}"}))
            assert wire.read_response().status == status


def test_two_authorization_headers(closed: Stage) -> None:
    answer = closed.ask(HEAD + b"authorization: Bearer x\r\ncontent-length: 2\r\n\r\n{}")
    assert "twice" in check(answer, 400, "invalid_request")


def test_scopes_and_routes(closed: Stage) -> None:
    check(closed.post(document("chat"), {"x-api-key": METRICS}), 403, "scope_missing")
    message = check(closed.post(document("chat"), {"x-api-key": OTHER}), 403, "route_not_allowed")
    assert "other-route" in message


# -- bodies


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"hello", b"[]", b'"x"', b"null", b'{"model":"a",}', b'{"model":"gpt-oss-20b"\x00}', b"\x00",
        b'{"model":"gpt-oss-20b","x":"\xff\xfe"}', b"[" * 10_000, b'{"a":' * 10_000, gzip.compress(BODY),
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_bodies_that_are_no_json_object(closed: Stage, body: bytes) -> None:
    check(closed.post(body), 400, "invalid_json")


@pytest.mark.parametrize("api", APIS)
def test_fields_that_are_wrong(closed: Stage, api: str) -> None:
    def refused(**more: object) -> tuple[int, str]:
        answer = closed.post(document(api) | more, path=PATHS[api])
        return answer.status, gateway.error_code(answer)

    assert refused(model=None) == (400, "invalid_request")
    assert refused(stream="yes") == (400, "invalid_request")
    assert refused(model="gpt-6") == (404, "model_not_found")
    assert refused(kv_transfer_params={}) == (400, "unsupported_field")
    answer = closed.post(json.dumps(document(api))[:-1].encode() + b',"model":"x"}', path=PATHS[api])
    assert (answer.status, gateway.error_code(answer)) == (400, "invalid_request")
    without = {name: value for name, value in document(api).items() if name != "model"}
    assert closed.post(without, path=PATHS[api]).status == 400


def test_an_unknown_model_names_what_may_be_used(closed: Stage) -> None:
    message = check(closed.post({"model": "gpt-6", "messages": []}), 404, "model_not_found")
    assert f"{MODEL}, other-route" in message


def test_fields_that_only_the_engine_judges(stage: Stage) -> None:
    """Its 400s come through, in the words of the API."""
    for api in ("chat", "completions", "messages"):
        answer = stage.post(document(api) | {"max_tokens": -1}, path=PATHS[api])
        assert answer.status == 400
        assert "max_tokens" in answer.json["error"]["message"]
        assert (answer.json.get("type") == "error") == (api == "messages")
        streamed = stage.post(document(api, stream=True) | {"max_tokens": -1}, path=PATHS[api])
        assert streamed.status == 400
        assert streamed.head.headers["content-type"] == "application/json"


def test_two_hundred_levels_of_nesting_go_to_the_engine(stage: Stage) -> None:
    nested = json.loads("[" * 200 + "]" * 200)
    assert stage.post(document("chat") | {"metadata": nested}).status == 200


def test_nul_bytes_inside_strings_are_text(stage: Stage) -> None:
    assert stage.post(document("chat", messages=[{"role": "user", "content": "a\0b"}])).status == 200


def test_a_body_in_pretty_print_and_chunks(stage: Stage) -> None:
    pretty = json.dumps(document("chat"), indent=4).encode()
    raw = b"".join(gateway.chunk(pretty[at : at + 7]) for at in range(0, len(pretty), 7)) + gateway.LAST_CHUNK
    answer = stage.ask(HEAD + b"transfer-encoding: chunked\r\n\r\n" + raw)
    gateway.check_answer("chat", answer, stream=False)


def test_a_declared_body_of_50_megabytes(closed: Stage) -> None:
    with client.connect(closed.worker.url) as wire:
        wire.send(HEAD + b"content-length: 52428800\r\n\r\n")
        answer = wire.read_response()  # before a byte of it was sent
        check(answer, 413, "body_too_large")
        assert answer.head.headers["connection"] == "close"
        assert wire.read_to_end() == b""


def test_an_undeclared_body_of_50_megabytes(closed: Stage) -> None:
    with client.connect(closed.worker.url) as wire:
        piece = gateway.chunk(b"x" * 65536)
        wire.send(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(800):
                wire.send(piece)
        check(wire.read_response(), 413, "body_too_large")


def test_a_client_that_sends_50_megabytes_before_it_reads_gets_its_answer(closed: Stage) -> None:
    with client.connect(closed.worker.url) as wire:
        wire.send(HEAD + b"content-length: 52428800\r\n\r\n")
        for _ in range(50):
            wire.send(b"x" * (1 << 20))
        check(wire.read_response(), 413, "body_too_large")


def test_a_large_body_within_the_limit(stage: Stage) -> None:
    content = "x" * (4 << 20)
    answer = stage.post(document("chat", messages=[{"role": "user", "content": content}], sim_prompt_tokens=10))
    assert answer.status == 200


@pytest.mark.parametrize("rest", [b"content-length: 100\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n5\r\nab"])
def test_a_body_that_never_ends(closed: Stage, rest: bytes) -> None:
    answer = closed.ask(HEAD + rest)
    check(answer, 408, "body_timeout")
    assert answer.head.headers["connection"] == "close"


def test_a_body_that_comes_byte_by_byte_for_ever(closed: Stage) -> None:
    with client.connect(closed.worker.url) as wire:
        wire.send(HEAD + b"content-length: 1000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            wire.dribble(b"x" * 100, pause_seconds=0.01)
        check(wire.read_response(), 408, "body_timeout")


# -- heads


def test_headers_of_a_megabyte(closed: Stage) -> None:
    for lines in (b"x-a: " + b"a" * (1 << 20), b"\r\n".join(b"x-%d: a" % n for n in range(100_000))):
        with client.connect(closed.worker.url) as wire:
            with contextlib.suppress(ConnectionError):
                wire.send(HEAD + lines)
            answer = wire.read_response()
        check(answer, 431, "headers_too_large")


def test_headers_just_within_the_limit_with_a_body_behind_them_cut_anywhere(stage: Stage) -> None:
    body = json.dumps(document("chat", pad="p" * 90_000)).encode()
    head = HEAD + b"x-a: " + b"a" * 60_000 + b"\r\ncontent-length: %d\r\n\r\n" % len(body)
    for cut in (1, 2, 3, 4, 5):
        with client.connect(stage.worker.url) as wire:
            wire.send(head[:-cut])
            stage.worker.in_flight()  # the worker has read that
            wire.send(head[-cut:] + body)
            assert wire.read_response().status == 200


def test_a_head_that_comes_byte_by_byte_for_ever(closed: Stage) -> None:
    with client.connect(closed.worker.url) as wire:
        with contextlib.suppress(ConnectionError):
            wire.dribble(HEAD + b"x-a: " + b"a" * 200, pause_seconds=0.005)
        check(wire.read_response(), 408, "body_timeout")


def test_connections_that_say_nothing_are_closed(closed: Stage) -> None:
    with client.connect(closed.worker.url) as silent, client.connect(closed.worker.url) as idle:
        idle.send(client.get("/healthz"))
        assert idle.read_response().status == 200
        assert silent.read_to_end() == b""
        assert idle.read_to_end() == b""


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"content-type": "text/plain"}, "unsupported_media_type"),
        ({"content-type": "multipart/form-data; boundary=x"}, "unsupported_media_type"),
        ({"content-type": "application/x-www-form-urlencoded"}, "unsupported_media_type"),
        ({"content-encoding": "gzip"}, "unsupported_media_type"),
        ({"content-encoding": "zstd"}, "unsupported_media_type"),
    ],
)
def test_media_types(closed: Stage, headers: dict[str, str], code: str) -> None:
    check(closed.post(document("chat"), AUTH | headers), 415, code)


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON", "application/json; charset=utf-8"])
def test_media_types_that_are_json(stage: Stage, kind: str) -> None:
    assert stage.post(document("chat"), AUTH | {"content-type": kind, "content-encoding": "identity"}).status == 200


@pytest.mark.parametrize("path", [*PATHS.values(), "/tokenize"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_methods_that_are_not_allowed(closed: Stage, path: str, method: str) -> None:
    answer = closed.ask(client.request(method, path, b"", AUTH))
    assert (answer.status, gateway.error_code(answer)) == (405, "method_not_allowed")
    assert answer.head.headers["allow"] == "POST"


def test_own_paths_take_get_only(closed: Stage) -> None:
    answer = closed.ask(client.request("POST", "/v1/models", b"", AUTH))
    assert (answer.status, answer.head.headers["allow"]) == (405, "GET")


# Every other route of vLLM 0.32, and a few that are nobody's.
CLOSED = [
    "/", "/metrics", "/load", "/ping", "/version", "/server_info", "/docs", "/openapi.json", "/redoc",
    "/sim/state", "/invocations", "/v1/embeddings", "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank",
    "/v2/rerank", "/classify", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/scale_elastic_ep", "/is_scaling_elastic_ep",
    "/generative_scoring", "/sleep", "/wake_up", "/is_sleeping", "/reset_prefix_cache", "/collective_rpc",
    "/start_profile", "/stop_profile", "/inference/v1/generate", "/abort_requests", "/pause", "/resume",
    "/v1/responses/resp_1", "/v1/responses/resp_1/cancel", "/v1/chat/completions/", "/v1/chat/completions/x",
    "/V1/chat/completions", "/v1//chat/completions", "/v1/chat/../chat/completions", "/%761/chat/completions",
    "/tokenizer_info", "/v1/fleet", "/v1/keys", "/v1/tenants",
]  # fmt: skip


@pytest.mark.parametrize("path", CLOSED)
def test_paths_that_are_closed(closed: Stage, path: str) -> None:
    for method in ("GET", "POST"):
        check(closed.ask(client.request(method, path, b"{}" if method == "POST" else b"", AUTH)), 404, "unknown_path")


# -- smuggling

BAD_HTTP = {
    "two lengths": HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    "two equal lengths": HEAD + b"content-length: 5\r\ncontent-length: 5\r\n\r\nhello",
    "two lengths in one": HEAD + b"content-length: 5, 5\r\n\r\nhello",
    "length and chunked": HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": HEAD + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    "folded header": HEAD + b"x-a: b\r\n c\r\ncontent-length: 2\r\n\r\n{}",
    "folded framing": HEAD + b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "bare line feeds": b"GET /healthz HTTP/1.1\nhost: x\n\n",
    "a bare line feed": HEAD + b"x-a: b\nx-b: c\r\ncontent-length: 2\r\n\r\n{}",
    "a bare return": HEAD + b"x-a: b\rx-b: c\r\ncontent-length: 2\r\n\r\n{}",
    "a chunk's size too large": HEAD + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    "a chunk's size with a sign": HEAD + b"transfer-encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
    "a chunk's size of nothing": HEAD + b"transfer-encoding: chunked\r\n\r\n\r\nhello\r\n0\r\n\r\n",
    "a chunk longer than its size": HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n",
    "chunks with line feeds": HEAD + b"transfer-encoding: chunked\r\n\r\n2\n{}\n0\n\n",
    "space before colon": HEAD + b"content-length : 2\r\n\r\n{}",
    "space before chunked": HEAD + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    "a line that begins with a space": b"POST /v1/chat/completions HTTP/1.1\r\n host: x\r\n\r\n",
    "another coding": HEAD + b"transfer-encoding: gzip\r\n\r\nhello",
    "nearly chunked": HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and then not": HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a negative length": HEAD + b"content-length: -1\r\n\r\n",
    "a length with a sign": HEAD + b"content-length: +2\r\n\r\n{}",
    "a hexadecimal length": HEAD + b"content-length: 0x2\r\n\r\n{}",
    "a length too large": HEAD + b"content-length: 99999999999999999999999\r\n\r\n",
    "a NUL in a header": HEAD + b"x-a: b\0c\r\ncontent-length: 2\r\n\r\n{}",
    "a NUL in a name": HEAD + b"x-a\0: b\r\ncontent-length: 2\r\n\r\n{}",
    "no name": HEAD + b": b\r\ncontent-length: 2\r\n\r\n{}",
    "no colon": HEAD + b"hello\r\ncontent-length: 2\r\n\r\n{}",
    "no version": b"GET /healthz\r\n\r\n",
    "HTTP/0.9": b"GET /healthz HTTP/0.9\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 in the old way": b"GET /healthz HTTP/2.0\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "an unknown method": b"HELLO /healthz HTTP/1.1\r\n\r\n",
    "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    "an upgrade": b"GET /healthz HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /healthz HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    "gzip, then chunked": HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "HTTP/1.0 in chunks": b"POST /nope HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a host that is none": b"GET /healthz HTTP/1.1\r\nhost: a b/c\r\n\r\n",
    "a host and a path": b"GET /healthz HTTP/1.1\r\nhost: x/y\r\n\r\n",
    "an authority for a target": b"GET example.org:80 HTTP/1.1\r\nhost: x\r\n\r\n",
    "two content encodings": HEAD
    + b"content-encoding: gzip\r\ncontent-encoding: identity\r\ncontent-length: 2\r\n\r\n{}",
    "a line feed in a chunk's extension": HEAD + b"transfer-encoding: chunked\r\n\r\n2;a\nb\r\n{}\r\n0\r\n\r\n",
    "a length among the trailers": HEAD
    + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\ncontent-length: 5\r\n\r\n",
    "an upgrade with a body": HEAD
    + b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: %d\r\n\r\n" % len(BODY)
    + BODY,
}


@pytest.mark.parametrize("name", BAD_HTTP)
def test_what_is_no_proper_http_is_refused_and_the_connection_ended(closed: Stage, name: str) -> None:
    # a whole request behind it: whoever had been fooled by the first would serve the second
    assert closed.raw(BAD_HTTP[name] + client.get("/healthz")) == [b"400"]


@pytest.mark.parametrize("head", [b"POST /nope HTTP/1.1\r\n", b"POST /v1/chat/completions HTTP/1.1\r\n"])
@pytest.mark.parametrize("body", [b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n", b"ZZ\r\n\r\n", b""])
def test_one_answer_to_a_request_refused_at_its_head(closed: Stage, head: bytes, body: bytes) -> None:
    """However much of it, and of what comes behind it, was in the same read."""
    behind = client.get("/healthz") * 2
    assert len(closed.raw(head + b"transfer-encoding: chunked\r\n\r\n" + body + behind)) == 1


def test_trailers_count_as_headers(closed: Stage) -> None:
    """They are read and thrown away, but not without end."""
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    assert closed.raw(head + b"".join(b"x-%d: %b\r\n" % (i, b"a" * 1000) for i in range(100))) == [b"431"]


def test_a_refused_body_that_trickles_gets_its_answer_soon(closed: Stage) -> None:
    """The head has decided already: 401, and not the body's 408."""
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n{"
    assert closed.raw(request) == [b"401"]


def test_garbage_behind_a_request_does_not_cost_it_its_answer(stage: Stage) -> None:
    whole = gateway.request("chat")
    for garbage in (
        b"\x00\x01garbage\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n :",
    ):
        assert stage.raw(whole + garbage) == [b"200"]
        assert stage.raw(client.get("/healthz") + garbage) == [b"200", b"400"]


def test_the_worker_without_keys_says_so(tmp_path: Path) -> None:
    with running_worker(tmp_path, document=b"not a snapshot") as worker:
        answer = gateway.ask(worker, gateway.request("chat"))
        check(answer, 503, "no_ready_engine")
        assert answer.head.headers["retry-after"]
        assert gateway.ask(worker, client.get("/healthz")).status == 200
        assert gateway.ask(worker, client.get("/readyz")).status == 503
        gateway.settled(worker)


# -- targets


@pytest.mark.parametrize("target", ["http://x", "HTTP://other.example:8080", "https://user@x", "http://[::1]"])
def test_a_target_in_absolute_form_is_its_path(stage: Stage, target: str) -> None:
    for query in ("", "?a=http://b/c"):
        answer = stage.post(document("chat"), path=target + PATHS["chat"] + query)
        gateway.check_answer("chat", answer, stream=False)
    assert stage.ask(client.get(target + "/healthz")).status == 200
    assert stage.ask(client.get(target + f"/v1/models/{MODEL}", AUTH)).json["id"] == MODEL
    check(stage.ask(client.get(target)), 404, "unknown_path")


@pytest.mark.parametrize("target", ["*", "ftp://x/healthz", "http:///healthz", "http://?/healthz"])
def test_other_targets_are_told_so(closed: Stage, target: str) -> None:
    answer = closed.ask(client.get(target))
    assert answer.status in (400, 404)
    assert "must be a path" in check(answer, answer.status, gateway.error_code(answer))


def test_connect_is_told_that_this_is_no_proxy(closed: Stage) -> None:
    answer = closed.ask(client.request("CONNECT", "example.org:443"))
    assert "proxy" in check(answer, 400, "invalid_request")


def test_hosts_that_are_valid(stage: Stage) -> None:
    with client.connect(stage.worker.url) as wire:
        for host in ("", "x", "my_host:8080", "[::1]:80", "[fe80::1%25eth0]", "192.0.2.1", "a,b", "x"):
            wire.send(client.get("/healthz", {"host": host}))
            assert wire.read_response().status == 200, host


# -- expectations

EXPECTING = HEAD + b"content-length: %d\r\n" % len(BODY)


@pytest.mark.parametrize("value", [b"100-continue", b"100-Continue", b"100-continue "])
def test_a_client_that_waits_is_told_to_go_on(stage: Stage, value: bytes) -> None:
    with client.connect(stage.worker.url) as wire:
        wire.send(EXPECTING + b"expect: " + value + b"\r\n\r\n")
        assert wire.read_head().status == 100
        wire.send(BODY)
        assert wire.read_response().status == 200


def test_a_pipelined_client_that_waits_is_told_when_its_turn_comes(stage: Stage) -> None:
    with client.connect(stage.worker.url) as wire:
        wire.send(gateway.request("chat") + EXPECTING + b"expect: 100-continue\r\n\r\n")
        assert wire.read_response().status == 200
        assert wire.read_head().status == 100
        wire.send(BODY)
        assert wire.read_response().status == 200


@pytest.mark.parametrize("value", [b"200-ok", b"100-continue, x", b"", b"100-continue\r\nexpect: 100-continue"])
def test_other_expectations_are_refused_and_the_connection_ended(closed: Stage, value: bytes) -> None:
    with client.connect(closed.worker.url) as wire:
        wire.send(EXPECTING + b"expect: " + value + b"\r\n\r\n" + BODY)
        answer = wire.read_response()
        assert "expect" in check(answer, 400, "invalid_request")
        assert answer.head.headers["connection"] == "close"
        assert wire.read_to_end() == b""


def test_http_1_0_is_never_told_to_go_on(stage: Stage) -> None:
    for value in (b"100-continue", b"200-ok"):
        request = EXPECTING.replace(b"HTTP/1.1", b"HTTP/1.0") + b"expect: " + value + b"\r\n\r\n" + BODY
        assert stage.raw(request) == [b"200"]


def test_who_has_no_body_is_not_told_to_go_on(stage: Stage) -> None:
    assert stage.raw(client.get("/healthz", {"expect": "100-continue"})) == [b"200"]


# -- framing, and who does not read

CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "endless"),
    [
        (b"", b"1;" + b"a" * 1000 + b"\r\n{\r\n"),  # extensions
        (b"1;", b"a" * 1000),  # one extension
        (b"", b"1\r\n{\r\n"),  # chunks of one byte
        (b"", b"0" * 1000),  # a size of zeros
        (b"0\r\nx-a: ", b"a" * 1000),  # one trailer
    ],
    ids=["extensions", "an extension", "tiny chunks", "a size", "a trailer"],
)
def test_framing_without_end(tmp_path: Path, first: bytes, endless: bytes) -> None:
    with running_worker(tmp_path, max_body_bytes=1 << 20) as worker, client.connect(worker.url) as wire:
        piece = endless * (65536 // len(endless))
        sent = 0
        wire.send(CHUNKED + first)
        with contextlib.suppress(ConnectionError):
            while sent < 4 << 20 and wire.is_quiet(0.005):
                wire.send(piece)
                sent += len(piece)
                worker.in_flight()
        assert "framing" in check(wire.read_response(), 413, "body_too_large")
        assert sent < 2 << 20
        gateway.settled(worker)


@pytest.mark.parametrize("size", [32, 4096])
def test_a_body_at_its_limit_in_chunks(stage: Stage, tmp_path: Path, size: int) -> None:
    limit = 256 << 10
    with running_worker(tmp_path, max_body_bytes=limit) as worker:
        worker.serve(stage.engine.address)
        body = BODY + b" " * (limit - len(BODY))
        chunks = b"".join(gateway.chunk(body[at : at + size]) for at in range(0, limit, size))
        for more, status in ((b"", 200), (gateway.chunk(b" "), 413)):
            with client.connect(worker.url) as wire:
                wire.send(CHUNKED + chunks + more + gateway.LAST_CHUNK)
                assert wire.read_response().status == status


def test_bodies_that_nobody_wants_take_no_room(stage: Stage, tmp_path: Path) -> None:
    """Without a key nothing is kept that could fill the room of those who have one."""
    with running_worker(tmp_path, max_bodies_bytes=20_000) as worker, contextlib.ExitStack() as stack:
        worker.serve(stage.engine.address)
        for _ in range(4):
            wire = stack.enter_context(client.connect(worker.url))
            wire.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 60000\r\n\r\n" + b"x" * 30_000)
        worker.in_flight()
        assert gateway.ask(worker, gateway.request("chat")).status == 200
        wire.send(b"x" * 30_000)
        assert wire.read_response().status == 200
        large = gateway.ask(worker, b"GET /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 70000\r\n\r\n")
        check(large, 413, "body_too_large")


def test_who_does_not_read_the_answers_is_not_read_from(stage: Stage) -> None:
    """Else a client could fill the worker's memory with answers; and all come once it reads."""
    one = client.get("/healthz")
    with client.connect(stage.worker.url, receive_buffer=4096) as wire:
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        wire.socket.setblocking(False)
        sent, idle = 0, 0
        requests = one * 5000
        while idle < 20 and sent < 200 << 20:
            try:
                sent += wire.socket.send(requests[sent % len(one) :])
                idle = 0
            except BlockingIOError:
                idle += 1
                stage.worker.in_flight()
                time.sleep(0.01)
        assert idle == 20
        whole = sent // len(one)
        for _ in range(whole):
            assert wire.read_response().status == 200


def test_lists_in_several_lines_go_on_as_one(stage: Stage) -> None:
    lines = b"tracestate: a=1\r\ntracestate: b=2\r\nx-request-id: one\r\nx-request-id: two\r\n"
    with gateway.scripted_engine() as engine:
        engine.scripts = [[gateway.http_answer(b'{"choices":[{"text":"x","finish_reason":"stop"}]}')]]
        stage.worker.serve(engine.address)
        answer = stage.ask(EXPECTING + lines + b"\r\n" + BODY)
    assert answer.status == 200
    assert answer.head.headers["x-request-id"] not in ("one", "two")
    assert b"tracestate: a=1, b=2\r\n" in engine.requests[0]


def test_whole_requests_before_garbage_are_all_answered(stage: Stage) -> None:
    assert stage.raw(gateway.request("chat") + client.get("/healthz") + b"\0garbage") == [b"200", b"200"]

"""Bytes from clients, mutated at random: the worker answers 4xx (or the right answer) or closes, and lives on."""

import contextlib
import json
import re
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import client, gateway
from tests.support.examples import examples
from tests.support.gateway import AUTH, ScriptedEngine, chunk, http_answer
from tests.support.worker import WorkerProcess, running_worker

ANSWER = b'{"choices":[{"text":"x","finish_reason":"stop"}]}'
STATUS = re.compile(rb"HTTP/1\.1 (\d\d\d) ")
SETTINGS = settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])

_body = json.dumps(gateway.document("chat")).encode()
VALID = [
    client.get("/healthz"),
    client.get("/v1/models", AUTH),
    client.request("HEAD", "/health", b"", AUTH),
    gateway.request("chat"),
    gateway.request("messages"),
    client.request("POST", "/v1/chat/completions", chunk(_body[:20]) + chunk(_body[20:]) + b"0\r\n\r\n",
                   AUTH | {"transfer-encoding": "chunked", "content-type": "application/json"}),
    client.request("POST", "/v1/completions", b"", AUTH | {"expect": "100-continue", "content-length": "10"}),
    client.request("POST", "/nope", b"x" * 100, {"connection": "close"}),
]  # fmt: skip
MARKS = [
    b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b" ", b":", b";", b"0\r\n\r\n", b"\xff", b"{", b'"', b"\\u0000",
    b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n", b"connection: upgrade\r\nupgrade: h2c\r\n",
    b"connection: close\r\n", b"expect: 100-continue\r\n", b"authorization: Bearer x\r\n", b"fffffffffffffffff\r\n",
    b"HTTP/1.0", b"HTTP/2.0", b"http://x", b"*", b"expect: x\r\n", b"5;a=b\r\n",
    b"CONNECT ", b"GET / HTTP/1.1\r\n\r\n", b"x" * 70_000,
]  # fmt: skip

mutation = st.tuples(
    st.sampled_from(["insert", "delete", "flip", "repeat", "cut"]),
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.sampled_from(MARKS), st.binary(min_size=1, max_size=8)),
)
mutated = st.tuples(
    st.lists(st.sampled_from(VALID), min_size=1, max_size=4).map(b"".join), st.lists(mutation, max_size=4)
)


def mutate(data: bytes, mutations: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, piece in mutations:
        at = int(place * len(data))
        if kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + len(piece) :]
        elif kind == "flip":
            data = data[:at] + bytes(b ^ piece[0] for b in data[at : at + 1]) + data[at + 1 :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 40] + data[at:]
        else:
            data = data[:at]
    return data


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    with gateway.scripted_engine() as running:
        running.scripts = [[http_answer(ANSWER)]]
        yield running


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, engine: ScriptedEngine) -> Iterator[WorkerProcess]:
    with running_worker(tmp_path_factory.mktemp("wire"), max_header_bytes=16384, max_body_bytes=200_000) as running:
        running.serve(engine.address)
        yield running


def talk(worker: WorkerProcess, pieces: list[bytes]) -> bytes:
    """Everything the worker says to this, until it has nothing more to say."""
    with client.connect(worker.url) as wire:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                wire.send(piece)
                worker.in_flight()  # the worker's turn: the pieces are not read as one
        for _ in range(10):  # what is whole is answered, what is not will never be
            if not worker.in_flight()["count"]:
                break
            time.sleep(0.001)
        with contextlib.suppress(OSError):
            wire.half_close()
        try:
            return wire.read_to_end()
        except ConnectionError:
            return b""


def check(worker: WorkerProcess, said: bytes) -> None:
    for status in STATUS.findall(said):
        assert status in (b"100", b"200") or status.startswith(b"4"), said
    gateway.settled(worker)


@SETTINGS
@given(case=mutated, cuts=st.lists(st.floats(0, 1, exclude_max=True), max_size=2))
def test_mutations_of_valid_requests(
    worker: WorkerProcess, case: tuple[bytes, list[tuple[str, float, bytes]]], cuts: list[float]
) -> None:
    data = mutate(*case)
    at = sorted({0, len(data), *(int(cut * len(data)) for cut in cuts)})
    check(worker, talk(worker, [data[a:b] for a, b in zip(at, at[1:], strict=False)]))


@SETTINGS
@given(data=st.binary(max_size=300))
def test_anything(worker: WorkerProcess, data: bytes) -> None:
    check(worker, talk(worker, [data]))


@SETTINGS
@given(body=st.one_of(st.binary(max_size=60), st.text(alphabet='{}[]":,\\ntrue0.e-mdl', max_size=60).map(str.encode)))
def test_any_body(worker: WorkerProcess, body: bytes) -> None:
    with client.connect(worker.url) as wire:
        wire.send(client.post("/v1/chat/completions", body, AUTH))
        answer = wire.read_response()
        assert answer.status in (400, 404)
        wire.send(gateway.request("chat"))  # the connection is still in step
        assert wire.read_response().body == ANSWER
    gateway.settled(worker)

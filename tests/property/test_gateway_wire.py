"""Bytes from clients, mutated at random: the worker answers 4xx (or the right answer) or closes, and lives on. And no
request is smuggled: an engine gets exactly what was accepted, a client exactly its own answers."""

import contextlib
import itertools
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import client, gateway
from tests.support.client import Ended, Response
from tests.support.examples import examples
from tests.support.gateway import AUTH, LAST_CHUNK, STREAM_HEAD, ScriptedEngine, chunk, http_answer
from tests.support.worker import KEY, MODEL, WorkerProcess, running_worker, snapshot

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


# -- smuggling

OTHER = "vts_otherkey0000_0123456789abcdefghijklmnopqrstuv"
TENANTS = {KEY: "test", OTHER: "other"}
START = b"POST /v1/chat/completions HTTP/1.1\r\n"


class Echo(ScriptedEngine):
    """Answers with the text that it was asked. `heard`: what came as the body of each request, and that alone."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[dict[str, Any]] = []
        self.beyond: list[bytes] = []  # what came behind a request before that was answered

    def _serve(self, own: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError), own:
            while more := own.recv(1 << 16):
                data += more
                head, end, rest = data.partition(b"\r\n\r\n")
                lines = [line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:]]
                headers = dict(lines)
                if not end or len(rest) < int(headers[b"content-length"]):
                    continue
                assert len(headers) == len(lines)
                assert b"transfer-encoding" not in headers
                data = rest[int(headers[b"content-length"]) :]
                self.beyond += [data] if data else []
                body = json.loads(rest)
                self.heard.append(body)
                own.sendall(self._answer(body["messages"][0]["content"], stream=body.get("stream", False)))
        with self._lock:
            self._open.discard(own)

    def _answer(self, text: str, *, stream: bool) -> bytes:
        if not stream:
            return http_answer({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
        event = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % text.encode()
        return STREAM_HEAD + chunk(event) + chunk(b"data: [DONE]\n\n") + LAST_CHUNK


@dataclass
class Said:
    """One request of a client and what becomes of it. `status` 0: no answer or a 4xx, and the connection ends."""

    raw: bytes
    status: int
    text: str = ""
    method: str = "POST"


def accepted(text: str, key: str, shape: str) -> Said:
    """A request whose answer says its text, in some way that HTTP has of writing it."""
    document = {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": "stream" in shape}
    body = json.dumps(document).encode()
    head = b"host: x\r\nAuthorization: Bearer %b\r\n" % key.encode()
    length = head + b"content-length: %d\r\n" % len(body)
    chunked = b"transfer-encoding: chunked\r\n"
    halves = chunk(body[:30]) + chunk(body[30:]) + LAST_CHUNK
    raws = {
        "plain": START + length + b"\r\n" + body,
        "stream": START + length + b"\r\n" + body,
        "chunked stream": START + head + chunked + b"\r\n" + halves,
        "zeros": START + head + b"Content-Length:\t00%d \r\n\r\n" % len(body) + body,
        "lines before": b"\r\n\r\n" + START + length + b"\r\n" + body,
        "absolute": START.replace(b" /", b" http://y/") + length + b"\r\n" + body,
        "another name": START + length + b"x-transfer-encoding: chunked\r\ntransfer_encoding: chunked\r\n\r\n" + body,
        "named hop by hop": START + length + b"connection: content-length, authorization\r\n\r\n" + body,
        "Chunked": START + head + b"TRANSFER-Encoding:  Chunked\r\n\r\n" + halves,
        "extensions": START + head + chunked + b'\r\n%x;a=b;c="d"\r\n%b\r\n0;e\r\n\r\n' % (len(body), body),
        "trailers": START + head + chunked + b"\r\n" + halves[:-2] + b"x-a: b\r\nauthorization: Bearer x\r\n\r\n",
        "expecting": START + length + b"expect: 100-continue\r\n\r\n" + body,
    }
    return Said(raws[shape], 200, text)


SHAPES = (
    "plain", "stream", "chunked stream", "zeros", "lines before", "absolute", "another name", "named hop by hop",
    "Chunked", "extensions", "trailers", "expecting",
)  # fmt: skip


def refused(inner: bytes, shape: str) -> Said:
    """A proper request with a whole one for a body, which is nobody's request; the connection goes on."""
    length = b"host: x\r\ncontent-length: %d\r\n" % len(inner)
    kinds = {
        "no key": Said(START + length + b"\r\n" + inner, 401),
        "a wrong key": Said(START + length + b"authorization: Bearer x\r\n\r\n" + inner, 401),
        "no path": Said(b"POST /x HTTP/1.1\r\n" + length + b"\r\n" + inner, 404),
        "a method": Said(START.replace(b"POST", b"PUT") + length + b"\r\n" + inner, 405),
        "a type": Said(START + length + b"content-type: a/b\r\n\r\n" + inner, 415),
        "a body with GET": Said(b"GET /healthz HTTP/1.1\r\n" + length + b"\r\n" + inner, 200),
        "chunks with GET": Said(
            b"GET /healthz HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(inner) + LAST_CHUNK, 200
        ),
        "a body with HEAD": Said(b"HEAD /healthz HTTP/1.1\r\n" + length + b"\r\n" + inner, 200, method="HEAD"),
    }
    return kinds[shape]


REFUSED = (
    "no key", "a wrong key", "no path", "a method", "a type", "a body with GET", "chunks with GET", "a body with HEAD",
)  # fmt: skip


def _with(lines: bytes, body: Callable[[bytes], bytes] = lambda inner: inner) -> Callable[[bytes, bytes], bytes]:
    """A request with these header lines more; %d in them is the length of what it carries."""

    def made(key: bytes, inner: bytes) -> bytes:
        named = lines.replace(b"%d", b"%d" % len(inner)).replace(b"%x", b"%x" % len(inner))
        return START + b"host: x\r\nauthorization: Bearer " + key + b"\r\n" + named + b"\r\n" + body(inner)

    return made


def _in_chunks(size: bytes) -> Callable[[bytes, bytes], bytes]:
    """A chunked body whose first chunk begins with this line; %x in it is the chunk's length."""
    return _with(
        b"transfer-encoding: chunked\r\n",
        lambda inner: size.replace(b"%x", b"%x" % len(inner)) + inner + b"\r\n" + LAST_CHUNK,
    )


def _zero(inner: bytes) -> bytes:
    return LAST_CHUNK + inner


# What two readers of HTTP may disagree about. Each holds a whole request that only one of them would see.
POISON: dict[str, Callable[[bytes, bytes], bytes]] = {
    "CL.TE": _with(b"content-length: %d\r\ntransfer-encoding: chunked\r\n", _zero),
    "TE.CL": _with(b"transfer-encoding: chunked\r\ncontent-length: 4\r\n", lambda inner: chunk(inner) + LAST_CHUNK),
    "TE.CL of nothing": _with(b"transfer-encoding: chunked\r\ncontent-length: 0\r\n", _zero),
    "two lengths": _with(b"content-length: 0\r\ncontent-length: %d\r\n"),
    "two lengths the other way": _with(b"content-length: %d\r\ncontent-length: 0\r\n"),
    "the same length twice": _with(b"content-length: %d\r\nContent-Length: %d\r\n"),
    "a list of lengths": _with(b"content-length: %d, %d\r\n"),
    "a length with a sign": _with(b"content-length: +%d\r\n"),
    "a length below nothing": _with(b"content-length: -%d\r\n"),
    "a length with a space": _with(b"content-length: 0 %d\r\n"),
    "a length with an underscore": _with(b"content-length: 0_%d\r\n"),
    "a hexadecimal length": _with(b"content-length: 0x%x\r\n"),
    "a length with a fraction": _with(b"content-length: %d.0\r\n"),
    "a length in quotes": _with(b'content-length: "%d"\r\n'),
    "an empty length": _with(b"content-length:\r\n"),
    "a length beyond 64 bits": _with(b"content-length: 18446744073709551616\r\n"),
    "a length in another script": _with("content-length: \u0663\r\n".encode()),
    "a folded length": _with(b"content-length:\r\n %d\r\n"),
    "a length behind a fold": _with(b"x-a: b\r\n\tcontent-length: %d\r\n"),
    "a length with a vertical tab": _with(b"content-length: \x0b%d\r\n"),
    "a name with a space": _with(b"content-length : %d\r\n"),
    "a name with a tab": _with(b"content-length\t: %d\r\n"),
    "a name with a NUL": _with(b"content-length\0: %d\r\n"),
    "a name in brackets": _with(b"(content-length): %d\r\n"),
    "a name with an umlaut": _with(b"content-l\xe4ngth: %d\r\n"),
    "a name behind a space": _with(b" content-length: %d\r\n"),
    "no name": _with(b": x\r\ncontent-length: %d\r\n"),
    "a name behind a return": _with(b"x: y\rcontent-length: %d\r\n"),
    "a name behind a line feed": _with(b"x: y\ncontent-length: %d\r\n"),
    "a NUL in a value": _with(b"x: y\0z\r\ncontent-length: %d\r\n"),
    "a control character in a value": _with(b"x: y\x01z\r\ncontent-length: %d\r\n"),
    "a delete in a value": _with(b"x: y\x7fz\r\ncontent-length: %d\r\n"),
    "a coding with a space before the colon": _with(b"transfer-encoding : chunked\r\n", _zero),
    "a coding with a comma": _with(b"transfer-encoding: chunked,\r\n", _zero),
    "a coding behind a comma": _with(b"transfer-encoding: , chunked\r\n", _zero),
    "a coding in quotes": _with(b'transfer-encoding: "chunked"\r\n', _zero),
    "a coding with a parameter": _with(b"transfer-encoding: chunked;q=1\r\n", _zero),
    "a coding with a vertical tab": _with(b"transfer-encoding: \x0bchunked\r\n", _zero),
    "chunked, then identity": _with(b"transfer-encoding: chunked, identity\r\n", _zero),
    "identity, then chunked": _with(b"transfer-encoding: identity, chunked\r\n", _zero),
    "identity and a length": _with(b"transfer-encoding: identity\r\ncontent-length: %d\r\n"),
    "chunked twice": _with(b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", _zero),
    "chunked in two lines": _with(b"transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n", _zero),
    "a folded coding": _with(b"transfer-encoding:\r\n chunked\r\n", _zero),
    "an empty coding": _with(b"transfer-encoding:\r\n", _zero),
    "a size with 0x": _in_chunks(b"0x%x\r\n"),
    "a size with an underscore": _in_chunks(b"0_%x\r\n"),
    "a size with a sign": _in_chunks(b"+%x\r\n"),
    "a size below nothing": _in_chunks(b"-%x\r\n"),
    "a size behind a space": _in_chunks(b" %x\r\n"),
    "a size before a space": _in_chunks(b"%x \r\n"),
    "a size with a line feed": _in_chunks(b"%x\n"),
    "a size with a return": _in_chunks(b"%x\r"),
    "a size beyond 64 bits": _in_chunks(b"10000000000000000%x\r\n"),
    "no size": _in_chunks(b"\r\n"),
    "a size of text": _in_chunks(b"x\r\n"),
    "a size too small": _in_chunks(b"5\r\n"),
    "a size too large": _with(b"transfer-encoding: chunked\r\n", lambda inner: b"5\r\n{}\r\n" + LAST_CHUNK + inner),
    "an extension with a line feed": _in_chunks(b"%x;a\n\r\n"),
    "an extension with a return": _in_chunks(b"%x;a\rb\r\n"),
    "an extension with a NUL": _in_chunks(b"%x;a\0\r\n"),
    "a length among trailers": _with(
        b"transfer-encoding: chunked\r\n", lambda inner: b"0\r\ncontent-length: %d\r\n\r\n" % len(inner) + inner
    ),
    "a coding among trailers": _with(
        b"transfer-encoding: chunked\r\n", lambda inner: b"0\r\ntransfer-encoding: chunked\r\n\r\n" + inner
    ),
    "a trailer that is a request": _with(b"transfer-encoding: chunked\r\n", lambda inner: b"0\r\n" + inner),
    "the end in the old way": lambda key, inner: b"POST / HTTP/1.1\nhost: x\n\n" + inner,
    "no version": lambda key, inner: b"POST /v1/models\r\n\r\n" + inner,
    "tabs": lambda key, inner: b"GET\t/healthz\tHTTP/1.1\r\nhost: x\r\n\r\n" + inner,
    "a space in the target": lambda key, inner: b"GET /healthz /x HTTP/1.1\r\nhost: x\r\n\r\n" + inner,
    "a return in the target": lambda key, inner: b"GET /healthz\rHTTP/1.1\r\nhost: x\r\n\r\n" + inner,
    "a NUL in the target": lambda key, inner: b"GET /healthz\0 HTTP/1.1\r\nhost: x\r\n\r\n" + inner,
    "another version": lambda key, inner: b"GET /healthz HTTP/1.2\r\nhost: x\r\n\r\n" + inner,
    "a version with more": lambda key, inner: b"GET /healthz HTTP/1.1x\r\nhost: x\r\n\r\n" + inner,
    "a method in small letters": lambda key, inner: b"get /healthz HTTP/1.1\r\nhost: x\r\n\r\n" + inner,
    "HTTP/1.0 in chunks": lambda key, inner: (
        b"POST /x HTTP/1.0\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n" + LAST_CHUNK + inner
    ),
    "the last request": lambda key, inner: b"GET /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" + inner,
    "the last of HTTP/1.0": lambda key, inner: b"GET /x HTTP/1.0\r\n\r\n" + inner,
    "a refused one in chunks": lambda key, inner: (
        b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + LAST_CHUNK + inner
    ),
    "two hosts": lambda key, inner: b"GET /healthz HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n" + inner,
    "an upgrade": lambda key, inner: (
        b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n" + inner
    ),
    "CONNECT": lambda key, inner: b"CONNECT x:80 HTTP/1.1\r\nhost: x:80\r\n\r\n" + inner,
}


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerProcess, Echo]]:
    keys = [{"id": key[4:16], "key": key, "tenant": tenant} for key, tenant in TENANTS.items()]
    engine = Echo()
    with running_worker(
        tmp_path_factory.mktemp("echo"), document=snapshot(1, keys), header_seconds=1.0, body_seconds=1.0
    ) as running:
        running.serve(engine.address)
        yield running, engine
    engine.close()


def check_answers(wire: client.Wire, said: list[Said]) -> list[str]:
    """Every answer is that of its own request, and none comes too many; returns the texts of those served."""
    served = []
    for one in said:
        if not one.status:
            rest = b""
            try:
                answer = wire.read_response()
                assert 400 <= answer.status < 500
                assert answer.head.headers["connection"] == "close"
                assert wire.read_to_end() == b""
            except Ended as ended:
                rest = ended.rest
            except ConnectionResetError:
                pass  # it was not listening any more
            assert not rest
            return served
        while (head := wire.read_head()).status == 100:
            pass
        answer = Response(head, b"" if one.method == "HEAD" else b"".join(wire.body_pieces(head)))
        assert answer.status == one.status, answer
        if one.text:
            served.append(one.text)
            assert one.text.encode() in answer.body
            assert set(re.findall(rb"mark-\d+", answer.body)) == {one.text.encode()}
    wire.half_close()
    assert wire.read_to_end() == b""
    return served


def converse(worker: WorkerProcess, engine: Echo, sides: list[tuple[list[Said], list[float]]]) -> None:
    """Several clients at once, one for each tenant, their bytes cut and sent in turns."""
    engine.heard.clear()
    engine.beyond.clear()
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(client.connect(worker.url)) for _ in sides]
        reads = []
        for said, cuts in sides:
            data = b"".join(one.raw for one in said)
            at = sorted({0, len(data), *(int(cut * len(data)) for cut in cuts)})
            reads.append([data[a:b] for a, b in itertools.pairwise(at)])
        for turn in itertools.zip_longest(*reads, fillvalue=b""):
            for wire, piece in zip(wires, turn, strict=True):
                with contextlib.suppress(ConnectionError):
                    wire.send(piece)
            worker.in_flight()
        served = [check_answers(wire, said) for wire, (said, _) in zip(wires, sides, strict=True)]
    gateway.settled(worker)
    heard = {body["messages"][0]["content"]: body for body in engine.heard}
    assert sorted(itertools.chain(*served)) == sorted(body["messages"][0]["content"] for body in engine.heard)
    assert not engine.beyond
    salts = [{heard[text]["cache_salt"] for text in texts} for texts in served]
    assert all(len(salt) <= 1 for salt in salts)  # each tenant's own
    assert len(set().union(*salts)) == sum(map(len, salts))


marks = (f"mark-{number}" for number in itertools.count())


def built(key: str, kind: str, shape: str) -> Said:
    if kind == "accepted":
        return accepted(next(marks), key, shape)
    # in the name of the other tenant: whoever is fooled lets one speak for another
    inner = accepted(next(marks), OTHER if key == KEY else KEY, "plain").raw
    if kind == "refused":
        return refused(inner, shape)
    return Said(POISON[shape](key.encode(), inner), 0)


one_request = st.one_of(
    st.tuples(st.just("accepted"), st.sampled_from(SHAPES)),
    st.tuples(st.just("refused"), st.sampled_from(REFUSED)),
    st.tuples(st.just("poison"), st.sampled_from(sorted(POISON))),
)
side = st.tuples(st.lists(one_request, min_size=1, max_size=5), st.lists(st.floats(0, 1, exclude_max=True), max_size=6))


@SETTINGS
@given(first=side, second=side)
def test_nobody_s_request_becomes_another_s(
    echo: tuple[WorkerProcess, Echo],
    first: tuple[list[tuple[str, str]], list[float]],
    second: tuple[list[tuple[str, str]], list[float]],
) -> None:
    worker, engine = echo
    sides = [
        ([built(key, *one) for one in requests], cuts)
        for key, (requests, cuts) in zip(TENANTS, (first, second), strict=True)
    ]
    converse(worker, engine, sides)


@pytest.mark.parametrize("after", [None, "accepted", "refused"])
@pytest.mark.parametrize("shape", POISON)
def test_each_poison_ends_its_connection(echo: tuple[WorkerProcess, Echo], shape: str, after: str | None) -> None:
    worker, engine = echo
    before = {"accepted": [built(KEY, "accepted", "plain")], "refused": [built(KEY, "refused", "no key")]}.get(
        after or "", []
    )
    said = [*before, built(KEY, "poison", shape), built(KEY, "accepted", "plain")]
    converse(worker, engine, [(said, [])])
    length = sum(len(one.raw) for one in before)
    whole = sum(len(one.raw) for one in said)
    converse(worker, engine, [(said, [length / whole, (length + len(said[-2].raw)) / whole])])


@pytest.mark.parametrize("kind", ["accepted", "refused"])
def test_each_proper_request_leaves_its_connection_in_step(echo: tuple[WorkerProcess, Echo], kind: str) -> None:
    worker, engine = echo
    for shape in SHAPES if kind == "accepted" else REFUSED:
        said = [built(KEY, kind, shape), built(KEY, "accepted", "plain"), built(KEY, kind, shape)]
        converse(worker, engine, [(said, [])])
        converse(worker, engine, [(said, [at / 40 for at in range(40)])])

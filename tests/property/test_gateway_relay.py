"""An engine's bytes, cut into reads at any place: the client gets the same answer. A scripted engine sends exactly
these reads to a real worker."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import gateway
from tests.support.client import Ended, Response
from tests.support.examples import examples
from tests.support.gateway import LAST_CHUNK, STREAM_HEAD, ScriptedEngine, chunk, http_answer
from tests.support.worker import WorkerProcess, running_worker

FAST = settings(max_examples=examples(120), deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _chat(choice: str) -> bytes:
    return (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"m","choices":[%b]}\n\n' % choice.encode()
    )


USAGE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"m","choices":[],'
    b'"usage":{"prompt_tokens":7,"total_tokens":12,"completion_tokens":5,"completion_tokens_details":{"a":1}}}\n\n'
)
CHAT = [
    _chat('{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}'),
    _chat('{"index":0,"delta":{"reasoning":"Hm"},"finish_reason":null}'),
    _chat('{"index":0,"delta":{"content":"a\\n\\ndata: [DONE]\\n\\n"},"finish_reason":null}'),
    _chat('{"index":0,"delta":{"content":"{\\"error\\":{\\"usage\\":{\\"x\\":1}}}"},"finish_reason":null}'),
    _chat('{"index":0,"delta":{"content":"\u00e9\U0001f600\\r\\n0\\r\\n\\r\\n"},"finish_reason":null}'),
    _chat('{"index":0,"delta":{},"finish_reason":"stop"}'),
    USAGE,
    b"data: [DONE]\n\n",
]
MESSAGES = [
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":7}}}\n\n',
    b'event: content_block_start\ndata: {"type":"content_block_start","index":0}\n\n',
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Hi"}}\n\n',
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"event: error\\n"}}\n\n',
    b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":5}}\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
]
EVENTS = {"chat": CHAT, "messages": MESSAGES}
PLAIN = json.dumps(
    {
        "choices": [{"message": {"content": "é\r\n\r\nHTTP/1.1 200 OK\r\n"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5},
    },
    ensure_ascii=False,
).encode()

# Places as fractions, so that one strategy serves payloads of every length.
cuts = st.lists(st.floats(0, 1, exclude_max=True), max_size=12)


def split(data: bytes, places: list[float]) -> list[bytes]:
    """`data` in pieces, cut at these places."""
    at = sorted({int(place * len(data)) for place in places} - {0})
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True) if b > a]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with running_worker(
        tmp_path_factory.mktemp("relay"), first_token_seconds=2, idle_seconds=2, total_seconds=4, connect_seconds=2
    ) as running:
        yield running


@pytest.fixture(scope="module")
def engine(worker: WorkerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedEngine]:
    path: Path = tmp_path_factory.mktemp("s") / "e.sock"
    with gateway.scripted_engine(path) as running:
        worker.serve(running.address)
        yield running


def ask(worker: WorkerProcess, engine: ScriptedEngine, pieces: list[bytes], data: bytes) -> Response:
    engine.scripts = [[*pieces]]
    answer = gateway.ask(worker, data)
    gateway.settled(worker)
    return answer


@FAST
@given(
    chunk_cuts=cuts,
    read_cuts=cuts,
    by_event=st.booleans(),
    asked=st.booleans(),
    api=st.sampled_from(["chat", "messages"]),
)
def test_a_stream_cut_anywhere(
    worker: WorkerProcess,
    engine: ScriptedEngine,
    chunk_cuts: list[float],
    read_cuts: list[float],
    by_event: bool,
    asked: bool,
    api: str,
) -> None:
    events = EVENTS[api]
    chunks = events if by_event else split(b"".join(events), chunk_cuts)
    raw = STREAM_HEAD + b"".join(map(chunk, chunks)) + LAST_CHUNK
    more = {"stream_options": {"include_usage": True}} if asked and api == "chat" else {}
    answer = ask(worker, engine, split(raw, read_cuts), gateway.request(api, stream=True, **more))
    hidden = [] if asked or api != "chat" else [USAGE]
    assert answer.status == 200
    assert answer.body == b"".join(event for event in events if event not in hidden)
    assert engine.connections == 1  # kept alive through all of it


@FAST
@given(read_cuts=cuts, chunk_cuts=cuts, chunked=st.booleans())
def test_a_plain_answer_cut_anywhere(
    worker: WorkerProcess, engine: ScriptedEngine, read_cuts: list[float], chunk_cuts: list[float], chunked: bool
) -> None:
    raw = http_answer(PLAIN)
    if chunked:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw = head + b"".join(map(chunk, split(PLAIN, chunk_cuts))) + LAST_CHUNK
    answer = ask(worker, engine, split(raw, read_cuts), gateway.request("chat"))
    assert (answer.status, answer.body) == (200, PLAIN)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_plain_answer_of_megabytes(worker: WorkerProcess, engine: ScriptedEngine, chunked: bool) -> None:
    body = b'{"choices":[{"text":"' + b"x" * 5_000_000 + b'"}]}'
    raw = http_answer(body)
    if chunked:
        pieces = [body[at : at + 100_000] for at in range(0, len(body), 100_000)]
        raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(map(chunk, pieces)) + LAST_CHUNK
    assert ask(worker, engine, [raw], gateway.request("chat")).body == body


@pytest.mark.parametrize("chunked", [False, True])
def test_a_plain_answer_of_megabytes_that_is_cut_does_not_look_whole(
    worker: WorkerProcess, engine: ScriptedEngine, chunked: bool
) -> None:
    body = b'{"choices":[{"text":"' + b"x" * 5_000_000 + b'"}]}'
    raw = http_answer(body)
    if chunked:
        raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(body) + LAST_CHUNK
    engine.scripts = [[raw[:-1000], "close"]]
    with pytest.raises(Ended):
        gateway.ask(worker, gateway.request("chat"))
    gateway.settled(worker)


@FAST
@given(read_cuts=cuts, garbage=st.binary(min_size=1, max_size=80), at=st.floats(0, 1, exclude_max=True))
def test_a_stream_that_turns_into_garbage(
    worker: WorkerProcess, engine: ScriptedEngine, read_cuts: list[float], garbage: bytes, at: float
) -> None:
    """The client gets an error of some kind, or what it got is the whole answer; nothing hangs."""
    raw = STREAM_HEAD + b"".join(map(chunk, CHAT)) + LAST_CHUNK
    place = int(at * len(raw))
    engine.scripts = [[*split(raw[:place] + garbage, read_cuts), "close"]]
    answer = gateway.ask(worker, gateway.request("chat", stream=True))
    gateway.settled(worker)
    if answer.status != 200:
        assert answer.status in (502, 503) or 400 <= answer.status < 500  # one that the garbage spelt
        return
    assert b"".join(CHAT).replace(USAGE, b"").startswith(answer.body) or b'data: {"error":' in answer.body


@FAST
@given(raw=st.binary(min_size=1, max_size=200))
def test_an_engine_that_speaks_no_http(worker: WorkerProcess, engine: ScriptedEngine, raw: bytes) -> None:
    engine.scripts = [[raw, "close"]]
    answer = gateway.ask(worker, gateway.request("chat"))
    assert answer.status == 502
    gateway.settled(worker)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",  # a body until the end of the connection: never whole for certain
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n{} ",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nx" * 3000,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/2 200\r\n\r\n",
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_are_wrong_http(worker: WorkerProcess, engine: ScriptedEngine, raw: bytes, stream: bool) -> None:
    engine.scripts = [[raw, "close"]]
    answer = gateway.ask(worker, gateway.request("chat", stream=stream))
    assert answer.status == 502
    gateway.settled(worker)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [b": ping\n\n"],
        [b"data: {\n\n"],
        [b"data: 1\n\n"],
        [b'data: {"choices":[1]}\n\n'],
        [b'data: {"choices":[{"delta":1}]}\n\n'],
        [b'data: {"error":"no words"}\n\n'],
        [CHAT[0]],
        [b"data: [DONE]\n\n"],
        [b"x" * 100_000],
    ],
    ids=repr,
)
def test_streams_without_a_token(worker: WorkerProcess, engine: ScriptedEngine, events: list[bytes]) -> None:
    answer = ask(
        worker, engine, [STREAM_HEAD + b"".join(map(chunk, events)) + LAST_CHUNK], gateway.request("chat", stream=True)
    )
    assert answer.status == 502
    assert answer.json["error"]["message"]


def test_an_answer_after_a_hundred_continues(worker: WorkerProcess, engine: ScriptedEngine) -> None:
    raw = b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + http_answer(PLAIN)
    assert ask(worker, engine, [raw], gateway.request("chat")).body == PLAIN


def test_bytes_nobody_asked_for_end_an_idle_connection(worker: WorkerProcess, engine: ScriptedEngine) -> None:
    engine.scripts = [[http_answer(PLAIN), http_answer(b'{"injected":true}')], [http_answer(PLAIN)]]
    assert gateway.ask(worker, gateway.request("chat")).body == PLAIN
    # Bytes that come after the next request was sent are its answer, as far as anybody can tell.
    gateway.wait_until(lambda: engine.left == 1, what="the idle connection's end")
    for _ in range(2):
        assert gateway.ask(worker, gateway.request("chat")).body == PLAIN
    gateway.settled(worker)


def test_an_engine_that_accepts_and_resets_at_once(worker: WorkerProcess, engine: ScriptedEngine) -> None:
    """However early the reset comes, also before the gateway has looked at its new connection."""
    with gateway.scripted_engine() as resetting:
        resetting.scripts = [[]]
        resetting.reset_at_accept = True
        worker.serve(resetting.address)
        try:
            for _ in range(100):
                answer = gateway.ask(worker, gateway.request("chat"), seconds=2)
                assert (answer.status, gateway.error_code(answer)) == (502, "engine_unreachable")
        finally:
            worker.serve(engine.address)
    gateway.settled(worker)

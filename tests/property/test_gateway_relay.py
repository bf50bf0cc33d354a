"""An engine's bytes, cut into reads at any place: the client gets the same answer, and its usage is settled alike.
Bytes that are no proper answer: an error, never a hang, and nothing of them in another answer. A scripted engine sends
exactly these reads to a real worker."""

import contextlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import client, gateway
from tests.support.client import Ended, Response
from tests.support.examples import examples
from tests.support.gateway import APIS, LAST_CHUNK, STREAM_HEAD, Piece, ScriptedEngine, chunk, http_answer
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
COMPLETIONS = [
    b'data: {"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":"Hi","finish_reason":null}]}\n\n',
    b'data: {"id":"cmpl-1","choices":[{"index":0,"text":"data: [DONE]","finish_reason":null}]}\n\n',
    b'data: {"id":"cmpl-1","choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n',
    USAGE,
    b"data: [DONE]\n\n",
]
RESPONSES = [
    b'event: response.created\ndata: {"type":"response.created","response":{"usage":null,"tools":[{"usage":{}}]}}\n\n',
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"Hi"}\n\n',
    (
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta",'
        b'"delta":"\\n\\nevent: response.failed \\"type\\":\\"response.completed\\""}\n\n'
    ),
    (
        b'event: response.completed\ndata: {"type":"response.completed","response":{"status":"completed",'
        b'"usage":{"input_tokens":7,"input_tokens_details":{"cached_tokens":0},"output_tokens":5,"total_tokens":12}}}\n\n'
    ),
]
EVENTS = {"chat": CHAT, "completions": COMPLETIONS, "responses": RESPONSES, "messages": MESSAGES}
PLAIN = json.dumps(
    {
        "choices": [{"message": {"content": "é\r\n\r\nHTTP/1.1 200 OK\r\n"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5},
    },
    ensure_ascii=False,
    separators=(",", ":"),
).encode()

ANSWERS = {
    "chat": PLAIN,
    "completions": b'{"choices":[{"text":"0\\r\\n\\r\\n"}],"usage":{"prompt_tokens":7,"total_tokens":12,'
    b'"completion_tokens":5,"prompt_tokens_details":null}}',
    "responses": b'{"status":"completed","output":[{"usage":{"x":1}}],"usage":{"input_tokens":7,'
    b'"output_tokens":5,"total_tokens":12}}',
    "messages": b'{"type":"message","content":[{"type":"text","text":"Hi"}],"stop_reason":"end_turn",'
    b'"usage":{"input_tokens":7,"output_tokens":5}}',
}

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


def framed(head: bytes, pieces: list[bytes], framing: str) -> bytes:
    """A whole answer; one that is framed by its connection's close has to be followed by that."""
    if framing == "chunked":
        return head + b"transfer-encoding: chunked\r\n\r\n" + b"".join(map(chunk, pieces)) + LAST_CHUNK
    body = b"".join(pieces)
    return head + (b"content-length: %d\r\n\r\n" % len(body) if framing == "length" else b"\r\n") + body


def settled_as(worker: WorkerProcess, answers: list[Response]) -> list[dict[str, Any]]:
    """The one record of each. Looked for when all have been asked: the log is written a few times a second."""
    names = [answer.head.headers["x-request-id"] for answer in answers]
    gateway.record_of(worker, names[-1])
    written = Counter(record["request_id"] for record in worker.records())
    assert {name: written[name] for name in names if written[name] != 1} == {}
    settled = {record["request_id"]: record for record in worker.records()}
    return [settled[name] for name in names]


def check_usage(worker: WorkerProcess, answers: list[Response]) -> None:
    """All of these were settled with the tokens that the engine told, which are the same in each."""
    for record in settled_as(worker, answers):
        assert (record["outcome"], record["prompt_tokens"], record["completion_tokens"]) == ("ok", 7, 5), record
        assert not record.get("estimated")


OK = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n"
EVENT_STREAM, JSON = OK % b"text/event-stream; charset=utf-8", OK % b"application/json"


def streamed(api: str, *, asked: bool) -> tuple[bytes, bytes]:
    """A request, and the body that its client is to get."""
    shows_usage = asked or api not in ("chat", "completions")
    more = {"stream_options": {"include_usage": True}} if asked and api in ("chat", "completions") else {}
    wanted = [event for event in EVENTS[api] if shows_usage or event != USAGE]
    return gateway.request(api, stream=True, **more), b"".join(wanted)


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_stream_cut_anywhere(worker: WorkerProcess, engine: ScriptedEngine, framing: str) -> None:
    answers: list[Response] = []

    @FAST
    @given(chunk_cuts=cuts, read_cuts=cuts, by_event=st.booleans(), asked=st.booleans(), api=st.sampled_from(APIS))
    def cut(chunk_cuts: list[float], read_cuts: list[float], by_event: bool, asked: bool, api: str) -> None:
        events = EVENTS[api]
        raw = framed(EVENT_STREAM, events if by_event else split(b"".join(events), chunk_cuts), framing)
        request, wanted = streamed(api, asked=asked)
        answer = ask(worker, engine, split(raw, read_cuts), request)
        assert (answer.status, answer.body) == (200, wanted)
        assert engine.connections == 1  # kept alive through all of it
        answers.append(answer)

    cut()
    check_usage(worker, answers)


def test_a_stream_that_ends_with_its_connection_cut_anywhere(worker: WorkerProcess, engine: ScriptedEngine) -> None:
    """Its own end says that it is whole."""
    answers: list[Response] = []

    @FAST
    @given(read_cuts=cuts, asked=st.booleans(), api=st.sampled_from(APIS))
    def cut(read_cuts: list[float], asked: bool, api: str) -> None:
        request, wanted = streamed(api, asked=asked)
        engine.scripts = [[*split(framed(EVENT_STREAM, EVENTS[api], "close"), read_cuts), "close"]]
        answer = gateway.ask(worker, request)
        gateway.settled(worker)
        assert (answer.status, answer.body) == (200, wanted)
        answers.append(answer)

    cut()
    check_usage(worker, answers)


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_plain_answer_cut_anywhere(worker: WorkerProcess, engine: ScriptedEngine, framing: str) -> None:
    answers: list[Response] = []

    @FAST
    @given(read_cuts=cuts, chunk_cuts=cuts, api=st.sampled_from(APIS))
    def cut(read_cuts: list[float], chunk_cuts: list[float], api: str) -> None:
        raw = framed(JSON, split(ANSWERS[api], chunk_cuts), framing)
        answer = ask(worker, engine, split(raw, read_cuts), gateway.request(api))
        assert (answer.status, answer.body) == (200, ANSWERS[api])
        answers.append(answer)

    cut()
    check_usage(worker, answers)


@FAST
@given(
    read_cuts=cuts,
    at=st.floats(0, 1, exclude_max=True),
    api=st.sampled_from(APIS),
    framing=st.sampled_from(["chunked", "length", "close"]),
    end=st.sampled_from(["close", "reset", LAST_CHUNK]),
    stream=st.booleans(),
)
def test_what_is_cut_short_never_looks_whole(
    worker: WorkerProcess,
    engine: ScriptedEngine,
    read_cuts: list[float],
    at: float,
    api: str,
    framing: str,
    end: Piece,
    stream: bool,
) -> None:
    if stream:
        raw = framed(EVENT_STREAM, EVENTS[api], framing)
        request, wanted = streamed(api, asked=False)
    else:
        raw = framed(JSON, [ANSWERS[api]], framing)
        request, wanted = gateway.request(api), ANSWERS[api]
    script: list[Piece] = [*split(raw[: int(at * len(raw))], read_cuts), end]
    engine.scripts = [script if end in ("close", "reset") else [*script, "close"]]
    try:
        answer = gateway.ask(worker, request)
    except Ended:
        return
    finally:
        gateway.settled(worker)
    if answer.status == 200 and answer.body != wanted:
        assert gateway.terminal_error(api, answer.events)["message"]
    assert answer.status in (200, 502)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("end", ["close", LAST_CHUNK])
def test_a_stream_that_ends_between_two_events_ends_with_an_error(
    worker: WorkerProcess, engine: ScriptedEngine, api: str, end: Piece
) -> None:
    """Also where the last one is of a text that looks like an end."""
    for events in range(1, len(EVENTS[api])):
        raw = EVENT_STREAM + b"transfer-encoding: chunked\r\n\r\n" + b"".join(map(chunk, EVENTS[api][:events]))
        engine.scripts = [[raw, end, "close"]]
        answer = gateway.ask(worker, gateway.request(api, stream=True))
        gateway.settled(worker)
        if answer.status == 200:
            assert gateway.terminal_error(api, answer.events)["message"]
        else:
            assert answer.status == 502


# How vLLM ends what it gives up: how many events of the answer come before, and what then.
GIVEN_UP = {
    "chat": [
        (3, [_chat('{"index":0,"delta":{},"finish_reason":"abort"}'), USAGE, b"data: [DONE]\n\n"]),
        (5, [_chat('{"index":0,"delta":{"content":"x"},"finish_reason": "abort"}'), b"data: [DONE]\n\n"]),
        (3, [USAGE, b"data: [DONE]\n\n"]),
        (5, [b"data: [DONE]\n\n"]),
    ],
    "completions": [
        (2, [COMPLETIONS[2].replace(b"length", b"abort"), USAGE, b"data: [DONE]\n\n"]),
        (1, [b"data: [DONE]\n\n"]),
    ],
    "responses": [(3, [RESPONSES[3].replace(b'"status":"completed"', b'"status":"cancelled"')])],
    "messages": [
        (4, [MESSAGES[4].replace(b'"delta":{}', b'"delta":{"stop_reason":null,"stop_sequence":null}'), MESSAGES[5]])
    ],
}


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_a_stream_that_is_given_up_in_its_middle_cut_anywhere(
    worker: WorkerProcess, engine: ScriptedEngine, framing: str
) -> None:
    """All that was said reaches the client, then an error, and nothing that looks like an end."""
    answers: list[Response] = []

    @FAST
    @given(
        chunk_cuts=cuts,
        read_cuts=cuts,
        by_event=st.booleans(),
        asked=st.booleans(),
        case=st.sampled_from([(api, *case) for api, cases in GIVEN_UP.items() for case in cases]),
    )
    def cut(
        chunk_cuts: list[float], read_cuts: list[float], by_event: bool, asked: bool, case: tuple[str, int, list[bytes]]
    ) -> None:
        api, count, rest = case
        events = [*EVENTS[api][:count], *rest]
        raw = framed(EVENT_STREAM, events if by_event else split(b"".join(events), chunk_cuts), framing)
        request, _ = streamed(api, asked=asked)
        engine.scripts = [[*split(raw, read_cuts), *(["close"] if framing == "close" else [])]]
        answer = gateway.ask(worker, request)
        gateway.settled(worker)
        assert answer.status == 200
        said = b"".join(events[:count]) + (USAGE if asked and rest[0] == USAGE else b"")
        assert answer.body.startswith(said)
        assert len(answer.events) == said.count(b"\n\n") + 1
        error = gateway.terminal_error(api, answer.events)
        assert error["message"] == "The engine gave the request up before it was finished."
        answers.append(answer)

    cut()
    for record in settled_as(worker, answers):
        assert (record["outcome"], record["code"]) == ("cut", "engine_unreachable"), record


def test_one_choice_of_two_that_is_not_finished_spoils_a_stream(worker: WorkerProcess, engine: ScriptedEngine) -> None:
    """The other one is; its text has whatever it has."""
    second = [event.replace(b'"index":0', b'"index":1') for event in CHAT[:6]]
    request = gateway.request("chat", stream=True, n=2)
    whole = [*(event for pair in zip(CHAT[:6], second, strict=True) for event in pair), *CHAT[6:]]
    answer = ask(worker, engine, [framed(EVENT_STREAM, whole, "chunked")], request)
    assert answer.body == b"".join(whole).replace(USAGE, b"")
    for broken in (
        [*CHAT[:6], *second[:5], *CHAT[6:]],
        [*second[:5], second[5].replace(b"stop", b"abort"), *CHAT],
        [*CHAT[:6], *second[:5], second[5].replace(b"stop", b"abort"), *CHAT[6:]],
    ):
        answer = ask(worker, engine, [framed(EVENT_STREAM, broken, "chunked")], request)
        assert gateway.terminal_error("chat", answer.events)["code"] == "engine_unreachable"
        assert not gateway.looks_whole("chat", answer.events)
        assert b'"abort"' not in answer.body


@pytest.mark.parametrize("api", APIS)
def test_a_plain_answer_that_is_given_up_is_none(worker: WorkerProcess, engine: ScriptedEngine, api: str) -> None:
    """Though it has tokens; what a client sent in may look as it likes."""
    body = ANSWERS[api].replace(b'"finish_reason":"stop"', b'"finish_reason":"abort"')
    if api == "completions":
        body = body.replace(b'"text"', b'"finish_reason":"abort","text"')
    body = body.replace(b'"status":"completed"', b'"status":"cancelled"').replace(b'"stop_reason":"end_turn",', b"")
    assert body != ANSWERS[api]
    answer = ask(worker, engine, [http_answer(body)], gateway.request(api))
    assert answer.status == 502
    body = ANSWERS["responses"].replace(b'"output"', b'"metadata":{"status":"cancelled"},"output"')
    assert ask(worker, engine, [http_answer(body)], gateway.request("responses")).body == body


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


# -- nothing of one answer in another


def mutate(raw: bytes, mutations: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, piece in mutations:
        at = int(place * len(raw))
        left = at + (len(piece) if kind == "overwrite" else 30 if kind == "delete" else 0)
        raw = raw[:at] + (b"" if kind == "delete" else piece) + raw[left:]
    return raw


FRAMING = [
    b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"0\r\n\r\n", b"5\r\n", b"ffffffffffffffffff\r\n", b"data: ", b"\n\n", b"\0",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", b"HTTP/1.1 100 Continue\r\n\r\n", b"content-length: 3\r\n",
    b"transfer-encoding: chunked\r\n", b"connection: close\r\n", b"204", b"304", b"101", b"999", b"000", b" 2",
    b"upgrade: h2c\r\nconnection: upgrade\r\n", b'data: {"error":{"code":400}}\n\n', b"data: [DONE]\n\n",
]  # fmt: skip
mutation = st.tuples(
    st.sampled_from(["insert", "overwrite", "delete"]),
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.sampled_from(FRAMING), st.binary(min_size=1, max_size=6)),
)
GOOD = b'{"choices":[{"message":{"content":"good"},"finish_reason":"stop"}]}'


def well_after(worker: WorkerProcess, engine: ScriptedEngine, wire: client.Wire | None = None) -> None:
    """The next request gets its own answer and nothing else, on the same connection if that is still open."""
    gateway.wait_until(lambda: not engine._open, what="the last script's end")
    gateway.settled(worker)
    engine.scripts = [[http_answer(GOOD)]]
    for own in ([wire] if wire is not None else []) + [client.connect(worker.url)]:
        with own:
            own.send(gateway.request("chat"))
            answer = own.read_response()
            assert (answer.status, answer.body) == (200, GOOD)
            own.half_close()
            assert own.read_to_end() == b""
    gateway.settled(worker)
    worker.serve()  # its idle connections go with the replica
    gateway.wait_until(lambda: not engine._open, what="the end of idle connections")
    worker.serve(engine.address)


@FAST
@given(
    read_cuts=cuts,
    api=st.sampled_from(APIS),
    framing=st.sampled_from(["chunked", "length"]),
    stream=st.booleans(),
    mutations=st.lists(mutation, min_size=1, max_size=3),
)
def test_mutations_of_answers(
    worker: WorkerProcess,
    engine: ScriptedEngine,
    read_cuts: list[float],
    api: str,
    framing: str,
    stream: bool,
    mutations: list[tuple[str, float, bytes]],
) -> None:
    """An error, or whatever the mutated bytes say; properly framed or visibly cut, and nothing of it comes later."""
    events = EVENTS[api] if stream else [ANSWERS[api]]
    raw = mutate(framed(EVENT_STREAM if stream else JSON, events, framing), mutations)
    engine.scripts = [[*split(raw, read_cuts), "close"]]
    with client.connect(worker.url) as wire:
        wire.send(gateway.request(api, stream=stream))
        head = wire.read_head()
        assert 200 <= head.status < 600
        with contextlib.suppress(Ended):
            for _ in wire.body_pieces(head):
                pass
        well_after(worker, engine, None if _ended(wire) else wire)


def _ended(wire: client.Wire) -> bool:
    """Whether the other side has ended it; fails where bytes are left that belong to no answer."""
    if wire.is_quiet(0.001):
        return False
    assert wire.read_to_end() == b""
    return True


ONE = http_answer(PLAIN)
ODD = {
    "bytes behind a length": ([ONE + b"x"], {502}),
    "bytes behind a length, later": ([ONE, b"x"], {200}),
    "an answer behind a length": ([ONE + http_answer(b'{"injected":1}')], {502}),
    "an answer behind a length, later": ([ONE, http_answer(b'{"injected":1}')], {200}),
    "an answer behind chunks": ([framed(JSON, [PLAIN], "chunked") + http_answer(b'{"injected":1}')], {200}),
    "garbage behind chunks": ([framed(JSON, [PLAIN], "chunked") + b"\r\n\0"], {200}),
    "100 with a length": ([b"HTTP/1.1 100 Continue\r\ncontent-length: 5\r\n\r\n" + ONE], {200, 502}),
    "103 and a type": ([b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\ncontent-type: a/b\r\n\r\n" + ONE], {200}),
    "102 and nothing else": ([b"HTTP/1.1 102 Processing\r\n\r\n"], {502}),
    "101": ([b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + ONE], {200, 502}),
    "101 to another protocol": (
        [b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n" + ONE],
        {502},
    ),
    "204": ([b"HTTP/1.1 204 No Content\r\n\r\n"], {502}),
    "204 with a body": ([b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\n{}"], {502}),
    "204 with chunks": ([b"HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"], {502}),
    "304 with a body": ([b"HTTP/1.1 304 Not Modified\r\ncontent-length: 2\r\n\r\n{}"], {502}),
    "a redirect": ([http_answer(b"{}", 307, b"location: http://elsewhere/\r\n")], {502}),
    "another success": ([http_answer(PLAIN, 206)], {502}),
    "no such status": ([http_answer(PLAIN, 999)], {502}),
    "status 600": ([http_answer(PLAIN, 600)], {502}),
    "status 0": ([b"HTTP/1.1 000 X\r\ncontent-length: 2\r\n\r\n{}"], {502}),
    "status 99": ([b"HTTP/1.1 099 X\r\ncontent-length: 2\r\n\r\n{}"], {502}),
    "a length and chunks": (
        [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"],
        {502},
    ),
    "a folded type": ([b"HTTP/1.1 200 OK\r\ncontent-type: a\r\n x: b\r\ncontent-length: 2\r\n\r\n{}"], {502}),
    "two types": ([b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\n" + ONE.partition(b"\r\n")[2]], {200}),
    "lines that end with a line feed": ([b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}"], {502}),
    "HTTP/1.0": ([ONE.replace(b"HTTP/1.1", b"HTTP/1.0", 1)], {200}),
    "another coding": ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n{}"], {502}),
    "nothing": ([], {502}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_odd_answers(worker: WorkerProcess, engine: ScriptedEngine, name: str, stream: bool) -> None:
    script, statuses = ODD[name]
    engine.scripts = [[*script, "close"]]
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(client.connect(worker.url))
        wire.send(gateway.request("chat", stream=stream))
        answer = wire.read_response()
        assert answer.status in ({502} if stream else statuses), answer.body
        assert answer.status == 502 or answer.body == PLAIN
        well_after(worker, engine, wire)


UNREADABLE = [
    b'{"error":{"message":"\xff","code":400}}',
    b'{"model":"\xff","choices":[{"message":{"content":"\xff"}}]}',
    b'{"error":' + b"[" * 100_000,
    b"[" * 5000 + b"]" * 5000,
    b"\xff|<|channel|>",
    b'{"type":"tool_use","name":"<|channel|>\xff"}',
    b"null",
    b"1",
    b'{"error":null}',
    b'{"error":{"message":{},"code":"x"}}',
]


@pytest.mark.parametrize("body", UNREADABLE, ids=lambda body: repr(body[:30]))
@pytest.mark.parametrize("api", [*APIS, "guidance"])
def test_answers_that_cannot_be_read(worker: WorkerProcess, engine: ScriptedEngine, body: bytes, api: str) -> None:
    """Plain ones go on as they are where nothing of them has to be known; a stream does not begin with one."""

    def answered(raw: bytes, request: bytes) -> int:
        engine.scripts = [[raw]]
        answer = gateway.ask(worker, request)
        gateway.settled(worker)
        return answer.status

    if api == "guidance":
        request = client.post("/emergency-guidance", {"prompt": "Help"}, gateway.AUTH)
        assert answered(http_answer(body), request) == 502
        assert answered(http_answer(body, 400), request) == 400
        return
    request = gateway.request(api)
    assert answered(http_answer(body), request) in (200, 502)
    assert answered(http_answer(body, 400), request) == 400
    for status in (500, 503):
        assert answered(http_answer(body, status), request) in (502, 503)
    for event in (b"data: " + body + b"\n\n", b"event: error\ndata: " + body + b"\n\n"):
        raw = framed(EVENT_STREAM, [event], "chunked")
        assert answered(raw, gateway.request(api, stream=True)) in (400, 502)
        raw = framed(EVENT_STREAM, [EVENTS[api][0], EVENTS[api][2], event], "chunked")
        assert answered(raw, gateway.request(api, stream=True)) in (200, 400, 502)


def test_a_length_in_an_interim_answer_frames_nothing(worker: WorkerProcess, engine: ScriptedEngine) -> None:
    """Of an answer so long that its head is relayed before its end."""
    body = b'{"choices":[{"text":"' + b"x" * 3_000_000 + b'"}]}'
    interim = b"HTTP/1.1 103 Early Hints\r\ncontent-length: 5\r\ncontent-type: a/b\r\n\r\n"
    engine.scripts = [[interim + b"HTTP/1.1 200 OK\r\n" + framed(b"", [body], "chunked"), "close"]]
    answer = gateway.ask(worker, gateway.request("chat"))
    assert answer.body == body
    assert answer.head.headers["content-type"] == "application/json"
    well_after(worker, engine)


@pytest.mark.parametrize("size", [14, 15, 16, 0xFE, 0xFF, 0x100, 0xFFE, 0xFFF, 0x1000])
def test_a_chunk_that_is_longer_than_its_size(worker: WorkerProcess, engine: ScriptedEngine, size: int) -> None:
    """However long it is, the client's framing stays right."""
    event = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"x" * 5000)
    begin = STREAM_HEAD + b"".join(map(chunk, CHAT[:2]))
    wrong = b"%x\r\n%b\n\n\r\n" % (size, event[: size - 1])
    engine.scripts = [[begin, wrong, LAST_CHUNK, "close"]]
    answer = gateway.ask(worker, gateway.request("chat", stream=True))
    assert gateway.terminal_error("chat", answer.events)["code"] == "engine_protocol"
    well_after(worker, engine)


def test_an_error_without_end_is_given_up(worker: WorkerProcess, engine: ScriptedEngine) -> None:
    engine.scripts = [[b"HTTP/1.1 400 X\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"x" * 20_000_000), "close"]]
    for stream in (False, True):
        assert gateway.ask(worker, gateway.request("chat", stream=stream)).status == 502
    well_after(worker, engine)


def test_an_answer_before_the_request_was_sent_whole(worker: WorkerProcess, engine: ScriptedEngine) -> None:
    """The rest of that request is not left in front of the next one, which goes by another connection."""
    seen: list[bytes] = []

    def hasty(listener: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            for answer in (http_answer(b'{"error":{"message":"too large"}}', 413), http_answer(GOOD)):
                own = stack.enter_context(listener.accept()[0])
                seen.append(own.recv(1000))  # and nothing more
                own.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=hasty, args=(listener,), daemon=True)
        thread.start()
        worker.serve("http://{}:{}".format(*listener.getsockname()))
        assert ask_for(worker, "x" * 6_000_000).status == 413
        answer = ask_for(worker, "y")
        assert (answer.status, answer.body) == (200, GOOD)
        thread.join(5)
    assert all(request.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n") for request in seen)
    gateway.settled(worker)
    worker.serve(engine.address)


def ask_for(worker: WorkerProcess, text: str) -> Response:
    return gateway.ask(worker, gateway.request("chat", messages=[{"role": "user", "content": text}]))


def test_an_answer_after_a_hundred_continues(worker: WorkerProcess, engine: ScriptedEngine) -> None:
    raw = b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + http_answer(PLAIN)
    assert ask(worker, engine, [raw], gateway.request("chat")).body == PLAIN


def test_bytes_nobody_asked_for_end_an_idle_connection(worker: WorkerProcess, engine: ScriptedEngine) -> None:
    left = engine.left
    engine.scripts = [[http_answer(PLAIN), http_answer(b'{"injected":true}')], [http_answer(PLAIN)]]
    assert gateway.ask(worker, gateway.request("chat")).body == PLAIN
    # Bytes that come after the next request was sent are its answer, as far as anybody can tell.
    gateway.wait_until(lambda: engine.left == left + 1, what="the idle connection's end")
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

"""Probes against real sockets whose other end answers well, badly, or not at all."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable

import pytest
from vitalis_serve.engines.probe import ProbeResult, Progress, answers, parse_metrics, progress

GOOD = {"choices": [{"text": " 4, 5"}], "usage": {"completion_tokens": 4}}
METRICS = b"""# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 5.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 7.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 41.0
vllm:generation_tokens_total{engine="0",model_name="m"} 1.234e+03
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:cache_config_info{block_size="128",engine="0",kv_cache_size_tokens="46592",num_gpu_blocks="364"} 1.0
"""
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def reply(status: int, body: object, *, chunked: bool = False) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    if chunked:
        half = len(raw) // 2
        parts = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (raw[:half], raw[half:]))
        return b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n%s0\r\n\r\n" % (status, parts)
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(raw), raw)


def ask(tmp_path, answer: bytes | Answer, what=answers, seconds: float = 5.0):
    """One probe of a server on a Unix socket that gives `answer` to everything."""

    async def serve(reader, writer):
        tasks.append(asyncio.current_task())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            seen.append((head, await reader.readexactly(length)))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def run():
        path = str(tmp_path / "s")
        server = await asyncio.start_unix_server(serve, path)
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            if what is answers:
                return await answers(f"unix:{path}", "m", deadline)
            return await progress(f"unix:{path}", deadline)
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    tasks: list[asyncio.Task] = []
    seen: list[tuple[bytes, bytes]] = []
    result = asyncio.run(run())
    return result, seen


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_with_tokens_is_ready(tmp_path, chunked):
    result, seen = ask(tmp_path, reply(200, GOOD, chunked=chunked))
    assert result.ready
    assert result.text == " 4, 5"
    head, body = seen[0]
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert json.loads(body)["model"] == "m"


def test_an_answer_that_ends_with_the_connection_is_read_whole(tmp_path):
    raw = b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(GOOD).encode()
    assert ask(tmp_path, raw)[0].ready


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply(500, {"error": {"message": "cannot\nschedule"}}), "answered 500: cannot schedule"),
        (reply(404, b"{}"), "answered 404"),
        (reply(200, {"choices": [], "usage": {"completion_tokens": 1}}), "without a choice"),
        (reply(200, {"choices": [{}], "usage": {"completion_tokens": 0}}), "without generating a token"),
        (reply(200, {"choices": [{}], "usage": None}), "without generating a token"),
        (reply(200, {"choices": {"0": 1}}), "without a choice"),
        (reply(200, [1]), "without a choice"),
        (reply(200, b"\xff\x00not json"), "without a choice"),
        (reply(200, b"[" * 100_000), "without a choice"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 abc\r\n\r\n", "not HTTP"),
        (b"\x00" * 200_000, "not HTTP"),
        (b"", "closed inside"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort", "closed inside"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "-5 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "99999999999 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "ValueError"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "ValueError"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", "-1 bytes"),
    ],
)  # fmt: skip
def test_anything_else_is_not_ready(tmp_path, answer, reason):
    result, _ = ask(tmp_path, answer)
    assert not result.ready
    assert result.refused
    assert reason in result.reason
    assert "\n" not in result.reason


def test_an_endless_body_is_bounded(tmp_path):
    async def endless(reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65_536)
            await writer.drain()

    result, _ = ask(tmp_path, endless, seconds=20)
    assert not result.ready
    assert "bytes" in result.reason


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"])
def test_silence_ends_at_the_deadline(tmp_path, said):
    async def silent(reader, writer):
        writer.write(said)
        await reader.read()

    result, _ = ask(tmp_path, silent, seconds=0.2)
    assert result == ProbeResult(False, "no answer in time", seconds=result.seconds)
    assert not result.refused


def test_a_deadline_that_has_passed_fails_at_once(tmp_path):
    assert not ask(tmp_path, reply(200, GOOD), seconds=-1)[0].ready


@pytest.mark.parametrize(
    "address", ["unix:/nowhere/s", "http://127.0.0.1:1", "ftp://x", "http://", "http://h:port", ""]
)
def test_bad_addresses_are_refusals(address):
    async def run():
        deadline = asyncio.get_running_loop().time() + 5
        return await answers(address, "m", deadline), await progress(address, deadline)

    result, looked = asyncio.run(run())
    assert not result.ready
    assert result.refused
    assert not looked.healthy


def test_http_addresses_work():
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply(200, GOOD))
        writer.close()

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return await answers(f"http://127.0.0.1:{port}", "m", asyncio.get_running_loop().time() + 5)
        finally:
            server.close()

    assert asyncio.run(run()).ready


def test_progress_reads_vllms_counters(tmp_path):
    looked, seen = ask(tmp_path, reply(200, METRICS), progress)
    assert looked == Progress(
        healthy=True, running=3, waiting=5, iterations=41.0, generated_tokens=1234.0, kv_cache_usage=0.25,
        kv_cache_tokens=46_592,
    )  # fmt: skip
    assert [head.split()[1] for head, _ in seen] == [b"/health", b"/metrics"]


def test_counters_move_with_any_work():
    before = parse_metrics(METRICS).counters
    assert parse_metrics(METRICS).counters == before
    assert parse_metrics(METRICS.replace(b"1.234e+03", b"1.235e+03")).counters != before
    assert parse_metrics(METRICS.replace(b" 41.0", b" 42.0")).counters != before
    assert parse_metrics(METRICS.replace(b"} 5.0", b"} 6.0")).counters == before


@pytest.mark.parametrize("text", [b"", b"\x00\xff", b"vllm:num_requests_running x", b"vllm:num_requests_running NaN\n"])
def test_garbage_metrics_are_zeros(text):
    assert parse_metrics(text) == Progress(healthy=True)


def test_a_process_says_when_it_was_started():
    said = b"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds 1.76387123412e+09\n" + METRICS
    assert parse_metrics(said).started == 1763871234.12
    assert parse_metrics(b"process_start_time_seconds soon\n").started == 0
    assert parse_metrics(METRICS).started == 0


class TwoAddresses(asyncio.SelectorEventLoop):
    """Where a name has two, as localhost mostly has."""

    async def getaddrinfo(self, host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", port)) for n in (1, 2)]


def test_gone_is_where_nobody_listens_and_nothing_else(tmp_path):
    def look(address, loop=asyncio.SelectorEventLoop):
        async def run():
            deadline = asyncio.get_running_loop().time() + 5
            return [await progress(address, deadline), await answers(address, "m", deadline)]

        with asyncio.Runner(loop_factory=loop) as runner:
            return [(seen.gone, seen.refused, seen.reason) for seen in runner.run(run())]

    nobody = [(True, True, "nobody listens")] * 2
    path = tmp_path / "left"
    assert look(f"unix:{path}") == nobody
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert look(f"unix:{path}") == nobody, "a file that is left behind"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        assert look(f"http://127.0.0.1:{port}") == nobody
        assert look(f"http://some-name:{port}", TwoAddresses) == nobody
    for answer in (b"", b"HTTP/1.1 abc\r\n\r\n", reply(503, b"")):
        for what in (answers, progress):
            said = ask(tmp_path, answer, what)[0]
            assert (said.gone, said.refused) == (False, True)


def test_unhealthy_is_a_refusal(tmp_path):
    looked, _ = ask(tmp_path, reply(503, b""), progress)
    assert looked == Progress(False, "/health answered 503", refused=True)


def test_a_full_queue_is_no_refusal_of_a_look(tmp_path):
    """Of connections to accept: saturation. asyncio takes EAGAIN there for a connection, and then lacks it."""
    path = str(tmp_path / "s")
    with contextlib.ExitStack() as kept:
        listener = kept.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = kept.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(path)
        looked = asyncio.run(progress(f"unix:{path}"))
    assert not looked.healthy
    assert not looked.refused


@pytest.mark.parametrize(("status", "busy"), [(503, True), (500, False)])
def test_only_503_may_be_busyness(tmp_path, status, busy):
    result, _ = ask(tmp_path, reply(status, b""))
    assert (result.refused, result.busy) == (True, busy)

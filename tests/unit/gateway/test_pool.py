"""Chunks that pass without the parser are read as the parser would read them, whatever their size."""

import asyncio
from typing import Any

import pytest
from vitalis_serve.gateway.pool import EngineConnection, EnginePool

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Transport:
    def abort(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


class Heard:
    """What a relay is told."""

    request_id = b"r"

    def __init__(self, *, passing: bool) -> None:
        self.passing = passing
        self.payload = b""
        self.failures: list[str] = []

    def on_engine_data(self, payload: bytes, raw: bytes | None) -> None:
        self.payload += payload

    def on_engine_chunk(self, raw: bytes, start: int) -> None:
        self.payload += raw[start:-2]

    def on_engine_end(self, payload: bytes, *_: Any) -> None:
        self.payload += payload

    def on_engine_failed(self, kind: str, message: str) -> None:
        self.failures.append(kind)


def hear(*reads: bytes, passing: bool, heard: Heard | None = None) -> Heard:
    pool = EnginePool("engine-0", "http://127.0.0.1:1", asyncio.new_event_loop(), idle_seconds=1)
    connection, heard = EngineConnection(pool), heard or Heard(passing=passing)
    connection.connection_made(Transport())  # type: ignore[arg-type]
    connection.relay = heard  # type: ignore[assignment]
    for read in reads:
        connection.data_received(read)
    pool._loop.close()
    return heard


def event(size: int) -> bytes:
    return b"x" * (size - 2) + b"\n\n"


@pytest.mark.parametrize("size", [2, 15, 16, 17, 254, 255, 256, 257, 4094, 4095, 4096, 4097, 70_000])
@pytest.mark.parametrize("written", [b"%x", b"%X", b"0%x", b"%x;a=b"])
def test_every_size_however_written(size: int, written: bytes) -> None:
    chunk = written % size + b"\r\n" + event(size) + b"\r\n"
    reads = [HEAD, b"4\r\nab\n\n\r\n", chunk, chunk + chunk, chunk, b"0\r\n\r\n"]
    passed, parsed = hear(*reads, passing=True), hear(*reads, passing=False)
    assert passed.payload == parsed.payload == b"ab\n\n" + 4 * event(size)
    assert passed.failures == parsed.failures == []


@pytest.mark.parametrize("size", [b"-a", b"+a", b" a", b"0xa", b"1_0", b"g", b""])
def test_what_is_no_size_fails(size: bytes) -> None:
    """Whatever Python would make of it."""
    for payload in (event(10), event(16)):
        assert hear(HEAD, b"4\r\nab\n\n\r\n", size + b"\r\n" + payload + b"\r\n", passing=True).failures == ["protocol"]


def test_a_connection_that_its_engine_ended_is_idle_no_more() -> None:
    pool = EnginePool("engine-0", "http://127.0.0.1:1", (loop := asyncio.new_event_loop()), idle_seconds=1)
    connections = [EngineConnection(pool) for _ in range(3)]
    for connection in connections:
        connection.connection_made(Transport())  # type: ignore[arg-type]
        pool.put_back(connection)
    connections[1].connection_lost(None)
    assert (pool.idle, pool.open) == (2, 2)
    assert [pool.take(), pool.take(), pool.take()] == [connections[2], connections[0], None]
    loop.close()


class Told(Heard):
    """Passes on what came as whole chunks, and the others' payload in chunks of its own."""

    sent = b""

    def on_engine_data(self, payload: bytes, raw: bytes | None) -> None:
        self.sent += raw if raw is not None else b"%x\r\n%b\r\n" % (len(payload), payload)

    def on_engine_chunk(self, raw: bytes, start: int) -> None:
        self.sent += raw


def test_what_passes_is_whole_chunks_wherever_the_reads_are_cut() -> None:
    data = b"data: {}\n\n"
    one = b"%x\r\n%b\r\n" % (len(data), data)
    body = 3 * one
    for first in range(len(body) + 1):
        for second in range(first, len(body) + 1):
            reads = [read for read in (body[:first], body[first:second], body[second:]) if read]
            told = Told(passing=True)
            hear(HEAD, one, *reads, passing=True, heard=told)
            again = hear(HEAD, told.sent, passing=False)
            assert (again.payload, again.failures) == (4 * data, []), reads

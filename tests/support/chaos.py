"""A proxy between two parties that spoils their connection on command: TCP or Unix socket on either side.

    with chaos.Proxy("http://127.0.0.1:8000") as proxy:
        proxy.trouble = chaos.Trouble(cut_after=500)      # for connections opened from now on
        client.ask(proxy.address, ...)

It runs on an event loop in a thread of its own; `trouble` is read when a connection is accepted (and again for each
piece of data where the trouble is changed under way with `spoil_open`).
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Trouble:
    """What goes wrong. The direction "down" is towards the client, "up" towards the engine, "both" is both.

    delay_seconds: every piece waits. black_hole: bytes are taken and never passed on. cut_after, reset_after: both
    sides are closed (FIN, or RST) once that many bytes have passed; half_close_after: only the receiver's side ends.
    dribble: one byte at a time, dribble_seconds apart. piece_bytes: pieces are cut to this size. refuse:
    accepted and reset at once.
    """

    direction: str = "down"
    delay_seconds: float = 0
    black_hole: bool = False
    cut_after: int | None = None
    reset_after: int | None = None
    half_close_after: int | None = None
    dribble: bool = False
    dribble_seconds: float = 0
    piece_bytes: int = 0
    refuse: bool = False

    def applies(self, direction: str) -> bool:
        return self.direction in (direction, "both")


NONE = Trouble()


class _Pair:
    """One client's connection and the one to the engine that goes with it."""

    def __init__(self, trouble: Trouble, client: asyncio.StreamWriter, engine: asyncio.StreamWriter) -> None:
        self.trouble = trouble
        self.client = client
        self.engine = engine

    def close(self, reset: bool = False) -> None:
        for writer in (self.client, self.engine):
            if reset:
                _linger_none(writer)
                writer.transport.abort()
            else:
                writer.close()


class Proxy:
    """Listens on a free port (or `uds`) and passes everything to `target`. Counts bytes and connections."""

    def __init__(self, target: str, uds: Path | None = None, trouble: Trouble = NONE) -> None:
        self.target = target
        self.trouble = trouble
        self.address = ""
        self.connections = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self._uds = uds
        self._pairs: set[_Pair] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)
        self._ready = threading.Event()
        self._ending = asyncio.Event()
        self._server: asyncio.Server | None = None

    def __enter__(self) -> "Proxy":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def open(self) -> int:
        """Connections that pass bytes now."""
        return len(self._pairs)

    def spoil_open(self, trouble: Trouble) -> None:
        """From now on this trouble, for open connections too."""

        def spoil() -> None:
            self.trouble = trouble
            for pair in self._pairs:
                pair.trouble = trouble

        self._on_loop(spoil)

    def close_open(self, reset: bool = False) -> None:
        """Ends every open connection, on both sides."""

        def close() -> None:
            for pair in list(self._pairs):
                pair.close(reset)

        self._on_loop(close)

    def _on_loop(self, call: Callable[[], None]) -> None:
        done = threading.Event()

        def run() -> None:
            call()
            done.set()

        self._loop.call_soon_threadsafe(run)
        assert done.wait(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        if self._uds is not None:
            self._server = await asyncio.start_unix_server(self._accept, str(self._uds), limit=PIECE_BYTES)
            self.address = f"unix:{self._uds}"
        else:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=PIECE_BYTES)
            self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._ending.wait()
        self._server.close()
        for pair in list(self._pairs):
            pair.close()
        own = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        trouble = self.trouble
        if trouble.refuse:
            _linger_none(writer)
            writer.transport.abort()
            return
        try:
            engine_reader, engine_writer = await _connect(self.target)
        except OSError:
            _linger_none(writer)
            writer.transport.abort()
            return
        pair = _Pair(trouble, writer, engine_writer)
        self._pairs.add(pair)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(pair, reader, engine_writer, "up"))
                group.create_task(self._pass(pair, engine_reader, writer, "down"))
        except* OSError:
            pair.close(reset=True)
        finally:
            self._pairs.discard(pair)
            pair.close()

    async def _pass(
        self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str
    ) -> None:
        passed = 0
        while data := await reader.read(PIECE_BYTES):
            trouble = pair.trouble if pair.trouble.applies(direction) else NONE
            if trouble.delay_seconds:
                await asyncio.sleep(trouble.delay_seconds)
            if trouble.black_hole:
                continue
            ends = [at for at in (trouble.cut_after, trouble.reset_after, trouble.half_close_after) if at is not None]
            data = data[: max(0, min(ends) - passed)] if ends else data
            await self._write(writer, data, trouble)
            passed += len(data)
            self._count(direction, len(data))
            if ends and passed >= min(ends):
                if trouble.half_close_after is not None:
                    break
                pair.close(reset=trouble.reset_after is not None)
                return
        if not writer.is_closing() and writer.can_write_eof():
            writer.write_eof()

    def _count(self, direction: str, count: int) -> None:
        if direction == "up":
            self.bytes_up += count
        else:
            self.bytes_down += count

    @staticmethod
    async def _write(writer: asyncio.StreamWriter, data: bytes, trouble: Trouble) -> None:
        size = 1 if trouble.dribble else trouble.piece_bytes or len(data) or 1
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
            await writer.drain()
            if trouble.dribble:
                await asyncio.sleep(trouble.dribble_seconds)


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    parts = urlsplit(address)
    return await asyncio.open_connection(parts.hostname, parts.port)


def _linger_none(writer: asyncio.StreamWriter) -> None:
    """Makes the coming close an RST."""
    own = writer.get_extra_info("socket")
    if own is not None and own.family != socket.AF_UNIX:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

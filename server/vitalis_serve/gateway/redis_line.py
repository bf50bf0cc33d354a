"""One connection to Redis on which calls of one script follow each other without waiting for the answers.

How it works: `say` only appends. One task writes whatever was said in a turn of the loop at once, one reads answers,
which come in the order of the calls. The script goes first on every connection, and again where Redis forgot it.
"""

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

CONNECT_SECONDS: Final = 1.0


def bulk(*values: bytes) -> bytes:
    """Arguments as Redis reads them."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(value), value) for value in values])


class Script:
    def __init__(self, text: str) -> None:
        self.text = text
        digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest().encode()
        self._head = bulk(b"EVALSHA", digest)
        self.load = command(bulk(b"SCRIPT", b"LOAD", text.encode()), 3)

    def call(self, keys: bytes, key_count: int, rest: Iterable[bytes], rest_count: int) -> bytes:
        """`keys` and `rest`: already as `bulk` makes them."""
        count = 3 + key_count + rest_count
        return b"".join(
            [b"*%d\r\n" % count, self._head, b"$%d\r\n%d\r\n" % (len(str(key_count)), key_count), keys, *rest]
        )


def command(arguments: bytes, count: int) -> bytes:
    return b"*%d\r\n" % count + arguments


class Call:
    """What is said once. `dropped` before it was sent: it is not sent at all."""

    __slots__ = ("dropped", "packed", "sent_at")

    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        self.sent_at = 0.0
        self.dropped = False

    def answered(self, reply: bytes | ResponseError) -> None:
        """Never heard by a call whose connection was lost: see `Line.close`."""


def pool_of(url: str) -> ConnectionPool:
    """Knows where and how to connect; holds no connection. ValueError where the address is none."""
    # RESP2: with RESP3 the library asks for news of a provider's maintenance, and reads them between the answers.
    pool: ConnectionPool = ConnectionPool.from_url(
        url, protocol=2, client_name="vitalis-serve", retry=Retry(NoBackoff(), 0)
    )
    # The deadlines are ours, whatever the address asks for; and answers are bytes.
    pool.connection_kwargs.update(
        socket_timeout=None, socket_connect_timeout=CONNECT_SECONDS, decode_responses=False, health_check_interval=0,
        retry_on_timeout=False,
    )  # fmt: skip
    return pool


def place_of(pool: ConnectionPool) -> str:
    """For people; without user and password."""
    known = pool.connection_kwargs
    return str(known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}")


class Line:
    """Made by `open`, until `close`."""

    def __init__(self, connection: AbstractConnection, script: Script) -> None:
        self._connection = connection
        self._script = script
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[Call] = deque()
        self._sent: deque[Call] = deque()
        self._wake = asyncio.Event()
        self._load()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    @staticmethod
    async def open(pool: ConnectionPool, script: Script) -> "Line":
        """Raises RedisError, OSError or TimeoutError."""
        connection: Any = pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return Line(connection, script)

    def say(self, call: Call) -> None:
        self._unsent.append(call)
        self._wake.set()

    @property
    def is_quiet(self) -> bool:
        """All that was said was answered."""
        return not self._unsent and not self._sent

    @property
    def silent_since(self) -> float:
        """When the oldest call was sent that is not answered (the loop's time); inf where there is none."""
        return self._sent[0].sent_at if self._sent else math.inf

    async def ended(self, seconds: float) -> bool:
        """Whether the connection is lost; waits so long for it. Raises what ended it."""
        done, _ = await asyncio.wait(self._tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return bool(done)

    async def close(self) -> list[Call]:
        """The calls that were sent and not answered, and then those never sent. Nobody knows of the former whether
        Redis heard them."""
        # The library only closes, and that waits until Redis has read what it was sent.
        if (writer := getattr(self._connection, "_writer", None)) is not None:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connection.disconnect(nowait=True)
        return [*self._sent, *(call for call in self._unsent if not call.dropped)]

    def _load(self) -> None:
        self._unsent.appendleft(Call(self._script.load))
        self._wake.set()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            now = self._loop.time()
            calls = [call for call in self._unsent if not call.dropped]
            self._unsent.clear()
            for call in calls:
                call.sent_at = now
            self._sent += calls
            await self._connection.send_packed_command(b"".join([call.packed for call in calls]), check_health=False)

    async def _read(self) -> None:
        read, sent = self._connection.read_response, self._sent
        while True:
            reply: bytes | ResponseError
            try:
                reply = await read(timeout=math.inf)
            except ResponseError as error:
                reply = error
            if not sent:
                raise RedisConnectionError("it said something that nobody had asked for")
            call = sent.popleft()
            if isinstance(reply, NoScriptError):
                self._unsent.append(call)
                self._load()
            else:
                call.answered(reply)

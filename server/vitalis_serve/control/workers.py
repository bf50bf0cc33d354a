"""The gateway workers connected to control: snapshots go to them, acknowledgements and reports come back.

Newline-delimited JSON over a Unix socket that only this user can open. A worker that is away misses
nothing: it gets the newest snapshot when it says hello, and serves from its last one until then.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from vitalis_serve.errors import ServeError

logger = logging.getLogger(__name__)

_LINE_BYTES: Final = 16 << 20
# A worker that reads nothing for so long is stuck: the supervisor will replace it, we only let go of it.
_UNREAD_BYTES: Final = 64 << 20
_NEWEST_VERSION: Final = 1 << 53


class _Link:
    """One connected worker."""

    def __init__(self, name: str, pid: int, writer: asyncio.StreamWriter) -> None:
        self.name = name
        self.pid = pid
        self.version = 0
        self.report: dict[str, Any] = {}
        self.reported = 0
        self._writer = writer

    def send(self, line: bytes) -> None:
        self._writer.write(line)
        if self._writer.transport.get_write_buffer_size() > _UNREAD_BYTES:
            logger.warning("worker does not read what control sends; connection closed", extra={"worker": self.name})
            self.close()

    def close(self) -> None:
        self._writer.transport.abort()


class Workers:
    """The one owner of the connections. `overtaken` is awaited when a worker has a newer snapshot than we
    do (the store was put back to an older copy): it must publish one that is newer still. `unknown_kid` is told the
    issuer of a token whose key id a worker does not know."""

    def __init__(self) -> None:
        self.overtaken: Callable[[int], Awaitable[None]] | None = None
        self.unknown_kid: Callable[[str], None] | None = None
        self._links: dict[str, _Link] = {}
        self._version = 0
        self._line = b""
        self._collections = 0
        self._questions = 0
        self._told: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._news = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def listen(self, path: Path) -> None:
        """Binds the socket, replacing one that a killed control left. OSError where it cannot."""
        self._server = await asyncio.start_unix_server(self._serve, path, limit=_LINE_BYTES)
        path.chmod(0o600)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for link in self._links.values():
            link.close()

    def listing(self) -> list[dict[str, Any]]:
        """Connected workers: name, pid, and the version of the snapshot that each serves from."""
        links = sorted(self._links.values(), key=lambda link: link.name)
        return [{"name": link.name, "pid": link.pid, "version": link.version} for link in links]

    def push(self, version: int, body: msgspec.Raw) -> None:
        """Sends a snapshot to every worker, now and to those that come later."""
        self._version = version
        self._line = msgspec.json.encode({"type": "snapshot", "version": version, "body": body}) + b"\n"
        for link in list(self._links.values()):
            link.send(self._line)

    async def applied(self, version: int, workers: int, seconds: float) -> bool:
        """Whether all connected workers, and at least `workers` of them, serve from `version` or a later one
        within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while not self._all_at(version, workers):
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def collect(self, seconds: float) -> dict[str, dict[str, Any]]:
        """Each connected worker's report, asked for now; the one before from a worker that does not answer
        within `seconds`."""
        self._collections += 1
        asked = self._collections
        line = msgspec.json.encode({"type": "collect", "id": asked}) + b"\n"
        links = list(self._links.values())
        for link in links:
            link.send(line)
        try:
            async with asyncio.timeout(seconds):
                while any(link.reported < asked for link in self._links.values() if link in links):
                    await self._news.wait()
        except TimeoutError:
            logger.warning("a worker did not report its metrics in time")
        return {link.name: link.report for link in self._links.values() if link.report}

    async def explain(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What the first worker by name says of a request that it might get: `gateway/explaining.py` has both shapes.

        Raises ServeError as that request would be refused; worker_unavailable where none answers within `seconds`."""
        if not self._links:
            raise ServeError("worker_unavailable", "no gateway worker is connected to control")
        link = self._links[min(self._links)]
        self._questions += 1
        asked = self._questions
        told = self._told[asked] = asyncio.get_running_loop().create_future()
        link.send(msgspec.json.encode({"type": "explain", "id": asked, "body": question}) + b"\n")
        try:
            async with asyncio.timeout(seconds):
                said = await told
        except TimeoutError:
            raise ServeError("worker_unavailable", f"{link.name} did not answer within {seconds:g} s") from None
        finally:
            del self._told[asked]
        if (error := said.get("error")) is not None:
            raise ServeError(error["code"], error["message"], param=error["param"])
        return dict(said["values"])

    def _all_at(self, version: int, workers: int) -> bool:
        return len(self._links) >= workers and all(link.version >= version for link in self._links.values())

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link: _Link | None = None
        try:
            async for line in reader:
                message = msgspec.json.decode(line)
                if link is None:
                    link = await self._hello(message, writer)
                else:
                    self._take(link, message)
        except (OSError, ValueError, KeyError, TypeError, msgspec.DecodeError) as error:
            logger.warning("a worker's connection failed", extra={"worker": link and link.name, "reason": repr(error)})
        finally:
            writer.transport.abort()
            if link is not None and self._links.get(link.name) is link:
                del self._links[link.name]
                self._tell()

    async def _hello(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> _Link:
        if message["type"] != "hello":
            raise ValueError("a worker's first message is not hello")
        link = _Link(str(message["worker"]), int(message["pid"]), writer)
        version = min(int(message["version"]), _NEWEST_VERSION)
        if version > self._version and self.overtaken is not None:
            await self.overtaken(version)
        elif version == self._version:
            link.version = version
        before = self._links.pop(link.name, None)
        if before is not None:
            before.close()
        self._links[link.name] = link
        # Sent even if the version is the same: after a store was put back, equal numbers may hide a
        # difference.
        if self._line:
            link.send(self._line)
        self._tell()
        return link

    def _take(self, link: _Link, message: dict[str, Any]) -> None:
        if message["type"] == "applied":
            link.version = max(link.version, int(message["version"]))
        elif message["type"] == "metrics":
            link.report = dict(message["values"])
            link.reported = max(link.reported, int(message["id"]))
        elif message["type"] == "explained":
            told = self._told.get(int(message["id"]))
            if told is not None and not told.done():
                told.set_result(message)
        elif message["type"] == "unknown_kid" and self.unknown_kid is not None:
            self.unknown_kid(str(message["issuer"]))
        self._tell()

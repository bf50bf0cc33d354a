"""Control's side of HTTP/1.1: uvicorn's own, which waits for ever for the rest of a request and holds whatever
its head brings. Every user of this machine reaches control's port, and needs no token to open a connection."""

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REQUEST_SECONDS: Final = 10.0
MAX_HEAD_BYTES: Final = 64 << 10


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection on which a request is not whole, body included, within REQUEST_SECONDS of its first byte, or
    none comes so long after connecting; and one whose head grows beyond MAX_HEAD_BYTES. Between two requests uvicorn's
    own `timeout_keep_alive` counts."""

    _deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _head_read = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._wait()  # before the parser: an empty line begins no request, but ends uvicorn's own waiting
        self._head_bytes += len(data)
        super().data_received(data)
        if not self._head_read and self._head_bytes > MAX_HEAD_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        self._wait()
        self._head_read = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_read = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_waiting()
        self._head_bytes, self._head_read = 0, False
        super().on_message_complete()

    def _wait(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

"""The outermost layer of control's HTTP API: credential, request id, size of the body. Plain ASGI, so that it
stands before anything a framework does with a request."""

import logging
import math
import re
import secrets
import time
from typing import Final

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitalis_serve.control.access import Access, permit
from vitalis_serve.control.changes import PRINCIPAL
from vitalis_serve.errors import ServeError

logger = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 1 << 20
# The documents hold no secret, and a browser that opens them sends no token.
_OPEN_PATHS: Final = frozenset({"/healthz", "/docs", "/openapi.json"})
_SANE_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def error_response(error: ServeError) -> JSONResponse:
    """The envelope of the data plane, with the headers that go with the error."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    facts = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return JSONResponse({"error": facts}, error.status, headers)


class Guard:
    """Lets a request through if it may be."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _SANE_ID.fullmatch(given) else secrets.token_hex(8).encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            if scope["path"] not in _OPEN_PATHS:
                self._check(scope, headers.get(b"authorization"))
        except ServeError as error:
            await error_response(error)(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, _bounded(receive), send_with_id)
        except Exception:
            logger.error("request failed", extra={"request_id": request_id.decode(), "path": scope["path"]})
            raise

    def _check(self, scope: Scope, authorization: bytes | None) -> None:
        peer = scope["client"][0] if scope.get("client") else "unknown"
        try:
            principal = self._access.check(authorization, peer, time.monotonic(), time.time())
        except ServeError as error:
            if error.code != "authentication_failures":  # those are as many as somebody likes
                facts = {"peer": peer, "path": scope["path"][:200], "code": error.code}
                logger.warning("refused without a credential of ours", extra=facts)
            raise
        permit(principal, scope["method"], scope["path"])
        scope[PRINCIPAL] = principal.name


def _bounded(receive: Receive) -> Receive:
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise ServeError("body_too_large", f"control takes bodies of at most {MAX_BODY_BYTES} bytes")
        return message

    return bounded

"""Header rules: request ids, credentials, and which of a client's headers go on to the engine. Pure."""

import re
from typing import Final

from vitalis_serve.errors import ServeError

# The only request headers looked at; all others are dropped, hop-by-hop ones and the engine's own
# (X-Vllm-Priority, X-data-parallel-rank) among them.
WANTED: Final = frozenset(
    {
        b"host",
        b"authorization",
        b"x-api-key",
        b"x-request-id",
        b"content-type",
        b"content-length",
        b"content-encoding",
        b"transfer-encoding",
        b"expect",
        b"anthropic-version",
        b"anthropic-beta",
        b"traceparent",
        b"x-session-id",
        b"tracestate",
    }
)
FORWARDED: Final = (b"anthropic-version", b"anthropic-beta", b"traceparent", b"tracestate")
# The others may be lists, of which each line is a part.
ONCE: Final = frozenset(
    {
        b"host",
        b"authorization",
        b"x-api-key",
        b"content-type",
        b"content-length",
        b"content-encoding",
        b"transfer-encoding",
        b"expect",
    }
)

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z").match

_SANE_HOST = re.compile(rb"(?:\[[0-9A-Za-z:.%_~-]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::[0-9]*)?\Z").match


def sane_host(value: bytes) -> bool:
    """Whether this may stand in a Host header: a name or address and perhaps a port; empty is allowed."""
    return _SANE_HOST(value) is not None


def sane_request_id(value: bytes | None) -> bytes | None:
    """The client's own id if it may be echoed and sent on, else None."""
    return value if value is not None and _SANE_ID(value) else None


def credential(headers: dict[bytes, bytes]) -> bytes:
    """The key presented, from `Authorization: Bearer` or `x-api-key`; ServeError missing_key or invalid_key."""
    bearer, api_key = headers.get(b"authorization"), headers.get(b"x-api-key")
    if bearer is not None:
        if bearer[:7].lower() != b"bearer ":
            raise ServeError("invalid_key", "The Authorization header must be `Bearer` and a key.")
        token = bearer[7:].strip()
        if api_key is not None and api_key.strip() != token:
            raise ServeError("invalid_key", "Authorization and x-api-key hold two different keys; send one of them.")
        if token:
            return token
    elif api_key is not None and (token := api_key.strip()):
        return token
    raise ServeError("missing_key", "No key was sent; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.")


def forwarded(headers: dict[bytes, bytes]) -> bytes:
    """The client's headers that go on to the engine, as header lines."""
    lines = b""
    for name in FORWARDED:
        if name in headers:
            lines += b"%b: %b\r\n" % (name, headers[name])
    return lines

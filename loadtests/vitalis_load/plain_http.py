"""A plain request and its whole answer: for what is asked of a server beside the load itself. Blocking; under Locust
gevent makes it wait politely."""

import http.client
import socket
import ssl
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from vitalis_load import wire
from vitalis_load.errors import LoadFailure

MOST_BYTES = 32 * 1024 * 1024


class Answer(NamedTuple):
    status: int
    body: bytes

    @property
    def words(self) -> str:
        """What it says, in one line."""
        return wire.body_words(self.body)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def check_url(url: str) -> str:
    """The address without a slash or /v1 at its end. Raises LoadFailure where it is none."""
    parts = urlsplit(url)
    try:
        good = parts.scheme == "unix" or (parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1))
    except ValueError:  # a port that is no number
        good = False
    if not good or (parts.scheme == "unix" and not parts.path):
        raise LoadFailure(f"{url!r} is no address: give http://HOST:PORT, https://HOST:PORT or unix:/PATH")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def ask(
    url: str, path: str, *, document: object = None, token: str = "", headers: dict[str, str] | None = None,
    method: str = "", seconds: float = 10,
) -> Answer:  # fmt: skip
    """GET, or POST where there is a document, or another method. `url` as `check_url` returns it. Raises OSError where
    no answer came (refused, no such host, too slow, cut, not HTTP): `reason` puts it in words."""
    connection, prefix = _connection(url, seconds)
    sent = {"authorization": f"Bearer {token}"} if token else {}
    sent |= headers or {}
    body = None
    if document is not None:
        body = msgspec.json.encode(document)
        sent["content-type"] = "application/json"
    try:
        connection.request(method or ("GET" if body is None else "POST"), prefix + path, body, sent)
        response = connection.getresponse()
        return Answer(response.status, response.read(MOST_BYTES))
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"the answer is not HTTP ({error!r})") from error
    finally:
        connection.close()


def _connection(url: str, seconds: float) -> tuple[http.client.HTTPConnection, str]:
    """Not open yet; and what paths begin with there."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return _UnixConnection(parts.path, seconds), ""
    host, port = parts.hostname or "", parts.port
    if parts.scheme == "https":
        trusted = ssl.create_default_context()
        return http.client.HTTPSConnection(host, port, timeout=seconds, context=trusted), parts.path
    return http.client.HTTPConnection(host, port, timeout=seconds), parts.path


def reason(error: OSError) -> str:
    """Why no answer came, in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return "there is no host of that name"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    return (error.strerror or str(error) or type(error).__name__).lower()

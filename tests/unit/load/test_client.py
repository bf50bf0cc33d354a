"""One connection against a server that does exactly what it is told, on a real socket."""

import contextlib
import datetime
import ipaddress
import os
import resource
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from vitalis_load import client, streams
from vitalis_load.records import Record

Act = Callable[[socket.socket], None]

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":%b}]}\n\n'
STREAM = CHUNK % b"null" + CHUNK % b'"stop"' + b"data: [DONE]\n\n"
PLAIN = (
    b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":3,"completion_tokens":2}}'
)
FAILURE = b'data: {"error":{"message":"engine is dead","code":500}}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Request-Id: r1\r\n"


def framed(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def chunked(*pieces: bytes) -> bytes:
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + framed(*pieces) + b"0\r\n\r\n"


def sized(body: bytes, status: bytes = b"200 OK", extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n%b\r\n" % (status, len(body), extra) + body


WHOLE = chunked(STREAM)


def say(*pieces: bytes, pause: float = 0) -> Act:
    def act(connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)

    return act


def shut(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def idle(connection: socket.socket) -> None:
    """Says nothing more until the other side goes."""
    connection.recv(1)


def wait(seconds: float) -> Act:
    return lambda connection: time.sleep(seconds)


class Server:
    """Reads a request, does what is next on its list, reads the next one. Every connection has a list of its own;
    after the last one's nobody is let in."""

    def __init__(self, *scripts: list[list[Act]], path: Path | None = None) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._scripts = scripts
        if path:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self.address = f"unix:{path}"
        else:
            self._listener = socket.socket()
            self._listener.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        for script in self._scripts:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            connection.settimeout(5)
            with contextlib.suppress(OSError), connection, self._dress(connection) as connection:
                for acts in script:
                    if not self._request(connection):
                        break
                    for act in acts:
                        act(connection)
        self._listener.close()

    def _dress(self, connection: socket.socket) -> socket.socket:
        return connection

    def _request(self, connection: socket.socket) -> bool:
        data = b""
        while b"\r\n\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                return False
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(body) < length:
            body += connection.recv(65536)
        self.requests.append(head + b"\r\n\r\n" + body)
        return True

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


class Asked:
    """A connection to such a server, on a clock that began with it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        began = time.monotonic()
        self.clock: Callable[[], float] = lambda: time.monotonic() - began
        self.connection = client.Connection(server.address, connect_seconds=5)

    def ask(self, *, stream: bool = True, seconds: float = 5, api: str = "chat", body: bytes = b"{}") -> Record:
        sent = client.request(api, body, host="h")
        now = self.clock()
        reader = streams.reader(api, stream)
        return self.connection.ask(sent, reader, scheduled=now - 0.5, deadline=now + seconds, clock=self.clock)


@pytest.fixture
def serve() -> Iterator[Callable[..., Asked]]:
    made: list[Asked] = []

    def start(*scripts: list[list[Act]], path: Path | None = None) -> Asked:
        made.append(Asked(Server(*scripts, path=path)))
        return made[-1]

    yield start
    for asked in made:
        asked.connection.close()
        asked.server.end()


def test_a_streamed_answer_and_when_it_came(serve: Any) -> None:
    role = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    script = [
        say(HEAD + b"Transfer-Encoding: chunked\r\n\r\n"), wait(0.05), say(framed(role)), wait(0.05),
        say(framed(CHUNK % b"null")), wait(0.05), say(framed(CHUNK % b'"stop"', b"data: [DONE]\n\n") + b"0\r\n\r\n"),
    ]  # fmt: skip
    record = serve([script]).ask()
    assert (record.error, record.status, record.finish, record.request_id) == ("", 200, "stop", "r1")
    assert record.chunks == 2
    assert record.first_token == record.first_output
    assert record.head is not None
    assert record.first_token is not None
    assert record.last_token == record.ended
    assert record.scheduled + 0.4 < record.sent <= record.head
    assert record.first_token - record.head > 0.09, "a role is no token"
    assert record.ended - record.first_token > 0.04


def test_a_connection_is_kept(serve: Any) -> None:
    asked = serve([[say(WHOLE)], [say(sized(PLAIN))], [say(WHOLE)]])
    assert asked.ask().error == ""
    plain = asked.ask(stream=False)
    assert (plain.error, plain.first_token, plain.completion_tokens, plain.prompt_tokens) == ("", None, 2, 3)
    assert asked.ask().error == ""
    assert (asked.connection.opened, asked.server.connections) == (1, 1)


@pytest.mark.parametrize("closing", [shut, reset])
def test_an_idle_connection_that_was_closed_is_opened_anew(serve: Any, closing: Act) -> None:
    asked = serve([[say(WHOLE), wait(0.02), closing]], [[say(WHOLE)]])
    assert asked.ask().error == ""
    time.sleep(0.1)
    assert asked.ask().error == ""
    assert asked.connection.opened == 2


@pytest.mark.parametrize("closing", [shut, reset])
def test_one_that_is_closed_as_the_request_comes_too(serve: Any, closing: Act) -> None:
    asked = serve([[say(WHOLE)], [closing]], [[say(WHOLE)]])
    assert asked.ask().error == ""
    assert asked.ask().error == ""
    assert (asked.connection.opened, len(asked.server.requests)) == (2, 3)


def test_but_not_one_whose_request_was_under_way(serve: Any) -> None:
    asked = serve([[say(WHOLE)], [wait(client.AT_ONCE_SECONDS + 0.1), reset]], [[say(WHOLE)]])
    assert asked.ask().error == ""
    record = asked.ask()
    assert (record.error, asked.connection.opened) == ("reset", 1)
    assert asked.ask().error == "", "the next one is on a new connection"


def test_a_failure_is_when_it_came_and_not_when_the_last_bytes_did(serve: Any) -> None:
    asked = serve([[say(HEAD + b"\r\n" + CHUNK % b"null"), wait(0.6), reset]])
    record = asked.ask()
    assert record.error
    assert record.first_token is not None
    assert record.ended - record.first_token >= 0.55


@pytest.mark.parametrize(
    ("acts", "error", "detail"),
    [
        ([reset], "reset", "reset"),
        ([shut], "reset", "closed before an answer"),
        ([say(HEAD), shut], "reset", "within the answer"),
        ([say(WHOLE[:-20]), shut], "reset", "within the answer"),
        ([say(WHOLE[:-60]), wait(0.05), reset], "reset", ""),
        ([say(chunked(CHUNK % b"null"))], "no_end", "without a finish reason"),
        ([say(HEAD + b"\r\n" + CHUNK % b"null"), shut], "no_end", "without a finish reason"),
        ([say(chunked(FAILURE))], "stream_error", "engine is dead"),
        ([say(chunked(b"data: oh\n\n"))], "garbled", "oh"),
        ([say(b"SSH-2.0-OpenSSH\r\n")], "garbled", "no HTTP"),
        ([say(sized(b'{"error":{"message":"no key"}}', b"401 No"))], "http_401", "no key"),
        ([say(sized(b"<h1>Bad Gateway</h1>", b"502 Bad"))], "http_502", "<h1>Bad Gateway</h1>"),
        ([say(sized(b"", b"204 None"))], "http_204", ""),
        ([idle], "timeout", "0.2 s"),
        ([say(WHOLE[:-60]), idle], "timeout", "0.2 s"),
    ],
)  # fmt: skip
def test_what_a_server_does_wrong(serve: Any, acts: list[Act], error: str, detail: str) -> None:
    asked = serve([acts], [[say(WHOLE)]])
    record = asked.ask(seconds=0.2 if error == "timeout" else 5)
    assert record.error == error
    assert detail in record.detail
    assert not record.unfinished
    assert record.ended > record.sent
    assert asked.ask().error == "" or error.startswith("http")


def test_a_head_alone_is_seen(serve: Any) -> None:
    record = serve([[say(HEAD + b"Transfer-Encoding: chunked\r\n\r\n"), idle]]).ask(seconds=0.2)
    assert (record.status, record.error) == (200, "timeout")
    assert record.head is not None


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        addresses = [f"http://127.0.0.1:{taken.getsockname()[1]}", f"unix:{tmp_path}/none.sock", "http://.invalid:1"]
        for address in addresses:
            connection = client.Connection(address, connect_seconds=2)
            reader = streams.reader("chat", stream=True)
            record = connection.ask(b"x", reader, scheduled=0, deadline=time.monotonic() + 5, clock=time.monotonic)
            assert (record.error, record.status) == ("connect", 0)
            assert record.detail.startswith(address)


def test_nobody_who_takes_the_connection() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(busy.getsockname())
        connection = client.Connection(f"http://127.0.0.1:{busy.getsockname()[1]}", connect_seconds=0.2)
        began = time.monotonic()
        reader = streams.reader("chat", stream=True)
        record = connection.ask(b"x", reader, scheduled=0, deadline=began + 5, clock=time.monotonic)
        assert record.error == "connect"
        assert "timed out" in record.detail
        assert time.monotonic() - began < 3
        for filler in fillers:
            filler.close()


def test_no_descriptor_for_it_is_no_fault_of_the_servers(serve: Any) -> None:
    asked = serve([[]])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1, hard))
        try:
            record = asked.ask()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (record.error, record.detail) == ("client", f"{asked.server.address}: Too many open files")


def test_refused_with_a_time_to_come_back(serve: Any) -> None:
    busy = sized(b'{"error":{"message":"busy"}}', b"503 Busy", b"Retry-After: 7\r\n")
    asked = serve([[say(busy)], [say(WHOLE)]])
    record = asked.ask()
    assert (record.error, record.retry_after, record.detail) == ("http_503", 7, "busy")
    assert asked.ask().error == ""
    assert asked.connection.opened == 1, "a refusal does not cost the connection"


def test_retry_after() -> None:
    assert client.retry_after("1.5", 0) == 1.5
    assert client.retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 40) == 60
    assert client.retry_after("soon", 0) is None
    assert client.retry_after("-3", 0) == 0


def test_what_breaks_after_the_end_does_no_harm(serve: Any) -> None:
    asked = serve([[say(WHOLE[:-5]), reset]], [[say(WHOLE[:-5]), idle]], [[say(WHOLE)]])
    assert asked.ask().error == ""
    began = time.monotonic()
    late = asked.ask(seconds=30)
    assert (late.error, late.finish) == ("", "stop")
    assert late.ended - late.sent < 0.5
    assert time.monotonic() - began < 5
    assert asked.ask().error == ""
    assert asked.connection.opened == 3


def test_interim_responses_and_what_nobody_asked_for(serve: Any) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    twice = WHOLE + sized(b"{}", b"500 What")
    asked = serve([[say(hints + WHOLE)], [say(twice), wait(0.3)]], [[say(WHOLE)]])
    for _ in range(3):
        record = asked.ask()
        assert (record.error, record.status, record.chunks) == ("", 200, 2)
    assert asked.connection.opened == 2


def test_a_server_that_answers_before_it_has_read(serve: Any) -> None:
    """A body too large: refused from its head, and the connection closed."""
    big = b"x" * 4_000_000

    class Hasty(Server):
        def _request(self, connection: socket.socket) -> bool:
            return bool(connection.recv(100))

    server = Hasty([[say(sized(b'{"error":{"message":"too large"}}', b"413 Large")), wait(0.2), reset]])
    asked = Asked(server)
    record = asked.ask(body=big)
    # a reset may overtake the answer: the kernel then drops it
    assert record.error in ("http_413", "reset"), record
    asked.connection.close()
    server.end()


def test_abandoned(serve: Any) -> None:
    asked = serve([[say(chunked(CHUNK % b"null")[:-5]), idle]], [[idle]], [[say(WHOLE)]])
    for chunks in (1, 0):
        threading.Timer(0.15, asked.connection.abandon).start()
        record = asked.ask()
        assert (record.unfinished, record.error, record.chunks) == (True, "", chunks)
        assert record.ended - record.sent < 0.9
    asked.connection.abandon()  # when nothing is under way
    assert asked.ask().error == ""


def test_over_a_unix_socket(serve: Any, tmp_path: Path) -> None:
    assert serve([[say(WHOLE)]], path=tmp_path / "s").ask().error == ""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of its own for 127.0.0.1, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "load")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()) + made.public_bytes(pem)
    )
    return path


class Guarded(Server):
    """The same behind TLS."""

    def __init__(self, certificate: Path, *scripts: list[list[Act]]) -> None:
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate)
        super().__init__(*scripts)
        self.address = self.address.replace("http:", "https:")

    def _dress(self, connection: socket.socket) -> socket.socket:
        return self._context.wrap_socket(connection, server_side=True)


def test_over_tls(certificate: Path) -> None:
    server = Guarded(certificate, [[say(WHOLE)], [say(WHOLE), shut]], [[say(WHOLE)]], [[]])
    asked = Asked(server)
    asked.connection = client.Connection(server.address, tls=ssl.create_default_context(cafile=str(certificate)))
    for _ in range(3):
        record = asked.ask()
        assert (record.error, record.chunks) == ("", 2)
        time.sleep(0.05)
    assert asked.connection.opened == 2, "kept, and opened anew where it was closed"
    asked.connection.close()
    asked.connection = client.Connection(server.address)
    record = asked.ask()
    assert record.error == "connect"
    assert "certificate verify failed" in record.detail
    server.end()


def test_every_cut_of_the_bytes_gives_the_same(serve: Any) -> None:
    asked = serve([[say(*(WHOLE[at : at + 1] for at in range(len(WHOLE))))], [say(WHOLE)]])
    first, second = asked.ask(), asked.ask()
    assert (first.error, first.chunks, first.finish) == (second.error, second.chunks, second.finish) == ("", 2, "stop")


def test_the_request(serve: Any) -> None:
    sent = client.request(
        "chat", {"model": "m", "stream": True}, host="h:1", path_prefix="/a/", key="k", headers={"X-Priority": "high"}
    )
    head, _, body = sent.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /a/v1/chat/completions HTTP/1.1"
    assert {b"Host: h:1", b"Authorization: Bearer k", b"X-Priority: high", b"Content-Length: %d" % len(body)} <= {
        *lines
    }
    assert msgspec.json.decode(body) == {"model": "m", "stream": True, "stream_options": {"include_usage": True}}
    own = client.request("completions", {"stream": True, "stream_options": None}, host="h")
    assert msgspec.json.decode(own.partition(b"\r\n\r\n")[2]) == {"stream": True, "stream_options": None}
    other = client.request("messages", {"stream": True}, host="h", key="k")
    assert b"\r\nx-api-key: k\r\n" in other
    assert b"stream_options" not in other
    assert b"\r\nAuthorization: Bearer k\r\n" in other

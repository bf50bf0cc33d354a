"""A small OIDC issuer on loopback, as real as it has to be: discovery, keys that rotate, tokens; and it misbehaves on
command. Its server runs in threads of the test's process."""

import contextlib
import functools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

DISCOVERY = "/.well-known/openid-configuration"
JWKS = "/keys"
KINDS: dict[str, Any] = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}


@functools.cache
def private_key(algorithm: str, number: int = 0) -> Any:
    """The same one each time for the same number: making one is slow."""
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP256R1()) if algorithm == "ES256" else rsa.generate_private_key(65537, 2048)


def jwk(algorithm: str, kid: str | None = None, number: int = 0, **more: Any) -> dict[str, Any]:
    """The public half, as an issuer publishes it."""
    made: dict[str, Any] = KINDS[algorithm].to_jwk(private_key(algorithm, number).public_key(), as_dict=True)
    return made | ({"kid": kid} if kid is not None else {}) | more


def sign(
    claims: dict[str, Any],
    algorithm: str = "ES256",
    *,
    kid: str | None = "one",
    number: int = 0,
    head: dict[str, Any] | None = None,
) -> bytes:
    """Whatever the claims are: `jwt.encode` would refuse what an issuer should not say."""
    named = ({"kid": kid} if kid is not None else {}) | (head or {})
    return jwt.PyJWS().encode(json.dumps(claims).encode(), private_key(algorithm, number), algorithm, named).encode()


def claims(issuer: str, now: float, **more: Any) -> dict[str, Any]:
    """Good for five minutes, for the audience `vitalis-serve` and the tenant `acme`; None takes one away."""
    made = {"iss": issuer, "aud": "vitalis-serve", "sub": "someone", "iat": now, "exp": now + 300, "tenant": "acme"}
    return {name: value for name, value in (made | more).items() if value is not None}


class Issuer:
    """`mode`: "well", "garbage", "error", "empty", "huge", "slow", "redirect" or "foreign" (discovery speaks of
    another issuer). `published`: its keys."""

    def __init__(self) -> None:
        self.published: list[dict[str, Any]] = [jwk("ES256", "one")]
        self.mode = "well"
        self.fetches: Counter[str] = Counter()
        self.release = threading.Event()  # what a slow one waits for
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.come_back()
        self.url = f"http://127.0.0.1:{self._port}"

    def come_back(self) -> None:
        """Where it was before."""
        handler = type("Handler", (_Handler,), {"issuer": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def go_away(self) -> None:
        """Connections are refused from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def options(self, **more: Any) -> dict[str, Any]:
        """An entry of `oidc`, as control gets it."""
        entry = {"name": "site", "issuer": self.url, "audience": ["vitalis-serve"]}
        return {**entry, "algorithms": ["RS256", "ES256", "EdDSA"], **more}

    def token(self, algorithm: str = "ES256", *, kid: str | None = "one", number: int = 0, **more: Any) -> str:
        return sign(claims(self.url, time.time(), **more), algorithm, kid=kid, number=number).decode()


class _Handler(BaseHTTPRequestHandler):
    issuer: Issuer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        issuer = self.issuer
        issuer.fetches[self.path] += 1
        document: Any = {"issuer": issuer.url, "jwks_uri": issuer.url + JWKS}
        if self.path == JWKS:
            document = {"keys": issuer.published}
        elif self.path != DISCOVERY:
            return self._answer(404, b"{}")
        if issuer.mode == "foreign" and self.path == DISCOVERY:
            document["issuer"] = "http://127.0.0.1:1"
        if issuer.mode == "empty" and self.path == JWKS:
            document = {"keys": []}
        if issuer.mode == "slow":
            issuer.release.wait(30)
        if issuer.mode == "redirect" and self.path == JWKS:
            return self._answer(302, b"", {"location": f"{issuer.url}/elsewhere"})
        body = {"garbage": b"<html>not JSON", "huge": b" " * (1 << 20)}.get(issuer.mode)
        return self._answer(
            500 if issuer.mode == "error" else 200, json.dumps(document).encode() if body is None else body
        )

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)


@contextlib.contextmanager
def running_issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    try:
        yield issuer
    finally:
        issuer.release.set()
        issuer.go_away()

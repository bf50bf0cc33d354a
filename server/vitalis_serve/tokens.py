"""Tokens of OIDC issuers (JWT): who signed one, for whom, for how long. Pure.

What costs little is looked at first: size, form, algorithm, issuer, key id; a signature is only computed for a key
that the issuer has published, with an algorithm that the configuration names and that this key is for. What a token's
head says of keys elsewhere (`jku`, `x5u`, `jwk`) is never read. A token once verified is known by its digest until it
ends, or its issuer's configuration or key changes.
"""

import base64
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Generic, NamedTuple, NoReturn, TypeVar

import jwt
import msgspec

from vitalis_serve.errors import ServeError

T = TypeVar("T")

MAX_TOKEN_BYTES: Final = 8 << 10
MAX_KEYS: Final = 64  # of one issuer
REMEMBERED: Final = 10_000
ASK_AGAIN_SECONDS: Final = 5.0
_MAX_KEY_CHARACTERS: Final = 1400  # of one member: an RSA modulus of 8192 bits
_LATEST: Final = 1 << 53
# algorithm -> the type and curve of its keys
_KEYS_FOR: Final[dict[str, tuple[str, str | None]]] = {
    "RS256": ("RSA", None), "RS384": ("RSA", None), "RS512": ("RSA", None), "PS256": ("RSA", None),
    "ES256": ("EC", "P-256"), "ES384": ("EC", "P-384"), "EdDSA": ("OKP", "Ed25519"),
}  # fmt: skip
_MEMBERS: Final = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
_BASE64URL: Final = re.compile(rb"[A-Za-z0-9_-]+")
_NOT_A_JWT: Final = "This token is not a JWT: three parts of base64url, the first two of them JSON objects."


class Issuer(msgspec.Struct, frozen=True):
    """Whose tokens are taken. Fields as in `settings.schema.Issuer`; `keys`: its JSON Web Keys, as control fetched
    them, the stale ones among them while that is allowed."""

    name: str
    issuer: str
    audience: tuple[str, ...]
    algorithms: tuple[str, ...]
    keys: tuple[dict[str, Any], ...] = ()
    leeway_seconds: float = 30
    tenant_claim: str = "tenant"
    tenants: dict[str, str] = {}
    class_claim: str | None = None
    classes: dict[str, str] = {}
    class_: str = msgspec.field(default="standard", name="class")
    scopes_claim: str | None = None
    scopes: dict[str, str] = {}
    routes: tuple[str, ...] = ("*",)
    roles_claim: str | None = None
    roles: dict[str, str] = {}


def looks_like_jwt(token: bytes) -> bool:
    """Whether somebody meant it as one: every JSON object begins so in base64url."""
    return token.startswith(b"eyJ") and token.count(b".") == 2


def public_key(jwk: Any) -> dict[str, str] | None:
    """What verifying takes of a JSON Web Key; None where that is not one, or not for signatures of the algorithms
    here. A private key is reduced to its public half."""
    kind = jwk.get("kty") if isinstance(jwk, dict) else None
    members = _MEMBERS.get(kind) if isinstance(kind, str) else None
    if members is None or jwk.get("use", "sig") != "sig":
        return None
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    found = {name: jwk[name] for name in ("kty", *members, "kid", "alg") if jwk.get(name) is not None}
    if not all(isinstance(value, str) and len(value) <= _MAX_KEY_CHARACTERS for value in found.values()):
        return None
    algorithms = [name for name in _KEYS_FOR if _is_for(found, name)]
    if not algorithms:
        return None
    try:
        key = jwt.PyJWK(found, algorithms[0])
    except (jwt.PyJWTError, ValueError):
        return None
    return found if key.Algorithm.check_key_length(key.key) is None else None


def _is_for(jwk: Mapping[str, str], algorithm: str) -> bool:
    kind, curve = _KEYS_FOR[algorithm]
    return jwk["kty"] == kind and jwk.get("crv") == curve and jwk.get("alg") in (None, algorithm)


class _Source:
    """A key of an issuer, under one configuration of that issuer."""

    __slots__ = ("_made", "issuer", "jwk")

    def __init__(self, issuer: Issuer, jwk: dict[str, str]) -> None:
        self.issuer = issuer
        self.jwk = jwk
        self._made: dict[str, jwt.PyJWK] = {}

    def made(self, algorithm: str) -> jwt.PyJWK:
        """The key with that one algorithm bound to it: the library refuses it for any other."""
        found = self._made.get(algorithm)
        if found is None:
            found = self._made[algorithm] = jwt.PyJWK(self.jwk, algorithm)
        return found


class Verified(NamedTuple, Generic[T]):
    """`until` in Unix seconds, leeway included. `meaning`: what its claims come to."""

    meaning: T
    until: float


class Memory(Generic[T]):
    """What stays when issuers or their keys change: tokens once verified, the newest `size` of them, and when a key
    was asked for last. `on_unknown_kid` is told an issuer's name, at most once in ASK_AGAIN_SECONDS."""

    def __init__(self, on_unknown_kid: Callable[[str], None] | None = None, size: int = REMEMBERED) -> None:
        self.on_unknown_kid = on_unknown_kid
        self._size = size
        self._verified: OrderedDict[bytes, tuple[_Source, Verified[T]]] = OrderedDict()
        self._asked: dict[str, float] = {}
        self.sources: dict[bytes, _Source] = {}  # of the last issuers, by what they are made of

    def __len__(self) -> int:
        return len(self._verified)

    def known(self, digest: bytes, sources: "frozenset[_Source]", wall: float) -> Verified[T] | None:
        """What this token was found to be, if that still holds."""
        found = self._verified.get(digest)
        if found is None:
            return None
        if found[0] not in sources or wall >= found[1].until:
            del self._verified[digest]
            return None
        self._verified.move_to_end(digest)
        return found[1]

    def keep(self, digest: bytes, source: _Source, verified: Verified[T]) -> None:
        self._verified[digest] = source, verified
        if len(self._verified) > self._size:
            self._verified.popitem(last=False)

    def ask(self, issuer: str, wall: float) -> None:
        """Somebody presented a key id that the issuer has not published as far as we know."""
        if self.on_unknown_kid is not None and abs(wall - self._asked.get(issuer, -math.inf)) >= ASK_AGAIN_SECONDS:
            self._asked[issuer] = wall
            self.on_unknown_kid(issuer)


class Tokens(Generic[T]):
    """The issuers of one moment. `read` makes of a token's claims what is wanted of them, or raises ServeError; it is
    called once for each token."""

    def __init__(
        self, issuers: Iterable[Issuer], memory: Memory[T], read: Callable[[Issuer, dict[str, Any]], T]
    ) -> None:
        self._memory = memory
        self._read = read
        self._issuers: dict[str, tuple[Issuer, list[_Source]]] = {}
        sources: dict[bytes, _Source] = {}
        for issuer in issuers:
            bare = msgspec.structs.replace(issuer, keys=())
            said = msgspec.json.encode(bare)
            own: dict[bytes, _Source] = {}
            for jwk in issuer.keys[:MAX_KEYS]:
                name = said + msgspec.json.encode(jwk, order="sorted")
                if (source := memory.sources.get(name)) is not None:
                    own[name] = source
                elif (reduced := public_key(jwk)) is not None:
                    own[name] = _Source(bare, reduced)
            self._issuers[issuer.issuer] = bare, list(own.values())
            sources |= own
        memory.sources = sources
        self._sources = frozenset(sources.values())
        self._algorithms = _KEYS_FOR.keys() & {a for issuer, _ in self._issuers.values() for a in issuer.algorithms}

    def verify(self, token: bytes, digest: bytes, wall: float) -> Verified[T]:
        """`digest`: the token's SHA-256; `wall`: Unix seconds. Raises ServeError invalid_token, or what `read` does."""
        if (found := self._memory.known(digest, self._sources, wall)) is not None:
            return found
        source, claims, until = self._verify(token, wall)
        verified = Verified(self._read(source.issuer, claims), until)
        self._memory.keep(digest, source, verified)
        return verified

    def _verify(self, token: bytes, wall: float) -> tuple[_Source, dict[str, Any], float]:
        if len(token) > MAX_TOKEN_BYTES:
            raise _invalid(f"This token is larger than {MAX_TOKEN_BYTES} bytes.")
        parts = token.split(b".")
        if len(parts) != 3 or not all(map(_BASE64URL.fullmatch, parts)):
            raise _invalid(_NOT_A_JWT)
        head = _object(parts[0])
        if "crit" in head or "b64" in head:
            raise _invalid("This token's head asks for an extension (`crit`, `b64`); none is understood here.")
        algorithm = head.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._algorithms:
            raise _invalid("This token is signed with an algorithm that is not allowed here.")
        claims = _object(parts[1])
        said = claims.get("iss")
        found = self._issuers.get(said) if isinstance(said, str) else None
        if found is None:
            raise _invalid("This token's issuer (`iss`) is not one of those that are trusted here.")
        issuer, sources = found
        if algorithm not in issuer.algorithms:
            raise _invalid("This token is signed with an algorithm that is not allowed for its issuer.")
        source = self._source(issuer, sources, head, algorithm, wall)
        key = source.made(algorithm)
        if not key.Algorithm.verify(token[: -len(parts[2]) - 1], key.key, _bytes(parts[2])):
            raise _invalid("This token's signature is wrong.")
        return source, claims, _judge(issuer, claims, wall)

    def _source(
        self, issuer: Issuer, sources: list[_Source], head: dict[str, Any], algorithm: str, wall: float
    ) -> _Source:
        kid = head.get("kid")
        if kid is not None and not isinstance(kid, str):
            raise _invalid("This token's key id (`kid`) is not text.")
        if kid is None:
            fitting = [source for source in sources if _is_for(source.jwk, algorithm)]
            if len(fitting) == 1:
                return fitting[0]
            if sources:
                raise _invalid("This token names no key (`kid`), and its issuer has not exactly one for its algorithm.")
        else:
            named = [source for source in sources if source.jwk.get("kid") == kid]
            if fitting := [source for source in named if _is_for(source.jwk, algorithm)]:
                return fitting[0]
            if named:
                raise _invalid("This token's algorithm is not that of the key that it names.")
        self._memory.ask(issuer.name, wall)
        if not sources:
            raise _invalid("The keys of this token's issuer are not known here yet; try again in some seconds.")
        raise _invalid(
            "This token's issuer has not published the key that it names (`kid`); try again in some seconds."
        )


def _judge(issuer: Issuer, claims: dict[str, Any], wall: float) -> float:
    """Until when it holds, leeway included. The library would take text for a number, and its own clock."""
    leeway = issuer.leeway_seconds
    until = _time(claims, "exp") + leeway
    if wall >= until:
        raise _invalid("This token has expired; get a new one.")
    if _time(claims, "iat") > wall + leeway:
        raise _invalid("This token was issued in the future (`iat`): the clocks of its issuer and of this host differ.")
    if "nbf" in claims and _time(claims, "nbf") > wall + leeway:
        raise _invalid("This token is not valid yet (`nbf`).")
    audience = claims.get("aud")
    named = [audience] if isinstance(audience, str) else audience
    if not isinstance(named, list) or not any(isinstance(one, str) and one in issuer.audience for one in named):
        raise _invalid("This token is for somebody else: its `aud` names none of the audiences that are taken here.")
    return until


def _time(claims: dict[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LATEST:
        raise _invalid(f"This token has no `{name}` that is a number of seconds.")
    return float(value)


def _bytes(part: bytes) -> bytes:
    """Of base64url without padding; the alphabet was looked at already."""
    try:
        return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    except ValueError:
        raise _invalid(_NOT_A_JWT) from None


def _object(part: bytes) -> dict[str, Any]:
    try:
        found = json.loads(_bytes(part).decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _invalid(_NOT_A_JWT) from None
    if not isinstance(found, dict):
        raise _invalid(_NOT_A_JWT)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _invalid("This token says the same thing twice: a name in it is not unique.")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(word)


def _invalid(sentence: str) -> ServeError:
    return ServeError("invalid_token", sentence)


# What claims say


def claim(claims: dict[str, Any], name: str) -> Any:
    """A claim by its name, else by the way to it through others (`realm_access.roles`); None where there is none."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for word in name.split("."):
        if not isinstance(found, dict) or word not in found:
            return None
        found = found[word]
    return found


def text_claim(claims: dict[str, Any], name: str) -> str | None:
    """ServeError where it is something else than text."""
    found = claim(claims, name)
    if found is not None and not isinstance(found, str):
        raise _invalid(f"This token's claim `{name}` must be text.")
    return found


def words_claim(claims: dict[str, Any], name: str) -> list[str]:
    """A list of text, or words with spaces between them (as OAuth's `scope`). ServeError where it is neither."""
    found = claim(claims, name)
    if found is None:
        return []
    words = found.split() if isinstance(found, str) else found
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise _invalid(f"This token's claim `{name}` must be text or a list of text.")
    return words


def shown(value: str) -> str:
    """What may stand in an answer or a log of a value that a stranger chose."""
    return value if len(value) <= 64 and value.isascii() and value.isprintable() and "`" not in value else "…"

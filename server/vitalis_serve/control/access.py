"""Who may use control, and for what: its own token, keys with the scope `admin` or `metrics`, and tokens of OIDC
issuers whose claims give a role; and what a peer that guesses gets.

The right credential is always let in, whoever else behind the same address guesses: with 238 bits there is
nothing to guess, and everyone on this machine shares one address. The limit keeps failures from filling the
log. Keys and tenants are looked up in what was published last, so a flood of wrong ones costs no query.
"""

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from vitalis_serve.control.files import kept_secret
from vitalis_serve.errors import ServeError
from vitalis_serve.store.records import DISABLED, Contents
from vitalis_serve.tokens import Issuer, Memory, Tokens, looks_like_jwt, shown, text_claim, words_claim

# Each may do what those before it may.
ROLES: Final = ("metrics", "viewer", "operator", "admin")
_NEVER: Final = float("inf")
_OPERATORS: Final = ("/v1/fleet/", "/v1/explain")
_ADMINS: Final = ("/v1/audit",)


class Principal(NamedTuple):
    """Who asks, as the audit table names them (`control.token`, `key:<id>`, `oidc:<issuer>:<sub>`), and the highest of
    ROLES that they have; None for none."""

    name: str
    role: str | None


class Speaker(NamedTuple):
    """Who a token speaks for, and the tenant of ours that it names; None where it names none."""

    principal: Principal
    tenant: str | None


def control_token(path: Path) -> str:
    """The token in `path`, made on the first start. Raises StartError if it can be neither read nor made."""
    return kept_secret(path, "vtc_")


def needed(method: str, path: str) -> str:
    """The lowest role that a request takes. What is not named here takes `admin`, unless it only reads."""
    if method in ("GET", "HEAD"):
        if path == "/metrics":
            return "metrics"
        return "admin" if _below(path, _ADMINS) else "viewer"
    return "operator" if method == "POST" and _below(path, _OPERATORS) else "admin"


def _below(path: str, places: Iterable[str]) -> bool:
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)


def permit(principal: Principal, method: str, path: str) -> None:
    """Raises ServeError scope_missing, naming the role that is needed."""
    role = needed(method, path)
    if principal.role is None or ROLES.index(principal.role) < ROLES.index(role):
        has = f"has the role `{principal.role}`" if principal.role is not None else "has no role here"
        raise ServeError("scope_missing", f"this needs the role `{role}`; {principal.name} {has}")


class Failures:
    """How many failures each peer has left: a token bucket a peer, for the last `peers` peers that failed.

    Times are seconds of a clock that never goes back.
    """

    def __init__(self, burst: float = 10, per_second: float = 1, peers: int = 1024) -> None:
        self._burst = burst
        self._per_second = per_second
        self._peers = peers
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def count(self, peer: str, now: float) -> float:
        """One more failure: 0 if it is within the limit, else the seconds until the next one would be."""
        left, since = self._buckets.pop(peer, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        wait = 0.0 if left >= 1 else (1 - left) / self._per_second
        self._buckets[peer] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > self._peers:
            self._buckets.popitem(last=False)
        return wait


class Access:
    """Answers whose an `Authorization` header is."""

    def __init__(self, token: str, failures: Failures) -> None:
        self.memory: Memory[Speaker] = Memory()  # of the tokens verified here
        self._expected = f"bearer {token}".encode()
        self._failures = failures
        self._tokens: Tokens[Speaker] | None = None
        self._keys: dict[bytes, tuple[Principal, float]] = {}
        self._revoked: frozenset[str] = frozenset()

    def know(self, contents: Contents) -> None:
        """The keys that open something from now on, and the tenants whose tokens open nothing."""
        self._revoked = frozenset(tenant.name for tenant in contents.tenants if tenant.status == DISABLED)
        self._keys = {}
        for key in contents.keys:
            principal = Principal(f"key:{key.id}", _role_of_scopes(key.scopes))
            until = key.expires_at or _NEVER
            if key.old_digest is not None:
                self._keys[bytes.fromhex(key.old_digest)] = principal, min(key.old_until or 0, until)
            self._keys[bytes.fromhex(key.digest)] = principal, until

    def trust(self, issuers: Iterable[Issuer]) -> None:
        """The issuers whose tokens are taken from now on."""
        listed = list(issuers)
        self._tokens = Tokens(listed, self.memory, _speaker) if listed else None

    def check(self, authorization: bytes | None, peer: str, now: float, wall: float) -> Principal:
        """`now` of a clock that never goes back, `wall` in Unix seconds. Raises ServeError `missing_key`,
        `invalid_key`, `expired_key`, `invalid_token` or `authentication_failures`."""
        scheme, _, token = (authorization or b"").strip().partition(b" ")
        token = token.strip()
        if hmac.compare_digest(scheme.lower() + b" " + token, self._expected):
            return Principal("control.token", "admin")
        try:
            return self._identify(scheme, token, wall)
        except ServeError:
            if wait := self._failures.count(peer, now):
                raise ServeError(
                    "authentication_failures",
                    "too many requests without the right token came from this address",
                    retry_after=max(1.0, wait),
                ) from None
            raise

    def _identify(self, scheme: bytes, token: bytes, wall: float) -> Principal:
        if not token:
            raise ServeError(
                "missing_key",
                "control needs `Authorization: Bearer` with the token in the file control.token, a key with the scope"
                " `admin`, or a token of an issuer that gives a role here",
            )
        if scheme.lower() == b"bearer":
            digest = hashlib.sha256(token).digest()
            found = self._keys.get(digest)
            if found is not None:
                if wall >= found[1]:
                    raise ServeError("expired_key", "this key, or this secret of it, has expired")
                return found[0]
            if self._tokens is not None and looks_like_jwt(token):
                principal, tenant = self._tokens.verify(token, digest, wall).meaning
                if tenant in self._revoked:  # each time: a token once verified is remembered
                    raise ServeError("invalid_token", f"This token's tenant, `{shown(tenant)}`, was revoked.")
                return principal
        raise ServeError("invalid_key", "this is neither control's token (in the file control.token) nor a known key")


def _role_of_scopes(scopes: Iterable[str]) -> str | None:
    return next((scope for scope in ("admin", "metrics") if scope in scopes), None)


def _speaker(issuer: Issuer, claims: dict[str, Any]) -> Speaker:
    """By its issuer's configuration: of the roles that its claims come to, it has the highest."""
    subject = text_claim(claims, "sub")
    if not subject:
        raise ServeError("invalid_token", "This token has no `sub`: control writes down who did what.")
    name = shown(subject)
    if name != subject:  # whoever it is stays the same one, and nobody else
        name = f"sha256-{hashlib.sha256(subject.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"
    words = words_claim(claims, issuer.roles_claim) if issuer.roles_claim is not None else []
    roles = [issuer.roles[word] for word in words if word in issuer.roles]
    principal = Principal(f"oidc:{issuer.name}:{name}", max(roles, key=ROLES.index, default=None))
    tenant = text_claim(claims, issuer.tenant_claim)
    if tenant and issuer.tenants:
        tenant = issuer.tenants.get(tenant)
    return Speaker(principal, tenant or None)

"""Who is asking: the immutable snapshot of keys and routes, looked up by SHA-256 digest.

A snapshot is replaced whole; nothing here ever writes one. A flood of wrong keys costs one digest and one
dictionary look-up each, and no memory.
"""

import copy
import hashlib
import hmac
import os
from collections.abc import Sequence
from typing import Final

import msgspec

from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.limits import Rates, Subject
from vitalis_serve.gateway.route_policy import RoutePolicy
from vitalis_serve.gateway.tokens import Grant, grant
from vitalis_serve.tokens import Issuer, Memory, Tokens, looks_like_jwt, shown

SALT_LENGTH: Final = 32  # hex digits
TOKEN_MARK_LENGTH: Final = 12  # hex digits


class Key(msgspec.Struct, frozen=True):
    """A credential of a tenant. `expires_at` in Unix seconds; `routes` may be ["*"].

    While a key is rotated the secret before opens it too, until `old_until`. A token's (`tokens.py`) has no digest."""

    id: str
    digest: str
    tenant: str
    scopes: tuple[str, ...] = ("inference",)
    routes: tuple[str, ...] = ("*",)
    class_: str = msgspec.field(default="standard", name="class")
    expires_at: float | None = None
    old_digest: str | None = None
    old_until: float | None = None
    rates: Rates | None = None

    def may_use(self, route: str) -> bool:
        return "*" in self.routes or route in self.routes


class Defaults(msgspec.Struct, frozen=True):
    """What a route sets where the caller says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    reasoning_effort: str | None = None
    max_tokens: int | None = None


class Limits(msgspec.Struct, frozen=True):
    """What a route allows at most. Tokens, counts, and bytes of JSON."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_output_bytes: int | None = None


class Weight(msgspec.Struct, frozen=True):
    """An engine's model and its part of a route's conversations, relative to the other weights."""

    model: str
    weight: float


_NO_DEFAULTS: Final = Defaults()
_NO_LIMITS: Final = Limits()


class Route(msgspec.Struct, frozen=True):
    """A public model name and the engine's name for what it maps to.

    `class_`: of its requests, whatever their key's; None leaves it to the key. `fallbacks`: engine models in order.
    """

    name: str
    model: str
    class_: str | None = msgspec.field(default=None, name="class")
    defaults: Defaults = _NO_DEFAULTS
    limits: Limits = _NO_LIMITS
    preamble: str = ""
    weights: tuple[Weight, ...] = ()
    fallbacks: tuple[str, ...] = ()
    rates: Rates | None = None

    def class_for(self, key: Key) -> str:
        """The class of a request; no wish of the caller's has a part in it."""
        return self.class_ or key.class_


class Tenant(msgspec.Struct, frozen=True):
    """Tenants of the same `cache_group` share a prefix cache; "" shares with nobody. `weight`: its share of the fair
    queue."""

    name: str
    status: str = "active"
    cache_group: str = ""
    weight: float = 1.0
    rates: Rates | None = None


class Snapshot(msgspec.Struct, frozen=True):
    """What control pushes: see `control/snapshots.py`.

    cache_secret: the deployment's, from which the tenants' salts come. A snapshot without one still keeps tenants
    apart, by a secret of this process alone. route_rates: limits of routes that are not configured but offered because
    engines serve them.
    """

    version: int
    keys: tuple[Key, ...] = ()
    routes: tuple[Route, ...] = ()
    tenants: tuple[Tenant, ...] = ()
    cache_secret: str = ""
    route_rates: dict[str, Rates] = {}
    issuers: tuple[Issuer, ...] = ()


_DECODER: Final = msgspec.json.Decoder(Snapshot)
_NEVER: Final = float("inf")


class Use(msgspec.Struct, frozen=True):
    """What one key gets on one route: looked up once for a snapshot, because a request needs all of it.

    sharers: who shares a prefix cache with its tenant. salt: `cache_salt` of its requests, as JSON. subjects: whose
    limits hold."""

    key: Key
    route: Route
    class_: str
    policy: RoutePolicy | None
    sharers: bytes
    salt: msgspec.Raw
    weight: float
    subjects: tuple[Subject, ...]


class KeyTable:
    """One snapshot, indexed. Build a new one for a new snapshot and replace it by assignment."""

    __slots__ = (
        "_active", "_by_digest", "_by_grant", "_cache_groups", "_cache_secret", "_configured", "_rates",
        "_route_rates", "_salts", "_tokens", "_weights", "uses", "policies", "routes", "version",
    )  # fmt: skip

    def __init__(self, snapshot: Snapshot, memory: Memory[Grant] | None = None) -> None:
        """`memory`: of the tokens verified under earlier snapshots."""
        memory = Memory() if memory is None else memory
        self.version = snapshot.version
        # The secrets before a rotation first: they never stand in the way of one that is in force.
        self._by_digest = {
            bytes.fromhex(k.old_digest): (k, min(k.old_until or 0, k.expires_at or _NEVER))
            for k in snapshot.keys
            if k.old_digest is not None
        } | {bytes.fromhex(k.digest): (k, k.expires_at or _NEVER) for k in snapshot.keys}
        self._tokens = Tokens(snapshot.issuers, memory, grant) if snapshot.issuers else None
        self._by_grant: dict[Grant, Key] = {}
        self._active = {t.name: t.status == "active" for t in snapshot.tenants}
        self.routes = {r.name: r for r in snapshot.routes}
        self.policies = {r.name: policy for r in snapshot.routes if (policy := RoutePolicy.of(r)) is not None}
        self._cache_groups = {t.name: t.cache_group for t in snapshot.tenants if t.cache_group}
        self._weights = {t.name: t.weight for t in snapshot.tenants}
        self._rates = {t.name: t.rates for t in snapshot.tenants}
        self._route_rates = snapshot.route_rates
        self._cache_secret = snapshot.cache_secret.encode() or os.urandom(32)
        self._salts: dict[str, msgspec.Raw] = {}
        self.uses: dict[tuple[str, str], Use] = {}
        self._configured = bool(self.routes)

    @staticmethod
    def decode(document: bytes, memory: Memory[Grant] | None = None) -> "KeyTable":
        """Raises msgspec.DecodeError or ValueError where the document is not a snapshot."""
        return KeyTable(_DECODER.decode(document), memory)

    def offering(self, models: Sequence[str]) -> "KeyTable":
        """The same keys, with one route for each of these models. Itself where that changes nothing, or where the
        routes were configured."""
        if self._configured or tuple(self.routes) == tuple(models):
            return self
        table = copy.copy(self)
        table.routes = {name: Route(name, name, rates=self._route_rates.get(name)) for name in models}
        table.uses = {}  # of other routes
        return table

    def identify(self, token: bytes, now: float) -> tuple[Key, float]:
        """The key behind a secret or a token, and until when it opens anything; times in Unix seconds. ServeError
        invalid_key, expired_key or invalid_token."""
        digest = hashlib.sha256(token).digest()
        found = self._by_digest.get(digest)
        if found is None:
            if self._tokens is not None and looks_like_jwt(token):
                verified = self._tokens.verify(token, digest, now)
                return self._granted(verified.meaning), verified.until
            raise ServeError("invalid_key", "This key is not known, or it was revoked.")
        if now >= found[1]:
            if found[1] != found[0].expires_at:
                raise ServeError("expired_key", "This secret was replaced by a newer one of the same key.")
            raise ServeError("expired_key", "This key has expired; ask for a new one.")
        return found

    def _granted(self, grant: Grant) -> Key:
        """One key for all tokens that come to the same; its tenant is looked up each time the credential is."""
        key = self._by_grant.get(grant)
        if key is None:
            active = self._active.get(grant.tenant)
            if active is None:
                raise ServeError("invalid_token", f"This token's tenant, `{shown(grant.tenant)}`, does not exist here.")
            if not active:
                raise ServeError("invalid_token", f"This token's tenant, `{shown(grant.tenant)}`, was revoked.")
            # Tokens of one issuer that come to different things are told apart in the ledger and the log.
            mark = hashlib.sha256(msgspec.json.encode(grant)).hexdigest()[:TOKEN_MARK_LENGTH]
            key = self._by_grant[grant] = Key(
                f"oidc:{grant.issuer}:{mark}", "", grant.tenant, grant.scopes, grant.routes, grant.class_
            )
        return key

    def allowed(self, key: Key) -> Sequence[Route]:
        """The routes that a key may use, in the order of the configuration."""
        return [route for name, route in self.routes.items() if key.may_use(name)]

    def route(self, key: Key, name: str) -> Route:
        """ServeError model_not_found (naming what the key may use), route_not_allowed, or no_ready_engine before any
        route is known."""
        if not self.routes:
            raise ServeError("no_ready_engine", "No engine has said yet which models it serves.", retry_after=5)
        route = self.routes.get(name)
        if route is None:
            known = ", ".join(r.name for r in self.allowed(key)) or "none"
            raise ServeError(
                "model_not_found",
                f"The model `{name[:128]}` does not exist here. This key may use: {known}.",
                param="model",
            )
        if not key.may_use(name):
            known = ", ".join(r.name for r in self.allowed(key)) or "none"
            raise ServeError("route_not_allowed", f"This key may not use `{name}`. It may use: {known}.", param="model")
        return route

    def use(self, key: Key, model: str) -> Use:
        """As `route`, with all that the key gets there."""
        found = self.uses.get((key.id, model))
        if found is None or found.key is not key:  # one of an older snapshot may come late
            route = self.route(key, model)
            found = self.uses[key.id, model] = Use(
                key,
                route,
                route.class_for(key),
                self.policies.get(route.name),
                self.sharers(key.tenant).encode(),
                self.salt(key.tenant),
                self._weights.get(key.tenant, 1.0),
                self._subjects(key, route),
            )
        return found

    def _subjects(self, key: Key, route: Route) -> tuple[Subject, ...]:
        limited = (
            ("key", key.id, key.rates),
            ("tenant", key.tenant, self._rates.get(key.tenant)),
            ("route", route.name, route.rates),
        )
        return tuple(
            Subject(f"{kind}:{name}", rates, "" if kind == "route" else key.tenant)
            for kind, name, rates in limited
            if rates is not None
        )

    def sharers(self, tenant: str) -> str:
        """Who shares a prefix cache with a tenant: its group (no tenant's name has a colon), else itself alone."""
        group = self._cache_groups.get(tenant)
        return tenant if group is None else f"group:{group}"

    def salt(self, tenant: str) -> msgspec.Raw:
        """The `cache_salt` of a tenant's requests, as JSON: who does not know it can neither read nor time what
        another tenant left in an engine's prefix cache."""
        salt = self._salts.get(tenant)
        if salt is None:
            group = self._cache_groups.get(tenant)
            # A tenant that is called like a group is not in it.
            owner = f"tenant:{tenant}" if group is None else f"group:{group}"
            digest = hmac.digest(self._cache_secret, owner.encode(), "sha256").hex()[:SALT_LENGTH]
            salt = self._salts[tenant] = msgspec.Raw(b'"%b"' % digest.encode())
        return salt

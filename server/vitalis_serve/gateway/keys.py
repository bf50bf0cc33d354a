"""Who is asking: the immutable snapshot of keys and routes, looked up by SHA-256 digest.

A snapshot is replaced whole; nothing here ever writes one. A flood of wrong keys costs one digest and one
dictionary look-up each, and no memory.
"""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from vitalis_serve.errors import ServeError


class Key(msgspec.Struct, frozen=True):
    """A credential of a tenant. `expires_at` in Unix seconds; `routes` may be ["*"]."""

    id: str
    digest: str
    tenant: str
    scopes: tuple[str, ...] = ("inference",)
    routes: tuple[str, ...] = ("*",)
    class_: str = msgspec.field(default="standard", name="class")
    expires_at: float | None = None

    def may_use(self, route: str) -> bool:
        return "*" in self.routes or route in self.routes


class Route(msgspec.Struct, frozen=True):
    """A public model name and the engine's name for what it maps to."""

    name: str
    model: str


class Snapshot(msgspec.Struct, frozen=True):
    """What control pushes: see `control/snapshots.py`."""

    version: int
    keys: tuple[Key, ...] = ()
    routes: tuple[Route, ...] = ()
    tenants: tuple[Any, ...] = ()


_DECODER: Final = msgspec.json.Decoder(Snapshot)
_NEVER: Final = float("inf")


class KeyTable:
    """One snapshot, indexed. Build a new one for a new snapshot and replace it by assignment."""

    __slots__ = ("_by_digest", "_configured", "_names_by_key", "routes", "version")

    def __init__(self, snapshot: Snapshot) -> None:
        self.version = snapshot.version
        self._by_digest = {bytes.fromhex(k.digest): (k, k.expires_at or _NEVER) for k in snapshot.keys}
        self.routes = {r.name: r for r in snapshot.routes}
        self._configured = bool(self.routes)

    @staticmethod
    def decode(document: bytes) -> "KeyTable":
        """Raises msgspec.DecodeError or ValueError where the document is not a snapshot."""
        return KeyTable(_DECODER.decode(document))

    def offering(self, models: Sequence[str]) -> "KeyTable":
        """The same keys, with one route for each of these models. Itself where that changes nothing, or where the
        routes were configured."""
        if self._configured or tuple(self.routes) == tuple(models):
            return self
        table = copy.copy(self)
        table.routes = {name: Route(name, name) for name in models}
        return table

    def identify(self, token: bytes, now: float) -> Key:
        """The key behind a token; `now` in Unix seconds. ServeError invalid_key or expired_key."""
        found = self._by_digest.get(hashlib.sha256(token).digest())
        if found is None:
            raise ServeError("invalid_key", "This key is not known, or it was revoked.")
        if now >= found[1]:
            raise ServeError("expired_key", "This key has expired; ask for a new one.")
        return found[0]

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

"""What a token opens on the data plane: the tenant, class, scopes and routes that its claims come to. Pure."""

from typing import Any

import msgspec

from vitalis_serve.errors import ServeError
from vitalis_serve.tokens import Issuer, shown, text_claim, words_claim


class Grant(msgspec.Struct, frozen=True):
    """`issuer`: its name in the configuration. The tenant may be one that does not exist."""

    issuer: str
    tenant: str
    class_: str
    scopes: tuple[str, ...]
    routes: tuple[str, ...]


def grant(issuer: Issuer, claims: dict[str, Any]) -> Grant:
    """By the issuer's configuration. Raises ServeError invalid_token."""
    name = text_claim(claims, issuer.tenant_claim)
    if not name:
        raise ServeError("invalid_token", f"This token names no tenant: the claim `{issuer.tenant_claim}` is missing.")
    tenant = issuer.tenants.get(name) if issuer.tenants else name
    if tenant is None:
        raise ServeError("invalid_token", f"This token's `{issuer.tenant_claim}`, `{shown(name)}`, is no tenant here.")
    class_ = issuer.class_
    scopes: tuple[str, ...] = ("inference",)
    if issuer.class_claim is not None:
        class_ = issuer.classes.get(text_claim(claims, issuer.class_claim) or "", class_)
    if issuer.scopes_claim is not None:
        words = words_claim(claims, issuer.scopes_claim)
        scopes = tuple(sorted({issuer.scopes[word] for word in words if word in issuer.scopes}))
    return Grant(issuer.name, tenant, class_, scopes, issuer.routes)

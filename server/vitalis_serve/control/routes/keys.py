"""Keys: credentials of tenants."""

import time
from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import Depends, Query, Request
from fastapi.routing import APIRouter

from vitalis_serve.control import schemas
from vitalis_serve.control.changes import Control, act
from vitalis_serve.errors import ServeError
from vitalis_serve.store import records
from vitalis_serve.store.records import nearest
from vitalis_serve.store.secrets import new_key


def router(control: Control) -> APIRouter:
    routes = APIRouter(prefix="/v1/keys", tags=["keys"])

    def routes_exist(body: schemas.NewKey) -> schemas.NewKey:
        # Without routes of its own the gateway offers what the engines say that they serve.
        known_routes = {route.name for route in control.options.routes} or {*control.supervision.fleet.models}
        known_routes |= {"*"}
        for name in body.routes:
            if name not in known_routes:
                raise ServeError(
                    "invalid_request",
                    f"there is no route {name!r}{nearest(name, known_routes)}",
                    param="routes",
                )
        return body

    @routes.get("")
    async def keys(
        tenant: Annotated[str | None, Query(description="Only this tenant's.")] = None,
    ) -> schemas.Keys:
        now = int(time.time())
        return schemas.Keys(keys=[_key(key, now) for key in await control.store.keys(tenant)])

    @routes.post("", status_code=201)
    async def create(request: Request, body: Annotated[schemas.NewKey, Depends(routes_exist)]) -> schemas.KeyCreated:
        """Makes a key. The answer is the only place where it is ever seen whole."""
        now = int(time.time())
        made = new_key()
        key = records.Key(
            id=made.id,
            tenant=body.tenant,
            digest=made.digest,
            created_at=now,
            name=body.name,
            class_=body.class_,
            scopes=body.scopes,
            routes=body.routes,
            notes=body.notes,
            expires_at=None if body.expires_in_seconds is None else now + body.expires_in_seconds,
        )
        details = body.model_dump(mode="json", by_alias=True)
        _, version, applied = await control.change(
            act(request, "key.create", made.id, details), lambda change: change.add_key(key)
        )
        return schemas.KeyCreated(key=made.key, **_key(key, now).model_dump(), version=version, applied=applied)

    @routes.delete("/{key_id}")
    async def revoke(request: Request, key_id: str) -> schemas.KeyRevoked:
        """The key opens nothing any more; running streams finish. Of one that was revoked before nothing changes."""
        now = int(time.time())
        (key, already), version, applied = await control.change(
            act(request, "key.revoke", key_id), lambda change: change.revoke_key(key_id, now)
        )
        return schemas.KeyRevoked(
            **_key(key, now).model_dump(), version=version, applied=applied, already_revoked=already
        )

    return routes


def _key(key: records.Key, now: int) -> schemas.Key:
    fields = asdict(key)
    del fields["digest"]
    status: Literal["active", "expired", "revoked"] = "active"
    if key.revoked_at is not None:
        status = "revoked"
    elif key.expires_at is not None and key.expires_at <= now:
        status = "expired"
    return schemas.Key(**fields, status=status)

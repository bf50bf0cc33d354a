"""Keys: credentials of tenants."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.routing import APIRouter

from vitalis_serve.control import schemas
from vitalis_serve.control.changes import Control, act
from vitalis_serve.errors import ServeError
from vitalis_serve.store import records
from vitalis_serve.store.rates import Rates, Subject
from vitalis_serve.store.records import Change, nearest
from vitalis_serve.store.secrets import new_key


def router(control: Control) -> APIRouter:
    routes = APIRouter(prefix="/v1/keys", tags=["keys"])

    def new(body: schemas.NewKey) -> schemas.NewKey:
        _routes_exist(control, body.routes)
        return body

    @routes.get("")
    async def keys(
        tenant: Annotated[str | None, Query(description="Only this tenant's.")] = None,
    ) -> schemas.Keys:
        now = int(time.time())
        rates = await control.store.rates()
        return schemas.Keys(keys=[schemas.Key(**_fields(k, rates, now)) for k in await control.store.keys(tenant)])

    @routes.post("", status_code=201)
    async def create(request: Request, body: Annotated[schemas.NewKey, Depends(new)]) -> schemas.KeyCreated:
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
        rates = {Subject("key", made.id): Rates(**body.limits.given())}

        async def work(change: Change) -> None:
            await change.add_key(key)
            await change.set_rates(rates)

        details = body.model_dump(mode="json", by_alias=True) | {"limits": body.limits.given()}
        _, version, applied = await control.change(act(request, "key.create", made.id, details), work)
        return schemas.KeyCreated(key=made.key, **_fields(key, rates, now), version=version, applied=applied)

    routes.include_router(_one_router(control))
    return routes


def _one_router(control: Control) -> APIRouter:
    """What is done with one key."""
    routes = APIRouter(prefix="/{key_id}")

    def existing(body: schemas.KeyChanges) -> schemas.KeyChanges:
        _routes_exist(control, body.routes)
        return body

    @routes.post("/rotate")
    async def rotate(request: Request, key_id: str, body: schemas.Rotation) -> schemas.KeyCreated:
        """Gives a key another secret, seen whole only in the answer. The one before opens too for `overlap_seconds`,
        the one before that no longer."""
        now = int(time.time())
        made = new_key(key_id)

        async def work(change: Change) -> dict[str, Any]:
            key = await change.rotate_key(key_id, made.digest, now, body.overlap_seconds)
            return _fields(key, await change.rates(), now)

        recorded = act(request, "key.rotate", key_id, body.model_dump())
        fields, version, applied = await control.change(recorded, work)
        return schemas.KeyCreated(key=made.key, **fields, version=version, applied=applied)

    @routes.patch("")
    async def change_key(
        request: Request, key_id: str, body: Annotated[schemas.KeyChanges, Depends(existing)]
    ) -> schemas.KeyChanged:
        """Changes what is given. Not of a key that was revoked: that is for good."""
        now = int(time.time())
        values = body.model_dump(exclude_unset=True)
        if "expires_in_seconds" in values:
            seconds = values.pop("expires_in_seconds")
            values["expires_at"] = None if seconds is None else now + seconds

        async def work(change: Change) -> dict[str, Any]:
            return _fields(await change.change_key(key_id, values), await change.rates(), now)

        details = body.model_dump(mode="json", by_alias=True, exclude_unset=True)
        fields, version, applied = await control.change(act(request, "key.change", key_id, details), work)
        return schemas.KeyChanged(**fields, version=version, applied=applied)

    @routes.delete("")
    async def revoke(request: Request, key_id: str) -> schemas.KeyRevoked:
        """The key opens nothing any more; running streams finish. Of one that was revoked before nothing changes."""
        now = int(time.time())

        async def work(change: Change) -> tuple[dict[str, Any], bool]:
            key, already = await change.revoke_key(key_id, now)
            return _fields(key, await change.rates(), now), already

        (fields, already), version, applied = await control.change(act(request, "key.revoke", key_id), work)
        return schemas.KeyRevoked(**fields, version=version, applied=applied, already_revoked=already)

    return routes


def _routes_exist(control: Control, names: Iterable[str]) -> None:
    known = control.route_names() | {"*"}
    for name in names:
        if name not in known:
            raise ServeError("invalid_request", f"there is no route {name!r}{nearest(name, known)}", param="routes")


def _fields(key: records.Key, rates: Mapping[Subject, Rates], now: int) -> dict[str, Any]:
    """Of `schemas.Key`: without what opens it."""
    fields = asdict(key)
    del fields["digest"], fields["old_digest"]
    if key.old_until is not None and key.old_until <= now:
        fields["old_until"] = None
    status = "active"
    if key.revoked_at is not None:
        status = "revoked"
    elif key.expires_at is not None and key.expires_at <= now:
        status = "expired"
    return {**fields, "status": status, "limits": asdict(rates.get(Subject("key", key.id), Rates()))}

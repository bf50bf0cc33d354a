"""Tenants: who keys belong to."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import Request
from fastapi.routing import APIRouter

from vitalis_serve.control import schemas
from vitalis_serve.control.changes import Control, act
from vitalis_serve.store import records
from vitalis_serve.store.rates import Rates, Subject
from vitalis_serve.store.records import Change


def router(control: Control) -> APIRouter:
    routes = APIRouter(prefix="/v1/tenants", tags=["tenants"])

    @routes.get("")
    async def tenants() -> schemas.Tenants:
        rates = await control.store.rates()
        return schemas.Tenants(tenants=[schemas.Tenant(**_fields(t, rates)) for t in await control.store.tenants()])

    @routes.post("", status_code=201)
    async def create(request: Request, body: schemas.NewTenant) -> schemas.TenantChanged:
        tenant = records.Tenant(body.name, int(time.time()), notes=body.notes)
        rates = {Subject("tenant", body.name): Rates(**body.limits.given())}

        async def work(change: Change) -> None:
            await change.add_tenant(tenant)
            await change.set_rates(rates)

        details = {"notes": body.notes, "limits": body.limits.given()}
        _, version, applied = await control.change(act(request, "tenant.create", body.name, details), work)
        return schemas.TenantChanged(**_fields(tenant, rates), version=version, applied=applied)

    @routes.delete("/{name}")
    async def revoke(request: Request, name: str) -> schemas.TenantChanged:
        """None of its keys opens anything any more. The name stays taken."""

        async def work(change: Change) -> dict[str, Any]:
            return _fields(await change.disable_tenant(name), await change.rates())

        fields, version, applied = await control.change(act(request, "tenant.revoke", name), work)
        return schemas.TenantChanged(**fields, version=version, applied=applied)

    return routes


def _fields(tenant: records.Tenant, rates: Mapping[Subject, Rates]) -> dict[str, Any]:
    return {**asdict(tenant), "limits": asdict(rates.get(Subject("tenant", tenant.name), Rates()))}

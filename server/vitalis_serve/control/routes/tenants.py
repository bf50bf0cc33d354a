"""Tenants: who keys belong to."""

import time
from dataclasses import asdict

from fastapi import Request
from fastapi.routing import APIRouter

from vitalis_serve.control import schemas
from vitalis_serve.control.changes import Control, act
from vitalis_serve.store import records


def router(control: Control) -> APIRouter:
    routes = APIRouter(prefix="/v1/tenants", tags=["tenants"])

    @routes.get("")
    async def tenants() -> schemas.Tenants:
        found = await control.store.tenants()
        return schemas.Tenants(tenants=[schemas.Tenant(**asdict(tenant)) for tenant in found])

    @routes.post("", status_code=201)
    async def create(request: Request, body: schemas.NewTenant) -> schemas.TenantChanged:
        tenant = records.Tenant(body.name, int(time.time()), notes=body.notes)
        _, version, applied = await control.change(
            act(request, "tenant.create", body.name), lambda change: change.add_tenant(tenant)
        )
        return schemas.TenantChanged(**asdict(tenant), version=version, applied=applied)

    @routes.delete("/{name}")
    async def revoke(request: Request, name: str) -> schemas.TenantChanged:
        """None of its keys opens anything any more. The name stays taken."""
        tenant, version, applied = await control.change(
            act(request, "tenant.revoke", name), lambda change: change.disable_tenant(name)
        )
        return schemas.TenantChanged(**asdict(tenant), version=version, applied=applied)

    return routes

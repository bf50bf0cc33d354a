"""Many tenants, keys and limits at once, from a file: all of it or nothing."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

from fastapi import Query, Request
from fastapi.routing import APIRouter

from vitalis_serve.control import import_file, importing, schemas
from vitalis_serve.control.changes import Control, act
from vitalis_serve.store.records import Act, Change

_BODY = {"required": True, "content": {"application/yaml": {"schema": {"type": "string"}}}}


def router(control: Control) -> APIRouter:
    routes = APIRouter(prefix="/v1/import", tags=["import"])

    @routes.post("", openapi_extra={"requestBody": _BODY})
    async def take(
        request: Request,
        skip_existing: Annotated[bool, Query(description="Leave what is there already as it is.")] = False,
    ) -> schemas.Imported:
        """Takes a YAML file with lists `tenants`, `keys` and `limits`. Where a row is wrong nothing is imported, and
        the answer names every such row with its line. New secrets are seen only in the answer."""
        try:
            document = await asyncio.to_thread(import_file.read, await request.body())
        except import_file.Refusal as refusal:
            raise refusal.error() from None

        async def work(change: Change) -> importing.Plan:
            present = importing.Present(
                {tenant.name: tenant.status for tenant in await change.tenants()},
                tuple(await change.keys()),
                (await change.rates()).keys(),
                control.route_names(),
            )
            try:
                plan = await asyncio.to_thread(
                    importing.plan, document, present, int(time.time()), skip_existing=skip_existing
                )
            except import_file.Refusal as refusal:
                raise refusal.error() from None
            await change.add_tenants(plan.tenants)
            await change.add_keys(plan.keys)
            await change.set_rates(plan.rates)
            return plan

        plan, version, applied = await control.change(lambda plan: _acts(request, plan), work)
        return schemas.Imported(
            tenants=len(plan.tenants),
            keys=len(plan.keys),
            limits=len(plan.rates),
            skipped=plan.skipped,
            secrets=[schemas.Secret(id=k.id, tenant=k.tenant, name=k.name, key=whole) for k, whole in plan.secrets],
            version=version,
            applied=applied,
        )

    return routes


def _acts(request: Request, plan: importing.Plan) -> Iterator[Act]:
    """One for each row, and one for the import."""
    for tenant in plan.tenants:
        yield act(request, "tenant.create", tenant.name, {"notes": tenant.notes})
    for key in plan.keys:
        details = {name: value for name, value in asdict(key).items() if name not in ("id", "digest", "old_digest")}
        yield act(request, "key.create", key.id, details)
    for subject, rates in plan.rates.items():
        yield act(request, "limits.set", f"{subject.kind}:{subject.name}", rates.given())
    counts = {"tenants": len(plan.tenants), "keys": len(plan.keys), "limits": len(plan.rates)}
    yield act(request, "import", "file", counts | {"skipped": plan.skipped})

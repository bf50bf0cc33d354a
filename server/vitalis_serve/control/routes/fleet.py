"""Replicas: what they are doing, commands to them, and where a request would go."""

import msgspec
from fastapi import Request
from fastapi.routing import APIRouter

from vitalis_serve.control import schemas
from vitalis_serve.control.changes import Control
from vitalis_serve.errors import ServeError
from vitalis_serve.store.records import nearest


def router(control: Control) -> APIRouter:
    routes = APIRouter(prefix="/v1/fleet", tags=["fleet"])

    @routes.get("")
    async def fleet() -> schemas.Fleet:
        """Every replica as the supervisor published it last."""
        return listing(control)

    @routes.post("/scale")
    async def scale(request: Request, body: schemas.Scale) -> schemas.FleetDone:
        """Answers when the fleet has as many replicas as asked for, or could not get them."""
        return await control.command(request, {"command": "scale", "replicas": body.replicas})

    @routes.post("/restart")
    async def restart_all(request: Request) -> schemas.FleetDone:
        """All replicas, one after the other."""
        return await control.command(request, {"command": "restart", "replica": None})

    @routes.post("/{replica}/restart")
    async def restart(request: Request, replica: str) -> schemas.FleetDone:
        """Drains a replica, then starts it anew."""
        return await control.command(request, {"command": "restart", "replica": replica})

    @routes.post("/{replica}/drain")
    async def drain(request: Request, replica: str) -> schemas.FleetDone:
        """No new requests go there; answers when the last one has ended."""
        return await control.command(request, {"command": "drain", "replica": replica})

    return routes


def explain_router(control: Control) -> APIRouter:
    routes = APIRouter(tags=["fleet"])

    @routes.post("/v1/explain")
    async def explain(request: Request, body: schemas.Question) -> schemas.Explanation:
        """Which replica a request would get just now, and why. Changes nothing; refused as the request would be."""
        if body.tenant:
            names = [tenant.name for tenant in await control.store.tenants()]
            if body.tenant not in names:
                raise ServeError("tenant_not_found", f"there is no tenant {body.tenant!r}{nearest(body.tenant, names)}")
        question = body.model_dump(by_alias=True)
        # Homes go by the bytes that a client wrote, spaces included.
        try:
            question["body"] = str(memoryview(_as_written(await request.body()).body), "utf-8")
        except (msgspec.DecodeError, UnicodeDecodeError):  # NaN, or another encoding: Python reads more than JSON
            raise ServeError("invalid_json", "the body is not JSON") from None
        said = await control.workers.explain(question, control.options.collect_seconds)
        return schemas.Explanation(**said)

    return routes


class _WithBody(msgspec.Struct):
    body: msgspec.Raw = msgspec.Raw(b"{}")


_as_written = msgspec.json.Decoder(_WithBody).decode


def listing(control: Control) -> schemas.Fleet:
    return schemas.Fleet(**control.supervision.fleet.to_json())

"""Control's HTTP API. Routes decide nothing: changes go through `snapshots.py`, fleet commands to the
supervisor.

Everything but /healthz and the documents (/docs, /openapi.json) needs control's token. Answers that are not a
success carry the envelope of the data plane.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from fastapi import Depends, FastAPI, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRouter
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from vitalis_serve import __version__
from vitalis_serve.control import documents, exposition, schemas
from vitalis_serve.control.access import Access
from vitalis_serve.control.guard import Guard, error_response
from vitalis_serve.control.options import ControlOptions
from vitalis_serve.control.snapshots import Snapshots
from vitalis_serve.control.supervision import Supervision
from vitalis_serve.control.workers import Workers
from vitalis_serve.errors import ServeError
from vitalis_serve.fleet import TAKES_REQUESTS
from vitalis_serve.store import records
from vitalis_serve.store.records import Act, Change, Store, nearest
from vitalis_serve.store.secrets import new_key

logger = logging.getLogger(__name__)
T = TypeVar("T")
_WHO: Final = "control.token"
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "default": {"model": schemas.Error, "description": "Refused or failed; `error.code` says why."}
}


class Control:
    """What the routes work with. Built once, by `process.py`."""

    def __init__(
        self,
        options: ControlOptions,
        store: Store,
        workers: Workers,
        snapshots: Snapshots,
        supervision: Supervision,
    ) -> None:
        self.options = options
        self.store = store
        self.workers = workers
        self.snapshots = snapshots
        self.supervision = supervision

    async def change(self, act: Act, work: Callable[[Change], Awaitable[T]]) -> tuple[T, int, bool]:
        """A change with its audit row, published; and whether the workers have it yet."""

        async def recorded(change: Change) -> T:
            result = await work(change)
            await change.record(act)
            return result

        result, version = await self.snapshots.change(recorded)
        applied = await self.workers.applied(version, self.options.workers, self.options.apply_seconds)
        return result, version, applied

    async def command(self, request: Request, document: dict[str, Any]) -> schemas.FleetDone:
        """A fleet command, in the audit table before it is sent and again with its outcome."""
        action = f"fleet.{document['command']}"
        subject = str(document.get("replica") or "fleet")
        details = {k: v for k, v in document.items() if k not in ("command", "replica")}
        await self._record(act(request, action, subject, details))
        outcome: dict[str, Any] = {"ok": False, "message": "not finished"}
        try:
            *progress, last = await self.supervision.command(document)
            outcome = {"ok": True, "message": str(last.get("message", ""))}
        except ServeError as error:
            outcome = {"ok": False, "message": error.message}
            raise
        finally:
            await self._record(act(request, f"{action}.done", subject, outcome))
        return schemas.FleetDone(
            message=str(outcome["message"]), progress=[str(line.get("message", "")) for line in progress]
        )

    async def _record(self, act: Act) -> None:
        """The log takes what the store cannot: a full disk must not keep anyone from draining a replica."""
        try:
            async with self.store.change() as change:
                await change.record(act)
        except ServeError as error:
            logger.error("audit row not stored", extra={"row": asdict(act), "reason": error.message})


def act(request: Request, action: str, subject: str, details: dict[str, Any] | None = None) -> Act:
    """The audit row of a request: who, what, when, from where."""
    peer = f"{request.client.host}:{request.client.port}" if request.client else "unknown"
    agent = request.headers.get("user-agent", "")
    return Act(int(time.time()), _WHO, action, subject, f"{peer} {agent}"[:256].rstrip(), details or {})


def create_app(control: Control, access: Access) -> FastAPI:
    """The application. Its first layer is the guard: nothing behind it is reached without the token."""
    app = FastAPI(
        title="vitalis-serve control",
        version=__version__,
        description="The admin plane: fleet, tenants, keys, health and metrics.",
        docs_url=None,
        redoc_url=None,
    )

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(documents.page(app.openapi()), headers=documents.HEADERS)

    app.add_exception_handler(ServeError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _crashed)
    app.include_router(_health_routes(control), responses=_ERRORS)
    secured = [Security(HTTPBearer(auto_error=False, description="The token in the file control.token."))]
    for router in (
        _watch_routes(control),
        _fleet_routes(control),
        _explain_routes(control),
        _tenant_routes(control),
        _key_routes(control),
    ):
        app.include_router(router, responses=_ERRORS, dependencies=secured)
    app.add_middleware(Guard, access=access)
    return app


def _health_routes(control: Control) -> APIRouter:
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz")
    async def healthz() -> schemas.Alive:
        """This process lives."""
        return schemas.Alive(status="ok")

    return routes


def _watch_routes(control: Control) -> APIRouter:
    routes = APIRouter(tags=["health"])

    @routes.get("/health", responses={503: {"model": schemas.Health}})
    async def health(response: Response) -> schemas.Health:
        """Whether requests can be answered: the fleet, the workers and the store."""
        store = schemas.StoreHealth(ok=True, detail="")
        try:
            await control.store.check()
        except ServeError as error:
            store = schemas.StoreHealth(ok=False, detail=error.message)
        workers = [schemas.Worker(**worker) for worker in control.workers.listing()]
        fleet = control.supervision.fleet
        ok = store.ok and bool(workers) and any(r.state in TAKES_REQUESTS for r in fleet.replicas)
        response.status_code = 200 if ok else 503
        return schemas.Health(
            status="ok" if ok else "degraded",
            fleet=_fleet(control),
            workers=workers,
            snapshot_version=control.snapshots.version,
            store=store,
        )

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus text: every worker's counts, asked for now, and the fleet's states."""
        reports = await control.workers.collect(control.options.collect_seconds)
        versions = {worker["name"]: worker["version"] for worker in control.workers.listing()}
        text = exposition.render(reports, control.supervision.fleet, versions)
        return Response(text, media_type=exposition.CONTENT_TYPE)

    @routes.get("/v1/audit", tags=["audit"])
    async def audit(
        limit: schemas.RowCount = 100,
        before: Annotated[schemas.RowId | None, Query(description="Only rows with an id below this one.")] = None,
    ) -> schemas.Acts:
        """Who changed what, newest first."""
        acts = await control.store.acts(limit, before)
        return schemas.Acts(audit=[schemas.Act(**asdict(row)) for row in acts])

    return routes


def _fleet_routes(control: Control) -> APIRouter:
    routes = APIRouter(prefix="/v1/fleet", tags=["fleet"])

    @routes.get("")
    async def fleet() -> schemas.Fleet:
        """Every replica as the supervisor published it last."""
        return _fleet(control)

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


def _explain_routes(control: Control) -> APIRouter:
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


def _tenant_routes(control: Control) -> APIRouter:
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


def _key_routes(control: Control) -> APIRouter:
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


def _fleet(control: Control) -> schemas.Fleet:
    return schemas.Fleet(**control.supervision.fleet.to_json())


def _key(key: records.Key, now: int) -> schemas.Key:
    fields = asdict(key)
    del fields["digest"]
    status: Literal["active", "expired", "revoked"] = "active"
    if key.revoked_at is not None:
        status = "revoked"
    elif key.expires_at is not None and key.expires_at <= now:
        status = "expired"
    return schemas.Key(**fields, status=status)


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServeError)
    return error_response(error)


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    """The first thing wrong with a request, as one sentence that names the field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return error_response(ServeError("invalid_json", "the body is not JSON"))
    where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    if where == "body":
        reason = "send a JSON object, and with it `content-type: application/json`"
    elif first["type"] == "missing":
        reason = "this field is missing"
    elif first["type"] == "extra_forbidden":
        reason = "there is no such field"
    else:
        reason = first["msg"].removeprefix("Value error, ")
    return error_response(ServeError("invalid_request", f"{where[:200]}: {reason}", param=where[:200]))


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ServeError):
        return error_response(error.__cause__)
    codes = {404: "unknown_path", 405: "method_not_allowed"}
    return error_response(ServeError(codes.get(error.status_code, "invalid_request"), str(error.detail)))


async def _crashed(_request: Request, _error: Exception) -> JSONResponse:
    """The server logs the traceback; the client gets none of it."""
    return error_response(ServeError("internal", "control failed; its log has the reason under this request id"))

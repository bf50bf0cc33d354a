"""Whether all is well: this process, the fleet, the workers, the store; metrics and the audit table."""

from dataclasses import asdict
from typing import Annotated

from fastapi import Query, Response
from fastapi.routing import APIRouter

from vitalis_serve.control import exposition, schemas
from vitalis_serve.control.changes import Control
from vitalis_serve.control.routes.fleet import listing
from vitalis_serve.errors import ServeError
from vitalis_serve.fleet import TAKES_REQUESTS


def open_router() -> APIRouter:
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz")
    async def healthz() -> schemas.Alive:
        """This process lives."""
        return schemas.Alive(status="ok")

    return routes


def router(control: Control) -> APIRouter:
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
            fleet=listing(control),
            workers=workers,
            snapshot_version=control.snapshots.version,
            store=store,
        )

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus text: every worker's counts, asked for now, and the fleet's states."""
        reports = await control.workers.collect(control.options.collect_seconds)
        versions = {worker["name"]: worker["version"] for worker in control.workers.listing()}
        ledger = None if control.ledger is None else control.ledger.figures()
        text = exposition.render(reports, control.supervision.fleet, versions, ledger)
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

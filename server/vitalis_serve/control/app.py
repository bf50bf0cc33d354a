"""Control's HTTP API: its routes (`routes/`), put together behind the guard.

Everything but /healthz and the documents (/docs, /openapi.json) needs a credential with a role (`access.py`). Answers
that are not a success carry the envelope of the data plane.
"""

from typing import Any, Final

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from vitalis_serve import __version__
from vitalis_serve.control import documents, schemas
from vitalis_serve.control.access import Access
from vitalis_serve.control.changes import Control
from vitalis_serve.control.guard import Guard, error_response
from vitalis_serve.control.refusals import reason
from vitalis_serve.control.routes import fleet, health, imports, keys, limits, tenants, usage
from vitalis_serve.errors import ServeError

_CREDENTIALS: Final = (
    "The token in the file control.token, a key with the scope `admin` (`metrics` for /metrics), or an OIDC token that"
    " has a role here."
)
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "default": {"model": schemas.Error, "description": "Refused or failed; `error.code` says why."}
}


def create_app(control: Control, access: Access) -> FastAPI:
    """The application. Its first layer is the guard: nothing behind it is reached without a credential."""
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
    app.include_router(health.open_router(), responses=_ERRORS)
    secured = [Security(HTTPBearer(auto_error=False, description=_CREDENTIALS))]
    for router in (
        health.router(control),
        fleet.router(control),
        fleet.explain_router(control),
        tenants.router(control),
        keys.router(control),
        limits.router(control),
        imports.router(control),
        usage.router(control),
    ):
        app.include_router(router, responses=_ERRORS, dependencies=secured)
    app.add_middleware(Guard, access=access)
    return app


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
    if where != "body":
        said = f"{where[:200]}: {reason(first)}"
    elif first["type"] == "value_error":  # about the body as a whole
        said = reason(first)
    else:
        said = "body: send a JSON object, and with it `content-type: application/json`"
    return error_response(ServeError("invalid_request", said, param=where[:200]))


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ServeError):
        return error_response(error.__cause__)
    codes = {404: "unknown_path", 405: "method_not_allowed"}
    return error_response(ServeError(codes.get(error.status_code, "invalid_request"), str(error.detail)))


async def _crashed(_request: Request, _error: Exception) -> JSONResponse:
    """The server logs the traceback; the client gets none of it."""
    return error_response(ServeError("internal", "control failed; its log has the reason under this request id"))

"""What was used: sums by tenant, key, route and day, and single requests for when somebody asks why."""

import re
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Final, TypeVar

import msgspec
from fastapi import Query, Response
from fastapi.routing import APIRouter
from pydantic import BaseModel, Field, StringConstraints

from vitalis_serve.control import schemas
from vitalis_serve.control.changes import Control
from vitalis_serve.errors import ServeError
from vitalis_serve.store.records import nearest
from vitalis_serve.store.usage import COUNTS, GROUPS, Range

T = TypeVar("T")
MOST_ROWS: Final = 50_000
_EPOCH: Final = date(1970, 1, 1)
_DRAIN_SECONDS: Final = 3.0
_DAY_FORM: Final = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


class Waiting(BaseModel):
    """What this host has on its disk and not yet in the store, so that it is in no sum; all 0 where all of it is in."""

    records: int
    bytes: int
    oldest_seconds: float


class Counts(BaseModel):
    """requests: that came to an end. failed: of those, the ones that ended otherwise than whole or by their client's
    leaving. estimated: whose tokens no engine told. cached_tokens are among the prompt's, reasoning_tokens among the
    completion's."""

    requests: int
    failed: int
    estimated: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


class Sum(Counts):
    """Has the groups that were asked for and no other."""

    day: Annotated[date | None, Field(description="UTC.")] = None
    tenant: str | None = None
    key: str | None = None
    route: str | None = None


class UsageSums(BaseModel):
    from_: Annotated[date, Field(alias="from")]
    to: date
    by: list[str]
    usage: list[Sum]
    total: Counts
    waiting: Waiting


class FinishedRequest(BaseModel):
    """Times in Unix milliseconds. `request_id` is the caller's; `id` is ours and unique."""

    id: str
    began_ms: int
    ended_ms: int
    tenant: str
    key: str
    route: str
    model: str
    api: str
    class_: Annotated[str, Field(alias="class")]
    request_id: str
    stream: bool
    outcome: str
    code: str
    status: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    prompt_estimated: bool
    completion_estimated: bool


class FinishedRequests(BaseModel):
    requests: list[FinishedRequest]
    next: Annotated[str | None, Field(description="Give it as `before` to get those that ended earlier; null: none.")]
    waiting: Waiting


Day = Annotated[str | None, Query(description="YYYY-MM-DD, UTC.", max_length=64)]
Word = Annotated[str, StringConstraints(max_length=256)]
Tenant = Annotated[Word | None, Query(description="Only this tenant's.")]
Key = Annotated[Word | None, Query(description="Only of the key with this id.")]
Route = Annotated[Word | None, Query(description="Only of this route.")]


def router(control: Control) -> APIRouter:
    routes = APIRouter(prefix="/v1/usage", tags=["usage"])

    @routes.get("", response_model=UsageSums)
    async def usage(
        by: Annotated[Word, Query(description=f"Of {', '.join(GROUPS)}; commas between.")] = "tenant",
        from_: Annotated[Day, Query(alias="from")] = None,
        to: Day = None,
        tenant: Tenant = None,
        key: Key = None,
        route: Route = None,
    ) -> Response:
        """Sums over days in UTC, both included; without them the month so far. Ordered by the groups."""
        groups = _groups(by)
        wanted = await _range(control, from_, to, tenant, key, route)
        rows, waiting = await _asked(control, lambda: control.store.usage.sums(wanted, groups, MOST_ROWS + 1))
        if len(rows) > MOST_ROWS:
            raise ServeError(
                "invalid_request",
                f"that is more than {MOST_ROWS} rows: ask for fewer days, or group by less",
                param="by",
            )
        if not rows:
            await _known(control, wanted)
        for row in rows:
            if "day" in row:
                row["day"] = _date(row["day"])
        total = {name: sum(row[name] for row in rows) for name in COUNTS}
        told = {"from": _date(wanted.first), "to": _date(wanted.last), "by": groups, "usage": rows, "total": total}
        # Not through the model: there may be tens of thousands of rows, and others wait meanwhile.
        return Response(msgspec.json.encode({**told, "waiting": waiting}), media_type="application/json")

    @routes.get("/requests", response_model=FinishedRequests)
    async def requests(
        from_: Annotated[Day, Query(alias="from")] = None,
        to: Day = None,
        tenant: Tenant = None,
        key: Key = None,
        route: Route = None,
        request_id: Annotated[Word | None, Query(description="Only those that the caller named so.")] = None,
        limit: schemas.RowCount = 100,
        before: Annotated[Word | None, Query(description="`next` of the answer before.")] = None,
    ) -> Response:
        """Single requests, the one that ended last first, for as long as they are kept (`ledger.keep_days`)."""
        wanted = await _range(control, from_, to, tenant, key, route)
        place = None if before is None else _place(before)
        rows, waiting = await _asked(control, lambda: control.store.usage.requests(wanted, limit, place, request_id))
        if not rows:
            await _known(control, wanted)
        for row in rows:
            del row["day"]
        following = f"{rows[-1]['ended_ms']}-{rows[-1]['id']}" if len(rows) == limit else None
        told = {"requests": rows, "next": following, "waiting": waiting}
        return Response(msgspec.json.encode(told), media_type="application/json")

    return routes


async def _asked(control: Control, question: Callable[[], Awaitable[T]]) -> tuple[T, dict[str, Any]]:
    """The store's answer, once what has just finished is in it, and what is not in it even so."""
    waiting = Waiting(records=0, bytes=0, oldest_seconds=0)
    if control.ledger is not None:
        depth = await control.ledger.drained(_DRAIN_SECONDS)
        waiting = Waiting(records=depth.records, bytes=depth.bytes, oldest_seconds=depth.oldest_seconds)
    try:
        return await question(), waiting.model_dump()
    except ServeError as error:
        if error.code not in ("store_unavailable", "storage_full"):
            raise
        aside = (
            f"{waiting.records} records of finished requests ({waiting.bytes} bytes) wait safely on this host's disk"
        )
        raise ServeError(error.code, f"{error.message}; {aside}") from error


def _groups(text: str) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in GROUPS:
            raise ServeError("invalid_request", f"by: there is no group {word!r}{nearest(word, GROUPS)}", param="by")
    return words


async def _range(
    control: Control, from_: str | None, to: str | None, tenant: str | None, key: str | None, route: str | None
) -> Range:
    today = datetime.now(UTC).date()
    first = None if from_ is None else _day("from", from_)
    last = _day("to", to) if to is not None else max(today, first or today)
    first = first or last.replace(day=1)
    if first > last:
        raise ServeError(
            "invalid_request", f"from {first} is after to {last}: give the earlier day first", param="from"
        )
    if tenant is not None:
        names = [found.name for found in await control.store.tenants()]
        if tenant not in names:
            raise ServeError(
                "tenant_not_found", f"there is no tenant {tenant!r}{nearest(tenant, names)}", param="tenant"
            )
    return Range((first - _EPOCH).days, (last - _EPOCH).days, tenant, key, route)


async def _known(control: Control, wanted: Range) -> None:
    """Nothing was found: a name that nobody knows is more likely wrong than unused."""
    if wanted.key is not None and ":" not in wanted.key:  # oidc:<issuer> stands for what a token opened
        ids = [key.id for key in await control.store.keys()]
        if wanted.key not in ids:
            raise ServeError("key_not_found", f"there is no key {wanted.key!r}{nearest(wanted.key, ids)}", param="key")
    routes = control.route_names()
    if wanted.route is not None and wanted.route not in routes:
        known = nearest(wanted.route, routes)
        raise ServeError("invalid_request", f"nothing was used on a route {wanted.route!r}{known}", param="route")


def _day(name: str, text: str) -> date:
    try:
        if _DAY_FORM.fullmatch(text):  # of the ISO forms this one alone
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise ServeError(
        "invalid_request", f"{name}: {text[:64]!r} is no day: write YYYY-MM-DD, for example 2026-11-01", param=name
    )


def _date(day: int) -> str:
    return (_EPOCH + timedelta(day)).isoformat()


def _place(text: str) -> tuple[int, str]:
    at, _, last = text.partition("-")
    if not (at.isascii() and at.isdecimal() and len(at) < 16):
        raise ServeError(
            "invalid_request", f"before: give `next` of the answer before, not {text[:64]!r}", param="before"
        )
    return int(at), last

"""Limits of keys (by id), tenants and routes (by name)."""

from dataclasses import asdict, replace

from fastapi import Request
from fastapi.routing import APIRouter

from vitalis_serve.control import schemas
from vitalis_serve.control.changes import Control, act
from vitalis_serve.errors import ServeError
from vitalis_serve.store.rates import Rates, Subject
from vitalis_serve.store.records import DISABLED, Change, nearest


def router(control: Control) -> APIRouter:
    routes = APIRouter(prefix="/v1/limits", tags=["limits"])

    async def changed(request: Request, subject: Subject, action: str, wanted: schemas.Rates) -> schemas.LimitsChanged:
        async def work(change: Change) -> Rates:
            before = (await change.rates()).get(subject)
            if action != "limits.clear" or before is None:
                await _exists(control, change, subject, to_be_limited=action != "limits.clear")
            rates = replace(before or Rates(), **wanted.model_dump(exclude_unset=True))
            await change.set_rates({subject: rates})
            return rates

        details = wanted.model_dump(exclude_unset=True)
        recorded = act(request, action, f"{subject.kind}:{subject.name}", details)
        rates, version, applied = await control.change(recorded, work)
        return schemas.LimitsChanged(**subject._asdict(), **asdict(rates), version=version, applied=applied)

    @routes.get("")
    async def every() -> schemas.AllLimits:
        """All that there are."""
        found = await control.store.rates()
        return schemas.AllLimits(
            limits=[schemas.LimitsOf(**subject._asdict(), **asdict(rates)) for subject, rates in found.items()]
        )

    @routes.get("/{kind}/{name:path}")
    async def one(kind: schemas.Kind, name: str) -> schemas.LimitsOf:
        """Nulls where there are none."""
        subject = Subject(kind, name)
        rates = (await control.store.rates()).get(subject)
        if rates is None:
            async with control.store.reading() as change:
                await _exists(control, change, subject)
        return schemas.LimitsOf(**subject._asdict(), **asdict(rates or Rates()))

    @routes.put("/{kind}/{name:path}")
    async def put(request: Request, kind: schemas.Kind, name: str, body: schemas.SomeRates) -> schemas.LimitsChanged:
        """Sets these limits and no others."""
        whole = schemas.Rates(**dict.fromkeys(schemas.Rates.model_fields) | body.model_dump())
        return await changed(request, Subject(kind, name), "limits.set", whole)

    @routes.patch("/{kind}/{name:path}")
    async def patch(request: Request, kind: schemas.Kind, name: str, body: schemas.SomeRates) -> schemas.LimitsChanged:
        """Sets some of the limits; null lifts one, what is left out stays as it is."""
        return await changed(request, Subject(kind, name), "limits.set", body)

    @routes.delete("/{kind}/{name:path}")
    async def clear(request: Request, kind: schemas.Kind, name: str) -> schemas.LimitsChanged:
        """Lifts them all."""
        none = schemas.Rates(**dict.fromkeys(schemas.Rates.model_fields))
        return await changed(request, Subject(kind, name), "limits.clear", none)

    return routes


async def _exists(control: Control, change: Change, subject: Subject, *, to_be_limited: bool = False) -> None:
    """Raises ServeError `key_not_found`, `tenant_not_found` or `route_not_found`; `key_closed` or `tenant_disabled`
    where limits would limit nothing."""
    if subject.kind == "key":
        await (change.open_key(subject.name) if to_be_limited else change.key(subject.name))
    elif subject.kind == "tenant":
        tenant = await change.tenant(subject.name)
        if to_be_limited and tenant.status == DISABLED:
            raise ServeError("tenant_disabled", f"tenant {subject.name!r} was revoked: it uses nothing", param="name")
    else:
        known = control.route_names()
        if subject.name not in known:
            word = subject.name[:128]
            raise ServeError("route_not_found", f"there is no route {word!r}{nearest(word, known)}", param="name")

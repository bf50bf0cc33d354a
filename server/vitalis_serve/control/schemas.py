"""The bodies of control's HTTP API, as its OpenAPI document shows them. Each refusal is one sentence."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from vitalis_serve.store.rates import KINDS
from vitalis_serve.store.records import CLASSES, SCOPES, nearest

MOST: Final = 10**15  # of a limit
_TEN_YEARS = 10 * 366 * 86_400
_LONGEST_OVERLAP = 366 * 86_400


def _class(value: str) -> str:
    if value not in CLASSES:
        raise ValueError(f"there is no class {value!r}{nearest(value, CLASSES)}")
    return value


def _scope(value: str) -> str:
    if value not in SCOPES:
        raise ValueError(f"there is no scope {value!r}{nearest(value, SCOPES)}")
    return value


def _kind(value: str) -> str:
    if value not in KINDS:
        raise ValueError(f"limits are those of a {', a '.join(KINDS[:-1])} or a {KINDS[-1]}, not of a {value!r}")
    return value


def _limit(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
    try:
        return inner(value)
    except ValidationError:
        raise ValueError(
            f"{_shown(value)} is no limit: give a whole number from 1 to {MOST}, or null for no limit of this kind; to "
            "shut someone out, revoke the key or tenant"
        ) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _unique(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def said(sentence: str) -> WrapValidator:
    """What is refused is refused with `sentence`; a refusal that is a sentence of ours already stays as it is."""

    def check(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            if error.errors()[0]["type"] == "value_error":
                raise
            raise ValueError(sentence) from None

    return WrapValidator(check)


Name = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"),
    Field(description="Letters, digits, dot, underscore, hyphen; at most 64."),
    said(
        "give 1 to 64 letters, digits, dots, underscores and hyphens, the first a letter or digit, for example "
        "vitalis-chat"
    ),
]
Class = Annotated[
    str,
    StringConstraints(max_length=64),
    said(f"give one of {', '.join(CLASSES)}"),
    AfterValidator(_class),
    WithJsonSchema({"type": "string", "enum": list(CLASSES)}),
]
Scope = Annotated[
    str,
    StringConstraints(max_length=64),
    said(f"give names out of {', '.join(SCOPES)}"),
    AfterValidator(_scope),
    WithJsonSchema({"type": "string", "enum": list(SCOPES)}),
]
# PostgreSQL stores no NUL.
ShortText = Annotated[
    str, StringConstraints(max_length=128, pattern=r"^[^\x00]*$"), said("give text of at most 128 characters")
]
Notes = Annotated[
    str, StringConstraints(max_length=1000, pattern=r"^[^\x00]*$"), said("give text of at most 1000 characters")
]
Kind = Annotated[
    str,
    StringConstraints(max_length=64),
    said(f"give one of {', '.join(KINDS)}"),
    AfterValidator(_kind),
    WithJsonSchema({"type": "string", "enum": list(KINDS)}),
]
Limit = Annotated[int, Field(ge=1, le=MOST, strict=True), WrapValidator(_limit)]
Lifetime = Annotated[
    int,
    Field(ge=1, le=_TEN_YEARS),
    said(f"give a whole number of seconds from 1 to {_TEN_YEARS}, for example 7776000 for ninety days"),
]
Overlap = Annotated[
    int,
    Field(ge=0, le=_LONGEST_OVERLAP, description="So long the secret before opens too."),
    said(f"give a whole number of seconds from 0 to {_LONGEST_OVERLAP}, for example 86400 for a day"),
]
FromNow = Annotated[
    int,
    Field(ge=0, le=_TEN_YEARS, description="From now; 0 ends it at once, null gives it no end."),
    said(f"give a whole number of seconds from 0 to {_TEN_YEARS}, for example 7776000 for ninety days, or null"),
]
Replicas = Annotated[int, Field(ge=0, le=1024), said("give a whole number from 0 to 1024")]
RowCount = Annotated[int, Field(ge=1, le=1000), said("give a whole number from 1 to 1000")]
RowId = Annotated[int, Field(ge=1, le=2**63 - 1), said("give the id of an audit row, a whole number from 1")]
UnixSeconds = Annotated[int, Field(description="UTC, Unix seconds.")]


class Body(BaseModel):
    """What a caller sends: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Rates(Body):
    """Limits of a key, tenant or route; null or left out: none of that kind. Days and months are UTC."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent: Limit | None = None
    tokens_per_day: Limit | None = None
    tokens_per_month: Limit | None = None

    def given(self) -> dict[str, int]:
        return self.model_dump(exclude_none=True, include=set(Rates.model_fields))


class SomeRates(Rates):
    """Changes of limits: what is left out stays as it is."""

    @model_validator(mode="after")
    def says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"give at least one of {', '.join(Rates.model_fields)}")
        return self


class NewTenant(Body):
    name: Name
    notes: Notes = ""
    limits: Rates = Rates()


TenantName = Annotated[str, StringConstraints(max_length=64), said("give the name of a tenant, at most 64 characters")]
Scopes = Annotated[
    tuple[Scope, ...],
    Field(min_length=1),
    said(f"give a list of one or more of {', '.join(SCOPES)}"),
    AfterValidator(_unique),
]
Routes = Annotated[
    tuple[Annotated[str, StringConstraints(max_length=128)], ...],
    Field(min_length=1, description='Names of routes, or ["*"] for all there are and will be.'),
    said('give a list of routes\' names, or ["*"] for all'),
    AfterValidator(_unique),
]


class NewKey(Body):
    tenant: TenantName
    name: ShortText = ""
    class_: Annotated[Class, Field(alias="class")] = "standard"
    scopes: Scopes = ("inference",)
    routes: Routes = ("*",)
    notes: Notes = ""
    expires_in_seconds: Lifetime | None = None
    limits: Rates = Rates()


class KeyChanges(Body):
    """What is left out stays as it is."""

    name: ShortText = ""
    class_: Annotated[Class, Field(alias="class")] = "standard"
    scopes: Scopes = ("inference",)
    routes: Routes = ("*",)
    notes: Notes = ""
    expires_in_seconds: FromNow | None = None

    @model_validator(mode="after")
    def says_something(self) -> Self:
        if not self.model_fields_set:
            names = [field.alias or name for name, field in KeyChanges.model_fields.items()]
            raise ValueError(f"give at least one of {', '.join(names)}")
        return self


class Rotation(Body):
    overlap_seconds: Overlap = 86_400


class Scale(Body):
    replicas: Replicas


class Question(Body):
    model: Annotated[str, Field(min_length=1, max_length=128, description="A route.")]
    tenant: Annotated[
        str,
        StringConstraints(max_length=64),
        Field(description="Whose request; homes differ by tenant. None: nobody's."),
    ] = ""
    class_: Annotated[Class, Field(alias="class", description="The key's; a route's own comes first.")] = "standard"
    api: Literal["chat", "completions", "responses", "messages"] = "chat"
    body: Annotated[
        dict[str, Any],
        Field(description="A request as a client would send it, byte for byte; kept nowhere. `model` may be left out."),
    ] = {}
    session: Annotated[str, StringConstraints(max_length=1024), Field(description="Of x-session-id.")] = ""


class Answer(BaseModel):
    """What control answers."""

    model_config = ConfigDict(populate_by_name=True)


class Limits(Answer):
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


class LimitsOf(Limits):
    """Of the tenant or route of that name, or of the key of that id."""

    kind: Literal["key", "tenant", "route"]
    name: str


class Tenant(Answer):
    name: str
    status: Literal["active", "disabled"]
    notes: str
    created_at: UnixSeconds
    limits: Limits


class Key(Answer):
    id: str
    tenant: str
    name: str
    class_: Annotated[str, Field(alias="class")]
    scopes: list[str]
    routes: list[str]
    notes: str
    status: Literal["active", "expired", "revoked"]
    created_at: UnixSeconds
    expires_at: UnixSeconds | None
    revoked_at: UnixSeconds | None
    old_until: Annotated[
        UnixSeconds | None, Field(description="Until then the secret before the last rotation opens too.")
    ]
    last_used_at: Annotated[UnixSeconds | None, Field(description="As far as the ledger has read.")]
    limits: Limits


class Applied(Answer):
    """version: of the snapshot that holds the change. applied: whether the workers serve from it already."""

    version: int
    applied: bool


class TenantChanged(Tenant, Applied):
    pass


class KeyChanged(Key, Applied):
    pass


class KeyRevoked(KeyChanged):
    already_revoked: Annotated[bool, Field(description="It was revoked before, at `revoked_at`.")]


class KeyCreated(KeyChanged):
    key: Annotated[str, Field(description="The whole key. It is stored nowhere and shown only here.")]


class LimitsChanged(LimitsOf, Applied):
    pass


class AllLimits(Answer):
    limits: list[LimitsOf]


class Secret(Answer):
    id: str
    tenant: str
    name: str
    key: Annotated[str, Field(description="The whole key. It is stored nowhere and shown only here.")]


class Imported(Applied):
    """How many rows were added of each kind; skipped: were there already. secrets: of the keys that came without a
    digest."""

    tenants: int
    keys: int
    limits: int
    skipped: int
    secrets: list[Secret]


class Tenants(Answer):
    tenants: list[Tenant]


class Keys(Answer):
    keys: list[Key]


class Act(Answer):
    id: int
    at: UnixSeconds
    who: str
    action: str
    subject: str
    origin: str
    details: dict[str, Any]


class Acts(Answer):
    audit: list[Act]


class Replica(Answer):
    name: str
    address: str
    state: str
    models: list[str]
    slots: int
    incarnation: int
    detail: str


class Fleet(Answer):
    version: int
    replicas: list[Replica]


class FleetDone(Answer):
    message: str
    progress: list[str]


class Candidate(Answer):
    replica: str
    place: int
    why_here: str
    lacks: Annotated[str, Field(description="Why it could not take the request now; empty where it could.")]


class Explanation(Answer):
    worker: Annotated[str, Field(description="Who says so; every worker has slots and a queue of its own.")]
    route: str
    class_: Annotated[str, Field(alias="class")]
    model: Annotated[str, Field(description="The engines' name, chosen by weight where the route has weights.")]
    fallback: Annotated[bool, Field(description="The model is a fallback: no replica serves those before it.")]
    policy: str
    chosen: Annotated[str | None, Field(description="The replica; null where the request would wait or be refused.")]
    reason: str
    ranking: list[Candidate]
    queued: Annotated[int, Field(description="Requests that wait at this worker now.")]


class Worker(Answer):
    name: str
    pid: int
    version: int


class StoreHealth(Answer):
    ok: bool
    detail: str


class Health(Answer):
    """status: ok, or degraded with a 503: no replica takes requests, no worker is there, or the store is
    away."""

    status: Literal["ok", "degraded"]
    fleet: Fleet
    workers: list[Worker]
    snapshot_version: int
    store: StoreHealth


class Alive(Answer):
    status: Literal["ok"]


class ErrorFacts(Answer):
    message: str
    type: str
    param: str | None
    code: str


class Error(Answer):
    error: ErrorFacts

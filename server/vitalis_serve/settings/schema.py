"""The schema of `config/gpt-oss.yaml`: names, units, defaults and bounds. Loading and merging are elsewhere.

Every model is frozen, maps and lists inside included, and refuses keys it does not know. Units stand in the
names (`_seconds`, `_bytes`). What each key means is said once, in `config/gpt-oss.yaml`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    field_validator,
    model_validator,
)


class FrozenMap(Mapping[str, Any]):
    """A map that cannot be changed. `types.MappingProxyType` would do, but cannot be copied or pickled."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)

    def __deepcopy__(self, memo: object) -> "FrozenMap":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenMap, (self._values,)


def freeze(value: Any) -> Any:
    """The same value with every mapping and list in it made read-only."""
    if isinstance(value, Mapping):
        return FrozenMap({key: freeze(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: Any) -> Any:
    """The plain dicts and lists that `freeze` was given."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [thaw(item) for item in value]
    return value


def _no_truth_values(value: Any) -> Any:
    # pydantic reads true as 1, and YAML reads `on` as true: `port: on` must not become port 1.
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _environment_text(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError('must be text: write "1" or "0", in quotes')
    return str(value) if isinstance(value, int | float) else value


def _comma_list(value: Any) -> Any:
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _path(value: Any) -> Any:
    if value == "":  # Path("") is the current folder
        raise ValueError("must not be empty")
    return str(Path(value).expanduser()) if isinstance(value, str) else value


Number = BeforeValidator(_no_truth_values)
Whole = Annotated[int, Number]
Seconds = Annotated[float, Number, Field(gt=0, le=86_400, allow_inf_nan=False)]
Pause = Annotated[float, Number, Field(ge=0, le=86_400, allow_inf_nan=False)]
Count = Annotated[int, Number, Field(ge=1, le=1_000_000)]
Amount = Annotated[int, Number, Field(ge=0, le=16 << 20)]
Port = Annotated[int, Number, Field(ge=0, le=65_535)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]
ProfileName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
ClaimName = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,256}$")]
Host = Annotated[str, StringConstraints(pattern=r"^[^\s/]{1,255}$")]
Folder = Annotated[Path, BeforeValidator(_path)]
EnvironmentValue = Annotated[str | None, BeforeValidator(_environment_text)]
EngineArgs = Annotated[Mapping[str, Any], AfterValidator(freeze), PlainSerializer(thaw)]
EngineEnv = Annotated[Mapping[str, EnvironmentValue], AfterValidator(freeze), PlainSerializer(thaw)]
CacheGroups = Annotated[Mapping[Name, tuple[Name, ...]], AfterValidator(freeze), PlainSerializer(thaw)]
ClassSeconds = Annotated[
    Mapping[Literal["emergency", "interactive", "standard", "batch"], Seconds],
    AfterValidator(freeze),
    PlainSerializer(thaw),
]
Share = Annotated[float, Number, Field(gt=0, le=1000, allow_inf_nan=False)]
TenantWeights = Annotated[Mapping[Name, Share], AfterValidator(freeze), PlainSerializer(thaw)]

SOURCES = ("hub", "folder", "package", "build")
_EMPTY = FrozenMap({})


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Deadlines(Strict):
    """Five separate deadlines of one request."""

    connect_seconds: Seconds = 5
    first_token_seconds: Seconds = 120
    idle_seconds: Seconds = 60
    client_stalled_seconds: Seconds = 60
    total_seconds: Seconds = 1800


class Queue(Strict):
    """Requests waiting for a slot: of each class at most so many, for at most so long."""

    max_requests: Count = 1024
    max_seconds: Seconds = 30
    class_seconds: ClassSeconds = _EMPTY  # type: ignore[assignment]  # it has no keys
    cold_start_seconds: Pause = 0
    overload_seconds: Pause = 1
    reserved_share: Annotated[float, Number, Field(ge=0, le=0.9, allow_inf_nan=False)] = 0.1


class Gateway(Strict):
    host: Host = "0.0.0.0"
    port: Port = 8080
    workers: Annotated[int, Number, Field(ge=1, le=16)] = 1
    gateways: Annotated[int, Number, Field(ge=1, le=64)] = 1
    max_header_bytes: Annotated[int, Number, Field(ge=1024, le=1 << 20)] = 65_536
    max_body_bytes: Annotated[int, Number, Field(ge=1024)] = 8 << 20
    max_bodies_bytes: Annotated[int, Number, Field(ge=1024)] = 256 << 20
    max_connections: Count = 10_000
    header_seconds: Seconds = 10
    body_seconds: Seconds = 60
    keepalive_seconds: Seconds = 75
    routing: Literal["affinity", "session", "least_tokens", "round_robin"] = "affinity"
    queue: Queue = Queue()
    deadlines: Deadlines = Deadlines()
    access_log: bool = True

    @model_validator(mode="after")
    def one_body_fits(self) -> "Gateway":
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_bodies_bytes ({self.max_bodies_bytes}) is below max_body_bytes ({self.max_body_bytes}):"
                " the largest allowed body would never fit"
            )
        return self


class Control(Strict):
    host: Host = "127.0.0.1"
    port: Port = 8081


class Model(Strict):
    """Which weights the engines load. Exactly one source.

    hub: a repository on the Hugging Face hub; folder: a local folder; package: one of the models that come
    from a Python package (`smollm2-135m`); build: one that this project builds (`gpt-oss-tiny`).
    """

    name: Name = "gpt-oss-20b"
    hub: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    revision: Name | None = None
    folder: Folder | None = None
    package: Literal["smollm2-135m"] | None = None
    build: Literal["gpt-oss-tiny"] | None = None

    @model_validator(mode="after")
    def exactly_one_source(self) -> "Model":
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(SOURCES)}; found {', '.join(given) or 'none'}")
        return self


class Restart(Strict):
    """Back-off after a crash: first * 2^n with jitter, up to `max_seconds`; `failed` after `tries`."""

    first_seconds: Seconds = 1
    max_seconds: Seconds = 60
    tries: Count = 5
    steady_seconds: Seconds = 300


class Engines(Strict):
    replicas: Annotated[int, Number, Field(ge=0, le=1024)] = 1
    tensor_parallel: Annotated[int, Number, Field(ge=1, le=64)] = 1
    device: Literal["auto", "cuda", "cpu"] = "auto"
    gpus: Annotated[tuple[Annotated[int, Number, Field(ge=0)], ...], BeforeValidator(_comma_list)] | None = None
    engine_python: str = "auto"
    slots: Count = 64
    start_seconds: Seconds = 900
    stop_seconds: Seconds = 30
    probe_seconds: Seconds = 2
    hung_seconds: Seconds = 60
    restart: Restart = Restart()
    engine_args: EngineArgs = _EMPTY
    engine_env: EngineEnv = _EMPTY


class Shutdown(Strict):
    """Stopping in order: settle (others learn that we are unready), then drain (what runs may finish)."""

    settle_seconds: Pause = 0
    drain_seconds: Pause = 30


class RouteDefaults(Strict):
    """Fields set where a request does not have them."""

    temperature: Annotated[float, Number, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Number, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    max_tokens: Count | None = None


class RouteLimits(Strict):
    """Fields that a request may not set above these."""

    max_tokens: Count | None = None
    min_tokens: Amount | None = None
    n: Count | None = None
    logprobs: Amount | None = None
    prompt_logprobs: Amount | None = None
    structured_output_bytes: Amount | None = None


class RouteWeight(Strict):
    """An engine model and its part of a route's conversations, relative to the other weights."""

    model: Name
    weight: Annotated[float, Number, Field(ge=0, le=1_000_000, allow_inf_nan=False)]


class Store(Strict):
    """Where tenants, keys, limits, usage and the audit table are kept. `url` None: SQLite in the data folder."""

    url: Annotated[str, StringConstraints(pattern=r"^postgres(ql)?://\S+$")] | None = None
    connect_seconds: Seconds = 5


class Limits(Strict):
    """Where requests and tokens are counted against the limits of keys, tenants and routes."""

    backend: Literal["memory", "redis"] = "memory"
    redis_url: Annotated[str, StringConstraints(pattern=r"^(rediss?|unix)://\S+$")] | None = None
    wait_seconds: Annotated[float, Number, Field(gt=0, le=10, allow_inf_nan=False)] = 0.05
    away: Literal["share", "refuse"] = "share"
    lease_seconds: Annotated[float, Number, Field(ge=5, le=3600, allow_inf_nan=False)] = 30

    @field_validator("redis_url")
    @classmethod
    def is_an_address(cls, url: str | None) -> str | None:
        try:
            parts = urlsplit(url or "")
            _ = parts.port
        except ValueError:
            parts = urlsplit("")
        if url is not None and not (parts.hostname if parts.scheme != "unix" else parts.path):
            raise ValueError("is no address: give redis://HOST:PORT/0, rediss://HOST:PORT/0 or unix:///PATH")
        return url

    @model_validator(mode="after")
    def redis_has_an_address(self) -> "Limits":
        if (self.backend == "redis") != (self.redis_url is not None):
            raise ValueError("give redis_url with backend: redis, and only with it")
        return self


class Ledger(Strict):
    """The record of what was used. Days are UTC; 0 keeps for ever."""

    full_disk: Literal["refuse", "serve"] = "refuse"
    segment_bytes: Annotated[int, Number, Field(ge=1 << 20, le=1 << 30)] = 16 << 20
    keep_days: Amount = 90
    keep_daily_days: Amount = 0


class Issuer(Strict):
    """One OIDC issuer whose tokens are taken, and what their claims mean here. A claim inside others is written with
    dots: `realm_access.roles`. Maps are from a claim's value to ours; an empty `tenants` takes the claim as it is."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    issuer: Annotated[str, StringConstraints(pattern=r"^https?://\S+$")]
    audience: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1)], ...], BeforeValidator(_comma_list), Field(min_length=1)
    ]
    jwks_uri: Annotated[str, StringConstraints(pattern=r"^https?://\S+$")] | None = None
    algorithms: Annotated[
        tuple[Literal["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"], ...], Field(min_length=1)
    ] = ("RS256", "ES256", "EdDSA")
    leeway_seconds: Annotated[float, Number, Field(ge=0, le=300, allow_inf_nan=False)] = 30
    refresh_seconds: Seconds = 3600
    stale_seconds: Annotated[float, Number, Field(ge=0, le=30 * 86_400, allow_inf_nan=False)] = 86_400
    tenant_claim: ClaimName = "tenant"
    tenants: Annotated[Mapping[str, Name], AfterValidator(freeze), PlainSerializer(thaw)] = _EMPTY
    class_claim: ClaimName | None = None
    classes: Annotated[
        Mapping[str, Literal["emergency", "interactive", "standard", "batch"]],
        AfterValidator(freeze),
        PlainSerializer(thaw),
    ] = _EMPTY
    class_: Literal["emergency", "interactive", "standard", "batch"] = Field(default="standard", alias="class")
    scopes_claim: ClaimName | None = None
    scopes: Annotated[
        Mapping[str, Literal["inference", "debug", "metrics"]], AfterValidator(freeze), PlainSerializer(thaw)
    ] = _EMPTY
    routes: Annotated[tuple[Name | Literal["*"], ...], Field(min_length=1)] = ("*",)
    roles_claim: ClaimName | None = None
    roles: Annotated[
        Mapping[str, Literal["viewer", "operator", "admin"]], AfterValidator(freeze), PlainSerializer(thaw)
    ] = _EMPTY

    @model_validator(mode="after")
    def claims_and_their_maps_go_together(self) -> "Issuer":
        for claim, values in (("class_claim", "classes"), ("scopes_claim", "scopes"), ("roles_claim", "roles")):
            if (getattr(self, claim) is not None) != bool(getattr(self, values)):
                raise ValueError(f"give {claim} and {values} together: nothing else says what the claim's values mean")
        return self


class Route(Strict):
    """A public model name and the engine model behind it (`model.name` where none is given), and what holds for
    its requests. Out of `settings.load`, `model` is never empty; with `weights` it is the heaviest."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Name
    model: Name | None = None
    class_: Literal["emergency", "interactive", "standard", "batch"] | None = Field(default=None, alias="class")
    defaults: RouteDefaults = RouteDefaults()
    limits: RouteLimits = RouteLimits()
    preamble: Annotated[str, StringConstraints(strip_whitespace=True, max_length=65_536)] = ""
    weights: tuple[RouteWeight, ...] = ()
    fallbacks: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def says_one_thing(self) -> "Route":
        if self.weights:
            if self.model is not None:
                raise ValueError("give model or weights, not both; a model of weight 0 gets nothing")
            if not any(weight.weight for weight in self.weights):
                raise ValueError("weights are all 0: some model must take the requests")
        models = [*(weight.model for weight in self.weights), *([self.model] if self.model else ()), *self.fallbacks]
        twice = next((model for model in models if models.count(model) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is named twice in model, weights and fallbacks")
        default, limit = self.defaults.max_tokens, self.limits.max_tokens
        if default is not None and limit is not None and default > limit:
            raise ValueError(f"defaults.max_tokens ({default}) is above limits.max_tokens ({limit})")
        return self


class Settings(Strict):
    """What is in force: config/gpt-oss.yaml with its profile and the environment merged in.

    Out of `settings.load`, `profile` is the one in force (never `auto`) and `routes` is never empty.
    """

    profile: ProfileName = "auto"
    data_folder: Folder = Path("var")
    gateway: Gateway = Gateway()
    control: Control = Control()
    model: Model = Model(hub="openai/gpt-oss-20b")
    engines: Engines = Engines()
    shutdown: Shutdown = Shutdown()
    store: Store = Store()
    limits: Limits = Limits()
    ledger: Ledger = Ledger()
    oidc: tuple[Issuer, ...] = ()
    routes: tuple[Route, ...] = ()
    cache_groups: CacheGroups = _EMPTY
    tenant_weights: TenantWeights = _EMPTY

    @model_validator(mode="after")
    def one_cache_group_each(self) -> "Settings":
        members = [tenant for tenants in self.cache_groups.values() for tenant in tenants]
        twice = sorted({tenant for tenant in members if members.count(tenant) > 1})
        if twice:
            raise ValueError(f"cache_groups name {', '.join(twice)} more than once")
        return self

    @field_validator("oidc")
    @classmethod
    def issuers_differ(cls, issuers: tuple[Issuer, ...]) -> tuple[Issuer, ...]:
        for word in ("name", "issuer"):
            said = [getattr(issuer, word) for issuer in issuers]
            twice = sorted({one for one in said if said.count(one) > 1})
            if twice:
                raise ValueError(f"{', '.join(twice)} is there more than once; every issuer has a {word} of its own")
        return issuers

    @field_validator("routes")
    @classmethod
    def routes_differ(cls, routes: tuple[Route, ...]) -> tuple[Route, ...]:
        names = [route.name for route in routes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is there more than once; every route needs a name of its own")
        return routes

    @model_validator(mode="after")
    def ports_differ(self) -> "Settings":
        data, admin = self.gateway, self.control
        if data.port == admin.port != 0 and _overlap(data.host, admin.host):
            raise ValueError(
                f"gateway.port and control.port are both {data.port} on the same address"
                f" ({data.host} and {admin.host}); change one"
            )
        return self


def _overlap(one: str, other: str) -> bool:
    """Whether two hosts share an address, as far as their text tells."""
    hosts = {"127.0.0.1" if host == "localhost" else host for host in (one, other)}
    if len(hosts) == 1 or "::" in hosts:  # :: takes IPv4 as well
        return True
    return "0.0.0.0" in hosts and not any(":" in host for host in hosts)

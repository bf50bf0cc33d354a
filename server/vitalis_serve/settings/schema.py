"""The schema of `config/gpt-oss.yaml`: names, units, defaults and bounds. Loading and merging are elsewhere.

Every model is frozen and refuses keys it does not know. Units stand in the names (`_seconds`, `_bytes`).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Deadlines(Strict):
    """Five separate deadlines of one request (design section 8)."""

    connect_seconds: Seconds = 5
    first_token_seconds: Seconds = 120
    idle_seconds: Seconds = 60
    client_stalled_seconds: Seconds = 60
    total_seconds: Seconds = 1800


class Queue(Strict):
    """Requests waiting for a slot: at most so many, for at most so long."""

    max_requests: Count = 1024
    max_seconds: Seconds = 30


class Gateway(Strict):
    host: str = "0.0.0.0"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    max_header_bytes: Annotated[int, Field(ge=1024, le=1 << 20)] = 65_536
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 << 20
    max_bodies_bytes: Annotated[int, Field(ge=1024)] = 256 << 20
    max_connections: Count = 10_000
    header_seconds: Seconds = 10
    body_seconds: Seconds = 60
    keepalive_seconds: Seconds = 75
    queue: Queue = Queue()
    deadlines: Deadlines = Deadlines()
    access_log: bool = True


class Control(Strict):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8081


class Model(Strict):
    """Which weights the engines load. Exactly one source.

    hub: a repository on the Hugging Face hub; folder: a local folder; package: one of the models that come
    from a Python package (`smollm2-135m`); build: one that this project builds (`gpt-oss-tiny`).
    """

    name: Name = "gpt-oss-20b"
    hub: str | None = None
    revision: str | None = None
    folder: Path | None = None
    package: Literal["smollm2-135m"] | None = None
    build: Literal["gpt-oss-tiny"] | None = None

    @model_validator(mode="after")
    def exactly_one_source(self) -> "Model":
        given = [k for k in ("hub", "folder", "package", "build") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of hub, folder, package, build; found {', '.join(given) or 'none'}"
            )
        return self


class Restart(Strict):
    """Back-off after a crash: first * 2^n with jitter, at most `max_seconds`; `failed` after `tries` in a row."""

    first_seconds: Seconds = 1
    max_seconds: Seconds = 60
    tries: Count = 5
    steady_seconds: Seconds = 300


class Engines(Strict):
    replicas: Annotated[int, Field(ge=0, le=1024)] = 1
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    device: Literal["auto", "cuda", "cpu"] = "auto"
    gpus: tuple[int, ...] | None = None
    engine_python: str = "auto"
    slots: Count = 64
    start_seconds: Seconds = 900
    stop_seconds: Seconds = 30
    probe_seconds: Seconds = 2
    hung_seconds: Seconds = 60
    restart: Restart = Restart()
    engine_args: dict[str, Any] = {}
    engine_env: dict[str, str] = {}


class Shutdown(Strict):
    """Stopping in order: settle (others learn that we are unready), then drain (what runs may finish)."""

    settle_seconds: Annotated[float, Field(ge=0, le=3600)] = 0
    drain_seconds: Annotated[float, Field(ge=0, le=86_400)] = 30


class Route(Strict):
    """A public model name and the engine model behind it."""

    name: Name
    model: Name | None = None


class Settings(Strict):
    """What is in force: config/gpt-oss.yaml with its profile and the environment merged in."""

    profile: str = "auto"
    data_folder: Path = Path("var")
    gateway: Gateway = Gateway()
    control: Control = Control()
    model: Model = Model(hub="openai/gpt-oss-20b")
    engines: Engines = Engines()
    shutdown: Shutdown = Shutdown()
    routes: tuple[Route, ...] = ()

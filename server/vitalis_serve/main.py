"""The composition root: Settings in, a tree of processes out. The only place that knows both supervise/ and
engines/.

    up        control, workers and engines on this host; engines' models are fetched first
    gateway   control and workers before engines that are already there
    engine    one supervised engine in the foreground, nothing in front of it

Each returns the exit code, and raises ConfigurationError or StartError for the command line to report.
"""

import asyncio
import atexit
import functools
import json
import logging
import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from vitalis_serve import logs
from vitalis_serve.control.options import ControlOptions, RouteOptions
from vitalis_serve.engines import models, probe
from vitalis_serve.engines.command import engine_command
from vitalis_serve.engines.diagnosis import remedy
from vitalis_serve.engines.environment import cache_folder, engine_python
from vitalis_serve.engines.gpu_memory import until_free
from vitalis_serve.engines.gpus import Inventory, read_inventory
from vitalis_serve.engines.placement import Placement, place
from vitalis_serve.errors import ConfigurationError, StartError
from vitalis_serve.fleet import TAKES_REQUESTS, Fleet, ReplicaState
from vitalis_serve.gateway.options import WorkerOptions
from vitalis_serve.progress import ProgressLines
from vitalis_serve.settings import Settings
from vitalis_serve.settings.schema import SOURCES, Route
from vitalis_serve.supervise import folders, orphans
from vitalis_serve.supervise.attendant import AttendantSpec
from vitalis_serve.supervise.child import keep
from vitalis_serve.supervise.lifecycle import Policy
from vitalis_serve.supervise.output import Output
from vitalis_serve.supervise.replica import Answer, Listing, ReplicaSpec, Sight
from vitalis_serve.supervise.supervisor import Supervisor, SupervisorOptions
from vitalis_serve.welcome import Welcome

logger = logging.getLogger(__name__)

OWN_IDLE_SECONDS = 60.0  # our engines keep idle connections for far longer
FOREIGN_IDLE_SECONDS = 4.0  # vLLM by default closes them after 5 s
DEFAULT_MEMORY_SHARE = 0.92  # vLLM's own gpu_memory_utilization


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything of one data folder lies; all paths absolute, folders made."""

    data: Path
    run: Path

    @property
    def log(self) -> Path:
        return self.data / "log"

    @property
    def control_address(self) -> Path:
        return self.data / "control.address"


def up(settings: Settings) -> int:
    """Runs the whole until it is told to stop."""
    place_ = _prepare(settings)
    inventory = read_inventory(os.environ)
    place(settings, inventory)  # what cannot fit is said before anything starts, and before it costs a download
    python = engine_python(settings.engines, os.environ)
    _check_model_folder(settings, python)
    supervisor_options = _supervisor_options(settings, place_, replicas=settings.engines.replicas)

    async def run() -> None:
        supervisor = Supervisor(supervisor_options, relay=_relay())
        welcome = Welcome(place_.data, place_.control_address)

        async def companion() -> None:
            async with asyncio.TaskGroup() as group:
                greeting = group.create_task(_greet(supervisor, welcome))
                folder = await _prepare_model(settings, place_)
                supervisor.open_fleet(functools.partial(_replica, settings, inventory, python, folder, place_))
                await supervisor.replicas.until(_any_ready)
                await greeting
            _show_requests(settings, supervisor, welcome)

        await supervisor.run(companion)

    asyncio.run(run())
    return 0


def gateway(settings: Settings, engines: Sequence[str], model: str | None = None) -> int:
    """Control and workers in front of engines that somebody else runs, at `engines` (http://host:port or
    unix:PATH). `model` is what they serve; if it is not given they are asked, for as long as this runs."""
    addresses = [_address(text) for text in engines]
    if not addresses:
        raise ConfigurationError("give at least one --engine, for example --engine http://127.0.0.1:8000")
    for address in addresses:
        if addresses.count(address) > 1:
            raise ConfigurationError(f"--engine {address} is given more than once: name each engine once")
    if model is not None and not probe.MODEL_NAME.fullmatch(model):
        raise ConfigurationError(f"--model {model!r} is no model's name: give it as the engine's /v1/models lists it")
    settings = _before_engines(settings, model)
    models = (model,) if model else ()
    place_ = _prepare(settings)
    supervisor_options = _supervisor_options(
        settings, place_, replicas=len(addresses), upstream_idle_seconds=FOREIGN_IDLE_SECONDS
    )

    async def run() -> None:
        supervisor = Supervisor(supervisor_options, relay=_relay())
        welcome = Welcome(place_.data, place_.control_address)

        async def companion() -> None:
            supervisor.open_fleet(functools.partial(_external, settings, addresses, models))
            await _greet(supervisor, welcome)
            await supervisor.replicas.until(_any_ready)
            _show_requests(settings, supervisor, welcome)

        await supervisor.run(companion)

    asyncio.run(run())
    return 0


def engine(settings: Settings) -> int:
    """One engine, kept alive, in the foreground; 1 if it has failed for good."""
    settings = _with_replicas(settings, 1)
    place_ = _prepare(settings)
    inventory = read_inventory(os.environ)
    place(settings, inventory)
    python = engine_python(settings.engines, os.environ)
    _check_model_folder(settings, python)
    options = SupervisorOptions(place_.data, place_.run, replicas=1, stop_seconds=settings.engines.stop_seconds)
    failed = False

    async def run() -> None:
        supervisor = Supervisor(options, relay=_relay(always=True))

        async def companion() -> None:
            nonlocal failed
            folder = await _prepare_model(settings, place_)
            supervisor.open_fleet(functools.partial(_replica, settings, inventory, python, folder, place_))
            await supervisor.replicas.until(lambda fleet: _any_ready(fleet) or _all_failed(fleet))
            if _any_ready(supervisor.fleet):
                logger.info("the engine answers at %s", supervisor.fleet.replicas[0].address)
            await supervisor.replicas.until(_all_failed)
            failed = True
            supervisor.stop()

        await supervisor.run(companion)

    asyncio.run(run())
    return 1 if failed else 0


# What there is to run


def _before_engines(settings: Settings, model: str | None) -> Settings:
    """`settings` for engines that somebody else runs. `model` is in the place of model.name, also behind the routes;
    without it there are the configured routes, or () for those that the engines will name."""
    name = settings.model.name
    configured = settings.routes != (Route(name=name, model=name),)  # the one that loading fills in
    if model is None:
        return settings if configured else settings.model_copy(update={"routes": ()})
    if configured:
        routes = tuple(r.model_copy(update={"model": model}) if r.model == name else r for r in settings.routes)
    else:
        routes = (Route.model_construct(name=model, model=model),)  # engines name models as they like
    unknown = dict.fromkeys(SOURCES)
    return settings.model_copy(
        update={"model": settings.model.model_copy(update=unknown | {"name": model}), "routes": routes},
    )


def _prepare(settings: Settings) -> Place:
    _raise_descriptor_limit()
    data = settings.data_folder.absolute()
    place_ = Place(data, folders.prepare(data))
    # Before anything of a running tree's could be written over, and in the data folder: where the run folder lies
    # may depend on who starts us.
    lock = folders.Lock(data / "lock", data)
    lock.acquire()
    atexit.register(lock.release)
    try:
        logs.configure(place_.log / "supervisor.log")
    except OSError as exc:
        raise StartError(f"{place_.log / 'supervisor.log'} cannot be written: {exc.strerror}.") from exc
    return place_


def _raise_descriptor_limit() -> None:
    """A shell's soft limit is often 1,024, which is some 500 streams: children inherit the hard one instead."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as exc:
        logger.warning("the limit of open files stays as it is: %s", exc)


def _supervisor_options(
    settings: Settings, place_: Place, *, replicas: int, upstream_idle_seconds: float = OWN_IDLE_SECONDS
) -> SupervisorOptions:
    control_file = _write(place_.run / "control.json", _control_options(settings, place_))
    workers = []
    for index in range(settings.gateway.workers):
        name = f"worker-{index}"
        file = _write(place_.run / f"{name}.json", _worker_options(settings, place_, index, upstream_idle_seconds))
        argv = (sys.executable, "-m", "vitalis_serve.gateway.worker", str(file))
        workers.append(AttendantSpec(name, "worker", argv, dict(os.environ)))
    return SupervisorOptions(
        data_folder=place_.data,
        run_folder=place_.run,
        host=settings.gateway.host,
        port=settings.gateway.port,
        replicas=replicas,
        settle_seconds=settings.shutdown.settle_seconds,
        drain_seconds=settings.shutdown.drain_seconds,
        stop_seconds=settings.engines.stop_seconds,
        workers=tuple(workers),
        control=AttendantSpec(
            "control",
            "control",
            (sys.executable, "-m", "vitalis_serve.control.process", str(control_file)),
            dict(os.environ),
        ),
        control_address=lambda: _control_place(settings, place_),
    )


def _worker_options(settings: Settings, place_: Place, index: int, upstream_idle_seconds: float) -> WorkerOptions:
    gateway_, deadlines = settings.gateway, settings.gateway.deadlines
    return WorkerOptions(
        name=f"worker-{index}",
        snapshot_path=str(place_.data / "snapshot.json"),
        control_socket=str(place_.run / "control.sock"),
        access_log_path=str(place_.log / "access.jsonl") if gateway_.access_log else "",
        max_header_bytes=gateway_.max_header_bytes,
        max_body_bytes=gateway_.max_body_bytes,
        max_bodies_bytes=gateway_.max_bodies_bytes,
        max_connections=gateway_.max_connections,
        header_seconds=gateway_.header_seconds,
        body_seconds=gateway_.body_seconds,
        keepalive_seconds=gateway_.keepalive_seconds,
        queue_requests=gateway_.queue.max_requests,
        queue_seconds=gateway_.queue.max_seconds,
        class_seconds={str(name): seconds for name, seconds in gateway_.queue.class_seconds.items()},
        cold_start_seconds=gateway_.queue.cold_start_seconds,
        overload_seconds=gateway_.queue.overload_seconds,
        reserved_share=gateway_.queue.reserved_share,
        routing=gateway_.routing,
        connect_seconds=deadlines.connect_seconds,
        first_token_seconds=deadlines.first_token_seconds,
        idle_seconds=deadlines.idle_seconds,
        client_stalled_seconds=deadlines.client_stalled_seconds,
        total_seconds=deadlines.total_seconds,
        upstream_idle_seconds=upstream_idle_seconds,
        harmony=_speaks_harmony(settings),
        workers=gateway_.workers,
        worker=index,
        gateways=gateway_.gateways,
        admission_socket=str(place_.run / "admission.sock"),
        spool_folder=str(place_.data / "spool"),
        spool_segment_bytes=settings.ledger.segment_bytes,
        spool_full=settings.ledger.full_disk,
        spent_path=str(place_.data / "spent.json"),
        limits_redis_url=settings.limits.redis_url or "",
        limits_wait_seconds=settings.limits.wait_seconds,
        limits_away=settings.limits.away,
        limits_lease_seconds=settings.limits.lease_seconds,
    )


def _speaks_harmony(settings: Settings) -> bool:
    """Whether gpt-oss is behind this gateway. Of engines that somebody else runs only the names are known, and where
    they are asked for those, the workers see (`WorkerState.take_fleet`)."""
    if not settings.routes:
        return False
    model = settings.model
    names = (model.hub, model.folder, model.build, model.name, *(route.model for route in settings.routes))
    return any("gpt-oss" in str(name).lower() for name in names)


def _control_options(settings: Settings, place_: Place) -> ControlOptions:
    return ControlOptions(
        database_path=str(place_.data / "vitalis.db"),
        snapshot_path=str(place_.data / "snapshot.json"),
        token_path=str(place_.data / "control.token"),
        address_path=str(place_.control_address),
        control_socket=str(place_.run / "control.sock"),
        supervisor_socket=str(place_.run / "supervisor.sock"),
        host=settings.control.host,
        port=settings.control.port,
        workers=settings.gateway.workers,
        cache_secret_path=str(place_.data / "cache.secret"),
        routes=tuple(_route_options(route, settings) for route in settings.routes),
        cache_groups={group: tuple(tenants) for group, tenants in settings.cache_groups.items()},
        tenant_weights=dict(settings.tenant_weights),
        database_url=settings.store.url or "",
        database_seconds=settings.store.connect_seconds,
        spool_folder=str(place_.data / "spool"),
        spent_path=str(place_.data / "spent.json"),
        keep_days=settings.ledger.keep_days,
        keep_daily_days=settings.ledger.keep_daily_days,
        issuers=tuple(issuer.model_dump(mode="json") for issuer in settings.oidc),
        limits_redis_url=settings.limits.redis_url or "",
    )


def _route_options(route: Route, settings: Settings) -> RouteOptions:
    policy = route.model_dump(mode="json", exclude_defaults=True, exclude={"name", "model"})
    return RouteOptions(route.name, route.model or settings.model.name, policy)


def _write(path: Path, options: msgspec.Struct) -> Path:
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(options))
    except OSError as exc:
        raise StartError(f"{path} cannot be written: {exc.strerror}.") from exc
    return path


def _control_place(settings: Settings, place_: Place) -> dict[str, Any]:
    try:
        address = urlsplit(place_.control_address.read_text().strip())
        return {"host": address.hostname, "port": address.port}
    except (OSError, ValueError):
        return {"host": settings.control.host, "port": settings.control.port}


# Replicas


@dataclass(frozen=True, slots=True)
class EngineProber:
    """`supervise.replica.Prober` by way of `engines.probe`."""

    address: str

    async def models(self, deadline: float) -> Listing:
        said = await probe.models(self.address, deadline)
        return Listing(said.names, said.reason)

    async def answers(self, model: str, deadline: float) -> Answer:
        result = await probe.answers(self.address, model, deadline)
        return Answer(result.reason, refused=result.refused, busy=result.busy, gone=result.gone)

    async def look(self, deadline: float) -> Sight:
        seen = await probe.progress(self.address, deadline)
        return Sight(
            seen.healthy,
            seen.running + seen.waiting,
            seen.counters,
            seen.refused,
            seen.reason,
            kv_tokens=seen.kv_cache_tokens or 0,
            gone=seen.gone,
            started=seen.started,
        )


def _policy(settings: Settings, *, owned: bool) -> Policy:
    engines, restart = settings.engines, settings.engines.restart
    return Policy(
        start_seconds=engines.start_seconds,
        stop_seconds=engines.stop_seconds,
        drain_seconds=settings.shutdown.drain_seconds,
        hung_seconds=engines.hung_seconds,
        backoff_first_seconds=restart.first_seconds,
        backoff_max_seconds=restart.max_seconds,
        tries=restart.tries,
        steady_seconds=restart.steady_seconds,
        owned=owned,
    )


def _replica(
    settings: Settings, inventory: Inventory, python: Path, folder: Path, place_: Place, index: int
) -> ReplicaSpec:
    """Raises ConfigurationError where there is no room for one more."""
    name = f"engine-{index}"
    placements = place(_with_replicas(settings, max(index + 1, settings.engines.replicas)), inventory)
    command = engine_command(
        settings,
        index,
        placements[index],
        folder,
        place_.run / f"{name}.sock",
        python=python,
        family=_family(folder),
    )
    return ReplicaSpec(
        name,
        command.address,
        (settings.model.name,),
        settings.engines.slots,
        EngineProber(command.address),
        _policy(settings, owned=True),
        probe_seconds=settings.engines.probe_seconds,
        argv=command.argv,
        environment=command.env,
        sockets=command.sockets,
        remedy=remedy,
        clear=functools.partial(_clear, settings, placements[index]) if placements[index].gpus else None,
    )


async def _clear(settings: Settings, placement: Placement) -> None:
    """Before a restart: the GPUs have given back what the process before held."""
    share = float(settings.engines.engine_args.get("gpu-memory-utilization", DEFAULT_MEMORY_SHARE))
    if not await until_free(placement.gpus, share):
        logger.warning("GPU memory is still taken by somebody else; starting all the same")


def _external(settings: Settings, addresses: Sequence[str], models: tuple[str, ...], index: int) -> ReplicaSpec:
    if index >= len(addresses):
        raise ConfigurationError("the engines of this gateway were given by address; there are no more")
    return ReplicaSpec(
        f"engine-{index}",
        addresses[index],
        models,
        settings.engines.slots,
        EngineProber(addresses[index]),
        _policy(settings, owned=False),
        probe_seconds=settings.engines.probe_seconds,
    )


def _with_replicas(settings: Settings, count: int) -> Settings:
    return settings.model_copy(update={"engines": settings.engines.model_copy(update={"replicas": count})})


def _family(folder: Path) -> str | None:
    """The model's architecture by its own word; None where it does not say."""
    try:
        family = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return family if isinstance(family, str) else None


def _address(text: str) -> str:
    """An engine's address as the fleet writes it. Raises ConfigurationError."""
    if text.startswith("unix:") and len(text) > len("unix:"):
        path = Path(text.removeprefix("unix:")).absolute()
        if len(os.fsencode(path)) >= folders.MAX_SOCKET_PATH_BYTES:
            raise ConfigurationError(
                f"--engine {text}: the path of a Unix socket must be shorter than {folders.MAX_SOCKET_PATH_BYTES} "
                f"bytes, this one has {len(os.fsencode(path))}: let the engine listen on a shorter one"
            )
        return f"unix:{path}"
    try:
        url = urlsplit(text)
        port = url.port or 80
    except ValueError:
        url, port = urlsplit(""), 0
    if "@" in url.netloc:  # not repeated: it may hold a password
        raise ConfigurationError("--engine: an address with a user name is not supported: give http://HOST:PORT")
    if url.scheme != "http" or not url.hostname or url.path.strip("/") or url.query:
        raise ConfigurationError(f"--engine {text} is no engine's address: give http://HOST:PORT or unix:/PATH")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return f"http://{host}:{port}"


def _check_model_folder(settings: Settings, python: Path) -> None:
    """A folder that is no model is said before anything starts: looking at it takes no time. Raises
    ConfigurationError."""
    if settings.model.folder is not None:
        models.ensure(settings.model, cache_folder(os.environ), python, _show_progress)


# Beside the children


def _relay(*, always: bool = False) -> Callable[[str, str], None] | None:
    """Children's lines into our own log, where that is what people read: not on a terminal, which has
    var/log/."""
    if sys.stderr.isatty() and not always:
        return None
    lines = logging.getLogger("vitalis_serve.child")

    def relay(name: str, line: str) -> None:
        engine_ = {"engine": name} if name.startswith("engine-") else {}
        lines.info("%s", line, extra={"child": name, **engine_})

    return relay


async def _greet(supervisor: Supervisor, welcome: Welcome) -> None:
    assert supervisor.control is not None
    await supervisor.control.ready.wait()
    await asyncio.to_thread(welcome.first_key)


def _show_requests(settings: Settings, supervisor: Supervisor, welcome: Welcome) -> None:
    names = [route.name for route in settings.routes] or supervisor.fleet.models
    welcome.show_requests(supervisor.host, supervisor.port, names[0])


async def _prepare_model(settings: Settings, place_: Place) -> Path:
    """Fetches and converts the model in a process that ends with us. Raises ConfigurationError,
    StartError."""
    result = place_.run / "model.path"
    result.unlink(missing_ok=True)
    file = place_.run / "model.json"
    file.write_text(settings.model_dump_json())
    progress = ProgressLines(_show_progress)
    output = Output(place_.log / "model.log", progress)
    argv = [sys.executable, "-m", "vitalis_serve.preparation", str(file), str(result)]
    mark = {orphans.VARIABLE: f"{folders.tree_mark(place_.data)}:model"}
    child = await keep(argv, {**os.environ, **mark}, output)
    ended = ""
    try:
        async for line in child.lines():
            ended = line
        await child.wait()
    finally:
        child.close()
        output.close()
        progress.end()
    said = (output.last_lines(1) or ("",))[0]
    if ended == "exited 2":
        raise ConfigurationError(said)
    if ended == "exited 3":
        raise StartError(said)
    if ended != "exited 0":
        raise StartError(f"the model could not be prepared ({ended}: {said}); see {place_.log / 'model.log'}")
    return Path(result.read_text())


def _show_progress(line: str) -> None:
    logger.info("model: %s", line)


def _any_ready(fleet: Fleet) -> bool:
    return any(replica.state in TAKES_REQUESTS for replica in fleet.replicas)


def _all_failed(fleet: Fleet) -> bool:
    return all(replica.state is ReplicaState.FAILED for replica in fleet.replicas)

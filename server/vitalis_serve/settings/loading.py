"""Settings from their places: schema defaults, then the file, then its profile, then the environment.

Maps merge key by key; anything else is replaced. Each layer must be right by itself, also where another one wins.
Every error is one sentence with the file and line (or variable) of the key at fault.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

from vitalis_serve.errors import ConfigurationError
from vitalis_serve.settings.hardware import GpuModel, gpu_models, profile_for
from vitalis_serve.settings.redaction import is_placeholder, is_secret, redact
from vitalis_serve.settings.schema import SOURCES, Route, Settings
from vitalis_serve.settings.sources import KeyPath, Layer, read_yaml
from vitalis_serve.settings.variables import environment_layer, setting_paths

DEFAULT_FILE: Final = Path("config/gpt-oss.yaml")
# In a checkout, and in our containers, config/ lies beside server/.
_INSTALLATION: Final = Path(__file__).parents[3]
_MODEL: Final = ("model",)
_MAPS: Final = (("engines", "engine_args"), ("engines", "engine_env"))
# Ours to decide: said twice, they would contradict the rest of the configuration.
RESERVED_ARGS: Final[Mapping[str, str]] = {
    "model": "set model.hub, model.folder, model.package or model.build instead",
    "served-model-name": "set model.name instead",
    "tensor-parallel-size": "set engines.tensor_parallel instead",
    "uds": "engines listen where the supervisor tells them to",
    "host": "engines listen on Unix sockets only",
    "port": "engines listen on Unix sockets only",
    "shutdown-timeout": "it is derived from shutdown.drain_seconds and engines.stop_seconds",
    "device-ids": "set engines.gpus instead",
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings and where they came from: `files` in the order they were merged, `layers` likewise."""

    settings: Settings
    files: tuple[Path, ...]
    layers: tuple[Layer, ...]
    profile_reason: str

    def place(self, path: KeyPath) -> str:
        """Where the value in force at `path` was given; "default" where nowhere."""
        return _place(self.layers, path) or "default"


def companion(file: Path, name: str) -> Path:
    """The file `name` (`profiles/h200.yaml`) that goes with a configuration file: beside it, else the one shipped."""
    beside, shipped = file.parent / name, _INSTALLATION / "config" / name
    return shipped if shipped.is_file() and not beside.is_file() else beside


def load(path: Path | None, environ: Mapping[str, str], *, engines_here: bool = True) -> Settings:
    """The settings in force. Raises ConfigurationError: one sentence naming place, key and remedy.

    engines_here: False where the engines are somebody else's. This machine's GPUs then say nothing about them, so the
    profile `auto` adds nothing and stays `auto`.
    """
    return resolve(path, environ, gpus=gpu_models if engines_here else None).settings


def resolve(
    path: Path | None,
    environ: Mapping[str, str],
    *,
    gpus: Callable[[], Sequence[GpuModel]] | None = gpu_models,
) -> Resolved:
    """As `load`, with the origins. `gpus` is asked only where the profile is `auto`; None: the engines are not here."""
    file = _file(path, environ)
    base, outer = _normalised(read_yaml(file)), _normalised(environment_layer(environ))
    # Before the profile is looked for: what is wrong in a file must not hide behind what is wrong beside it.
    _check(base)
    _check(outer)
    name, reason = _profile(base, outer, gpus)
    overlay_file = companion(file, f"profiles/{name}.yaml")
    overlay = Layer(name, {}, {}, {})
    if name != "auto":
        overlay = _profile_layer(file, overlay_file, _place([base, outer], ("profile",)) or "profile")
    layers = tuple(_source_cleared(layer) for layer in (base, overlay, outer))

    values = _defaults()
    for layer in layers:
        values = _merge(values, layer.values)
    values["profile"] = name
    settings = _validated(values, layers)
    _refuse_placeholders(settings, environ, layers)
    routes = settings.routes or (Route(name=settings.model.name),)
    routes = tuple(r if r.model else r.model_copy(update={"model": _route_model(r, settings)}) for r in routes)
    files = (file, overlay_file) if name != "auto" else (file,)
    return Resolved(settings.model_copy(update={"routes": routes}), files, layers, reason)


def _route_model(route: Route, settings: Settings) -> str:
    heaviest = max(route.weights, key=lambda weight: weight.weight, default=None)
    return heaviest.model if heaviest is not None else settings.model.name


def _file(path: Path | None, environ: Mapping[str, str]) -> Path:
    if path is not None:
        return path
    if environ.get("VITALIS_CONFIG"):
        return Path(environ["VITALIS_CONFIG"])
    # A checkout works from any folder.
    beside = _INSTALLATION / DEFAULT_FILE
    return beside if not DEFAULT_FILE.exists() and beside.exists() else DEFAULT_FILE


def _profile(base: Layer, outer: Layer, gpus: Callable[[], Sequence[GpuModel]] | None) -> tuple[str, str]:
    wanted = outer.values.get("profile", base.values.get("profile", "auto"))
    if wanted != "auto":
        return str(wanted), _place([base, outer], ("profile",)) or "default"
    if gpus is None:
        return "auto", "auto: no engine is started here"
    found = tuple(gpus())
    name = profile_for(found)
    return name, f"auto: {f'{len(found)} x {found[0].name}' if found else 'no GPU found'}"


def _profile_layer(file: Path, overlay: Path, place: str) -> Layer:
    if not overlay.is_file():
        folders = dict.fromkeys(
            folder.resolve() for folder in (file.parent / "profiles", _INSTALLATION / "config" / "profiles")
        )
        there = [folder for folder in folders if folder.is_dir()] or list(folders)[:1]
        known = sorted({other.stem for folder in there for other in folder.glob("*.yaml")})
        near = difflib.get_close_matches(overlay.stem, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
        where = " or ".join(str(folder) for folder in there)
        raise ConfigurationError(f"{place}: there is no profile {overlay.stem} in {where}; {remedy}")
    layer = _normalised(read_yaml(overlay))
    if "profile" in layer.values:
        raise ConfigurationError(f"{layer.place(('profile',))}: a profile cannot name a profile; remove the key")
    _check(layer)
    return layer


def _defaults() -> dict[str, Any]:
    values = Settings().model_dump()
    values["engines"] |= {"engine_args": {}, "engine_env": {}}
    return values


def _check(layer: Layer) -> None:
    """Raises ConfigurationError for what is wrong in this layer whatever the others say."""
    _refuse_unknown(layer)
    _refuse_reserved(layer)
    profile = layer.values.get("profile", "auto")
    if not isinstance(profile, str) or not profile.replace("-", "").isalnum():
        raise ConfigurationError(
            f"{layer.place(('profile',))}: profile must be the name of a file in profiles/, or auto"
        )
    values = _merge(_defaults(), layer.values) | {"profile": "auto"}  # whether there is that profile is said later
    try:
        Settings.model_validate(values)
    except ValidationError as error:
        # What contradicts another key may be right with the other layers.
        problems = [dict(problem) for problem in error.errors(include_url=False) if not _is_between_keys(problem)]
        if problems:
            raise _refusal(problems, [layer]) from None


def _is_between_keys(problem: Mapping[str, Any]) -> bool:
    above = tuple(problem["loc"])
    inner = any(len(path) > len(above) and path[: len(above)] == above for path in setting_paths())
    return inner and problem["type"] == "value_error"


def _place(layers: Sequence[Layer], path: KeyPath) -> str | None:
    """The last layer that gives `path` or something below or above it."""
    for layer in reversed(layers):
        branch: Any = layer.values
        for depth, key in enumerate(path):
            if isinstance(branch, list) and key.isdigit() and int(key) < len(branch):
                branch = branch[int(key)]
            elif isinstance(branch, Mapping) and key in branch:
                branch = branch[key]
            elif depth and not isinstance(branch, Mapping):
                return layer.place(path)
            else:
                break
        else:
            return layer.place(path)
    return None


def flag_name(key: str) -> str:
    """vLLM's own spelling of an option: no leading dashes, and dashes for underscores up to the first dot."""
    head, dot, rest = key.lstrip("-").partition(".")
    return head.replace("_", "-") + dot + rest


def _normalised(layer: Layer) -> Layer:
    """engine_args under vLLM's own spelling, so that max_num_seqs meets max-num-seqs of another layer."""
    engines = layer.values.get("engines")
    args = engines.get("engine_args") if isinstance(engines, Mapping) else None
    if not isinstance(engines, Mapping) or not isinstance(args, Mapping):
        return layer
    renamed: dict[str, Any] = {}
    lines, variables = dict(layer.lines), dict(layer.variables)
    for key, value in args.items():
        name = flag_name(key)
        old, new = (*_MAPS[0], key), (*_MAPS[0], name)
        if name in renamed:
            raise ConfigurationError(f"{layer.place(old)}: engines.engine_args has --{name} twice; remove one")
        renamed[name] = value
        if old in lines:
            lines[new] = lines[old]
    return Layer(layer.name, {**layer.values, "engines": {**engines, "engine_args": renamed}}, lines, variables)


def _source_cleared(layer: Layer) -> Layer:
    """A layer that names a model's source replaces the source of the layers below, it does not add one."""
    model = layer.values.get("model")
    if not isinstance(model, Mapping) or all(model.get(key) is None for key in SOURCES):
        return layer
    given: KeyPath = next((*_MODEL, key) for key in SOURCES if model.get(key) is not None)
    cleared: set[KeyPath] = {(*_MODEL, key) for key in (*SOURCES, "revision") if key not in model}
    # What was cleared was cleared by the source that is given.
    lines = dict.fromkeys(cleared, layer.lines[given]) if given in layer.lines else {}
    variables = dict.fromkeys(cleared, layer.variables[given]) if given in layer.variables else {}
    values = {**layer.values, "model": {**{path[-1]: None for path in cleared}, **model}}
    return Layer(layer.name, values, {**layer.lines, **lines}, {**layer.variables, **variables})


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        lower = merged.get(key)
        if isinstance(lower, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(lower, value)
        elif isinstance(lower, Mapping) and value is None:
            continue  # a section whose every key is commented out
        else:
            merged[key] = value
    return merged


def _section(path: KeyPath) -> type[BaseModel] | None:
    """The schema class that holds the keys directly below `path`, if it is one."""
    model: type[BaseModel] = Settings
    for key in path:
        if key.isdigit():
            continue
        field = model.model_fields.get(key)
        inner = None if field is None else field.annotation
        inner = next((arg for arg in get_args(inner) if isinstance(arg, type)), inner)
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return None
        model = inner
    return model


def _keys(section: type[BaseModel]) -> list[str]:
    """As they are written: `class` is no name for a field in Python."""
    return [field.alias or name for name, field in section.model_fields.items()]


def _refuse_unknown(layer: Layer, branch: Any = None, path: KeyPath = ()) -> None:
    section = _section(path)
    branch = layer.values if not path else branch
    if section is None:
        return
    if isinstance(branch, list):
        for i, item in enumerate(branch):
            if isinstance(item, Mapping):
                _refuse_unknown(layer, item, (*path, str(i)))
        return
    if not isinstance(branch, Mapping):
        return
    known = _keys(section)
    for key, value in branch.items():
        here = (*path, key)
        if key not in known:
            remedy = _nearest(here, section)
            raise ConfigurationError(f"{layer.place(here)}: {'.'.join(here)} is not a known key{remedy}")
        _refuse_unknown(layer, value, here)


def _nearest(path: KeyPath, section: type[BaseModel]) -> str:
    siblings = difflib.get_close_matches(path[-1], _keys(section), n=1)
    siblings = siblings or [name for name in _keys(section) if name.startswith(f"{path[-1]}_")]
    if siblings:
        return f"; did you mean {'.'.join((*path[:-1], siblings[0]))}?"
    ends: dict[str, KeyPath] = {}
    for known in setting_paths():
        ends.setdefault(known[-1], known)
    elsewhere = difflib.get_close_matches(path[-1], ends, n=1, cutoff=0.8)
    if elsewhere:
        return f"; did you mean {'.'.join(ends[elsewhere[0]])}?"
    if len(path) == 1 or path[0] == "engines":
        return "; vLLM's own options go below engines.engine_args"
    return f"; known here: {', '.join(_keys(section))}"


def _refuse_reserved(layer: Layer) -> None:
    engines = layer.values.get("engines")
    args = engines.get("engine_args") if isinstance(engines, Mapping) else None
    for name, value in args.items() if isinstance(args, Mapping) else ():
        remedy = RESERVED_ARGS.get(name)
        if remedy and value is not None:
            path = (*_MAPS[0], name)
            raise ConfigurationError(f"{layer.place(path)}: {'.'.join(path)} is not yours to set; {remedy}")


def _validated(values: Mapping[str, Any], layers: Sequence[Layer]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise _refusal([dict(problem) for problem in error.errors(include_url=False)], layers) from None


def _refusal(problems: Sequence[Mapping[str, Any]], layers: Sequence[Layer]) -> ConfigurationError:
    first = problems[0]
    path = _known_part(tuple(str(part) for part in first["loc"]))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    sentence = _sentence(path, first)
    # What is wrong only together has no path of its own, but names the keys.
    blamed = (path,) if path else tuple(key for key in setting_paths() if ".".join(key) in sentence)
    places = dict.fromkeys(place for key in blamed if (place := _place(layers, key)))
    where = ", ".join(places) or (layers[0].name if layers else "settings")
    return ConfigurationError(f"{where}: {sentence}{more}")


def _known_part(path: KeyPath) -> KeyPath:
    # pydantic adds parts of its own for unions and the like.
    for known in setting_paths():
        if path[: len(known)] == known:
            extra = path[len(known) : len(known) + 4]
            return known + tuple(part for part in extra if "[" not in part and part not in ("str", "int"))
    return path


_BOUNDS: Final = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_KINDS: Final = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "mapping": "a map of names to values",
    "dict": "a map of names to values",
    "model": "a section with keys of its own",
    "path": "a path",
}


def _sentence(path: KeyPath, problem: Mapping[str, Any]) -> str:
    """What pydantic found, in words: "gateway.port is 70000; it must be at most 65535"."""
    kind, context, given = problem["type"], problem.get("ctx", {}), problem.get("input")
    key = ".".join(path) or "the configuration"
    shown = "a secret" if is_secret(key) else _shown(redact(given))
    if kind == "value_error":
        reason = str(context["error"])
        return f"{key} {reason}" if reason.startswith("must") else f"{key}: {reason}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{key} is {shown}; it must be {words} {context[name]}"
    if kind == "literal_error":
        known = str(context["expected"]).replace("'", "").split()
        near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.7)  # "gpu" is not a mistyped "cpu"
        hint = f" (did you mean {near[0].strip(',')}?)" if near else ""
        return f"{key} is {shown}; it must be {context['expected']}{hint}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "string_pattern_mismatch":
        return f"{key} is {shown}; it must match {context['pattern']}"
    word = _KINDS.get(kind.split("_")[0])
    if word:
        return f"{key} is {shown}; it must be {word}"
    return f"{key} is {shown}; {str(problem['msg'])[:1].lower()}{str(problem['msg'])[1:]}"


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, Mapping | list | tuple):
        return "a map" if isinstance(value, Mapping) else "a list"
    text = repr(value) if isinstance(value, str) else str(value).lower() if value in (True, False) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_placeholders(settings: Settings, environ: Mapping[str, str], layers: Sequence[Layer]) -> None:
    if environ.get("HF_TOKEN") and is_placeholder(environ["HF_TOKEN"]):
        raise ConfigurationError("environment: HF_TOKEN holds a placeholder; put a real token there or leave it empty")
    for path, values in ((_MAPS[0], settings.engines.engine_args), (_MAPS[1], settings.engines.engine_env)):
        for name, value in values.items():
            if is_secret(name) and isinstance(value, str) and is_placeholder(value):
                place = _place(layers, (*path, name))
                raise ConfigurationError(
                    f"{place}: {'.'.join((*path, name))} holds a placeholder; put the real secret there"
                    " or remove the key"
                )

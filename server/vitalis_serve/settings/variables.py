"""Every environment variable of ours. The prefix is `VITALIS_`, never `VLLM_`: vLLM owns that one and
complains about names it does not know. `config/environment.env` lists the same; a test holds the two together."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from pydantic import BaseModel

from vitalis_serve.errors import ConfigurationError
from vitalis_serve.settings.schema import Settings
from vitalis_serve.settings.sources import KeyPath, Layer, read_value

PREFIX: Final = "VITALIS_"

# Not settings: read where they are needed. The internal ones are set by the supervisor for its children.
OTHER_VARIABLES: Final = MappingProxyType(
    {
        "VITALIS_CONFIG": "the configuration file, where --config is not given",
        "VITALIS_CACHE": "folder of environments and models, default ~/.cache/vitalis-serve",
        "VITALIS_ENGINE_PYTHON": "python of the engine's environment, where engines.engine_python is auto",
        "VITALIS_KEY": "a key for `vitalis-serve smoke`, where --key is not given",
        "VITALIS_SUPERVISOR_FD": "internal: a child's channel to the supervisor",
        "VITALIS_DATA_FD": "internal: the data socket, handed down by the supervisor",
        "VITALIS_TREE": "internal: marks the processes of one tree, so that orphans can be told",
    }
)
# VITALIS_ENGINES_ENGINE_PYTHON would be a near-twin of VITALIS_ENGINE_PYTHON; one is enough.
_LEFT_OUT: Final = frozenset({("engines", "engine_python")})
_STRUCTURED: Final = frozenset(
    {
        ("engines", "engine_args"),
        ("engines", "engine_env"),
        ("gateway", "queue", "class_seconds"),
        ("oidc",),
        ("routes",),
        ("cache_groups",),
        ("tenant_weights",),
    }
)


def setting_paths(model: type[BaseModel] = Settings, above: KeyPath = ()) -> tuple[KeyPath, ...]:
    """The path of every setting, in the schema's order; sections are walked into, lists and maps are not."""
    paths: list[KeyPath] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            paths += setting_paths(inner, (*above, name))
        else:
            paths.append((*above, name))
    return tuple(paths)


def _variable(path: KeyPath) -> str:
    return PREFIX + "_".join(path).upper()


VARIABLES: Final[Mapping[str, KeyPath]] = MappingProxyType(
    {_variable(path): path for path in setting_paths() if path not in _LEFT_OUT}
)


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """What the environment sets. An empty value counts as not set, as container tools pass empty ones.

    Raises ConfigurationError for a `VITALIS_` variable that is not ours, naming the nearest that is.
    """
    values: dict[str, Any] = {}
    places: dict[KeyPath, str] = {}
    for name in sorted(key for key in environ if key.startswith(PREFIX)):
        text = environ[name]
        path = VARIABLES.get(name)
        if path is None:
            if name in OTHER_VARIABLES:
                continue
            raise ConfigurationError(_unknown(name))
        if not text.strip():
            continue
        places[path] = name
        branch = values
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = read_value(text, name) if path in _STRUCTURED else text.strip()
    return Layer("environment", values, {}, places)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, [*VARIABLES, *OTHER_VARIABLES], n=1, cutoff=0.6)
    remedy = f"; did you mean {near[0]}?" if near else "; config/environment.env lists them all"
    return f"environment: {name} is not a variable of vitalis-serve{remedy}"

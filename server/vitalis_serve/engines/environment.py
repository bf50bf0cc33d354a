"""Where engines' own things lie: the cache folder, and the python of their virtual environment."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vitalis_serve.errors import ConfigurationError
from vitalis_serve.settings.schema import Engines

MAKE: Final = "python3 deploy/environments.py engine"


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Environments and models, shared by all checkouts. Not created here."""
    if given := environ.get("VITALIS_CACHE"):
        return Path(given).expanduser().absolute()
    home = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME") or Path.home()) / ".cache")
    return Path(home) / "vitalis-serve"


def engine_python(engines: Engines, environ: Mapping[str, str]) -> Path:
    """The python that engines run with: as configured, else VITALIS_ENGINE_PYTHON, else the newest in the cache.

    Raises ConfigurationError where there is none, or where the one named cannot be run.
    """
    if engines.engine_python != "auto":
        return _runnable(engines.engine_python, "engines.engine_python")
    if given := environ.get("VITALIS_ENGINE_PYTHON"):
        return _runnable(given, "VITALIS_ENGINE_PYTHON")
    folder = cache_folder(environ) / "env"
    wanted = {"cpu": ("engine-cpu",), "cuda": ("engine-cuda",)}.get(engines.device, ("engine-cuda", "engine-cpu"))
    for role in wanted:
        found = [path for path in folder.glob(f"{role}-*/bin/python") if os.access(path, os.X_OK)]
        if found:
            return max(found, key=lambda path: path.parent.parent.stat().st_mtime)
    raise ConfigurationError(
        f"engines.engine_python is auto, but there is no engine environment in {folder}; make one with"
        f" `{MAKE}` or set VITALIS_ENGINE_PYTHON"
    )


def _runnable(text: str, place: str) -> Path:
    # Not resolved: in a virtual environment `python` is a link, and following it would leave the environment.
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise ConfigurationError(f"{place}: {path} is not a program that can be run; make one with `{MAKE}`")
    return path

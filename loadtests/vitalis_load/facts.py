"""What a run writes down about where and with what it ran."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import psutil

from vitalis_load import engine_options, plain_http
from vitalis_load.sampling import Gpus
from vitalis_load.target import Target

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("locust", "gevent", "hdrhistogram", "httptools", "msgspec", "pydantic")


def versions(target: Target) -> dict[str, str]:
    """Of this program's parts, and of the servers that say theirs."""
    found = {"python": platform.python_version(), "vitalis-load": own_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for name, address in [*target.engines.items(), *([] if target.gateway else [("engine", target.url)])]:
        if version := _engine_version(address):
            found[f"vllm ({name})" if len(target.engines) > 1 else "vllm"] = version
    return found


def own_version() -> str:
    """That of the repository this is part of."""
    try:
        text = (REPOSITORY / "server" / "vitalis_serve" / "__init__.py").read_text()
    except OSError:
        return ""
    return next((line.split('"')[1] for line in text.splitlines() if line.startswith("__version__")), "")


def commit() -> str:
    """Of the repository; "+changes" where tracked files differ; "" where this is no checkout."""

    def git(*words: str) -> str:
        ran = subprocess.run(
            ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, timeout=20, check=True
        )
        return ran.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def machine() -> dict[str, Any]:
    """The one that makes the load."""
    gpus = Gpus()
    names = gpus.names()
    gpus.close()
    found: dict[str, Any] = {
        "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(), "system": platform.platform(),
    }  # fmt: skip
    return found | ({"gpus": names} if names else {})


def told(target: Target) -> dict[str, Any]:
    """What the server says of itself: models, replicas. What cannot be had is left out."""
    found: dict[str, Any] = {"gateway": target.gateway}
    models = _json(target.url, "/v1/models", target.key(""))
    if isinstance(models, dict):
        keep = ("id", "root", "max_model_len", "owned_by")
        found["models"] = [
            {name: model[name] for name in keep if model.get(name) is not None}
            for model in models.get("data", []) if isinstance(model, dict)
        ]  # fmt: skip
    if target.metrics_url:
        fleet = _json(target.metrics_url, "/v1/fleet", target.metrics_token)
        if isinstance(fleet, dict):
            found["replicas"] = fleet.get("replicas", [])
    engines = {
        name: engine_options.told(address, target.engine_pids.get(name)) for name, address in target.engines.items()
    }
    return found | ({"engines": engines} if any(engines.values()) else {})


def _engine_version(address: str) -> str:
    answer = _json(address, "/version", "")
    return str(answer.get("version", "")) if isinstance(answer, dict) else ""


def _json(url: str, path: str, token: str) -> Any:
    try:
        answer = plain_http.ask(url, path, token=token, seconds=5)
        return msgspec.json.decode(answer.body) if answer.status == 200 else None
    except (OSError, msgspec.DecodeError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

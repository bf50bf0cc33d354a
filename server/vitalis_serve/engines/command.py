"""The command line and environment of one engine. Pure but for the default of `environ`.

vLLM's options pass through: this file knows only those that the rest of the program relies on.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vitalis_serve.engines.environment import cache_folder
from vitalis_serve.engines.placement import Placement
from vitalis_serve.settings.schema import Settings, thaw

# vLLM's tear-down counts inside its own deadline; an idle stop took up to 7 s.
STOP_MARGIN_SECONDS: Final = 10
# Of the surrounding environment, what would change an engine behind the configuration's back or give away ours.
_NOT_INHERITED: Final = ("VITALIS_", "VLLM_", "PYTHON", "CUDA_VISIBLE_DEVICES", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Kept although they begin like one of those: Python's own warnings and buffering do no harm in logs.
_INHERITED: Final = frozenset({"PYTHONUNBUFFERED", "PYTHONFAULTHANDLER"})
# Where vLLM puts the sockets between its processes, else the temporary folder: seven of a run, which it never removes.
SOCKETS: Final = "VLLM_RPC_BASE_PATH"
SOCKET_NAME_BYTES, MOST_PATH_BYTES = len("/") + 36, 107  # a UUID each; sun_path less its end


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """`env` is the whole environment, nothing is to be added. `address` is where it will answer."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    address: str
    sockets: Path | None = None


def engine_command(
    settings: Settings,
    index: int,
    placement: Placement,
    model_folder: Path,
    socket_path: Path,
    *,
    python: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
    family: str | None = None,
) -> EngineCommand:
    """How replica `index` is started.

    python: the engine environment's (default: `engines.engine_python`, which must then be a path). environ: what
    is inherited from (default: this process's). family: the model's `model_type`; by default told from the name
    of its source. A subfolder tiktoken/ of the model folder is used for Harmony's vocabulary if it exists.
    """
    environ = os.environ if environ is None else environ
    gpt_oss = family == "gpt_oss" if family is not None else _is_gpt_oss(settings, model_folder)
    args = dict(_default_args(settings, placement, gpt_oss=gpt_oss))
    args |= settings.engines.engine_args
    argv = [
        str(python or settings.engines.engine_python),
        # The console script of the CPU build does not start (its distribution has another name); this does in both.
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model_folder)),
        *("--served-model-name", settings.model.name),
        *("--uds", str(socket_path)),
        *("--tensor-parallel-size", str(settings.engines.tensor_parallel)),
        *("--shutdown-timeout", str(stop_seconds(settings))),
        *flags(args),
    ]
    env = {key: value for key, value in environ.items() if _is_inherited(key)}
    sockets = socket_path.with_suffix(".ipc")
    fits = len(os.fsencode(sockets)) + SOCKET_NAME_BYTES <= MOST_PATH_BYTES
    ours = _default_env(placement, model_folder, environ, gpt_oss=gpt_oss) | {SOCKETS: str(sockets) if fits else None}
    for key, value in (ours | dict(settings.engines.engine_env)).items():
        if value is None:
            env.pop(key, None)
        else:
            env[key] = value
    return EngineCommand(tuple(argv), env, f"unix:{socket_path}", sockets if env.get(SOCKETS) == str(sockets) else None)


def stop_seconds(settings: Settings) -> int:
    """vLLM's own deadline for what runs after SIGTERM: the drain and a margin. Never 0: with 0 it can hang."""
    return math.ceil(settings.shutdown.drain_seconds) + STOP_MARGIN_SECONDS


def flags(args: Mapping[str, Any]) -> list[str]:
    """engine_args as words: true `--x`, false `--no-x`, null nothing, a list one word per item, a map JSON."""
    words: list[str] = []
    for name, value in args.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *(_word(item) for item in value)]
        else:
            word = _word(value)
            # A value that begins with a dash would be read as the next flag.
            words += [f"--{name}={word}"] if word.startswith("-") else [f"--{name}", word]
    return words


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(thaw(value))


def _is_gpt_oss(settings: Settings, model_folder: Path) -> bool:
    model = settings.model
    source = model.hub or model.build or model.package or model_folder.name
    return "gpt-oss" in source.lower()


def _default_args(settings: Settings, placement: Placement, *, gpt_oss: bool) -> Mapping[str, Any]:
    engines = settings.engines
    slots = engines.engine_args.get("max-num-seqs")
    in_flight = max(engines.slots, slots if isinstance(slots, int) else 0)
    args: dict[str, Any] = {
        "scheduling-policy": "priority",  # X-Vllm-Priority is ignored without it
        "enable-prompt-tokens-details": True,  # cached tokens in usage
        "disable-uvicorn-access-log": True,  # the gateway writes one
        "max-num-seqs": engines.slots,
        # A backstop above the gateway's own cap: vLLM counts waiting and running ones, probes too.
        "max-num-queued-reqs": 2 * in_flight + 16,
    }
    if gpt_oss:
        args |= {"reasoning-parser": "openai_gptoss", "tool-call-parser": "openai", "enable-auto-tool-choice": True}
    if placement.device == "cpu":
        args["enforce-eager"] = True  # compiled, the CPU build gives wrong answers
    return args


def _default_env(
    placement: Placement, model_folder: Path, environ: Mapping[str, str], *, gpt_oss: bool
) -> dict[str, str | None]:
    env: dict[str, str | None] = {
        "HF_HUB_OFFLINE": "1",  # files are complete when an engine starts; a look-up would only delay it
        "VLLM_NO_USAGE_STATS": "1",
        # Above the longest that the gateway keeps an idle connection: whoever closes first should be the gateway.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
        "PYTHONSAFEPATH": "1",  # the working folder must not shadow vLLM's modules
        "PYTHONUNBUFFERED": "1",
    }
    # Beside the model, or in the cache where `models.ensure` put it: without it Harmony tries a download.
    for vocabulary in (model_folder / "tiktoken", cache_folder(environ) / "tiktoken"):
        if gpt_oss and (vocabulary / "o200k_base.tiktoken").is_file():
            env["TIKTOKEN_ENCODINGS_BASE"] = str(vocabulary)
            break
    if placement.device == "cuda":
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # NVML's order, so that indices mean the same to both
        env["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu.index) for gpu in placement.gpus)
    elif placement.threads:
        env["VLLM_CPU_OMP_THREADS_BIND"] = placement.threads
    return env


def _is_inherited(name: str) -> bool:
    return name in _INHERITED or not name.startswith(_NOT_INHERITED)

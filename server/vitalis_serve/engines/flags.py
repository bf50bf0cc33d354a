"""Which options the installed vLLM knows, so that a mistyped one is reported before a start that takes minutes.

Asked once for each engine environment (importing vLLM takes 10 to 30 s) and kept in the cache folder. Where it cannot
be asked, that is said and nothing is refused: vLLM will tell.
"""

import difflib
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vitalis_serve.errors import ConfigurationError

ASK_SECONDS: Final = 180
_OPTION: Final = re.compile(r"(?<![\w-])--([a-z][a-z0-9.-]*[a-z0-9])")
# What the shipped profiles use; a test holds the two together.
COMMON: Final = frozenset(
    {
        "dtype",
        "enforce-eager",
        "gpu-memory-utilization",
        "max-cudagraph-capture-size",
        "max-model-len",
        "max-num-batched-tokens",
        "max-num-seqs",
    }
)
# Surely there in any vLLM: a text without them is no help text of it.
_EXPECTED: Final = frozenset({"model", "max-num-seqs", "tensor-parallel-size"})


@dataclass(frozen=True, slots=True)
class KnownFlags:
    """`names` without leading dashes; empty where vLLM could not be asked, with the reason in `problem`."""

    names: frozenset[str]
    problem: str = ""


def known_flags(python: Path, cache: Path) -> KnownFlags:
    """What `python`'s vLLM knows. Blocking: up to `ASK_SECONDS` the first time, then a file read."""
    file = cache / "flags" / f"{_key(python)}.json"
    try:
        names = json.loads(file.read_text("utf-8"))
        if isinstance(names, list) and set(names) >= _EXPECTED:
            return KnownFlags(frozenset(names))
    except (OSError, ValueError):
        pass
    asked = _ask(python)
    if asked.names:
        _keep(file, sorted(asked.names))
    return asked


def refuse_unknown(engine_args: Mapping[str, Any], known: KnownFlags) -> None:
    """Raises ConfigurationError for the first option that vLLM does not know, naming the nearest that it does."""
    if not known.names:
        return
    for name, value in engine_args.items():
        # --compilation-config.mode sets one key of the JSON option --compilation-config.
        root = name.partition(".")[0]
        spelling = f"no-{root}" if value is False else root
        if value is None or len(root) == 1 or spelling in known.names or (value is False and root in known.names):
            continue
        near = difflib.get_close_matches(root, known.names, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigurationError(f"engines.engine_args.{name} is not an option of the installed vLLM{hint}")


def _key(python: Path) -> str:
    """Changes when the environment does: its path, and when its packages last changed."""
    stamps = [str(python)]
    for folder in sorted(python.parent.parent.glob("lib/python*/site-packages")):
        stamps += [f"{folder}:{folder.stat().st_mtime_ns}"]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:24]


def _ask(python: Path) -> KnownFlags:
    argv = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--help=all"]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("VITALIS_", "VLLM_", "PYTHON"))}
    env |= {"PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    try:
        with tempfile.TemporaryDirectory() as empty:
            done = subprocess.run(
                argv, env=env, cwd=empty, capture_output=True, text=True, timeout=ASK_SECONDS, check=False
            )
    except subprocess.TimeoutExpired:
        return KnownFlags(frozenset(), f"vLLM did not list its options within {ASK_SECONDS} s")
    except (OSError, ValueError) as error:
        return KnownFlags(frozenset(), f"vLLM could not be asked for its options ({error})")
    names = frozenset(_OPTION.findall(done.stdout))
    if not names >= _EXPECTED:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        return KnownFlags(frozenset(), f"vLLM did not list its options: {last[:200]}")
    return KnownFlags(names)


def _keep(file: Path, names: list[str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
            json.dump(names, part)
        os.replace(part.name, file)
    except OSError:
        return  # a cache that cannot be written costs a question each time, no more


def check(engine_args: Mapping[str, Any], python: Path, cache: Path) -> str:
    """`refuse_unknown` of what `python`'s vLLM says; a sentence where it could not be asked, else "".

    Options that this project's own profiles use are in every vLLM it is released for, and are not asked about.
    """
    if all(name in COMMON for name in engine_args):
        return ""
    known = known_flags(python, cache)
    refuse_unknown(engine_args, known)
    return known.problem

"""The options that an engine runs with, as far as it tells."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitalis_load import plain_http

_CACHE = re.compile(rb"^vllm:cache_config_info\{([^\n]*)\}", re.MULTILINE)
_LABEL = re.compile(rb'(\w+)="([^"]*)"')
_OF_CACHE = ("block_size", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "kv_cache_size_tokens")
_SECRET = ("api-key", "hf-token")


def told(address: str, pid: int | None) -> dict[str, Any]:
    """What an engine says of its KV cache, and the options it was started with where it is a process of this machine:
    what `simulator calibrate` has to know of it."""
    found: dict[str, Any] = {}
    try:
        answer = plain_http.ask(address, "/metrics", seconds=5)
        line = _CACHE.search(answer.body) if answer.status == 200 else None
    except OSError:
        line = None
    if line is not None:
        labels = {name.decode(): value.decode() for name, value in _LABEL.findall(line.group(1))}
        found = {name: _number(labels[name]) for name in _OF_CACHE if labels.get(name, "None") != "None"}
    if pid is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found |= given(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1])
    return found


def given(argv: Sequence[str]) -> dict[str, Any]:
    """vLLM's options as they were given: {"max-num-seqs": 32, "enable-auto-tool-choice": True}. No keys."""
    found: dict[str, Any] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = _number(value) if equals else True
            name = "" if equals else name
        elif name:
            found[name] = _number(word) if found[name] is True else f"{found[name]} {word}"
    return {name: value for name, value in found.items() if name not in _SECRET}


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text

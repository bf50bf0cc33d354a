"""A model folder without weights: gpt-oss-20b's shape with random ones, where the real ones cannot be had.

Its text is noise; its speed is the real model's but for the balance of its experts. So every figure of it says so."""

import json
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.program import ASK_SECONDS, Program

CONFIG: Final = Path(__file__).resolve().parents[1] / "matrix" / "gpt-oss-20b-config.json"
# What stands for the weights: vitalis-serve wants to see a file, and nobody reads it.
PLACEHOLDER: Final = b'{"none":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
)
TINY: Final = "gpt-oss-tiny"
FETCH_SECONDS: Final = 4 * 3600
SAID: Final = "dummy weights: random numbers in gpt-oss-20b's shape"


def settings(folder: Path) -> dict[str, Any]:
    """A profile's, for engines on `folder`."""
    return {
        "model.name": "gpt-oss-20b",
        "model.folder": str(folder),
        "engines.engine_args.load-format": "dummy",
    }


def make(folder: Path, tokenizer: Path) -> Path:
    """The model folder; made again if it is there. Raises LoadFailure where `tokenizer` has none."""
    if not (tokenizer / "tokenizer.json").is_file():
        raise LoadFailure(
            f"{tokenizer} has no tokenizer.json: give a folder with gpt-oss's tokenizer (--tokenizer), such as"
            f" the one that `vitalis-serve model list` names for {TINY}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(CONFIG, folder / "config.json")
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, folder / name)
        if (tokenizer / "tiktoken").is_dir():
            shutil.copytree(tokenizer / "tiktoken", folder / "tiktoken", dirs_exist_ok=True)
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(PLACEHOLDER)) + PLACEHOLDER + b"\0")
    except OSError as error:
        raise LoadFailure(
            f"{error.filename or folder} cannot be written ({error.strerror})", Exit.CANNOT_WRITE
        ) from None
    return folder


def tokenizer_here(program: Program, environ: Mapping[str, str]) -> Path:
    """Where gpt-oss's tokenizer lies: with the tiny model of that family, which is built first where it is not there.
    Raises LoadFailure."""
    if found := _listed(program, environ):
        return found
    problem = fetch(program, {**environ, "VITALIS_PROFILE": "cpu-tiny"})
    if found := _listed(program, environ):
        return found
    raise LoadFailure(f"gpt-oss's tokenizer cannot be made here ({problem}): give a folder with it (--tokenizer)")


def fetch(program: Program, environ: Mapping[str, str]) -> str:
    """Gets the configured model; why that could not be done, in one line, "" where it was."""
    argv = program.argv("model", "fetch")
    try:
        done = subprocess.run(
            argv, env=dict(environ), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, timeout=FETCH_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else said[-1] if said else f"exit code {done.returncode}"


def _listed(program: Program, environ: Mapping[str, str]) -> Path | None:
    listed = subprocess.run(
        [*program.command, "model", "list", "--json"], env=dict(environ), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=ASK_SECONDS, check=False,
    )  # fmt: skip
    try:
        models = json.loads(listed.stdout)
    except ValueError:
        return None
    whole = [Path(model["folder"]) for model in models if model["name"] == TINY and not model["problems"]]
    return whole[0] if whole else None

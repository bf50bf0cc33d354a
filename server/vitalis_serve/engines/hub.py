"""Fetching a model from the Hugging Face hub into a folder, resumable at any byte.

Listing, authentication and transfer are huggingface_hub's. Its `snapshot_download` (2.4) continues
a file after a cut but starts it anew in a new process, which for shards of 5 GB is not resuming; so parts are kept
here, under the lock of `models.ensure`, and every file is compared with the hub's digest before it gets its name.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from vitalis_serve.errors import ConfigurationError, StartError

# The same weights again in two other formats; vLLM reads the root files only.
LEFT_OUT: Final = ("original/*", "metal/*", ".git*", "*.md", "*.png", "*.jpg", "*.pdf")
MANIFEST: Final = "vitalis-model.json"
THREADS: Final = 4
LINE_SECONDS: Final = 1  # who shows them thins them out (`vitalis_serve.progress`)
_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class _File:
    """`digest` is SHA-256 of the content, or git's blob id where `is_blob`."""

    path: str
    size: int
    digest: str
    is_blob: bool


class _Stopped(Exception):
    """Another file failed or the user interrupted; this one ends where it is."""


def download(
    repository: str, revision: str | None, folder: Path, say: Callable[[str], None], environ: Mapping[str, str]
) -> None:
    """Fills `folder` with the repository's files at `revision`. Parts of an earlier try are taken up.

    Raises ConfigurationError (no such repository or revision, no access) or StartError (network, disk).
    """
    token = environ.get("HF_TOKEN") or None
    endpoint = (environ.get("HF_ENDPOINT") or "").rstrip("/") or None
    place = f"model.hub {repository}"
    try:
        api = HfApi(endpoint=endpoint, token=token or False)
        commit = api.repo_info(repository, revision=revision).sha
        assert commit is not None
        files = _wanted(api, repository, commit)
        _check_room(folder, files)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with _Meter(repository.rpartition("/")[2], sum(f.size for f in files), say) as meter:
            _fetch_all(
                files,
                folder,
                lambda path: hf_hub_url(repository, path, revision=commit, endpoint=endpoint),
                headers,
                meter,
            )
    except (RepositoryNotFoundError, GatedRepoError) as error:
        hint = "set HF_TOKEN to a token that may read it" if token is None else "the token in HF_TOKEN may not read it"
        raise ConfigurationError(f"{place}: not found on {endpoint or 'the hub'}, or private; {hint}") from error
    except RevisionNotFoundError as error:
        raise ConfigurationError(f"{place}: has no revision {revision}; correct model.revision") from error
    except HFValidationError as error:
        raise ConfigurationError(f"{place}: is not the name of a repository (owner/name)") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        raise StartError(f"{place}: the hub answered {status}; what was fetched is kept, try again") from error
    except (httpx2.HTTPError, ConnectionError) as error:
        raise StartError(
            f"{place}: {endpoint or 'the hub'} cannot be reached ({type(error).__name__}); what was fetched is kept,"
            " try again, or give a local copy with model.folder"
        ) from error
    except OSError as error:
        raise StartError(f"{place}: {error.strerror or error} ({folder}); what was fetched is kept") from error
    manifest = {
        "repository": repository,
        "commit": commit,
        "files": {f.path: {"size": f.size, "digest": f.digest, "git": f.is_blob} for f in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")


def verify(folder: Path) -> tuple[str, ...]:
    """What differs from what was fetched, by digest (reads every byte). Empty too where nothing was fetched."""
    try:
        listed = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        files = [_File(path, f["size"], f["digest"], f["git"]) for path, f in listed.items()]
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return (f"{MANIFEST} cannot be read",)
    problems = []
    for file in files:
        path = folder / file.path
        if not path.is_file():
            problems.append(f"{file.path} is missing")
        elif path.stat().st_size != file.size or _digest(path, file) != file.digest:
            problems.append(f"{file.path} differs from the hub's")
    return tuple(problems)


def _wanted(api: HfApi, repository: str, commit: str) -> tuple[_File, ...]:
    files = []
    for entry in api.list_repo_tree(repository, recursive=True, revision=commit):
        if not isinstance(entry, RepoFile) or any(fnmatch(entry.path, pattern) for pattern in LEFT_OUT):
            continue
        # A name from the network must not lead out of the folder.
        if entry.path.startswith("/") or ".." in Path(entry.path).parts:
            raise StartError(f"model.hub {repository}: lists a file named {entry.path!r}; nothing was fetched")
        if entry.lfs is not None:
            files.append(_File(entry.path, entry.lfs.size, entry.lfs.sha256, is_blob=False))
        else:
            files.append(_File(entry.path, entry.size, entry.blob_id, is_blob=True))
    return tuple(files)


def _check_room(folder: Path, files: Iterable[_File]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(f.size - _have(folder, f) for f in files)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise StartError(
            f"{folder}: {missing / 1e9:.1f} GB are still to be fetched and {free / 1e9:.1f} GB are free; make room or"
            " set VITALIS_CACHE to a folder on a larger disk"
        )


def _part(folder: Path, file: _File) -> Path:
    # The digest in the name: a part of another revision's file must not be continued.
    return folder / ".parts" / file.digest


def _have(folder: Path, file: _File) -> int:
    for path in (folder / file.path, _part(folder, file)):
        if path.is_file():
            return min(path.stat().st_size, file.size)
    return 0


def _fetch_all(
    files: Iterable[_File],
    folder: Path,
    url: Callable[[str], str],
    headers: Mapping[str, str],
    meter: "_Meter",
) -> None:
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fetch") as threads:
        # Largest first, so that none of them is left for the end.
        order = sorted(files, key=lambda f: -f.size)
        tasks = [threads.submit(_fetch, f, folder, url(f.path), dict(headers), meter) for f in order]
        try:
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            meter.stop()
            for task in tasks:
                task.cancel()
    for task in done:
        task.result()
    shutil.rmtree(folder / ".parts", ignore_errors=True)


def _fetch(file: _File, folder: Path, url: str, headers: dict[str, str], meter: "_Meter") -> None:
    target, part = folder / file.path, _part(folder, file)
    if target.is_file() and target.stat().st_size == file.size:
        meter.advance(file.size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as out:
        if out.tell() > file.size:
            out.truncate(0)
        have = out.tell()
        if have == file.size:
            meter.advance(have)
        else:
            http_get(
                url,
                out,
                resume_size=have,
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.path,
                tqdm_class=meter.counter(),
            )
        out.flush()
        os.fsync(out.fileno())
    if _digest(part, file) != file.digest:
        part.unlink()
        raise StartError(f"{file.path}: what the hub sent does not have the digest it announced; try again")
    part.replace(target)


def _digest(path: Path, file: _File) -> str:
    # git's object id is SHA-1 by definition; it guards against damage here, not against an attacker.
    digest = hashlib.sha1(usedforsecurity=False) if file.is_blob else hashlib.sha256()
    if file.is_blob:
        digest.update(f"blob {file.size}\0".encode())
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class _Meter:
    """Bytes so far over all files: a bar on a terminal, else a line every few seconds. `stop` ends all transfers."""

    def __init__(self, name: str, total: int, say: Callable[[str], None]) -> None:
        self._name, self._total, self._say = name, total, say
        self._done = 0
        self._lock = threading.Lock()
        self._began = self._said = time.monotonic()
        self._stopped = threading.Event()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            self._bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> "_Meter":
        if self._bar is not None:
            self._bar.start()
        else:
            self._say(f"{self._name}: fetching {self._total / 1e9:.2f} GB")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._say(f"{self._name}: fetched, {time.monotonic() - self._began:.0f} s")

    def stop(self) -> None:
        self._stopped.set()

    def advance(self, count: int | float | None) -> None:
        """Called from every transfer for each block; raises `_Stopped` once all are to end."""
        if self._stopped.is_set():
            raise _Stopped
        with self._lock:
            self._done += int(count or 0)
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)
                return
            now = time.monotonic()
            if now - self._said < LINE_SECONDS:
                return
            self._said = now
            speed = self._done / (now - self._began)
        left = (self._total - self._done) / speed if speed else 0
        self._say(
            f"{self._name}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
            f" ({100 * self._done / max(1, self._total):.0f} %), {speed / 1e6:.0f} MB/s, {left:.0f} s left"
        )

    def counter(self) -> type[Any]:
        """A stand-in for the progress bar class that huggingface_hub makes one of for each file."""
        meter = self

        class Counter:
            def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
                meter.advance(initial)

            def __enter__(self) -> "Counter":
                return self

            def __exit__(self, *_: object) -> None:
                return

            def update(self, count: int | float | None = 1) -> None:
                meter.advance(count)

            def close(self) -> None:
                return

        return Counter

"""The data folder and the run folder below it: where they are, that they can be used, and who holds them."""

import fcntl
import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from vitalis_serve.errors import StartError

MAX_SOCKET_PATH_BYTES = 104
LONGEST_NAME = "supervisor.sock"
OWN_FILES = ("vitalis.db", "fleet.json")


def tree_name(data_folder: Path) -> str:
    """Names the process tree of one data folder, in marks and in short paths."""
    return hashlib.sha256(os.fsencode(data_folder.resolve())).hexdigest()[:16]


def tree_mark(data_folder: Path) -> str:
    """Marks every process of one tree, for the sweep. Device and inode are in it: in another container the same path
    is another folder, whose processes are not ours to end."""
    seen = data_folder.stat()
    return f"{tree_name(data_folder)}-{seen.st_dev:x}-{seen.st_ino:x}"


def run_folder(data_folder: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """`<data folder>/run`, or a short stand-in for it where a socket's path would not fit into 104 bytes."""
    folder = data_folder.resolve() / "run"
    if len(os.fsencode(folder / LONGEST_NAME)) < MAX_SOCKET_PATH_BYTES:
        return folder
    base = environ.get("XDG_RUNTIME_DIR") or f"/tmp/vitalis-serve-{os.getuid()}"  # noqa: S108  (checked in prepare)
    return Path(base) / f"vitalis-{tree_name(data_folder)}"


def prepare(data_folder: Path) -> Path:
    """Makes the folders, private; returns the run folder. Raises StartError where they cannot be written, or where
    data_folder is a folder of other things that others may read: closing it would lock them out."""
    run = run_folder(data_folder)
    try:
        data_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_foreign(data_folder)
        for folder in (data_folder / "log", run.parent, run):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_other_user(run)
        for folder in (data_folder, run):
            if not _is_private(folder):
                folder.chmod(0o700)
        for folder in (data_folder, run):
            _try_writing(folder)
    except OSError as exc:
        where = exc.filename or data_folder
        raise StartError(
            f"the data folder {data_folder} cannot be used ({exc.strerror}: {where}): free some space, make "
            "it writable, or set data_folder to another."
        ) from exc
    return run


def _refuse_other_user(folder: Path) -> None:
    if folder.stat().st_uid != os.getuid():
        raise StartError(f"{folder} belongs to another user: set data_folder to one of your own.")


def _is_private(folder: Path) -> bool:
    return stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0


def _refuse_foreign(folder: Path) -> None:
    _refuse_other_user(folder)
    if _is_private(folder) or not any(folder.iterdir()) or any((folder / name).is_file() for name in OWN_FILES):
        return
    run = folder / "run"
    # /var and / have a run/ too, but not a private one.
    if run.is_dir() and not run.is_symlink() and _is_private(run):
        return
    raise StartError(
        f"the data folder {folder.resolve()} holds other things and is open to other users: set data_folder to a "
        "folder of its own, which vitalis-serve makes."
    )


def _try_writing(folder: Path) -> None:
    trial = folder / f".trial-{os.getpid()}"
    try:
        with open(trial, "wb") as file:
            file.write(b"\0" * 65_536)
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(folder)) from exc
    finally:
        trial.unlink(missing_ok=True)


class Lock:
    """One supervisor a data folder. The kernel lets go of it when the process ends, however it ends."""

    def __init__(self, path: Path, data_folder: Path) -> None:
        self._path = path
        self._data_folder = data_folder
        self._fd = -1

    def acquire(self) -> None:
        """Raises StartError if another process holds it."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                raise StartError(
                    f"vitalis-serve already runs on {self._data_folder} (process {holder}): stop that one, "
                    "or set data_folder to another."
                ) from exc
            # The last holder may have removed the file between our open and our lock: then we hold nothing.
            try:
                ours = os.stat(self._path).st_ino == os.fstat(fd).st_ino
            except FileNotFoundError:
                ours = False
            if ours:
                break
            os.close(fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

"""Private files that are whole or not there: written beside their place, synced, then moved into it."""

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from vitalis_serve.errors import StartError

_SHORTEST: Final = 20  # characters behind the prefix


def stage(path: Path, content: bytes) -> Path:
    """Writes `content` beside `path`, 0600 and on the disk. What can fail for want of room fails here
    (OSError), and leaves nothing."""
    staged = path.with_name(path.name + ".new")
    try:
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    return staged


def publish(staged: Path, path: Path) -> None:
    """Moves a staged file into its place, for good."""
    os.replace(staged, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def kept_secret(path: Path, prefix: str) -> str:
    """The secret in `path`: `prefix` and 40 random characters, made at the first start (0600).

    Raises StartError if it can be neither read nor made.
    """
    try:
        if not path.exists():
            publish(stage(path, f"{prefix}{secrets.token_urlsafe(30)}\n".encode()), path)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
        secret = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"{path} can be neither read nor made ({error}): check the data folder") from error
    if not secret.startswith(prefix) or len(secret) < len(prefix) + _SHORTEST:
        raise StartError(f"{path} is not one of ours: remove the file and start again")
    return secret

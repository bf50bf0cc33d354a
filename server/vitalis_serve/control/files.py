"""Private files that are whole or not there: written beside their place, synced, then moved into it."""

import os
from pathlib import Path


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

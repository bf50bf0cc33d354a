"""Where new secrets go: shown once on a terminal, else into a private file."""

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitalis_serve.cli.failure import fail


class Outlet:
    """A terminal, or a file that is there, private and writable before a secret is made."""

    def __init__(self, staged: Path | None, folder: Path, wanted: Path | None) -> None:
        self._staged = staged
        self._folder = folder
        self._wanted = wanted

    def deliver(self, name: str, text: str) -> str:
        """What to print: the text itself, or the path of the file that holds it: the one that was wanted, else one of
        this name (and a number, where there is one already) in the data folder."""
        if self._staged is None:
            return text
        self._staged.write_text(f"{text}\n", "utf-8")
        if self._wanted is not None:
            return str(self._wanted)
        number = 1
        while True:
            path = self._folder / (name if number == 1 else f"{name}-{number}")
            try:
                path.hardlink_to(self._staged)  # unlike a renaming it overwrites nothing
            except FileExistsError:
                number += 1
                continue
            except OSError:  # a file system without hard links
                return str(self._staged)
            self._staged.unlink()
            return str(path)

    def nothing(self) -> None:
        """There is no secret: no file stays."""
        if self._staged is not None:
            self._staged.unlink()


@contextmanager
def secret_outlet(data_folder: Path, output: Path | None = None) -> Iterator[Outlet]:
    """Prepares the place for secrets that are about to be made: one that nobody could read would be lost.

    Ends the command (exit code 1) where the file cannot be made; an existing `output` is never overwritten.
    """
    if output is None and sys.stdout.isatty():
        yield Outlet(None, data_folder, None)
        return
    staged = output or data_folder / f".key-{secrets.token_hex(6)}"
    try:
        os.close(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        fail(f"the file {staged} for the key cannot be made ({error.strerror}): name another with --output")
    try:
        yield Outlet(staged, data_folder, output)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise

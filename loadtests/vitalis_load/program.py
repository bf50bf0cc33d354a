"""vitalis-serve as it is called here: its command, its configuration, and what it says is in force."""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from vitalis_load.errors import LoadFailure

REPOSITORY: Final = Path(__file__).resolve().parents[2]
ASK_SECONDS: Final = 60
# Below these everything is ours to set where configurations are compared.
SEARCHED: Final = ("VITALIS_PROFILE", "VITALIS_ENGINES_", "VITALIS_GATEWAY_QUEUE_")


def surroundings() -> dict[str, str]:
    """This process's variables, without the key of another tree."""
    return {name: value for name, value in os.environ.items() if name != "VITALIS_KEY"}


def refuse_variables(environ: Mapping[str, str]) -> None:
    """Variables win over profiles: with one of these every candidate would be the same."""
    found = [name for name in environ if name.startswith(SEARCHED) and environ[name]]
    if found:
        raise LoadFailure(
            f"{', '.join(sorted(found))} is set and would win over every configuration that is tried: put it into a"
            " profile or the configuration file, and unset it"
        )


class InForce(msgspec.Struct, frozen=True):
    """What `check-config` says."""

    profile: str
    files: list[str]  # the configuration, then the profile where there is one
    settings: dict[str, Any]

    @property
    def replicas(self) -> int:
        return int(self.settings["engines"]["replicas"])

    def value(self, path: str) -> Any:
        """Of "engines.slots" or "engines.engine_args.max-num-seqs"; None where nothing says."""
        found: Any = self.settings
        for name in path.split(".", 2):
            found = found.get(name) if isinstance(found, dict) else None
        return found


class Program(msgspec.Struct, frozen=True):
    """vitalis-serve as it is called here. `config`: "" for its own default."""

    command: tuple[str, ...]
    config: str = ""

    @classmethod
    def of(cls, command: str, config: Path | None) -> "Program":
        """`command` in a shell's words; "" for this checkout's, else the one on PATH. Raises LoadFailure."""
        words = tuple(shlex.split(command))
        if not words:
            own = REPOSITORY / ".venv" / "bin" / "vitalis-serve"
            found = str(own) if own.exists() else shutil.which("vitalis-serve")
            if found is None:
                raise LoadFailure(
                    f"there is no vitalis-serve to start ({own} is not there, nor one on PATH): run `make serve` once,"
                    " or give --serve"
                )
            words = (found,)
        elif shutil.which(words[0]) is None:
            raise LoadFailure(f"--serve: {words[0]} cannot be run: give vitalis-serve's path")
        if config is not None and not config.is_file():
            raise LoadFailure(f"--config: there is no file {config}")
        return cls(words, str(config.absolute()) if config else "")

    def argv(self, *words: str) -> list[str]:
        return [*self.command, *words, *(["--config", self.config] if self.config else [])]

    def in_force(self, environ: Mapping[str, str]) -> InForce:
        """Raises LoadFailure with the program's own words."""
        document = self._json(environ, "check-config", "--json")
        return InForce(document["profile"]["name"], document["files"], document["settings"])

    def _json(self, environ: Mapping[str, str], *words: str) -> dict[str, Any]:
        argv = self.argv(*words)
        try:
            done = subprocess.run(
                argv, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=ASK_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LoadFailure(f"{shlex.join(argv)} did not answer ({error})") from None
        try:
            return dict(json.loads(done.stdout))
        except ValueError:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise LoadFailure(f"{shlex.join(argv)}: {said}") from None

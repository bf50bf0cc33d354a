"""Candidates as profiles of vitalis-serve: what is varied (a space), each candidate as a file that `VITALIS_PROFILE`
loads, and the winner's with its evidence above it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from vitalis_load import tuning
from vitalis_load.errors import LoadFailure
from vitalis_load.program import InForce, Program
from vitalis_load.result import whole
from vitalis_load.tuning import Candidate, Dimension, Space

FOLDER: Final = Path(__file__).resolve().parents[1] / "spaces"
# vLLM's own, where nothing is set.
DEFAULTS: Final[Mapping[str, Any]] = {
    "engines.engine_args.stream-interval": 1,
    "engines.engine_args.kv-cache-dtype": "auto",
}
SECTIONS: Final = ("engines", "gateway", "shutdown", "limits")


def space(name: str, tries: Sequence[str] = ()) -> Space:
    """One that comes with this, or a file; with `tries` (SETTING=VALUE,VALUE) those alone. Raises LoadFailure."""
    if tries:
        return Space([_tried(each) for each in tries], "given on the command line")
    path = FOLDER / f"{name}.yaml" if (FOLDER / f"{name}.yaml").is_file() else Path(name)
    try:
        found = msgspec.convert(yaml.safe_load(path.read_text()), Space)
    except OSError as error:
        raise LoadFailure(
            f"--space {name}: {path} cannot be read ({error.strerror}); give cuda, cpu or a file's path"
        ) from None
    except yaml.YAMLError as error:
        raise LoadFailure(f"--space {path}: no YAML: {' '.join(str(error).split())}") from None
    except msgspec.ValidationError as error:
        raise LoadFailure(f"--space {path}: {error}") from None
    for dimension in found.dimensions:
        _check(dimension, str(path))
    return found


def current(space_: Space, in_force: InForce) -> dict[str, Any]:
    """The values in force of all that the space varies."""
    paths = {
        path for dimension in space_.dimensions for value in dimension.values for path in dimension.settings(value)
    }
    found = {path: value for path in paths if (value := in_force.value(path)) is not None}
    sequences = "engines.engine_args.max-num-seqs"
    if sequences in paths and sequences not in found:
        found[sequences] = in_force.value("engines.slots")  # it follows the slots
    return found


def flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """A profile's settings by dotted names; options of the engines, and their variables, one by one."""
    found: dict[str, Any] = {}
    for section, values in document.items():
        if not isinstance(values, Mapping):
            found[section] = values
            continue
        for key, value in values.items():
            if isinstance(value, Mapping):
                found |= {f"{section}.{key}.{name}": inner for name, inner in value.items()}
            else:
                found[f"{section}.{key}"] = value
    return found


class Shelf:
    """A folder with a copy of the configuration and a profile for each candidate beside it."""

    def __init__(self, folder: Path, in_force: InForce) -> None:
        """Raises LoadFailure where it cannot be made."""
        self._profiles = folder / "profiles"
        config = Path(in_force.files[0])
        self.config = folder / config.name
        base = Path(in_force.files[1]) if len(in_force.files) > 1 else None
        try:
            self._profiles.mkdir(parents=True, exist_ok=True)
            if not self.config.exists():
                shutil.copy(config, self.config)
            self.base: dict[str, Any] = yaml.safe_load(base.read_text()) or {} if base else {}
        except OSError as error:
            raise LoadFailure(f"{error.filename} cannot be used ({error.strerror})") from None

    def program(self, program: Program) -> Program:
        """The same program with this configuration."""
        return msgspec.structs.replace(program, config=str(self.config))

    def add(self, name: str, candidate: Candidate, head: str = "") -> Path:
        """The profile's file. `head`: lines above it, without "#"."""
        comment = "".join(f"# {line}".rstrip() + "\n" for line in head.splitlines())
        body = yaml.safe_dump(tuning.profile(self.base, candidate), sort_keys=False, width=100)
        path = self._profiles / f"{name}.yaml"
        whole(path, (comment + body).encode())
        return path


def _tried(words: str) -> Dimension:
    setting, equals, values = words.partition("=")
    if not equals or not values:
        raise LoadFailure(f"--try {words}: needs SETTING=VALUE,VALUE, as in --try engines.slots=32,64")
    given = [yaml.safe_load(value) for value in values.split(",")]
    made = Dimension(setting.rpartition(".")[2], given, setting.split("+"), DEFAULTS.get(setting))
    _check(made, "--try")
    return made


def _check(dimension: Dimension, where: str) -> None:
    """Raises LoadFailure for one that sets nothing, or what cannot be set."""
    for value in dimension.values:
        if isinstance(value, Mapping) and dimension.set:
            raise LoadFailure(f"{where}: {dimension.name}: either `set` with plain values, or maps of settings")
        settings = dimension.settings(value)
        wrong = [path for path in settings if path.partition(".")[0] not in SECTIONS or not path.rpartition(".")[0]]
        if wrong or not settings:
            raise LoadFailure(
                f"{where}: {dimension.name}: {', '.join(wrong) or 'nothing'} is no setting of vitalis-serve that can be"
                " varied: name it as in docs/configuration.md, such as engines.slots or"
                " engines.engine_args.max-num-batched-tokens"
            )

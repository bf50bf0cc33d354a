"""One YAML file as plain values, with the line of every key. Strict where YAML is lax: no duplicate keys, no
tags, no dates, no self-reference; keys are text as written (`no:` is the key "no")."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from vitalis_serve.errors import ConfigurationError

KeyPath = tuple[str, ...]
MAX_BYTES: Final = 1 << 20
_PLAIN: Final = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null"))


@dataclass(frozen=True, slots=True)
class Layer:
    """Values from one place. `lines` holds the 1-based line of each key path; `name` is the file, or
    "environment", where the places of values are variable names (`variables`)."""

    name: str
    values: Mapping[str, Any]
    lines: Mapping[KeyPath, int]
    variables: Mapping[KeyPath, str]

    def place(self, path: KeyPath) -> str:
        """Where `path` was given here: `file:line`, a variable's name, or only the layer's name."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.variables:
                return self.variables[path[:length]]
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name


def read_yaml(path: Path) -> Layer:
    """Raises ConfigurationError (one sentence) for whatever makes this file unusable."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file; give one with --config or VITALIS_CONFIG") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_BYTES:
        raise ConfigurationError(f"{path}: larger than {MAX_BYTES} bytes, which no configuration is")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: not UTF-8 text (byte {error.start})") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigurationError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError:
        raise ConfigurationError(f"{path}: nested too deeply to be a configuration") from None
    if node is None:
        return Layer(str(path), {}, {}, {})
    if not isinstance(node, yaml.MappingNode):
        raise ConfigurationError(f"{path}: must be a mapping of keys to values at its top level")
    lines: dict[KeyPath, int] = {}
    values = _Reader(str(path), lines).mapping(node, (), ())
    return Layer(str(path), values, lines, {})


def read_value(text: str, place: str) -> Any:
    """A value written as YAML or JSON in one line (a list or map in an environment variable)."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        raise ConfigurationError(f"{place}: must be JSON or one line of YAML") from None
    return None if node is None else _Reader(place, {}).value(node, (), ())


class _Reader:
    """Nodes to values, remembering lines. `above` holds the nodes we are inside of: an alias to one of them
    would never end."""

    def __init__(self, name: str, lines: dict[KeyPath, int]) -> None:
        self._name = name
        self._lines = lines
        self._scalars = yaml.SafeLoader("")

    def mapping(self, node: yaml.MappingNode, path: KeyPath, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigurationError(f"{self._name}:{line}: a key must be plain text")
            key = str(key_node.value)
            here = (*path, key)
            if key in values:
                raise ConfigurationError(
                    f"{self._name}:{line}: {'.'.join(here)} is given twice"
                    f" (first on line {self._lines[here]}); remove one"
                )
            self._lines[here] = line
            values[key] = self.value(value_node, here, (*above, node))
        return values

    def value(self, node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...]) -> Any:
        place = f"{self._name}:{node.start_mark.line + 1}: {'.'.join(path) or 'the value'}"
        if any(node is other for other in above):
            raise ConfigurationError(f"{place} refers to itself")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode):
            inside = (*above, node)
            return [self.value(item, (*path, str(i)), inside) for i, item in enumerate(node.value)]
        if node.tag == "tag:yaml.org,2002:timestamp":
            return node.value  # dates stay text: nothing of ours is a date
        if node.tag not in _PLAIN:
            raise ConfigurationError(f"{place} has the YAML tag {node.tag}; only plain values are allowed")
        try:
            return self._scalars.construct_object(node)
        except (ValueError, yaml.YAMLError):
            return node.value

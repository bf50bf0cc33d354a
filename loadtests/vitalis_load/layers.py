"""A scenario's YAML as layers: the file, its `small:`, what the command line sets. Each value knows its place."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from vitalis_load.errors import LoadFailure

SPREAD = {"median", "p95", "min", "max"}
EVERY = "*"  # in a layer's `tasks`: each of them


class Mapped(dict[str, Any]):
    """A mapping that knows the place (file and line, or option) of each of its keys."""

    def __init__(self, values: Mapping[str, Any] | None = None, places: Mapping[str, str] | None = None) -> None:
        super().__init__(values or {})
        self.places = dict(places or {})


class _Loader(yaml.SafeLoader):
    source = ""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Iterator[Mapped]:
    found = Mapped()
    yield found
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise LoadFailure(f"{loader.source}:{line}: {key.value!r} is not a field's name")
        if key.value in seen:
            raise LoadFailure(f"{loader.source}:{line}: {key.value} stands twice (first in line {seen[key.value]})")
        seen[key.value] = line
    found.update({str(key): value for key, value in loader.construct_mapping(node).items()})
    found.places |= {str(key.value): f"{loader.source}:{key.start_mark.line + 1}" for key, _ in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read(path: Path) -> Mapped:
    """The file's top level. Raises LoadFailure with the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise LoadFailure(f"{path}: is not text in UTF-8") from None
    except OSError as error:
        raise LoadFailure(f"{path}: the scenario cannot be read ({error.strerror}); check the path") from None
    loader = _Loader(text)
    loader.source = str(path)
    try:
        found = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise LoadFailure(f"{path}{line}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LoadFailure(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(found, Mapped):
        raise LoadFailure(f"{path}: a scenario is a mapping of fields (name, arrivals, tasks ...); this file has none")
    return found


def from_options(options: Mapping[str, str]) -> Mapped:
    """{"arrivals.rate": "5"} as a layer. Values are YAML. Raises LoadFailure."""
    top = Mapped()
    for name, written in options.items():
        place = f"--set {name}={written}"
        try:
            value = yaml.safe_load(written)
        except yaml.YAMLError:
            raise LoadFailure(f"{place}: the value is not YAML") from None
        words = name.split(".")
        if not all(words):
            raise LoadFailure(f"{place}: needs a field's name, as in --set arrivals.rate=5")
        inner = top
        for word in words[:-1]:
            below = inner.setdefault(word, Mapped())
            if not isinstance(below, Mapped):
                raise LoadFailure(f"{place}: {word} was set to one value before it")
            inner.places.setdefault(word, place)
            inner = below
        inner[words[-1]] = _placed(value, place)
        inner.places[words[-1]] = place
    return top


def _placed(value: Any, place: str) -> Any:
    if isinstance(value, dict):
        return Mapped({str(k): _placed(v, place) for k, v in value.items()}, {str(k): place for k in value})
    return [_placed(item, place) for item in value] if isinstance(value, list) else value


def laid_over(below: Mapped, above: Mapped) -> Mapped:
    """`above`'s values win. Mappings are merged, except one of another `kind` and a whole spread, which replace what
    was there. A mapping over a list of tasks changes those of its names ("*": each)."""
    merged = Mapped(below, below.places)
    for key, value in above.items():
        here = below.get(key)
        place = above.places.get(key, "")
        if isinstance(value, Mapped) and isinstance(here, list):
            merged[key] = _over_list(here, value, place)
        elif isinstance(value, Mapped) and isinstance(here, Mapped) and not _replaces(here, value):
            merged[key] = laid_over(here, value)
        else:
            merged[key] = value
            merged.places[key] = place
    return merged


def _replaces(here: Mapped, value: Mapped) -> bool:
    if value.keys() <= SPREAD:
        return value.keys() >= {"median", "p95"} or value.keys() >= {"min", "max"}
    return "kind" in value and value["kind"] != here.get("kind")


def _over_list(items: list[Any], changes: Mapped, place: str) -> list[Any]:
    names = [item.get("name") for item in items if isinstance(item, Mapped)]
    for name in changes:
        if name != EVERY and name not in names:
            where = changes.places.get(name, place)
            raise LoadFailure(f"{where}: there is no {name!r} to change; there is {listed(names)}")
    result = []
    for item in items:
        for name in (EVERY, str(item.get("name")) if isinstance(item, Mapped) else ""):
            change = changes.get(name)
            if isinstance(change, Mapped) and isinstance(item, Mapped):
                item = laid_over(item, change)
            elif name in changes:
                raise LoadFailure(f"{changes.places.get(name, place)}: {name} needs fields to change")
        result.append(item)
    return result


def plain(value: Any) -> Any:
    """Without places."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def place(tree: Any, path: Iterable[Any]) -> str:
    """Where the value at this path was written, or the nearest one around it."""
    found = ""
    for step in path:
        if isinstance(tree, Mapped) and step in tree:
            found = tree.places.get(step, found)
            tree = tree[step]
        elif isinstance(tree, list) and isinstance(step, int) and step < len(tree):
            tree = tree[step]
            if isinstance(tree, Mapped) and tree.places:
                found = next(iter(tree.places.values()))
    return found


def listed(names: Iterable[Any]) -> str:
    return ", ".join(str(name) for name in names) or "nothing"

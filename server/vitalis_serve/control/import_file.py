"""A file of tenants, keys and limits, as rows each of which is right by itself. Pure.

What is wrong with a row is kept with the row's place, so that all of it can be told at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import yaml
from pydantic import AfterValidator, Field, StringConstraints, ValidationError

from vitalis_serve.control import schemas
from vitalis_serve.control.refusals import reason
from vitalis_serve.errors import ServeError
from vitalis_serve.store.records import nearest
from vitalis_serve.store.secrets import ID_LENGTH

MOST_ROWS: Final = 20_000
_DEEPEST: Final = 16  # the parser recurses in C, where nothing else bounds it
_NUMBERS: Final = frozenset({*schemas.Rates.model_fields, "expires_in_days"})
# The one of libyaml is ten times as fast, and not in every build of the library.
_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


Row = TypeVar("Row", bound=schemas.Body)


class TenantRow(schemas.NewTenant):
    pass


class KeyRow(schemas.Body):
    """A key in a file is known by its tenant and name. `digest`: SHA-256 of the whole key where its secret is known to
    its user already, with the id that stands in it; else a secret is made."""

    tenant: schemas.TenantName
    name: Annotated[schemas.ShortText, Field(min_length=1), schemas.said("give a name of 1 to 128 characters")]
    class_: Annotated[schemas.Class, Field(alias="class")] = "standard"
    scopes: schemas.Scopes = ("inference",)
    routes: schemas.Routes = ("*",)
    notes: schemas.Notes = ""
    expires_in_days: (
        Annotated[int, Field(ge=1, le=3660, strict=True), schemas.said("give a whole number from 1 to 3660")] | None
    ) = None
    digest: (
        Annotated[
            str,
            StringConstraints(pattern=r"^[0-9a-fA-F]{64}$"),
            schemas.said("give the SHA-256 of the whole key, 64 hex digits"),
            AfterValidator(str.lower),
        ]
        | None
    ) = None
    id: (
        Annotated[
            str,
            StringConstraints(pattern=rf"^[0-9A-Za-z]{{{ID_LENGTH}}}$"),
            schemas.said(f"give the {ID_LENGTH} letters and digits that stand in the key"),
        ]
        | None
    ) = None
    limits: schemas.Rates = schemas.Rates()


class LimitsRow(schemas.Rates):
    kind: schemas.Kind
    name: Annotated[
        str, StringConstraints(min_length=1, max_length=128), schemas.said("give the name of what is limited")
    ]


_SECTIONS: Final[dict[str, type[schemas.Body]]] = {"tenants": TenantRow, "keys": KeyRow, "limits": LimitsRow}


class Place(NamedTuple):
    """Where a row begins; a file may have several rows on a line."""

    line: int
    section: str = ""
    number: int = 0

    def __str__(self) -> str:
        return f"line {self.line}" + (f" ({self.section}, row {self.number})" if self.section else "")


class Problem(NamedTuple):
    """Why a row cannot be imported. there: because it was there already."""

    place: Place
    sentence: str
    there: bool = False


class Refusal(Exception):
    """The file cannot be imported. `rows`: how many there are in it."""

    def __init__(self, problems: list[Problem], rows: int = 0) -> None:
        self.problems = sorted(problems)
        self.rows = rows
        super().__init__(f"{len(problems)} problems")

    def error(self) -> ServeError:
        """The answer, a line for each problem: `already_exists` where all else is well."""
        there = all(problem.there for problem in self.problems)
        if not self.rows:
            said = "nothing was imported: the file cannot be read"
        else:
            bad = len({problem.place for problem in self.problems})
            said = f"nothing was imported: {bad} of {self.rows} rows {'are there already' if there else 'are wrong'}"
        if there:
            said += "; leave them out, or skip what exists"
        lines = [f"{problem.place}: {problem.sentence}" for problem in self.problems]
        return ServeError("already_exists" if there else "invalid_request", "\n".join([f"{said}:", *lines]))


@dataclass(frozen=True, slots=True)
class Document:
    """Rows that are right by themselves, each with its place; and what is wrong with the others. named: tenants
    of rows that are wrong: what refers to them is not wrong for that."""

    tenants: list[tuple[Place, TenantRow]] = field(default_factory=list)
    keys: list[tuple[Place, KeyRow]] = field(default_factory=list)
    limits: list[tuple[Place, LimitsRow]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    rows: int = 0


def read(content: bytes) -> Document:
    """The rows of a YAML file (JSON is YAML too). Raises Refusal where it is not one, or not of this shape."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal([Problem(Place(content[: error.start].count(b"\n") + 1), "this is not UTF-8 text")]) from None
    root = _compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise Refusal([Problem(Place(1), f"give lists named {', '.join(_SECTIONS)}")])
    found: dict[str, list[tuple[Place, Any]]] = {name: [] for name in _SECTIONS}
    problems: list[Problem] = []
    named: set[str] = set()
    rows = 0
    for name, place, node in _entries(root, Place(1), problems):
        if name not in _SECTIONS:
            problems.append(Problem(place, f"there is no section {name[:64]!r}{nearest(name[:64], _SECTIONS)}"))
        elif not isinstance(node, yaml.SequenceNode):
            problems.append(Problem(place, f"{name}: give a list, each row with a dash before it"))
        else:
            rows += len(node.value)
            if rows > MOST_ROWS:
                raise Refusal([Problem(place, f"more than {MOST_ROWS} rows: give them in several files")])
            for number, row in enumerate(node.value, 1):
                here = Place(row.start_mark.line + 1, name, number)
                body = _row(_SECTIONS[name], row, here, problems)
                if body is not None:
                    found[name].append((here, body))
                elif name == "tenants" and isinstance(row, yaml.MappingNode):
                    named |= {str(value.value) for key, value in row.value if key.value == "name"}
    if not rows and not problems:
        raise Refusal([Problem(Place(1), f"there are no rows: give lists named {', '.join(_SECTIONS)}")])
    return Document(found["tenants"], found["keys"], found["limits"], problems, named, rows)


def _compose(text: str) -> yaml.Node | None:
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_LOADER):
            place = Place(_line(event.start_mark))
            if isinstance(event, yaml.AliasEvent):
                raise Refusal([Problem(place, "this file takes no references (*): write the value out")])
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise Refusal([Problem(place, "this is nested too deeply to be a file of tenants")])
        return yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        sentence = f"this is not valid YAML: {error.problem or error.context}"
        raise Refusal([Problem(Place(_line(mark)), sentence)]) from None
    except yaml.YAMLError as error:
        raise Refusal([Problem(Place(1), f"this is not valid YAML: {str(error).splitlines()[0]}")]) from None


def _line(mark: Any) -> int:
    return 1 if mark is None else int(mark.line) + 1


def _entries(node: yaml.MappingNode, place: Place, problems: list[Problem]) -> Iterator[tuple[str, Place, yaml.Node]]:
    """Each key of a mapping with its place and value; what cannot be one becomes a problem at `place`."""
    seen: dict[str, int] = {}
    for name, value in node.value:
        line = _line(name.start_mark)
        if not isinstance(name, yaml.ScalarNode):
            problems.append(Problem(place, "a field's name must be plain text"))
        elif name.value in seen:
            problems.append(Problem(place, f"{name.value[:64]} is given twice (first on line {seen[name.value]})"))
        else:
            seen[name.value] = line
            yield str(name.value), Place(line), value


def _row(model: type[Row], node: yaml.Node, place: Place, problems: list[Problem]) -> Row | None:
    if not isinstance(node, yaml.MappingNode):
        problems.append(Problem(place, "give a row as `field: value`"))
        return None
    wrong: list[Problem] = []
    values = {name: _value(name, value, place, wrong) for name, _, value in _entries(node, place, wrong)}
    try:
        body = model.model_validate(values)
    except ValidationError as error:
        said: dict[tuple[str, ...], str] = {}
        for e in error.errors():  # of a list with a wrong item the library also says that it is too short
            names = tuple(part for part in e["loc"] if isinstance(part, str))
            said.setdefault(names, f"{'.'.join(str(part) for part in e['loc'])[:64]}: {reason(e)}")
        wrong.append(Problem(place, "; ".join(said.values())))
        body = None
    problems += wrong
    return None if wrong else body


def _value(name: str, node: yaml.Node, place: Place, problems: list[Problem]) -> Any:
    """Text is what is written, so that a name may be `on` or 007; only what counts is a number."""
    if isinstance(node, yaml.MappingNode):
        return {inner: _value(inner, value, place, problems) for inner, _, value in _entries(node, place, problems)}
    if isinstance(node, yaml.SequenceNode):
        return [_value("", item, place, problems) for item in node.value]
    text = str(node.value)
    if node.tag == "tag:yaml.org,2002:null":
        return None
    digits = text.lstrip("+-").replace("_", "")
    whole = node.tag == "tag:yaml.org,2002:int" and digits.isascii() and digits.isdigit() and len(digits) < 20
    return int(text.replace("_", "")) if name in _NUMBERS and whole else text

"""What pydantic found wrong, as sentences for who wrote the scenario: where, which field, what is allowed."""

from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vitalis_load import layers
from vitalis_load.metrics import Slo

SLO_LIMITS = Slo.__struct_fields__
_KINDS = {
    "string": "a text", "float": "a number", "int": "a whole number", "bool": "true or false", "list": "a list",
    "dict": "a mapping", "model": "a mapping of fields",
}  # fmt: skip


def check_slo(slo: dict[str, float]) -> dict[str, float]:
    """The same. Raises ValueError for a limit there is not."""
    strange = [f"{name} {unknown(name, SLO_LIMITS)}" for name in slo if name not in SLO_LIMITS]
    if strange:
        raise ValueError("; ".join(strange))
    wrong = [name for name, value in slo.items() if value < 0]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must not be below 0")
    return slo


def unknown(name: object, allowed: Any) -> str:
    """What to say of a name there is not, with the one that was probably meant."""
    near = get_close_matches(str(name), [str(one) for one in allowed], n=1)
    return "is not known; " + (f"did you mean {near[0]}?" if near else f"allowed: {layers.listed(allowed)}")


def sentence(error: ValidationError, tree: Any, path: Path, model: type[BaseModel]) -> str:
    """All of it, one mistake after the other."""
    found = list(dict.fromkeys(_one(detail, tree, path, model) for detail in error.errors(include_url=False)))
    return found[0] if len(found) == 1 else "\n  ".join([f"{path}: {len(found)} mistakes:", *found])


def _one(detail: ErrorDetails, tree: Any, path: Path, model: type[BaseModel]) -> str:
    steps, inner = _without_tags(detail["loc"], tree)
    where = layers.place(tree, steps) or str(path)
    field = _dotted(steps, tree)
    kind, context = detail["type"], detail.get("ctx", {})
    given = detail.get("input")
    if kind == "extra_forbidden":
        allowed = _fields(model, detail["loc"][:-1])
        return f"{where}: {field} {unknown(steps[-1], allowed)}"
    if kind == "missing":
        return f"{where}: {field} is missing"
    if kind in ("literal_error", "union_tag_invalid"):
        words = str(context.get("expected", context.get("expected_tags", "")))
        allowed = [word.strip(" '") for word in words.replace(" or ", ", ").split(", ")]
        wrong = str(context.get("tag", given))
        name = f"{field}.kind" if kind == "union_tag_invalid" else field
        where = layers.place(tree, [*steps, "kind"]) or where
        return f"{where}: {name} {wrong!r} {unknown(wrong, allowed)}"
    if kind == "union_tag_not_found":
        return f"{where}: {field} needs a kind: {layers.listed(_tags(model, detail['loc']))}"
    if kind == "value_error":
        return f"{where}: {field + ': ' if field else ''}{context.get('error', detail['msg'])}"
    if kind == "string_pattern_mismatch":
        return f"{where}: {field} may have letters, digits and _ . - only, not {_shown(given)}"
    for ending in ("_type", "_parsing", "_from_float"):
        wanted = _KINDS.get(kind.removesuffix(ending))
        if kind.endswith(ending) and wanted:
            return f"{where}: {field} must be {wanted}, not {_shown(given)}"
    said = detail["msg"].removeprefix("Input should ").removeprefix("be ")
    return f"{where}: {field} must be {said}, not {_shown(given)}"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _without_tags(loc: tuple[Any, ...], tree: Any) -> tuple[list[Any], Any]:
    """pydantic puts the `kind` of a union into the path; the file has no such step."""
    steps: list[Any] = []
    for number, step in enumerate(loc):
        is_last = number == len(loc) - 1
        if isinstance(tree, dict) and isinstance(step, str) and step not in tree and not is_last:
            continue
        if isinstance(tree, dict) and tree.get("kind") == step and step not in tree:
            continue
        steps.append(step)
        if isinstance(tree, dict):
            tree = tree.get(step)
        elif isinstance(tree, list) and isinstance(step, int) and step < len(tree):
            tree = tree[step]
        else:
            tree = None
    return steps, tree


def _dotted(steps: list[Any], tree: Any) -> str:
    """tasks.chat.output rather than tasks.0.output."""
    words = []
    for step in steps:
        below = tree[step] if isinstance(tree, list) and isinstance(step, int) and step < len(tree) else None
        name = below.get("name") if isinstance(below, dict) else None
        words.append(str(name or step))
        tree = below if below is not None else tree.get(step) if isinstance(tree, dict) else None
    return ".".join(words)


def _models(annotation: Any) -> list[Any]:
    """The models and lists that an annotation allows."""
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [model for option in get_args(annotation) for model in _models(option)]
    return [annotation]


def _at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[Any]:
    options: list[Any] = [model]
    for step in loc:
        following: list[Any] = []
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                if step in option.model_fields:
                    following += _models(option.model_fields[step].annotation)
                elif _tag(option) == step:
                    following.append(option)
            elif get_origin(option) in (list, dict):
                following += _models(get_args(option)[-1])
        options = following or options
    return options


def _tag(model: Any) -> str:
    field = model.model_fields.get("kind") if isinstance(model, type) and issubclass(model, BaseModel) else None
    return str(get_args(field.annotation)[0]) if field is not None else ""


def _tags(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    return [_tag(option) for option in _at(model, loc) if _tag(option)]


def _fields(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    return [
        field.alias or name
        for option in _at(model, loc)
        if isinstance(option, type) and issubclass(option, BaseModel)
        for name, field in option.model_fields.items()
    ]

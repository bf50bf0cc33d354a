"""The page /docs: what /openapi.json says, to read in a browser. It loads nothing, from here or elsewhere, and runs
nothing: control also stands where there is no internet."""

import json
from collections.abc import Iterator
from html import escape
from typing import Any, Final

HEADERS: Final = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
_STYLE: Final = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}code,pre{background:#eee}"
    "pre{padding:1em;overflow:auto}td,th{padding:.1em 1em .1em 0;text-align:left;vertical-align:top}"
    "h3{margin:2em 0 0}"
)
_CALL: Final = 'curl -H "Authorization: Bearer $(cat control.token)" "$(cat control.address)/v1/fleet"'


def page(document: dict[str, Any]) -> str:
    """HTML of an OpenAPI document as FastAPI writes it."""
    return "\n".join(_lines(document))


def _lines(document: dict[str, Any]) -> Iterator[str]:
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    yield f"<h1>{title}</h1><p>{escape(info['description'])} For programs: <a href='/openapi.json'>/openapi.json</a>."
    yield "<p>Operations with a * need control's token. In the data folder:"
    yield f"<pre>{escape(_CALL)}</pre><h2>Operations</h2>"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield from _operation(method.upper(), path, operation)
    yield "<h2>Bodies</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{escape(schema.get("description", ""))}'
        required = schema.get("required", ())
        yield from _table([(key, field, key in required) for key, field in schema.get("properties", {}).items()])


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    star = " *" if operation.get("security") else ""
    yield f"<h3><code>{method} {escape(path)}</code>{star}</h3><p>{escape(operation.get('description', ''))}"
    yield from _table([(p["name"], p["schema"], p["required"]) for p in operation.get("parameters", ())])
    if "requestBody" in operation:
        yield f"<p>Takes {_content(operation['requestBody'])}."
    answers = (f"{escape(status)}: {_content(answer)}" for status, answer in operation["responses"].items())
    yield f"<p>Answers {', '.join(answers)}."


def _content(body: dict[str, Any]) -> str:
    kinds = body.get("content", {}).items()
    return " or ".join(_kind(content["schema"]) if "schema" in content else escape(kind) for kind, content in kinds)


def _table(fields: list[tuple[str, dict[str, Any], bool]]) -> Iterator[str]:
    if not fields:
        return
    yield "<table>"
    for name, schema, required in fields:
        need = "needed" if required else "may be left out"
        if "default" in schema:
            need = f"else <code>{escape(json.dumps(schema['default']))}</code>"
        yield f"<tr><td><code>{escape(name)}</code><td>{_kind(schema)}<td>{need}"
        yield f"<td>{escape(schema.get('description', ''))}"
    yield "</table>"


def _kind(schema: dict[str, Any]) -> str:
    """What a value is, in a few words, with links to the bodies described below."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_kind(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(escape(json.dumps(value)) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    bounds = {"minimum": "from", "maximum": "to", "maxLength": "at most", "pattern": "as"}
    limits = "".join(f" {word} {str(schema[key]).removesuffix('.0')}" for key, word in bounds.items() if key in schema)
    return escape(f"{schema.get('type', 'anything')}{limits}")

"""Asking control: what its commands share. Through its HTTP API on this machine, with the token of the data folder."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from vitalis_serve.cli.failure import fail
from vitalis_serve.control.client import Client, NotRunning, Refused

Config = Annotated[
    Path | None,
    typer.Option("--config", help="The configuration file (default config/gpt-oss.yaml, or VITALIS_CONFIG)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def control(config: Path | None) -> Iterator[tuple[Client, Path]]:
    """The running control and its data folder. What it refuses ends the command with its sentence."""
    from vitalis_serve.settings import load

    data_folder = load(config, os.environ).data_folder
    try:
        yield Client.of_folder(data_folder), data_folder
    except NotRunning as error:
        fail(str(error))
    except Refused as error:
        fail(str(error), 2 if error.status == 400 else 1)


def force(changed: dict[str, Any]) -> str:
    """Whether the workers have a change."""
    return "in force" if changed["applied"] else "in force as soon as every worker has acknowledged it"


def show(rows: list[dict[str, Any]], as_json: bool, columns: tuple[str, ...]) -> None:
    """Prints rows as JSON, or these columns of them as a table."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    cells = [[cell(column, row[column]) for column in columns] for row in rows]
    table = [[column.removesuffix("_at") for column in columns], *cells]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def cell(column: str, value: Any) -> str:
    """A value in a table."""
    if value is None:
        return "never" if column in ("expires_at", "last_used_at") else "-"
    if column.endswith(("_at", "_until")):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M")
    return ",".join(value) if isinstance(value, list) else str(value) or "-"

"""`usage`: what was used, from control's HTTP API, as a table, CSV or JSON."""

import csv
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlencode

import typer

from vitalis_serve.cli.failure import complain, fail
from vitalis_serve.control.client import Client, NotRunning, Refused

SECONDS: Final = 120  # sums over months of single rows take their time
_COUNTS: Final = {
    "requests": "requests",
    "failed": "failed",
    "estimated": "estimated",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "completion_tokens": "completion",
    "reasoning_tokens": "reasoning",
}


def register(app: typer.Typer) -> None:
    """Adds `usage`."""
    app.command("usage")(usage)


def usage(
    by: Annotated[str, typer.Option(help="Of tenant, key, route, day; commas between.")] = "tenant",
    first: Annotated[
        str | None, typer.Option("--from", metavar="DAY", help="First day, UTC; default: the month's first.")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="DAY", help="Last day, UTC; default: today.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    key: Annotated[str | None, typer.Option(metavar="ID", help="Only of this key.")] = None,
    route: Annotated[str | None, typer.Option(help="Only of this route.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="The configuration file (default config/gpt-oss.yaml, or VITALIS_CONFIG)."),
    ] = None,
) -> None:
    """Requests and tokens used, by tenant, key, route and day."""
    if as_csv and as_json:
        fail("--csv and --json: give one of the two", 2)
    said = {"by": by, "from": first, "to": last, "tenant": tenant, "key": key, "route": route}
    query = urlencode({name: value for name, value in said.items() if value is not None})
    answer = _asked(config, f"/v1/usage?{query}")
    if as_json:
        print(json.dumps(answer, indent=2))
    elif as_csv:
        columns = [*answer["by"], *_COUNTS]
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([row[column] for column in columns] for row in answer["usage"])
    else:
        _print(answer)
    if answer["waiting"]["records"]:
        complain(
            f"not in these figures: {answer['waiting']['records']} records that wait for the store, the oldest for "
            f"{answer['waiting']['oldest_seconds']:.0f} s"
        )


def _asked(config: Path | None, path: str) -> Any:
    from vitalis_serve.settings import load

    try:
        return Client.of_folder(load(config, os.environ).data_folder, seconds=SECONDS).call("GET", path)
    except NotRunning as error:
        fail(str(error))
    except Refused as error:
        fail(str(error), 2 if error.status in (400, 404) else 1)


def _print(answer: dict[str, Any]) -> None:
    groups = answer["by"]
    lines = [[*(str(row[group]) for group in groups), *_numbers(row)] for row in answer["usage"]]
    head = [*groups, *_COUNTS.values()]
    total = ["total", *("" for _ in groups[1:]), *_numbers(answer["total"])]
    table = [head, *lines, total]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for line in table:
        cells = [
            cell.ljust(width) if i < len(groups) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print(
        f"{answer['from']} to {answer['to']}, UTC; tokens: cached ones are among the prompt's, reasoning ones among "
        "the completion's"
    )


def _numbers(row: dict[str, Any]) -> list[str]:
    return [f"{row[name]:,}" for name in _COUNTS]

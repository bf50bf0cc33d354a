"""The matrix that is measured on one card: its cells, in which order, which are left, and the table they make. Pure.

Cells of the same options come together, since other options mean a restart; direct and gateway of the same load come
one after the other, so that their ratio is of the same minute.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from vitalis_load.overhead import WAYS, Way
from vitalis_load.records import RunInfo
from vitalis_load.searching import Point

STREAMS: Final = (1, 32, 64, 128, 256, 512, 1024)
WAITS_SECONDS: Final = 8  # around each cell: processes started, a little asked before, the report


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lengths in tokens. `shared`: how many of the prompt's are the same for all requests of a group."""

    name: str
    prompt: int
    output: int
    shared: int = 0
    groups: int = 1


SHAPES: Final = (
    Shape(name="1k-1k", prompt=1024, output=1024),
    Shape(name="8k-1k", prompt=8192, output=1024),
    Shape(name="shared-prefix", prompt=4096, output=256, shared=3840, groups=8),
)
# What the same command does where there is no card: every step of it, in a minute.
SMALL_STREAMS: Final = (1, 2, 4)
SMALL_SHAPES: Final = (
    Shape(name="1k-1k", prompt=64, output=16),
    Shape(name="8k-1k", prompt=256, output=16),
    Shape(name="shared-prefix", prompt=128, output=8, shared=96, groups=2),
)


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement."""

    options: str  # "default", "tuned", ...
    shape: str
    streams: int
    way: Way

    @property
    def name(self) -> str:
        return f"{self.options}-{self.shape}-{self.streams}-{self.way}"


class Outcome(msgspec.Struct, kw_only=True):
    """What came of a cell; without `point` it failed, and `problem` says why."""

    cell: Cell
    point: Point | None = None
    problem: str = ""


def cells(
    options: Sequence[str], shapes: Sequence[Shape], streams: Sequence[int], ways: Sequence[Way] = WAYS
) -> list[Cell]:
    return [
        Cell(options=name, shape=shape.name, streams=count, way=way)
        for name in options
        for shape in shapes
        for count in streams
        for way in ways
    ]


def remaining(wanted: Iterable[Cell], done: Iterable[Outcome]) -> list[Cell]:
    """Those not measured yet; one that failed is tried again by the next start."""
    measured = {outcome.cell for outcome in done if outcome.point is not None}
    return [cell for cell in wanted if cell not in measured]


def expected_seconds(left: Sequence[Cell], cell_seconds: float, start_seconds: float) -> float:
    """About how long the rest takes."""
    return len(left) * (cell_seconds + WAITS_SECONDS) + len({cell.options for cell in left}) * start_seconds


class Timing(msgspec.Struct, frozen=True):
    """Of one cell, in seconds."""

    warmup: float
    measured: float
    cooldown: float

    @property
    def whole(self) -> float:
        return self.warmup + self.measured + self.cooldown


def timing(seconds: float, before: Point | None) -> Timing:
    """`before`: the same shape with fewer streams, whose answers took half as long at worst. The load goes on until
    the answers that began within what is measured have ended: only then are their tokens known. All streams begin at
    once and have one length, so what is measured is two answers long at least."""
    if before is None or before.e2e_p99_ms is None:
        return Timing(seconds / 4, seconds, seconds / 4)
    answer = 2 * before.e2e_p99_ms / 1e3
    return Timing(max(seconds / 4, answer / 2), max(seconds, 2 * answer), max(seconds / 4, answer))


def scenario(shape: Shape, streams: int, timing_: Timing, deadline: float) -> dict[str, Any]:
    """What one cell asks, as a scenario's document: users that ask for completions of a fixed length without a pause
    (chat's format and ignore_eos do not go together in gpt-oss)."""
    prompt: dict[str, Any] = {"tokens": shape.prompt}
    if shape.shared:
        own = shape.prompt - shape.shared
        prompt = {"kind": "shared", "prefix_tokens": shape.shared, "groups": shape.groups, "tokens": own}
    return {
        "name": f"matrix-{shape.name}",
        "about": f"{streams} streams of {shape.prompt} tokens in and {shape.output} out",
        "arrivals": {"kind": "users", "users": streams},
        "shape": {"kind": "steady", "seconds": timing_.measured},
        "warmup_seconds": timing_.warmup,
        "cooldown_seconds": timing_.cooldown,
        "deadline_seconds": deadline,
        "repeats": 1,
        "tasks": [
            {
                "name": shape.name,
                "api": "completions",
                "prompt": prompt,
                "output": shape.output,
                "body": {"ignore_eos": True},
            }
        ],
    }


def open_gateway(streams: int, slots: int, deadline: float) -> dict[str, Any]:
    """The gateway's settings for which it asks the engine what the client asks the gateway. What it refuses, keeps for
    emergencies or gives up would be less work for the engine and no cost of the gateway's; who waits, waits in both
    ways. `slots`: those of the options that are measured; `deadline`: of one request, in seconds."""
    return {
        "engines.slots": max(streams, slots),
        "gateway.queue.max_requests": max(streams, 1024),
        "gateway.queue.max_seconds": deadline,
        "gateway.queue.overload_seconds": 0,
        "gateway.queue.reserved_share": 0,
        "gateway.deadlines.first_token_seconds": deadline,
        "gateway.deadlines.total_seconds": 2 * deadline,
    }


class Row(msgspec.Struct, kw_only=True):
    """One load of the table, both ways. `ratio`: output tokens/s through the gateway over direct."""

    options: str
    shape: str
    streams: int
    points: dict[str, Point]
    problems: dict[str, str]
    ratio: float | None


def rows(wanted: Iterable[Cell], done: Iterable[Outcome]) -> list[Row]:
    """In the order of the matrix; what was not measured is left out. Of a cell that was tried twice the last counts."""
    by_cell = {outcome.cell: outcome for outcome in done}
    made: dict[tuple[str, str, int], Row] = {}
    for cell in wanted:
        outcome = by_cell.get(cell)
        if outcome is None:
            continue
        place = (cell.options, cell.shape, cell.streams)
        row = made.setdefault(
            place,
            Row(options=cell.options, shape=cell.shape, streams=cell.streams, points={}, problems={}, ratio=None),
        )
        if outcome.point is not None:
            row.points[cell.way] = outcome.point
        else:
            row.problems[cell.way] = outcome.problem
    for row in made.values():
        row.ratio = _ratio(row.points)
    return list(made.values())


def table(measured: Sequence[Row]) -> str:
    """Markdown, one line for each load."""
    head = (
        "| options | shape | streams | output tokens/s direct | gateway | ratio | TTFT p50 / p99 ms direct | gateway |"
        " TPOT p50 / p99 ms direct | gateway | failed |"
    )
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in measured:
        direct, gateway = row.points.get("direct"), row.points.get("gateway")
        failed = sum(point.failed_share > 0 for point in row.points.values())
        cells_ = [
            row.options,
            row.shape,
            str(row.streams),
            *(f"{point.tokens_per_second:,.0f}{_mark(point)}" if point else "" for point in (direct, gateway)),
            "" if row.ratio is None else f"{row.ratio:.3f}",
            *(_pair(point, "ttft") for point in (direct, gateway)),
            *(_pair(point, "tpot") for point in (direct, gateway)),
            "; ".join(
                [
                    *(
                        f"{way}: {point.failed_share:.1%}"
                        for way, point in row.points.items()
                        if failed and point.failed_share
                    ),
                    *(f"{way}: {problem}" for way, problem in row.problems.items()),
                ]
            ),
        ]
        lines.append("| " + " | ".join(cells_) + " |")
    return "\n".join(lines) + "\n"


def ratios(measured: Sequence[Row]) -> list[str]:
    """Over all loads of one shape and options, in a sentence each."""
    groups: dict[str, list[float]] = {}
    for row in measured:
        if row.ratio is not None:
            groups.setdefault(f"{row.shape}, {row.options}", []).append(row.ratio)
    return [
        f"{name}: output tokens/s through the gateway over direct {min(found):.3f} to {max(found):.3f},"
        f" median {statistics.median(found):.3f}."
        for name, found in groups.items()
    ]


def machine(run: RunInfo) -> str:
    """What it was measured on and with."""
    told = run.machine
    gpus = ", ".join(str(gpu) for gpu in told.get("gpus", [])) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return (
        f"{told.get('cpu', 'a CPU')}, {told.get('cores', '?')} cores, {gpus}; {versions}; commit {run.commit or '?'}."
    )


def _ratio(points: Mapping[str, Point]) -> float | None:
    direct, gateway = points.get("direct"), points.get("gateway")
    if direct is None or gateway is None or not direct.tokens_per_second:
        return None
    return gateway.tokens_per_second / direct.tokens_per_second


def _mark(point: Point) -> str:
    return " (client-bound)" if point.client_bound else ""


def _pair(point: Point | None, figure: str) -> str:
    if point is None:
        return ""
    first, last = getattr(point, f"{figure}_p50_ms"), getattr(point, f"{figure}_p99_ms")
    return "" if first is None else f"{first:.1f} / {last:.1f}"

"""What a run comes to: `result.json`. Made of the run's folder alone, so it can be made again at any time.

Times are seconds, rates are per second, shares are 0 to 1. docs/load-testing.md says what each field means.
"""

import contextlib
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vitalis_load import figures, honesty, metrics, reading, timelines
from vitalis_load.distributions import Distribution, distributions
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.estimates import Estimate
from vitalis_load.histograms import Histogram
from vitalis_load.honesty import Honesty
from vitalis_load.metrics import Slo, Summary, Verdict, Window
from vitalis_load.reading import RepeatData, Repeats
from vitalis_load.records import Record, RunInfo
from vitalis_load.timelines import Timeline


class RepeatResult(msgspec.Struct, kw_only=True):
    """One repeat."""

    number: int
    began_at: float | None  # Unix seconds; None where the repeat was killed
    seconds: float
    complete: bool
    reason: str  # a sentence where not complete
    window: Window  # what was measured: without warm-up and cool-down
    summary: Summary
    honesty: Honesty
    distributions: dict[str, Distribution]
    timeline: Timeline


class Failure(msgspec.Struct, kw_only=True):
    """Requests of all repeats' windows that failed in the same way."""

    error: str  # as in Record.error
    count: int
    share: float  # of all requests of the windows
    tenants: dict[str, int]
    first_at: float
    last_at: float
    detail: str  # the words of the first of them
    retry_after: float | None  # the median of what the server asked for


class Result(msgspec.Struct, kw_only=True):
    """A whole run. `figures` has an Estimate over the repeats for each key of figures.FIGURES that could be had."""

    schema: str = "vitalis-load-result/1"
    run: RunInfo
    partial: bool
    partial_reasons: list[str]
    honesty: Honesty
    slo: Slo
    verdicts: list[Verdict]  # of the medians over the repeats: the run's limits, then each task's own
    figures: dict[str, Estimate]
    failures: list[Failure]
    distributions: dict[str, Distribution]  # ttft, ttfo, tpot, gaps, e2e; of all repeats together
    repeats: list[RepeatResult]

    @property
    def met(self) -> bool:
        """Whether every SLO that was asked for holds."""
        return all(verdict.ok for verdict in self.verdicts)


class SweepPoint(msgspec.Struct, kw_only=True):
    """One load that was tried."""

    load: float  # in the sweep's unit
    figures: dict[str, Estimate]
    met: bool = True  # the SLO
    missed: list[str] = []  # which limits of the SLO were not, in words
    client_bound: bool = False
    partial: bool = False
    note: str = ""  # a sentence, such as why it was stopped early
    run: str = ""  # the run's folder, from the sweep's


class Sweep(msgspec.Struct, kw_only=True):
    """Loads tried against one configuration, in increasing order: a curve of throughput against latency."""

    schema: str = "vitalis-load-sweep/1"
    id: str
    label: str  # names the curve where there are several: "gateway", "direct", "tuned"
    unit: str  # requests/s or users
    run: RunInfo  # of the first point; what all points share
    slo: Slo
    points: list[SweepPoint]
    saturation: float | None = None  # the load from which more load gave no more output tokens/s
    best: float | None = None  # the load with the best goodput among those that met the SLO
    conclusions: list[str] = []  # sentences
    partial: bool = False
    partial_reasons: list[str] = []


def build(run: Path) -> Result:
    """What the run's folder says. Raises LoadFailure where it is none, or holds no request."""
    return made_of(reading.read(run))


def write(run: Path) -> Result:
    """As `build`; written to the folder as result.json. Raises LoadFailure where that cannot be done."""
    result = build(run)
    store(result, run / "result.json")
    return result


def store(made: Result | Sweep, path: Path) -> None:
    """Whole or not at all. Raises LoadFailure where the disk does not take it."""
    whole(path, msgspec.json.encode(made) + b"\n")


def load(path: Path) -> Result:
    """A run's folder or its result.json; a folder without one is built. Raises LoadFailure."""
    if path.is_dir():
        return load(path / "result.json") if (path / "result.json").is_file() else build(path)
    return _decoded(path, Result, "vitalis-load-result/1")


def load_sweep(path: Path) -> Sweep:
    """A sweep's folder or its sweep.json. Raises LoadFailure."""
    return _decoded(path / "sweep.json" if path.is_dir() else path, Sweep, "vitalis-load-sweep/1")


def schema() -> str:
    """The JSON schema of result.json, from the types it is made of."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Result)), indent=2).decode() + "\n"


def point(load: float, result: Result, *, note: str = "", run: str = "") -> SweepPoint:
    """A run as one point of a curve."""
    return SweepPoint(
        load=load,
        figures=result.figures,
        met=result.met,
        missed=[f"{verdict.task} {verdict.name}".strip() for verdict in result.verdicts if not verdict.ok],
        client_bound=result.honesty.client_bound,
        partial=result.partial,
        note=note,
        run=run,
    )


def whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all. Raises LoadFailure."""
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise LoadFailure(f"{path} cannot be written: {error.strerror}", Exit.CANNOT_WRITE) from None


K = TypeVar("K")


def _decoded(path: Path, kind: type[K], schema: str) -> K:
    try:
        content = path.read_bytes()
        told = msgspec.json.decode(content, type=dict[str, Any]).get("schema", "none")
        if told != schema:
            raise LoadFailure(f"{path} is of the schema {told}, and {schema} is wanted")
        return msgspec.json.decode(content, type=kind)
    except OSError as error:
        raise LoadFailure(f"{path} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise LoadFailure(f"{path} is not of the schema {schema}: {error}") from None


def made_of(run: Repeats) -> Result:
    """What was read of a run's folder, as a result. Raises LoadFailure where it holds no request."""
    slo = asked(run.info.scenario)
    had = [repeat for repeat in run.repeats if repeat.records]
    if not had:
        raise LoadFailure(f"{run.folder} holds no finished request: there is nothing to report")
    gaps = Histogram()
    repeats = [_repeat(repeat, run.info, slo, gaps) for repeat in had]
    inside = [_inside(repeat.records, made.window) for repeat, made in zip(had, repeats, strict=True)]
    reasons = list(_partial_reasons(run))
    return Result(
        run=run.info,
        partial=bool(reasons),
        partial_reasons=reasons,
        honesty=honesty.over([repeat.honesty for repeat in repeats], [repeat.number for repeat in repeats]),
        slo=slo,
        verdicts=list(_verdicts([repeat.summary for repeat in repeats], slo, _of_tasks(run.info.scenario))),
        figures=figures.over_repeats(repeat.summary for repeat in repeats),
        failures=_failures([record for records in inside for record in records]),
        distributions=distributions([record for records in inside for record in records], gaps),
        repeats=repeats,
    )


def asked(scenario: dict[str, Any]) -> Slo:
    """The SLO of a RunInfo's scenario. Raises LoadFailure where it is none."""
    return _slo(scenario.get("slo"), "the run's SLO")


def _of_tasks(scenario: dict[str, Any]) -> dict[str, Slo]:
    """Of the tasks that have one."""
    tasks = [task for task in scenario.get("tasks") or () if task.get("slo")]
    return {task["name"]: _slo(task["slo"], f"the SLO of the task {task['name']}") for task in tasks}


def _slo(given: Any, whose: str) -> Slo:
    try:
        return msgspec.convert(given or {}, type=Slo)
    except msgspec.ValidationError as error:
        raise LoadFailure(f"{whose} cannot be used: {error}") from None


def window(repeat: RepeatData, scenario: dict[str, Any]) -> Window:
    """What is measured of a repeat: what was due between the end of its warm-up and the begin of its cool-down.

    Where it ended before, up to its end; where it had not even warmed up, all of it.
    """
    last = max((record.scheduled for record in repeat.records), default=0.0)
    ended = max(last, repeat.end.seconds if repeat.end is not None else repeat.last_moment)
    start, planned = (scenario.get("expected") or {}).get("window") or (
        float(scenario.get("warmup_seconds") or 0),
        ended - float(scenario.get("cooldown_seconds") or 0),
    )
    end = min(planned, ended)
    return Window(start, end) if end > start else Window(0.0, max(ended, 1e-3))


def _repeat(repeat: RepeatData, info: RunInfo, slo: Slo, all_gaps: Histogram) -> RepeatResult:
    """Its gaps are added to `all_gaps`."""
    measured = window(repeat, info.scenario)
    gaps = _gaps(repeat, measured)
    all_gaps.merge(gaps)
    summary = metrics.summarise(repeat.records, gaps, measured, slo)
    end = repeat.end
    return RepeatResult(
        number=repeat.number,
        began_at=end.began_at if end and end.began_at else None,
        seconds=max(end.seconds if end else 0.0, repeat.last_moment),
        complete=end is not None and end.complete,
        reason=end.reason if end else "it was killed before its end",
        window=measured,
        summary=summary,
        honesty=honesty.judge(repeat, info.scenario, measured, summary),
        distributions=distributions(_inside(repeat.records, measured), gaps),
        timeline=timelines.timeline(repeat),
    )


def _inside(records: Iterable[Record], measured: Window) -> list[Record]:
    return [record for record in records if measured.holds(record.scheduled)]


def _gaps(repeat: RepeatData, measured: Window) -> Histogram:
    """Of whole seconds within the window."""
    total = Histogram()
    for second in repeat.gaps:
        if measured.holds(second.at):
            with contextlib.suppress(ValueError):
                total.merge(Histogram.decode(second.hdr))
    return total


def _verdicts(summaries: list[Summary], slo: Slo, tasks: dict[str, Slo]) -> Iterable[Verdict]:
    """Each limit against the median over the repeats. It holds where it does in more than half of them."""
    yield from _judged([metrics.check(summary, slo) for summary in summaries])
    for name, own in tasks.items():
        # a task that asked nothing within the window has kept nothing
        parts = [summary.by_task.get(name) or metrics.NOTHING for summary in summaries]
        for verdict in _judged([metrics.check(part, own) for part in parts]):
            yield msgspec.structs.replace(verdict, task=name)


def _judged(checked: list[list[Verdict]]) -> Iterable[Verdict]:
    for same in zip(*checked, strict=True):
        values = [verdict.value for verdict in same if verdict.value is not None]
        held = sum(verdict.ok for verdict in same)
        median = statistics.median(values) if values else None
        why = "" if held * 2 > len(same) else next((verdict.why for verdict in same if verdict.why), "")
        yield msgspec.structs.replace(same[0], value=median, ok=held * 2 > len(same), why=why)


def _failures(records: list[Record]) -> list[Failure]:
    """The most frequent first."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        if metrics.failed(record):
            kinds.setdefault(record.error, []).append(record)
    found = []
    for error, same in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        waits = sorted(record.retry_after for record in same if record.retry_after is not None)
        found.append(
            Failure(
                error=error,
                count=len(same),
                share=len(same) / len(records),
                tenants=dict(Counter(record.tenant for record in same).most_common()),
                first_at=min(record.ended for record in same),
                last_at=max(record.ended for record in same),
                detail=next((record.detail for record in same if record.detail), ""),
                retry_after=statistics.median(waits) if waits else None,
            )
        )
    return found


def _partial_reasons(run: Repeats) -> Iterable[str]:
    """In sentences without a full stop."""
    for repeat in run.repeats:
        if repeat.end is None:
            yield f"repeat {repeat.number} was killed before its end"
        elif not repeat.end.complete:
            yield f"repeat {repeat.number}: {repeat.end.reason or 'it did not come to its end'}"
    missing = run.info.repeats - len(run.repeats)
    if missing > 0:
        yield f"{missing} of {run.info.repeats} repeats were not begun"

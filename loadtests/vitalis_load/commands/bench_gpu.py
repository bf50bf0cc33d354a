"""`vitalis-load bench-gpu`: the whole matrix on one card, unattended; the same in small where there is none."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import yaml

from vitalis_load import gpu_matrix, gpus, loads, profiles, weights
from vitalis_load.commands import given
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.gpu_matrix import Cell, Outcome, Shape
from vitalis_load.overhead import WAYS
from vitalis_load.processes import third_of_cores
from vitalis_load.program import InForce, Program, refuse_variables, surroundings
from vitalis_load.result import Sweep, whole
from vitalis_load.scenario import Scenario
from vitalis_load.searching import Journal, Point, Step
from vitalis_load.serving import Serving, StartFailed
from vitalis_load.sweeping import Bounds
from vitalis_load.target import Target, alike

_SEQUENCES = "engines.engine_args.max-num-seqs"
FOLDER = Path(__file__).resolve().parents[2] / "matrix"


def bench_gpu(
    rehearse: Annotated[bool, typer.Option(help="every step in small, on whatever runs here")] = False,
    options: Annotated[str, typer.Option(help="default,tuned: which engine options")] = "default,tuned",
    tuned: Annotated[Path | None, typer.Option(help="a profile that `tune` wrote; default: matrix/tuned.yaml")] = None,
    shapes: Annotated[str, typer.Option(help="of 1k-1k,8k-1k,shared-prefix; default: all")] = "",
    streams: Annotated[str, typer.Option(help="such as 1,64,1024; default: 1 to 1024 in seven steps")] = "",
    ways: Annotated[str, typer.Option(help="direct,gateway")] = "direct,gateway",
    seconds: Annotated[float, typer.Option(help="measured of each cell, at least; 0: 60, or 3 in a rehearsal")] = 0,
    weights_: Annotated[
        str, typer.Option("--weights", help="real, dummy, or auto: dummy where there are none")
    ] = "auto",
    tokenizer: Annotated[Path | None, typer.Option(help="folder with gpt-oss's tokenizer, for dummy weights")] = None,
    config: given.Config = None,
    serve: given.Serve = "",
    start_seconds: given.StartSeconds = 1800,
    deadline: Annotated[float, typer.Option(help="of one request, in seconds")] = 900,
    processes: Annotated[int, typer.Option(help="of the load generator; 0: a third of the cores")] = 0,
    out: given.Out = None,
) -> None:
    """1 to 1,024 streams, three shapes, directly and through the gateway, default and tuned options."""
    chosen = _shapes(shapes, gpu_matrix.SMALL_SHAPES if rehearse else gpu_matrix.SHAPES)
    counts = _counts(streams) or list(gpu_matrix.SMALL_STREAMS if rehearse else gpu_matrix.STREAMS)
    cells = gpu_matrix.cells(
        _among("--options", options, ("default", "tuned")), chosen, counts,
        [way for way in WAYS if way in _among("--ways", ways, WAYS)],
    )  # fmt: skip
    program = Program.of(serve, config)
    environ = surroundings()
    refuse_variables(environ)
    in_force = program.in_force(environ)
    if not rehearse and gpus.count(in_force.value("engines.gpus")) == 0:
        raise LoadFailure("no NVIDIA GPU is found: --rehearse does every step in small without one", Exit.NO_TARGET)
    where = given.folder(out, "rehearsal" if rehearse else "bench-gpu")
    at_least = seconds or (3.0 if rehearse else 60.0)
    journal = Journal(
        where / "journal.jsonl",
        {"cells": cells, "seconds": at_least, "rehearse": rehearse, "tuned": str(tuned or "")},
    )
    matrix = _Matrix(
        cells=cells, shapes=chosen, seconds=at_least, deadline=deadline, program=program, in_force=in_force,
        tuned=_tuned(tuned, rehearse), start_seconds=start_seconds, processes=processes or third_of_cores(),
        where=where, journal=journal, small=rehearse,
    )  # fmt: skip
    try:
        with given.kept(where):
            matrix.settle_weights("real" if rehearse and weights_ == "auto" else weights_, tokenizer)
            matrix.run()
    finally:
        matrix.conclude()
    if any(outcome.point is None for outcome in matrix.latest()):
        raise typer.Exit(Exit.MISSED)


class _Matrix:
    """One matrix from its first cell to its report. What it knows is in the journal."""

    def __init__(
        self, *, cells: Sequence[Cell], shapes: Sequence[Shape], seconds: float, deadline: float, program: Program,
        in_force: InForce, tuned: dict[str, Any], start_seconds: float, processes: int, where: Path, journal: Journal,
        small: bool,
    ) -> None:  # fmt: skip
        self._small, self._cells, self._shapes = small, cells, {shape.name: shape for shape in shapes}
        self._seconds, self._deadline, self._start_seconds = seconds, deadline, start_seconds
        self._processes, self._where, self._journal = processes, where, journal
        self._shelf = profiles.Shelf(where / "config", in_force)
        self._plain, self._program, self._tuned = program, self._shelf.program(program), tuned
        self._in_force = in_force
        self._weights: dict[str, Any] = {}
        self._outcomes = [msgspec.convert(e["outcome"], Outcome) for e in journal.entries if "outcome" in e]
        self._note = next((str(e["weights"]) for e in journal.entries if "weights" in e), "")

    def settle_weights(self, asked: str, tokenizer: Path | None) -> None:
        """Decides once whose weights these figures are of, and makes the folder where they are of none."""
        if asked not in ("real", "dummy", "auto"):
            raise LoadFailure(f"--weights {asked}: must be real, dummy or auto")
        environ = surroundings()
        if not self._note:
            note = "the configured model's own weights"
            if asked == "auto":
                given.say("fetching the model (13.8 GB where it is not here yet)")
                if problem := weights.fetch(self._plain, environ):
                    given.say(f"the model cannot be had ({problem}): going on with {weights.SAID}")
                    asked = "dummy"
            if asked == "dummy":
                note = weights.SAID
            self._note = note
            self._journal.add({"weights": note})
        if self._note == weights.SAID:
            source = tokenizer or weights.tokenizer_here(self._plain, environ)
            self._weights = weights.settings(weights.make(self._where / "model", source))

    def run(self) -> None:
        left = gpu_matrix.remaining(self._cells, self._outcomes)
        about = gpu_matrix.expected_seconds(left, 1.5 * self._seconds, min(self._start_seconds, 180))
        given.say(
            f"{len(left)} of {len(self._cells)} cells to measure: about {about / 60:.0f} min or more; {self._where}"
        )
        for options, cells in _by_options(left):
            self._with_options(options, cells)

    def latest(self) -> list[Outcome]:
        """The last of each cell, in the matrix's order."""
        by_cell = {outcome.cell: outcome for outcome in self._outcomes}
        return [by_cell[cell] for cell in self._cells if cell in by_cell]

    def conclude(self) -> None:
        """The table, a page for each shape, and the JSON, of whatever is known."""
        rows = gpu_matrix.rows(self._cells, self._outcomes)
        curves = list(self._curves())
        if not curves:
            return
        run = curves[0].run
        left = len(gpu_matrix.remaining(self._cells, self._outcomes))
        head = [
            f"{run.model}, {self._note}.",
            *(["A rehearsal: small lengths, a few streams; its figures say nothing of the real matrix."] * self._small),
            *([f"{left} of {len(self._cells)} cells are missing."] if left else []),
            *gpu_matrix.ratios(rows),
            gpu_matrix.machine(run),
        ]
        document = {"schema": "vitalis-load-matrix/1", "weights": self._note, "rows": rows, "run": run}
        whole(self._where / "matrix.json", msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
        text = self._write_table(head)
        for shape in self._shapes:
            mine = [curve for curve in curves if curve.label.startswith(f"{shape}, ")]
            if mine:
                given.report(mine, self._where / shape, title=f"The matrix: {shape}", evidence="\n".join(head))
        given.say(f"\n{text}\nreports: {self._where}/*/report.html; table: {self._where / 'matrix.md'}")

    def _write_table(self, head: Sequence[str]) -> str:
        text = "\n\n".join([*head, gpu_matrix.table(gpu_matrix.rows(self._cells, self._outcomes))])
        whole(self._where / "matrix.md", text.encode())
        return text

    def _with_options(self, options: str, cells: Sequence[Cell]) -> None:
        """Every cell of one engine. An engine that ends is started again for the cell after; one that ends twice in a
        row, or does not start, is given up."""
        left, ended = list(cells), 0
        while left and ended < 2:
            given.say(f"starting the engine with {options} options{' again' if ended else ''}")
            self._shelf.add(f"matrix-{options}", self._settings(options))
            log = self._where / options / "terminal.log"
            try:
                with Serving(self._program, log, VITALIS_PROFILE=f"matrix-{options}") as running:
                    running.wait(1, self._start_seconds, given.say)
                    sides = _targets(running)
                    while left:
                        cell = left.pop(0)
                        outcome = self._measured(cell, sides)
                        try:
                            running.check()
                        except StartFailed as failure:
                            self._add(Outcome(cell=cell, problem=str(failure)))
                            ended += 1
                            break
                        self._add(outcome)
                        ended = 0
            except StartFailed as failure:
                self._add(Outcome(cell=left.pop(0), problem=f"the engine did not start: {failure}"))
                break
            except LoadFailure as failure:
                if failure.code in (Exit.INTERRUPTED, Exit.CANNOT_WRITE):
                    raise
                self._add(Outcome(cell=left.pop(0), problem=failure.message))
                break
        for cell in left:
            self._add(Outcome(cell=cell, problem="not tried, since the engine ended before"))

    def _measured(self, cell: Cell, sides: dict[str, Target], tries: int = 2) -> Outcome:
        given.say(f"{cell.options}, {cell.shape}, {cell.streams} streams, {cell.way}")
        timing = gpu_matrix.timing(self._seconds, self._before(cell))
        document = gpu_matrix.scenario(self._shapes[cell.shape], cell.streams, timing, self._deadline)
        try:
            point = loads.measure(
                sides[cell.way], Scenario.model_validate(document), Step(float(cell.streams)), out=self._where / "runs",
                processes=min(self._processes, cell.streams), scale="full", seed=1, progress=given.within,
                note=f"{cell.name}; {self._note}",
            )  # fmt: skip
        except LoadFailure as failure:
            if failure.code in (Exit.INTERRUPTED, Exit.CANNOT_WRITE):
                raise
            return Outcome(cell=cell, problem=failure.message)
        given.say(f"  {loads.line(point, 'users')}")
        if point.partial and tries > 1:
            return self._measured(cell, sides, tries - 1)
        return Outcome(cell=cell, problem=point.partial) if point.partial else Outcome(cell=cell, point=point)

    def _before(self, cell: Cell) -> Point | None:
        """The same with the next fewer streams."""
        fewer = [
            outcome for outcome in self.latest()
            if outcome.point and outcome.cell.streams < cell.streams
            and (outcome.cell.options, outcome.cell.shape) == (cell.options, cell.shape)
        ]  # fmt: skip
        return max(fewer, key=lambda outcome: outcome.cell.streams).point if fewer else None

    def _settings(self, options: str) -> dict[str, Any]:
        tuned = self._tuned if options == "tuned" else {}
        sequences = self._in_force.value(_SEQUENCES) or self._in_force.value("engines.slots")
        most = max(cell.streams for cell in self._cells)
        return {
            _SEQUENCES: sequences, **tuned, **self._weights, "engines.replicas": 1,
            **gpu_matrix.open_gateway(most, int(tuned.get("engines.slots", 0)), self._deadline),
        }  # fmt: skip

    def _add(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._journal.add({"outcome": outcome})
        if outcome.problem:
            given.say(f"  {outcome.cell.name}: {outcome.problem}")
        # What is killed where nobody looks leaves what it had until then.
        self._write_table([self._note])

    def _curves(self) -> Iterator[Sweep]:
        """One for each options, shape and way, over the streams."""
        groups: dict[str, list[Outcome]] = {}
        for outcome in self.latest():
            if outcome.point is not None:
                cell = outcome.cell
                groups.setdefault(f"{cell.shape}, {cell.options}, {cell.way}", []).append(outcome)
        for label, outcomes in groups.items():
            points = [outcome.point for outcome in outcomes if outcome.point is not None]
            bounds = Bounds(unit="users", first=points[0].load, most=points[-1].load)
            made = loads.curve(
                self._where / "runs", points, bounds, identity=self._where.name, label=label, searched=False
            )
            if made is not None:
                yield made


def _targets(running: Serving) -> dict[str, Target]:
    gateway = running.target()
    [replica] = running.status().fleet.replicas
    direct = Target(url=replica.address, model=replica.models[0], engines=gateway.engines, gateway=False)
    return dict(zip(WAYS, alike(direct, gateway), strict=True))


def _by_options(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    for options in dict.fromkeys(cell.options for cell in cells):
        yield options, [cell for cell in cells if cell.options == options]


def _tuned(path: Path | None, rehearse: bool) -> dict[str, Any]:
    """Settings by dotted names, of a profile or of the file that comes with this. Raises LoadFailure."""
    source = path or FOLDER / ("tuned-small.yaml" if rehearse else "tuned.yaml")
    try:
        return profiles.flat(yaml.safe_load(source.read_text()) or {})
    except OSError as error:
        raise LoadFailure(f"--tuned {source} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, AttributeError):
        raise LoadFailure(f"--tuned {source} is no profile: give a YAML file as `tune` writes it") from None


def _among(option: str, words: str, known: Sequence[str]) -> list[Any]:
    chosen = [word.strip() for word in words.split(",") if word.strip()]
    if strange := [word for word in chosen if word not in known]:
        raise LoadFailure(f"{option} {','.join(strange)}: must be of {', '.join(known)}")
    if not chosen:
        raise LoadFailure(f"{option}: give at least one of {', '.join(known)}")
    return chosen


def _shapes(words: str, known: Sequence[Shape]) -> list[Shape]:
    names = _among("--shapes", words or ",".join(shape.name for shape in known), [shape.name for shape in known])
    return [shape for shape in known if shape.name in names]


def _counts(words: str) -> list[int]:
    try:
        counts = sorted({int(word) for word in words.split(",") if word.strip()})
    except ValueError:
        counts = [0]
    if any(count < 1 for count in counts):
        raise LoadFailure(f"--streams {words}: needs whole numbers of at least 1, such as 1,64,1024")
    return counts

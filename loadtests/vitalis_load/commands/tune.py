"""`vitalis-load tune`: the engine options with the best goodput under an SLO, as a profile with its evidence."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from vitalis_load import loads, profiles, sweeping, tenants, tuning
from vitalis_load.commands import given
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.gpus import count as gpu_count
from vitalis_load.program import InForce, Program, refuse_variables, surroundings
from vitalis_load.result import Sweep, whole
from vitalis_load.scenario import Scenario
from vitalis_load.searching import Journal, Point, Step
from vitalis_load.serving import Serving, StartFailed
from vitalis_load.sweeping import Bounds
from vitalis_load.target import Target
from vitalis_load.tuning import Space, Trial


def tune(
    scenario: Annotated[str, typer.Argument(help="a name, or a file")] = "short-chat",
    space: Annotated[str, typer.Option(help="cuda, cpu or a file: what is varied; default: by the device")] = "",
    tries: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="SETTING=V,V", help="vary this alone; SETTING+SETTING get the same value"),
    ] = None,
    config: given.Config = None,
    serve: given.Serve = "",
    model: given.Model = "",
    scale: given.Scale = "full",
    change: given.Set = None,
    slo: given.SloOption = None,
    first: Annotated[float, typer.Option(min=0, help="load to begin with; 0: a quarter of the scenario's own")] = 0,
    most: Annotated[float, typer.Option(help="highest load")] = 100_000,
    precision: Annotated[float, typer.Option(help="of the load that holds")] = 0.1,
    points: Annotated[int, typer.Option(min=1, help="at most so many loads for one candidate")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="of each candidate's best load")] = 3,
    start_seconds: given.StartSeconds = 1200,
    processes: given.Processes = 1,
    seed: given.Seed = 1,
    name: Annotated[str, typer.Option(help="of the profile that is written")] = "tuned",
    out: given.Out = None,
) -> None:
    """Start one configuration after the other, ask each for its best goodput under the SLO, and keep the best."""
    asked = given.asked_scenario(scenario, scale, change, slo)
    unit = loads.unit_of(asked)
    begin = first or max(loads.usual(asked) / 4, 1.0 if unit == "users" else 0.0)
    bounds = Bounds(unit=unit, first=begin, most=max(most, begin), precision=precision, points=points, confirm=repeats)
    program = Program.of(serve, config)
    environ = surroundings()
    refuse_variables(environ)
    in_force = program.in_force(environ)
    device = str(in_force.value("engines.device"))
    gpus = gpu_count(in_force.value("engines.gpus"))
    varied = profiles.space(
        space or ("cuda" if device == "cuda" or (device == "auto" and gpus) else "cpu"), tries or []
    )
    where = given.folder(out, f"tune-{asked.name}")
    asked_for = {
        "scenario": asked.resolved(), "scale": scale, "seed": seed, "profile": in_force.profile,
        "engines": in_force.settings["engines"], "model": in_force.settings["model"],
    }  # fmt: skip
    journal = Journal(where / "journal.jsonl", asked_for)
    search = _Search(
        scenario=asked, scale=scale, seed=seed, processes=processes, model=model, bounds=bounds, space=varied,
        program=program, in_force=in_force, gpus=gpus if device != "cpu" else 0, start_seconds=start_seconds,
        where=where, journal=journal,
    )  # fmt: skip
    if journal.resumed:
        given.say(f"going on with {where}: {len(search.trials)} configurations were tried")
    partial = "it was ended before it was done"
    try:
        with given.kept(where):
            search.run()
        partial = ""
    finally:
        search.conclude(name, partial)
    if search.winner_point() is None:
        raise typer.Exit(Exit.MISSED)


CURVES = 6  # in the report


class _Search:
    """One search from its first candidate to the profile. What it knows is in the journal."""

    def __init__(
        self, *, scenario: Scenario, scale: str, seed: int, processes: int, model: str, bounds: Bounds, space: Space,
        program: Program, in_force: InForce, gpus: int, start_seconds: float, where: Path, journal: Journal,
    ) -> None:  # fmt: skip
        self._scenario, self._scale, self._seed, self._processes = scenario, scale, seed, processes
        self._model, self._bounds, self._space, self._gpus = model, bounds, space, gpus
        self._start_seconds, self._where, self._journal = start_seconds, where, journal
        self._shelf = profiles.Shelf(where / "config", in_force)
        self._program = self._shelf.program(program)
        self._in_force = in_force
        self._current = profiles.current(space, in_force)
        self.trials = _trials(journal.entries)

    def run(self) -> None:
        while (following := self._progress().following) is not None:
            trial = next((known for known in self.trials if known.candidate == following), None)
            if trial is None:
                trial = Trial(candidate=following)
                self.trials.append(trial)
            number = self.trials.index(trial)
            given.say(f"configuration {number + 1}: {tuning.name(following)}")
            self._try(trial, f"trial-{number + 1:02d}")
            self._note(trial, state=trial.state, reason=trial.reason)
            given.say(f"  {self._outcome(trial)}")

    def winner_point(self) -> Point | None:
        winner = self._winner()
        return sweeping.best(winner.points, self._bounds) if winner else None

    def conclude(self, name: str, partial: str) -> None:
        """The profile, the evidence and the page, of whatever is known."""
        curves = [curve for trial in self._drawn() if (curve := self._curve(trial, partial))]
        if not curves:
            return
        winner, evidence = self._winner(), self._evidence(partial)
        page = given.report(curves, self._where, title=f"Tuning: {self._scenario.name}", evidence=evidence)
        document = {
            "schema": "vitalis-load-tune/1", "scenario": self._scenario.resolved(), "scale": self._scale,
            "profile_in_force": self._in_force.profile, "in_force": self._current, "space": self._space,
            "winner": winner.candidate if winner else None, "trials": self.trials, "partial": partial,
        }  # fmt: skip
        whole(self._where / "tune.json", msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
        given.say(f"\n{evidence}\nreport: {page}")
        if winner is None or self.winner_point() is None:
            return
        path = self._shelf.add(name, winner.candidate, f"{evidence}\nEvidence: {self._where.name}")
        self._program.in_force({**surroundings(), "VITALIS_PROFILE": name})  # it can be loaded
        given.say(
            f"profile: {path}\nto use it: copy it to the folder profiles/ beside your configuration, and set profile:"
            f" {name} (or VITALIS_PROFILE={name})"
        )

    def _try(self, trial: Trial, folder: str) -> None:
        self._shelf.add(folder, trial.candidate)
        place = self._where / folder
        replicas = int({**self._current, **trial.candidate}.get("engines.replicas") or self._in_force.replicas)
        try:
            with Serving(self._program, place / "terminal.log", VITALIS_PROFILE=folder) as running:
                running.wait(replicas, self._start_seconds, given.say)
                with tenants.with_keys(running.target(self._model), self._scenario, given.say) as target:
                    self._measure(trial, folder, target, running)
        except StartFailed as failure:
            trial.state, trial.reason = "failed", str(failure)
        except LoadFailure as failure:
            if failure.code != Exit.NO_TARGET:
                raise
            trial.state, trial.reason = "failed", failure.message

    def _measure(self, trial: Trial, folder: str, target: Target, running: Serving) -> None:
        """Raises StartFailed where the engine ends under the load."""
        champion = self.winner_point() if trial.candidate else None
        while step := tuning.next_measurement(trial.points, champion, self._bounds):
            found = self._point(step, folder, target)
            running.check()
            trial.points.append(found)
            self._note(trial, point=found)
            given.say(f"  {loads.line(found, self._bounds.unit)}")
        trial.state, trial.reason = tuning.verdict(trial.points, champion, self._bounds)

    def _point(self, step: Step, folder: str, target: Target) -> Point:
        found = loads.measure(
            target, self._scenario, step, out=self._where / folder, processes=self._processes, scale=self._scale,
            seed=self._seed, progress=given.within, note=folder,
        )  # fmt: skip
        return msgspec.structs.replace(found, run=f"{folder}/{found.run}")

    def _note(self, trial: Trial, **learnt: Any) -> None:
        self._journal.add({"candidate": trial.candidate, **learnt})

    def _progress(self) -> tuning.Progress:
        return tuning.search(self._space, self._current, self.trials, self._bounds, self._gpus)

    def _winner(self) -> Trial | None:
        winner = self._progress().winner
        return next((trial for trial in self.trials if trial.candidate == winner), None)

    def _drawn(self) -> list[Trial]:
        """The configuration in force, the winner, and the best others, as many as can be told apart in a plot."""

        def goodput(trial: Trial) -> float:
            found = sweeping.best(trial.points, self._bounds)
            return found.goodput if found else 0.0

        first = [trial for trial in self.trials if not trial.candidate or trial is self._winner()]
        others = sorted((trial for trial in self.trials if trial not in first), key=goodput, reverse=True)
        return [*first, *others][:CURVES]

    def _curve(self, trial: Trial, partial: str) -> Sweep | None:
        notes = [trial.reason] if trial.reason else []
        return loads.curve(
            self._where, trial.points, self._bounds, identity=f"{self._where.name}/{self.trials.index(trial) + 1}",
            label=tuning.name(trial.candidate), notes=notes, partial=partial if trial.state == "going on" else "",
        )  # fmt: skip

    def _outcome(self, trial: Trial) -> str:
        found = sweeping.best(trial.points, self._bounds)
        if trial.state != "measured" or found is None:
            return f"{trial.state}: {trial.reason}"
        return f"holds {sweeping.show(found.load, self._bounds.unit)}: {found.goodput:.3g} good requests/s"

    def _evidence(self, partial: str) -> str:
        winner, found = self._winner(), self.winner_point()
        before = next((trial for trial in self.trials if not trial.candidate), None)
        was = sweeping.best(before.points, self._bounds) if before else None
        slo = ", ".join(f"{name} {value:g}" for name, value in self._scenario.slo.items()) or "none"
        today = datetime.datetime.now(datetime.UTC).date()
        what = f"scenario {self._scenario.name} ({self._scale}), SLO: {slo}"
        lines = [f"Tuned {today} from profile {self._in_force.profile}, {what}."]
        if winner is None or found is None:
            lines.append("No configuration that was tried holds the SLO at any load that was tried.")
        elif not winner.candidate:
            lines.append("Nothing that was tried is better than the configuration in force.")
        else:
            gain = f", {found.goodput / was.goodput - 1:+.0%}" if was and was.goodput else ""
            before_words = f"{was.goodput:.3g}" if was else "none"
            lines.append(
                f"{tuning.name(winner.candidate)}: {found.goodput:.3g} good requests/s (before: {before_words}{gain}),"
                f" {found.tokens_per_second:.0f} output tokens/s."
            )
        lines += [f"{tuning.name(trial.candidate)}: {self._outcome(trial)}" for trial in self.trials]
        return "\n".join([*lines, *([f"Partial: {partial}."] if partial else [])])


def _trials(entries: Sequence[dict[str, Any]]) -> list[Trial]:
    """As they were when the journal's last line was written."""
    trials: dict[str, Trial] = {}
    for entry in entries:
        trial = trials.setdefault(tuning.key(entry["candidate"]), Trial(candidate=entry["candidate"]))
        if "point" in entry:
            trial.points.append(loads.as_point(entry["point"]))
        if "state" in entry:
            trial.state, trial.reason = entry["state"], entry["reason"]
    return list(trials.values())

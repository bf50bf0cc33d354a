"""`vitalis-load overhead`: the same engine directly and through the gateway, in turn, in one run."""

import contextlib
import functools
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from vitalis_load import discovery, metrics, options, reading, result, runs
from vitalis_load import overhead as compared
from vitalis_load.commands import given
from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.overhead import Added, Overhead, Round, Way
from vitalis_load.processes import cpu_seconds, gateway_processes
from vitalis_load.program import REPOSITORY, Program, surroundings
from vitalis_load.prompts import Tokenisation
from vitalis_load.result import Sweep, whole
from vitalis_load.scenario import Scenario
from vitalis_load.searching import Journal
from vitalis_load.serving import Serving, StartFailed
from vitalis_load.target import Target, alike

SIMULATOR = ("--preset", "sim-20b", "--max-num-seqs", "4096", "--port", "0")
START_SECONDS = 60


def overhead(
    scenario: Annotated[str, typer.Option(help="a name or a file; default: streams of fixed lengths")] = "",
    streams: Annotated[int, typer.Option(min=1, help="at once, where no scenario is given")] = 16,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of a prompt, where no scenario is given")] = 128,
    output: Annotated[int, typer.Option(min=1, help="tokens of an answer, where no scenario is given")] = 128,
    api: Annotated[str, typer.Option(help="where no scenario is given")] = "completions",
    seconds: Annotated[float, typer.Option(min=1, help="of each round, where no scenario is given")] = 15,
    pairs: Annotated[int, typer.Option(min=1, help="rounds of each way")] = 5,
    data_folder: given.DataFolder = options.DATA_FOLDER,
    simulator: Annotated[
        bool, typer.Option(help="a simulated engine, started for this, instead of a real one")
    ] = False,
    simulator_options: Annotated[str, typer.Option(help="of the simulated engine")] = " ".join(SIMULATOR),
    simulator_python: Annotated[str, typer.Option(help="has uvloop; default: this checkout's gateway's")] = "",
    serve: given.Serve = "",
    config: given.Config = None,
    scale: given.Scale = "full",
    change: given.Set = None,
    processes: given.Processes = 1,
    seed: given.Seed = 1,
    out: given.Out = None,
) -> None:
    """Ratio of tokens/s, added TTFT and TPOT, CPU per event: what the gateway costs in front of one engine."""
    where = given.folder(out, "overhead")
    if scenario:
        asked = given.asked_scenario(scenario, scale, change, None)
    else:
        asked = Scenario.model_validate(fixed(api, streams, prompt, output, seconds))
    before = _Before.of(serve, config, simulator_python, simulator_options) if simulator else None
    asked_for = {"scenario": asked.resolved(), "pairs": pairs, "simulator": simulator, "seed": seed}
    journal = Journal(where / "journal.jsonl", asked_for)
    rounds = [msgspec.convert(entry["round"], Round) for entry in journal.entries]
    try:
        with given.kept(where), _sides(data_folder, before, where) as sides:
            runs.learn(sides.gateway, asked, seed=seed, progress=given.within)
            counting = runs.learn(sides.direct, asked, seed=seed, progress=given.within)
            measure = functools.partial(
                _round, sides, asked, where=where, counting=counting, processes=processes, scale=scale, seed=seed
            )
            for number, (pair, way) in enumerate(compared.order(pairs)):
                if any((each.pair, each.way) == (pair, way) for each in rounds):
                    continue
                given.say(f"round {number + 1} of {2 * pairs}: {way}")
                found = measure(pair, way)
                if found.partial:
                    given.say(f"  once more, since it was partial: {found.partial}")
                    found = measure(pair, way)
                if found.partial:
                    raise LoadFailure(f"a round was partial twice: {found.partial}", Exit.MISSED)
                rounds.append(found)
                journal.add({"round": found})
                given.say(f"  {found.tokens_per_second:.0f} output tokens/s, {found.failed} of {found.requests} failed")
    finally:
        made = compared.overhead(rounds)
        if made.pairs:
            whole(where / "overhead.json", msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
            text = summary(made)
            page = given.report(_curves(rounds, where), where, title="Direct against gateway", evidence=text)
            given.say(f"\n{text}\nreport: {page}")
    if sum(made.failed.values()) > 0.5 * sum(made.requests.values()):
        raise typer.Exit(Exit.MISSED)


class Sides(msgspec.Struct):
    """The two ways to one engine, and the processes that are on the longer one."""

    direct: Target
    gateway: Target
    processes: list[Any]  # psutil's


class _Before(msgspec.Struct):
    """A gateway and the simulated engine that it is put before."""

    program: Program
    engine: list[str]  # its argv

    @classmethod
    def of(cls, serve: str, config: Path | None, python: str, words: str) -> "_Before":
        return cls(Program.of(serve, config), [_python(python), "-m", "simulator", *words.split()])


def fixed(api: str, streams: int, prompt: int, output: int, seconds: float) -> dict[str, Any]:
    """Users without a pause that ask for answers of one length: both ways do the same work."""
    body = {"ignore_eos": True} if api == "completions" else {}
    return {
        "name": "overhead",
        "about": f"{streams} streams of {prompt} tokens in and {output} out",
        "arrivals": {"kind": "users", "users": streams},
        "shape": {"kind": "steady", "seconds": seconds},
        "warmup_seconds": min(3.0, seconds / 4),
        "cooldown_seconds": 0.0,
        "repeats": 1,
        "tasks": [{"name": api, "api": api, "prompt": {"tokens": prompt}, "output": output, "body": body}],
    }


def summary(made: Overhead) -> str:
    """For a person."""
    lines = [f"direct against gateway, {made.pairs} pairs of rounds on one engine"]
    if made.ratio is not None:
        lines.append(
            f"output tokens/s through the gateway over direct: {made.ratio.median:.3f}"
            f" ({made.ratio.min:.3f} to {made.ratio.max:.3f})"
        )
    for name in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99"):
        added = getattr(made, name)
        if added is not None:
            lines.append(f"added {name[:4].upper()} {name[5:]}: {_added(added)}")
    if made.cpu_us_per_event is not None and made.cpu_us_per_event_gross is not None:
        lines.append(
            f"CPU of the gateway: {made.cpu_us_per_event:.1f} us an event, {made.cpu_us_per_event_gross:.1f} with what"
            f" it takes when idle ({made.cpu_idle or 0:.3f} cores)"
        )
    return "\n".join([*lines, *(f"note: {doubt}" for doubt in made.doubts)])


@contextlib.contextmanager
def _sides(folder: str, before: "_Before | None", where: Path) -> Iterator[Sides]:
    """Of the server that runs on the folder, or of one that is started for this. Raises LoadFailure."""
    if before is None:
        yield _both(options.target(None, data_folder=folder), discovery.status(Path(folder)))
        return
    with _simulated(before.engine, where / "simulator.log") as address:
        words = ("gateway", "--engine", address)
        # More slots than streams: what waits for a slot is no overhead.
        with Serving(before.program, where / "terminal.log", words=words, VITALIS_ENGINES_SLOTS="4096") as tree:
            try:
                tree.wait(1, START_SECONDS, given.say)
            except StartFailed as failure:
                raise LoadFailure(f"the gateway did not start: {failure}", Exit.NO_TARGET) from None
            yield _both(tree.target(), tree.status())


def _both(gateway: Target, status: discovery.Status) -> Sides:
    """Raises LoadFailure where there is not just one engine to be asked directly."""
    replicas = status.fleet.replicas
    if len(replicas) != 1:
        raise LoadFailure(
            f"the gateway has {len(replicas)} engines, and its cost shows in front of one: run it with"
            " VITALIS_ENGINES_REPLICAS=1"
        )
    [engine] = replicas
    direct = Target(url=engine.address, model=engine.models[0], engines=gateway.engines, gateway=False)
    return Sides(*alike(direct, gateway), gateway_processes(status))


def _python(given_: str) -> str:
    """What the simulated engine runs in. Raises LoadFailure."""
    own = REPOSITORY / ".venv" / "bin" / "python"
    found = shutil.which(given_ or str(own))
    if found is None:
        raise LoadFailure(
            f"{given_ or own} cannot be run: run `make serve` once, or give --simulator-python, one that has uvloop,"
            " httptools and msgspec"
        )
    return found


@contextlib.contextmanager
def _simulated(argv: list[str], log: Path) -> Iterator[str]:
    """A simulated engine's address."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environ = {**surroundings(), "PYTHONPATH": str(REPOSITORY / "loadtests")}
    with log.open("wb") as errors:
        child = subprocess.Popen(
            argv, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("listening on "):
                yield line.removeprefix("listening on ").strip()
                break
        else:
            raise LoadFailure(f"the simulated engine ended with code {child.wait()}: see {log}", Exit.NO_TARGET)
    finally:
        child.terminate()
        child.wait()


def _round(
    sides: Sides, asked: Scenario, pair: int, way: Way, *, where: Path, counting: Tokenisation, processes: int,
    scale: str, seed: int,
) -> Round:  # fmt: skip
    target = sides.direct if way == "direct" else sides.gateway
    before, began = cpu_seconds(sides.processes), time.monotonic()
    folder = runs.run(
        target, asked, out=where / "runs", repeats=1, processes=processes, scale=scale, seed=seed + pair,
        progress=given.within, counting=counting, note=f"{way}, pair {pair + 1}",
    )  # fmt: skip
    cpu, lasted = cpu_seconds(sides.processes) - before, time.monotonic() - began
    made = result.load(folder)
    [repeat] = made.repeats
    [data] = reading.read(folder).repeats
    inside = [record for record in data.records if repeat.window.holds(record.scheduled)]
    honesty = repeat.honesty
    return Round(
        way=way,
        pair=pair,
        seconds=repeat.window.seconds,
        tokens_per_second=repeat.summary.output_tokens_per_second,
        requests=len(inside),
        failed=sum(map(metrics.failed, inside)),
        events=sum(record.chunks for record in data.records),
        ttft=[value for record in inside if not metrics.failed(record) and (value := metrics.ttft(record)) is not None],
        tpot=[value for record in inside if (value := metrics.tpot(record)) is not None],
        gateway_cpu=cpu,
        whole_seconds=lasted,
        partial="; ".join(made.partial_reasons),
        client_bound="; ".join(honesty.reasons) if honesty.client_bound else "",
        run=folder.name,
    )


def _curves(rounds: list[Round], where: Path) -> list[Sweep]:
    """Each way's rounds, one point each."""
    curves = []
    for way in compared.WAYS:
        mine = [each for each in rounds if each.way == way]
        results = [result.load(where / "runs" / each.run) for each in mine]
        if results:
            curves.append(
                Sweep(
                    id=f"{where.name}/{way}",
                    label=way,
                    unit="round",
                    run=results[0].run,
                    slo=results[0].slo,
                    points=[
                        result.point(each.pair + 1, made, run=each.run)
                        for each, made in zip(mine, results, strict=True)
                    ],
                )
            )
    return curves


def _added(added: Added) -> str:
    within = "" if added.pairs is None else f", within a pair {added.pairs.min:+.2f} to {added.pairs.max:+.2f}"
    return f"{added.added:+.2f} ms ({added.direct:.2f} direct, {added.gateway:.2f} through it{within})"

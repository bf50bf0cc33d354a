"""Calibration: an engine's speed, found again from what its clients saw."""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from simulator import calibrate, fitting, options
from simulator.calibration import Calibration, Unusable, load
from simulator.fitting import CannotTell, Served
from simulator.options import Options
from simulator.schedule import Schedule, Sequence
from simulator.speed import Speed
from simulator.virtual import Job
from vitalis_load import client as load_client
from vitalis_load import streams
from vitalis_load.records import EngineSample, Record, RepeatEnd, RunInfo, Sample

from tests.support import simulator

SIM_20B = Speed(0.008, 0.0001, 20_000)


def jobs(rates: list[float], seed: int = 1, prompt: tuple[int, int] = (50, 1500), seconds: float = 40) -> list[Job]:
    """Arrivals at random, each rate for so many seconds."""
    draw, made, now = random.Random(seed), [], 0.0
    for at, rate in enumerate(rates):
        while (now := now + draw.expovariate(rate)) < (at + 1) * seconds:
            made.append(Job(now, draw.randint(*prompt), draw.randint(20, 300)))
        now = (at + 1) * seconds
    return made


def seen(speed: Speed, made: list[Job], noise: float = 0.002, hidden: int = 0) -> list[Served]:
    """What clients 3 ms away see of an engine of this speed, in virtual time. `hidden`: tokens that make no event."""
    draw, schedule, now, coming = random.Random(5), Schedule(Options(speed=speed)), 0.0, 0
    while coming < len(made) or schedule.has_work():
        if not schedule.has_work():
            now = max(now, made[coming].at)
        while coming < len(made) and made[coming].at <= now:
            job = made[coming]
            schedule.add(Sequence(job, job.prompt, job.output))
            coming += 1
        now += schedule.begin(now)
        for sequence in schedule.finish():
            if sequence.generated == hidden + 1:
                sequence.owner.first = now
            if sequence.generated == sequence.target:
                schedule.remove(sequence)
                sequence.owner.ended = now
    return [
        Served(job.at - 0.003, job.first + abs(draw.gauss(0, noise)), job.ended + abs(draw.gauss(0, noise)),
               job.output, job.prompt, job.prompt, hidden)
        for job in made
    ]  # fmt: skip


def assert_near(found: Speed, true: Speed, share: float = 0.1) -> None:
    for name in ("decode_step_seconds", "per_sequence_seconds", "prefill_tokens_per_second"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=share), name
    assert found.per_context_token_seconds == pytest.approx(true.per_context_token_seconds, rel=share, abs=1e-12)


@pytest.mark.parametrize(
    ("speed", "rates"),
    [
        (SIM_20B, [0.3, 1, 4]),
        (SIM_20B, [1, 8, 18]),  # more than it can do
        (Speed(0.02, 0.002, 3000), [0.5, 1, 2]),
        (Speed(0.006, 0.00005, 60_000), [1, 6, 12]),
        (Speed(0.01, 0.0002, 30_000, per_context_token_seconds=3e-7), [0.5, 2, 6]),
    ],
)
def test_a_speed_is_found_again(speed: Speed, rates: list[float]) -> None:
    fit = fitting.find([seen(speed, jobs(rates))])
    assert_near(fit.speed, speed, 0.06)
    assert fit.explained > 0.9
    assert fit.error_p90 < 0.1
    if fit.alone:
        assert 0.002 < fit.overhead_seconds < 0.009


def test_hidden_tokens_are_in_it() -> None:
    """Short answers after Harmony's markers, on an engine that is busy with prompts: where it matters most."""
    made = jobs([0.6, 2, 5, 8, 11], seconds=15)
    for job in made:
        job.prompt, job.output = 400, 40
    speed = Speed(0.012, 0.0008, 6000)
    fit = fitting.find([seen(speed, made, hidden=3)])
    assert_near(fit.speed, speed, 0.08)
    assert fit.error_p90 < 0.1


def test_repeats_have_clocks_of_their_own() -> None:
    repeats = [seen(SIM_20B, jobs([rate], seed)) for seed, rate in enumerate((0.5, 2, 6))]
    assert_near(fitting.find(repeats).speed, SIM_20B)


def test_an_interrupted_minute_does_not_spoil_it() -> None:
    served = seen(SIM_20B, jobs([0.5, 2, 6]))
    for one in served:
        if 50 < one.first < 55:
            one.ended += 4  # the machine stood still for some
    assert_near(fitting.find([served]).speed, SIM_20B)


def test_too_little_is_refused() -> None:
    with pytest.raises(CannotTell, match="too few"):
        fitting.find([seen(SIM_20B, jobs([0.5], seconds=30))])


def test_a_load_that_never_varies_is_refused() -> None:
    served = []
    for turn in range(60):  # always four at once
        served += seen(SIM_20B, [Job(0.0, 400, 100) for _ in range(4)])
        for one in served[-4:]:
            one.sent += 10 * turn
            one.first += 10 * turn
            one.ended += 10 * turn
    with pytest.raises(CannotTell, match="load varies"):
        fitting.find([served])


def test_prompts_that_cannot_be_felt_are_refused() -> None:
    served = seen(Speed(0.02, 0.001, 1_000_000), jobs([0.5, 2, 4], prompt=(5, 30)), noise=0.004)
    with pytest.raises(CannotTell, match="prefill"):
        fitting.find([served])


def test_what_is_no_such_engine_is_refused() -> None:
    draw, served = random.Random(3), seen(SIM_20B, jobs([0.5, 2, 6]))
    for one in served:
        one.ended = one.first + (one.ended - one.first) * draw.choice((0.3, 1, 3))
    with pytest.raises(CannotTell):
        fitting.find([served])


def write(
    folder: Path, repeats: list[list[Record]], engines: Callable[[int], list[EngineSample]], **target: Any
) -> Path:
    """A run's folder with these records, and a sample at its begin and its end."""
    folder.mkdir()
    info = RunInfo(
        id="r", scenario={"name": "ramp"}, scale="small", url="http://x", model="m", repeats=len(repeats),
        processes=1, began_at=0.0, target=target,
    )  # fmt: skip
    (folder / "run.json").write_bytes(msgspec.json.encode(info))
    for number, records in enumerate(repeats, 1):
        repeat = folder / f"repeat-{number}"
        repeat.mkdir()
        (repeat / "requests.jsonl").write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in records))
        tokens = sum(record.completion_tokens or 0 for record in records)
        last = max(record.ended for record in records)
        samples = [Sample(at=0.0, engines=engines(0)), Sample(at=last, engines=engines(tokens))]
        (repeat / "samples.jsonl").write_bytes(b"".join(msgspec.json.encode(s) + b"\n" for s in samples))
        (repeat / "end.json").write_bytes(msgspec.json.encode(RepeatEnd(began_at=0.0, seconds=last)))
    return folder


def engine_sample(name: str, tokens: float) -> EngineSample:
    return EngineSample(name=name, running=0, waiting=0, kv_usage=0, generation_tokens=tokens, prompt_tokens=0)


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(simulator.ROOT / "loadtests"), "PATH": "/usr/bin:/bin"}
    argv = [sys.executable, "-m", "simulator", "calibrate", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=60, check=False)


def load_it(address: str, phases: list[tuple[int, float]]) -> list[Record]:
    """Users that ask one thing after the other, more in every phase, by the load tests' own client."""
    began = time.monotonic()
    records: list[Record] = []

    def clock() -> float:
        return time.monotonic() - began

    def user(number: int, until: float) -> None:
        draw, connection = random.Random(number), load_client.Connection(address)
        while clock() < until:
            api = draw.choice(("chat", "completions"))
            fields: dict[str, Any] = {"messages": [{"role": "user", "content": f"{draw.random()}"}]}
            if api == "completions":
                fields = {"prompt": f"{draw.random()}"}
            length = draw.randint(20, 50)
            fields |= {"sim_prompt_tokens": draw.randint(20, 900), "sim_output_tokens": length, "max_tokens": length}
            request = load_client.request(api, {**fields, "stream": True}, host="simulator")
            records.append(
                connection.ask(
                    request, streams.reader(api, True), scheduled=clock(), deadline=clock() + 30, clock=clock
                )
            )
        connection.close()

    number, until = 0, 0.0
    for users, seconds in phases:
        until += seconds
        threads = [threading.Thread(target=user, args=(number + at, until)) for at in range(users)]
        number += users
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sorted(records, key=lambda record: record.ended)


def test_from_a_recorded_run_to_a_simulator_like_it(tmp_path: Path) -> None:
    true = Speed(0.008, 0.0006, 8000)
    flags = ("--decode-step-ms", "8", "--per-sequence-ms", "0.6", "--prefill-tokens-per-second", "8000")
    with simulator.started(*flags, preset="sim-20b") as engine:
        records = load_it(engine.address, [(1, 3), (4, 2), (12, 2)])
    assert not [record.error for record in records if record.error]
    run = write(
        tmp_path / "run", [records], lambda tokens: [engine_sample("e", tokens)],
        models=["m"], engine={"max-num-seqs": 48, "max_num_batched_tokens": 2048},
    )  # fmt: skip
    said = command(run)
    assert said.returncode == 0, said.stderr
    assert "decode step" in said.stdout
    calibration = load(run / "calibration.json")
    assert_near(calibration.speed, true)
    assert calibration.fit is not None
    assert calibration.fit.error_p50 < 0.1
    assert calibration.engine.max_num_seqs == 48
    # and back: the figures are a simulator's, flags beat them
    parsed = options.parse(["--calibration", str(run / "calibration.json"), "--decode-step-ms", "5"])
    assert parsed.speed.decode_step_seconds == 0.005
    assert parsed.speed.prefill_tokens_per_second == calibration.prefill_tokens_per_second
    assert parsed.max_num_seqs == 48
    # through its result.json, to a file that is named
    (run / "result.json").write_text("{}")
    other = tmp_path / "other.json"
    assert command(run / "result.json", "-o", other).returncode == 0
    assert json.loads(other.read_text())["run"]["scenario"] == "ramp"


RECORD = Record(task="t", api="chat", scheduled=0.0, sent=0.0, first_token=0.1, ended=1.0, prompt_tokens=9,
                completion_tokens=40, chunks=30)  # fmt: skip


@pytest.mark.parametrize(
    ("engines", "words"),
    [
        (lambda tokens: [engine_sample("a", tokens), engine_sample("b", 0)], "2 engines (a, b)"),
        (lambda tokens: [engine_sample("a", 2 * tokens)], "somebody else used it"),
        (lambda tokens: [engine_sample("a", tokens)], "load varies"),
    ],
)
def test_a_run_that_does_not_tell_is_refused(tmp_path: Path, engines: Any, words: str) -> None:
    run = write(tmp_path / "run", [[RECORD] * 50], engines)
    said = command(run)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.count("\n") == 1
    assert words in said.stderr
    assert not (run / "calibration.json").exists()


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "does not exist"), (tmp_path, "no run.json")):
        said = command(path)
        assert said.returncode == 2
        assert words in said.stderr
        assert "Traceback" not in said.stderr


def test_tokens_that_nobody_sees() -> None:
    told = {"chat": 3, "completions": 0}
    for api, hidden in told.items():
        one = calibrate.served(msgspec.structs.replace(RECORD, api=api), harmony=True, interval=1.0)
        assert one is not None
        assert one.hidden == hidden
    plain = calibrate.served(RECORD, harmony=False, interval=1.0)
    assert plain is not None
    assert plain.hidden == 0
    failed = calibrate.served(
        msgspec.structs.replace(RECORD, error="reset", completion_tokens=None, last_token=0.7),
        harmony=False,
        interval=2.0,
    )
    assert failed is not None
    assert (failed.usable, failed.tokens, failed.ended) == (False, 60, 0.7)
    assert calibrate.served(msgspec.structs.replace(RECORD, first_token=None), harmony=False, interval=1.0) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a calibration"),
        ('{"decode_step_seconds": 1}', "missing required field"),
        (Calibration(decode_step_seconds=-1, per_sequence_seconds=0, prefill_tokens_per_second=1), "below 0"),
        (Calibration(decode_step_seconds=1, per_sequence_seconds=0, prefill_tokens_per_second=1, schema="x/9"), "x/9"),
    ],
)
def test_a_file_that_is_no_calibration(tmp_path: Path, text: Any, words: str) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(text.encode() if isinstance(text, str) else msgspec.json.encode(text))
    with pytest.raises(Unusable, match=words):
        load(path)
    with pytest.raises(SystemExit, match="2"):
        options.parse(["--calibration", str(path)])

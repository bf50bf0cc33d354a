"""Sweep, tune, overhead and the matrix as people start them, with simulated engines in vLLM's place."""

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.support import loading, simulator
from tests.support.installation import ROOT, Installation
from tests.support.loading import load_python  # noqa: F401  a fixture

BRIEF = {
    "name": "brief",
    "arrivals": {"kind": "constant", "rate": 20},
    "shape": {"seconds": 1.0},
    "warmup_seconds": 0.2,
    "cooldown_seconds": 0.2,
    "deadline_seconds": 30,
    "slo": {"ttft_p99_ms": 800},
    "tasks": [{"name": "chat", "prompt": {"tokens": 40}, "output": 10}],
}


def brief(folder: Path) -> str:
    (folder / "brief.yaml").write_text(json.dumps(BRIEF))
    return str(folder / "brief.yaml")


def serve(folder: Path, **engines: object) -> list[str]:
    """Options that name a vitalis-serve whose engines are simulated: a token each 10 ms."""
    Installation(folder).configure(folder / "model", **engines)
    python = folder / "python"
    python.write_text(python.read_text().replace("--preset instant", "--preset instant --decode-step-ms 10"))
    command = folder / "serve"
    run = "import sys; from vitalis_serve.cli import main; sys.exit(main())"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT / "server"} exec {sys.executable} -c {shlex.quote(run)} "$@"\n')
    command.chmod(0o755)
    return ["--serve", str(command), "--config", str(folder / "c.yaml")]


def tune(folder: Path) -> list[str]:
    options = serve(folder, slots=1)
    (folder / "profiles" / "plain.yaml").write_text("engines: {hung_seconds: 50}")
    return ["tune", brief(folder), *options, "--try", "engines.slots=1,8", "--first", "20", "--points", "1",
            "--repeats", "1", "--slo", "ttft_p99_ms=1000"]  # fmt: skip


def overhead(folder: Path) -> list[str]:
    return ["overhead", "--simulator", "--simulator-python", sys.executable, *serve(folder), "--streams", "4",
            "--output", "20", "--seconds", "1", "--pairs", "1"]  # fmt: skip


def rehearsal(folder: Path) -> list[str]:
    return ["bench-gpu", "--rehearse", *serve(folder), "--streams", "2", "--shapes", "shared-prefix", "--seconds", "1",
            "--options", "default,tuned"]  # fmt: skip


@dataclass
class Begun:
    """A search that goes on while others are tested: most of each is waiting for processes to start."""

    load: loading.Load
    words: list[str]
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def done(self) -> str:
        """What it said."""
        code = self.load.ended(100)
        assert code == 0, self.load.said()
        return self.load.said()


@pytest.fixture(scope="module")
def begun(load_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Begun]]:  # noqa: F811
    with contextlib.ExitStack() as stack:
        made = {}
        for what in (tune, overhead, rehearsal):
            folder = tmp_path_factory.mktemp(what.__name__)
            words = [*what(folder), "--out", str(folder / "out")]
            load = stack.enter_context(loading.started(load_python, *words, out=folder / "said"))
            made[what.__name__] = Begun(load, words, folder)
        yield made


def test_a_sweep_is_gone_on_with(begun, load_python, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    with simulator.started("--decode-step-ms", "5", log=tmp_path / "engine.log") as engine:
        words = [
            "sweep",
            brief(tmp_path),
            "--url",
            engine.address,
            "--first",
            "10",
            "--repeats",
            "1",
            "--out",
            str(out),
        ]
        for said in ("load 1: 10 requests/s", "going on with"):
            done = loading.command(load_python, *words, "--points", "1", cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
            assert said in done.stdout
            assert "best goodput" in done.stdout
        served = len(engine.log())
        assert len(list((out / "runs").iterdir())) == 1, "no load is measured twice"
        other = loading.command(load_python, *words, "--seed", "2", cwd=tmp_path)
        assert other.returncode == 2
        assert "holds a search with another seed" in other.stderr
    assert served >= 14, "warm-up and cool-down too"
    [point] = json.loads((out / "sweep.json").read_text())["points"]
    assert point["load"] == 10
    assert 5 < point["figures"]["requests_per_second"]["median"] < 15
    assert "output tokens/s" in (out / "report.html").read_text()


def test_a_rehearsal_of_the_matrix(begun, load_python):  # noqa: F811
    """The command that runs on a card, in small."""
    ours = begun["rehearsal"]
    ours.done()
    rows = json.loads((ours.out / "matrix.json").read_text())["rows"]
    assert [row["options"] for row in rows] == ["default", "tuned"]
    for row in rows:
        assert set(row["points"]) == {"direct", "gateway"}
        assert all(point["tokens_per_second"] > 0 and not point.get("failed_share") for point in row["points"].values())
        assert row["ratio"] > 0
    profile = yaml.safe_load((ours.out / "config" / "profiles" / "matrix-tuned.yaml").read_text())
    assert profile["engines"]["engine_args"] == {"max-num-seqs": 16, "stream-interval": 2}
    assert "A rehearsal" in (ours.out / "matrix.md").read_text()
    assert (ours.out / "shared-prefix" / "report.html").exists()
    again = loading.command(load_python, *ours.words, cwd=ours.folder)
    assert again.returncode == 0
    assert "0 of 4 cells to measure" in again.stdout


def test_overhead_of_the_gateway_before_a_simulated_engine(begun):
    ours = begun["overhead"]
    said = ours.done()
    found = json.loads((ours.out / "overhead.json").read_text())
    assert found["pairs"] == 1
    assert found["failed"] == {"direct": 0, "gateway": 0}
    assert 0.1 < found["ratio"]["median"] < 10, "the same engine both ways, on a busy machine"
    assert found["cpu_us_per_event_gross"] > 0
    assert found["ttft_p50"]["direct"] > 0
    assert "so few pairs of rounds (1) say little" in said


def test_tune_finds_what_is_better_and_writes_a_profile_that_is_loaded(begun):
    """One slot carries less than ten such answers a second, eight carry the twenty that are asked for."""
    ours = begun["tune"]
    ours.done()
    profile = ours.out / "config" / "profiles" / "tuned.yaml"
    assert yaml.safe_load(profile.read_text()) == {"engines": {"hung_seconds": 50, "slots": 8}}
    assert "# slots=8: " in profile.read_text()
    found = json.loads((ours.out / "tune.json").read_text())
    assert found["winner"] == {"engines.slots": 8}
    assert [trial["state"] for trial in found["trials"]] == ["left", "measured"]
    assert (ours.out / "trial-01" / "engine-0.log").exists()
    assert "in-force" in (ours.out / "report.html").read_text()


WRONG = [
    (["sweep", "surge"], "scenario surge has no single load to search over"),
    (["sweep", "short-chat", "--slo", "ttft=1"], "ttft"),
    (["sweep", "short-chat", "--data-folder", "nowhere"], "no server runs on the data folder nowhere"),
    (["tune", "--try", "engines.slots"], "needs SETTING=VALUE,VALUE"),
    (["tune", "--serve", "/no/such"], "--serve: /no/such cannot be run"),
    (["overhead", "--data-folder", "nowhere"], "no server runs on the data folder nowhere"),
    (["bench-gpu", "--streams", "0"], "--streams 0: needs whole numbers of at least 1"),
    (["bench-gpu", "--shapes", "1k-2k"], "--shapes 1k-2k: must be of 1k-1k, 8k-1k, shared-prefix"),
]


def test_bad_input_is_one_sentence(load_python, tmp_path):  # noqa: F811
    """All at once: most of each is the start of a Python."""
    with contextlib.ExitStack() as stack:
        started = []
        options = serve(tmp_path)
        for number, (words, sentence) in enumerate(WRONG):
            more = options if words[0] == "tune" and "--serve" not in words else []
            out = tmp_path / f"out-{number}"
            started.append((stack.enter_context(loading.started(load_python, *words, *more, out=out)), sentence))
        for load, sentence in started:
            assert load.ended() in (2, 3)
            assert sentence in load.said()
            assert len(load.said().strip().splitlines()) == 1, load.said()


def test_a_variable_that_would_win_over_every_candidate_is_refused(load_python, tmp_path):  # noqa: F811
    words = ["tune", brief(tmp_path), *serve(tmp_path)]
    done = loading.command(load_python, *words, cwd=tmp_path, VITALIS_ENGINES_SLOTS="3")
    assert done.returncode == 2
    assert "VITALIS_ENGINES_SLOTS is set and would win over every configuration" in done.stderr

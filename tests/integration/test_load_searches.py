"""Sweep, tune, overhead and the matrix as people start them, with simulated engines in vLLM's place."""

import contextlib
import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import loading, simulator
from tests.support.installation import ROOT, Installation
from tests.support.loading import load_python  # noqa: F401  a fixture

BRIEF = {
    "name": "brief",
    "arrivals": {"kind": "constant", "rate": 20},
    "shape": {"seconds": 1.5},
    "warmup_seconds": 0.3,
    "cooldown_seconds": 0.2,
    "deadline_seconds": 30,
    "slo": {"ttft_p99_ms": 800},
    "tasks": [{"name": "chat", "prompt": {"tokens": 40}, "output": 10}],
}


@pytest.fixture
def brief(tmp_path: Path) -> str:
    (tmp_path / "brief.yaml").write_text(json.dumps(BRIEF))
    return str(tmp_path / "brief.yaml")


@pytest.fixture
def serve(tmp_path: Path) -> list[str]:
    """Options that name a vitalis-serve whose engines are simulated: a token each 10 ms."""
    ours = Installation(tmp_path)
    python = tmp_path / "python"
    python.write_text(python.read_text().replace("--preset instant", "--preset instant --decode-step-ms 10"))
    command = tmp_path / "serve"
    run = "import sys; from vitalis_serve.cli import main; sys.exit(main())"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT / "server"} exec {sys.executable} -c {shlex.quote(run)} "$@"\n')
    command.chmod(0o755)
    assert ours.process is None, "only its files are used"
    return ["--serve", str(command), "--config", str(tmp_path / "c.yaml")]


def test_a_sweep_is_gone_on_with(load_python, tmp_path, brief):  # noqa: F811
    with simulator.started("--decode-step-ms", "5", log=tmp_path / "engine.log") as engine:
        words = ["sweep", brief, "--url", engine.address, "--first", "10", "--most", "20", "--repeats", "1",
                 "--out", str(tmp_path / "out")]  # fmt: skip
        first = loading.command(load_python, *words, "--points", "1", cwd=tmp_path)
        assert first.returncode == 0, first.stdout + first.stderr
        asked = len(loading.lines(tmp_path / "out" / "journal.jsonl"))
        second = loading.command(load_python, *words, "--points", "2", cwd=tmp_path)
        assert second.returncode == 0, second.stdout + second.stderr
        served = len(engine.log())
    assert "going on with" in second.stdout
    assert asked == 2, "what is searched, and one load"
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2, "no load was measured twice"
    sweep = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [point["load"] for point in sweep["points"]] == [10, 20]
    rates = [point["figures"]["requests_per_second"]["median"] for point in sweep["points"]]
    assert rates[1] > 1.4 * rates[0]
    assert served >= 10 * 2 + 20 * 2, "warm-up and cool-down too"
    assert "output tokens/s" in (tmp_path / "out" / "report.html").read_text()
    other = loading.command(load_python, *words, "--seed", "2", cwd=tmp_path)
    assert other.returncode == 2
    assert "holds a search with another seed" in other.stderr


def test_tune_finds_what_is_better_and_writes_a_profile_that_is_loaded(load_python, tmp_path, brief, serve):  # noqa: F811
    """One slot carries less than ten such answers a second, eight carry the twenty that are asked for."""
    document = json.loads((tmp_path / "c.yaml").read_text())
    document["engines"]["slots"] = 1
    (tmp_path / "c.yaml").write_text(json.dumps(document))
    (tmp_path / "profiles" / "plain.yaml").write_text("engines: {hung_seconds: 50}")
    out = tmp_path / "out"
    tuned = loading.command(
        load_python, "tune", brief, *serve, "--try", "engines.slots=1,8", "--first", "20", "--points", "1",
        "--repeats", "1", "--slo", "ttft_p99_ms=500", "--out", str(out), cwd=tmp_path,
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    profile = out / "config" / "profiles" / "tuned.yaml"
    assert yaml.safe_load(profile.read_text()) == {"engines": {"hung_seconds": 50, "slots": 8}}
    assert "# slots=8: " in profile.read_text()
    found = json.loads((out / "tune.json").read_text())
    assert found["winner"] == {"engines.slots": 8}
    assert [trial["state"] for trial in found["trials"]] == ["left", "measured"]
    assert (out / "trial-01" / "engine-0.log").exists()
    assert "in-force" in (out / "report.html").read_text()


def test_overhead_of_the_gateway_before_a_simulated_engine(load_python, tmp_path, serve):  # noqa: F811
    out = tmp_path / "out"
    done = loading.command(
        load_python, "overhead", "--simulator", "--simulator-python", sys.executable, *serve, "--streams", "4",
        "--output", "20", "--seconds", "1.5", "--pairs", "1", "--out", str(out), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "overhead.json").read_text())
    assert found["pairs"] == 1
    assert found["failed"] == {"direct": 0, "gateway": 0}
    assert 0.3 < found["ratio"]["median"] < 1.5, "the same engine both ways"
    assert found["cpu_us_per_event_gross"] > 0
    assert found["ttft_p50"]["direct"] > 0
    assert "so few pairs of rounds (1) say little" in done.stdout


def test_a_rehearsal_of_the_matrix(load_python, tmp_path, serve):  # noqa: F811
    """The command that runs on a card, in small. What is asked is counted, direct and through the gateway."""
    out = tmp_path / "out"
    words = ["bench-gpu", "--rehearse", *serve, "--streams", "2", "--shapes", "shared-prefix", "--seconds", "1",
             "--options", "tuned", "--out", str(out)]  # fmt: skip
    done = loading.command(load_python, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads((out / "matrix.json").read_text())["rows"]
    assert set(row["points"]) == {"direct", "gateway"}
    assert all(point["tokens_per_second"] > 0 and not point.get("failed_share") for point in row["points"].values())
    assert 0.3 < row["ratio"] < 1.5
    profile = yaml.safe_load((out / "config" / "profiles" / "matrix-tuned.yaml").read_text())
    assert profile["engines"]["engine_args"] == {"max-num-seqs": 16, "stream-interval": 2}
    assert "A rehearsal" in (out / "matrix.md").read_text()
    assert (out / "shared-prefix" / "report.html").exists()
    again = loading.command(load_python, *words, cwd=tmp_path)
    assert again.returncode == 0
    assert "0 of 2 cells to measure" in again.stdout


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


def test_bad_input_is_one_sentence(load_python, tmp_path, serve):  # noqa: F811
    """All at once: most of each is the start of a Python."""
    with contextlib.ExitStack() as stack:
        begun = []
        for number, (words, sentence) in enumerate(WRONG):
            more = serve if words[0] == "tune" and "--serve" not in words else []
            out = tmp_path / f"out-{number}"
            begun.append((stack.enter_context(loading.started(load_python, *words, *more, out=out)), sentence))
        for load, sentence in begun:
            assert load.ended() in (2, 3)
            assert sentence in load.said()
            assert len(load.said().strip().splitlines()) == 1, load.said()


def test_a_variable_that_would_win_over_every_candidate_is_refused(load_python, tmp_path, brief, serve):  # noqa: F811
    done = loading.command(load_python, "tune", brief, *serve, cwd=tmp_path, VITALIS_ENGINES_SLOTS="3")
    assert done.returncode == 2
    assert "VITALIS_ENGINES_SLOTS is set and would win over every configuration" in done.stderr

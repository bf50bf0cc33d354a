"""How many replicas a traffic needs, in virtual time; and what is said of a traffic that cannot be planned for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from simulator.calibration import Calibration, Engine, Quality
from vitalis_load import planning
from vitalis_load.assumptions import assumptions
from vitalis_load.errors import LoadFailure
from vitalis_load.planning import Planned, Setting
from vitalis_load.traffic import Traffic, load

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "loadtests" / "traffic" / "example.yaml"
# the workload that capacity is measured with, with shorter answers, on short clocks
CHAT = {"median": 400, "p95": 2000, "max": 30000}
USUAL: dict[str, Any] = {
    "name": "usual",
    "rate": 8,
    "margin": 0.0,
    "seconds": 30,
    "warmup_seconds": 10,
    "repeats": 1,
    "slo": {"ttft_p99_ms": 2000, "tpot_p99_ms": 40},
    "tasks": [
        {"name": "chat", "prompt": {"tokens": CHAT}, "output": {"median": 50, "p95": 150}},
    ],
}  # fmt: skip


def setting(calibration: Calibration | None = None, **more: Any) -> Setting:
    return Setting(Traffic.model_validate({**USUAL, **more}), calibration)


def planned(calibration: Calibration | None = None, **more: Any) -> Planned:
    return planning.plan(setting(calibration, **more), lambda line: None)


def test_arithmetic_knows_what_a_replica_carries() -> None:
    # measured with the gateway's own admission before a schedule of this speed: 12.3
    task = {"name": "chat", "prompt": {"tokens": CHAT}, "output": {"median": 150, "p95": 500, "max": 4000}}
    assert planning.capacity(setting(tasks=[task])) == pytest.approx(12.3, rel=0.1)


def test_the_smallest_number_that_holds() -> None:
    one = planning.capacity(setting())
    found = planned(rate=2.5 * one)
    assert found.replicas is not None
    by_count = {one.replicas: one for one in found.outcomes}
    assert by_count[found.replicas].holds
    assert not by_count[found.replicas - 1].holds
    # what would fill the seats of two and a half needs three, and perhaps some more for the tail
    assert 3 <= found.replicas <= 5
    assert by_count[found.replicas].utilisation < by_count[found.replicas - 1].utilisation


def test_one_is_enough_for_little() -> None:
    found = planned(rate=10)
    assert (found.replicas, [one.replicas for one in found.outcomes]) == (1, [1])
    assert found.outcomes[0].good_share > 0.99


def test_peak_margin_and_spare_are_in_it() -> None:
    found = planned(rate=20, peak_factor=2, margin=0.5, spare=2)
    assert found.rate == 60
    assert found.replicas is not None
    assert found.replicas >= 3
    assert found.wanted == found.replicas + 2


def test_the_same_again_is_the_same() -> None:
    first, second = (planning.measure(setting(rate=20), 2, lambda line: None) for _ in range(2))
    assert first == second


def test_repeats_count_by_the_worst() -> None:
    one = planning.measure(setting(rate=15), 1, lambda line: None)
    two = planning.measure(setting(rate=15, repeats=2), 1, lambda line: None)
    assert two.ttft_p99_ms >= one.ttft_p99_ms
    assert two.holds <= one.holds


def test_shared_prefixes_need_less_where_they_are_cached() -> None:
    task = {"name": "a", "prompt": {"kind": "shared", "prefix_tokens": 3000, "groups": 6, "tokens": 100}, "output": 60}
    cached = planning.measure(setting(rate=10, tasks=[task]), 2, lambda line: None)
    computed = planning.measure(setting(rate=10, tasks=[task], engine={"prefix_caching": False}), 2, lambda line: None)
    assert cached.cached_share > 0.9
    assert computed.cached_share == 0
    assert cached.holds
    assert not computed.holds
    assert cached.kv_peak < computed.kv_peak  # a prefix is held once


def test_emergencies_do_not_feel_the_rest() -> None:
    tasks = [
        {"name": "batch", "weight": 20, "class": "batch", "prompt": 600, "output": 200},
        {"name": "emergency", "weight": 1, "class": "emergency", "prompt": 200, "output": 100},
    ]
    for task in tasks:
        task["prompt"] = {"tokens": task["prompt"]}
    found = planning.measure(setting(rate=20, tasks=tasks), 1, lambda line: None)
    assert not found.holds
    assert found.tasks["emergency"] < 1000
    assert found.tasks["batch"] > 10_000


def test_what_no_number_can_do() -> None:
    slow = Calibration(decode_step_seconds=0.05, per_sequence_seconds=0.001, prefill_tokens_per_second=5000)
    found = planned(slow)
    assert (found.replicas, found.outcomes) == (None, [])
    assert "51.0 ms a token" in found.impossible
    most = planned(rate=120, most_replicas=2)
    assert most.replicas is None
    assert most.outcomes[-1].replicas == 2


def test_a_calibration_is_what_the_engine_is() -> None:
    quality = Quality(requests=9, alone=0, batch=(1, 12), context=(10, 20), explained=1, error_p50=0, error_p90=0.04)
    half = Calibration(
        decode_step_seconds=0.016, per_sequence_seconds=0.0002, prefill_tokens_per_second=10_000, overhead_seconds=0.1,
        engine=Engine(max_num_seqs=48), fit=quality, run={"id": "r7", "model": "m"},
    )  # fmt: skip
    one = setting(half, rate=6)
    assert one.options.max_num_seqs == 48
    assert setting(half, engine={"max_num_seqs": 32}).options.max_num_seqs == 32
    told = " ".join(assumptions(one))
    assert "extrapolated" in told
    assert "r7" in told
    slow, fast = (planning.measure(which, 1, lambda line: None) for which in (one, setting(rate=6)))
    assert slow.ttft_p50_ms > fast.ttft_p50_ms + 100  # what surrounds the engine is part of what is waited
    assert slow.tpot_p99_ms > 1.5 * fast.tpot_p99_ms
    assert any("imagined" in line for line in assumptions(setting()))


def written(tmp_path: Path, **more: Any) -> Path:
    path = tmp_path / "traffic.yaml"
    path.write_text(yaml.safe_dump({**USUAL, **more}, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"peek_factor": 2}, ["traffic.yaml:", "peek_factor", "did you mean peak_factor"]),
        ({"slo": {"ttft_p99": 1}}, ["did you mean ttft_p99_ms"]),
        ({"slo": {"failed_share": 0.1}}, ["failed_share cannot be planned for"]),
        ({"slo": {}}, ["slo"]),
        ({"rate": 0}, ["rate", "greater than 0"]),
        ({"tasks": [{**USUAL["tasks"][0], "class": "urgent"}]}, ["urgent", "emergency"]),
        ({"tasks": [USUAL["tasks"][0]] * 2}, ["chat stands twice"]),
        ({"tasks": [{"name": "a", "output": 5}], "spare": -1}, ["2 mistakes", "prompt is missing", "spare"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, more: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(LoadFailure) as failure:
        load(written(tmp_path, **more))
    for word in words:
        assert word in failure.value.message
    assert failure.value.code == 2


def test_fields_can_be_set(tmp_path: Path) -> None:
    found = load(written(tmp_path), {"rate": "2.5", "slo.ttft_p99_ms": "500", "tasks.chat.output": "20"})
    assert (found.rate, found.slo["ttft_p99_ms"], found.tasks[0].output.mean) == (2.5, 500, 20)


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": f"{ROOT / 'loadtests'}:{ROOT / 'server'}", "PATH": "/usr/bin:/bin"}
    argv = [sys.executable, "-m", "vitalis_load", "plan", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=100, check=False)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    short = ["--set", "seconds=10", "--set", "warmup_seconds=2", "--set", "repeats=1", "--set", "rate=12"]
    said = command("--traffic", EXAMPLE, *short, "--json", out)
    assert said.returncode == 0, said.stderr
    answer = json.loads(out.read_text())
    assert f"{answer['replicas']} replica" in said.stdout
    assert f"with 1 to spare: {answer['wanted']}" in said.stdout
    for word in ("imagined engine", "TTFT p99", "seats used", "holds"):
        assert word in said.stdout
    missed = command("--traffic", EXAMPLE, *short, "--slo", "tpot_p99_ms=5")
    assert missed.returncode == 1
    assert "no number of replicas helps" in missed.stdout


def test_the_command_says_what_is_wrong() -> None:
    said = command("--traffic", EXAMPLE, "--calibration", EXAMPLE)
    assert (said.returncode, said.stdout) == (2, "")
    assert "is not a calibration" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(LoadFailure, match=r"/nowhere.yaml: there is no such file; loadtests/traffic/example.yaml"):
        load(Path("/nowhere.yaml"))


def test_the_answer_can_be_written_down_when_some_never_ended() -> None:
    hopeless = planning.measure(setting(rate=120), 1, lambda line: None)
    assert not hopeless.holds
    assert json.loads(msgspec.json.encode(hopeless))["ttft_p99_ms"] is None  # endless


def test_an_answer_that_never_ends_is_no_good_one() -> None:
    """Ten times what it carries, and no limit but the share of good answers."""
    one = planning.capacity(setting())
    found = planned(rate=10 * one, most_replicas=1, slo={"min_good_share": 0.99})
    assert found.replicas is None
    [only] = found.outcomes
    assert only.missed == ["good share"]
    assert only.good_share < 0.5

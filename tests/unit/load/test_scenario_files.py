"""Scenarios as people write them: layers, defaults, and a sentence for every mistake."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vitalis_load.errors import LoadFailure
from vitalis_load.metrics import Slo
from vitalis_load.scenario import FOLDER, Scenario, load, names

GOOD = """\
name: mine
capacity: 10
arrivals: {kind: poisson, rate: 0.5x}
shape: {seconds: 60}
slo: {ttft_p99_ms: 500}
tasks:
  - name: chat
    prompt: {tokens: {median: 400, p95: 2000, max: 3000}}
    output: {median: 150, p95: 500}
  - name: other
    api: completions
    prompt: {tokens: 100}
    output: 20
small:
  shape: {seconds: 6}
  arrivals: {kind: users, users: 2}
  tasks:
    "*":
      output: 8
    chat:
      prompt: {tokens: {min: 10, max: 20}}
"""


def file(tmp_path: Path, text: str = GOOD) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def complaint(tmp_path: Path, text: str, **more: object) -> str:
    with pytest.raises(LoadFailure) as failure:
        load(file(tmp_path, text), **more)  # type: ignore[arg-type]
    assert failure.value.code == 2
    return failure.value.message


# layers


def test_full_is_what_stands_there() -> None:
    assert names() == [
        "burst", "long-context", "mixed-classes", "multi-turn", "noisy-neighbour", "overload", "shared-prefix",
        "short-chat", "soak", "surge",
    ]  # fmt: skip


def test_small_changes_what_it_names(tmp_path: Path) -> None:
    full, small = load(file(tmp_path)), load(file(tmp_path), scale="small")
    assert (full.measured_seconds, small.measured_seconds) == (60, 6)
    assert full.open
    assert small.users_at(12) == 2
    assert [str(task.output.tokens) for task in full.tasks] == ["median 150, p95 500", "20"]
    assert [str(task.output.tokens) for task in small.tasks] == ["8", "8"]
    assert [str(task.prompt.tokens) for task in small.tasks] == ["10 to 20", "100"]  # type: ignore[union-attr]
    assert small.tasks[1].api == "completions"


def test_options_win_and_reach_into_tasks(tmp_path: Path) -> None:
    found = load(
        file(tmp_path), scale="small",
        overrides={
            "arrivals.users": "9", "tasks.chat.output": "{median: 5, p95: 7}", "tasks.*.temperature": "0",
            "slo.tpot_p99_ms": "40",
        },
    )  # fmt: skip
    assert found.users_at(12) == 9
    assert [task.temperature for task in found.tasks] == [0, 0]
    assert str(found.tasks[0].output.tokens) == "median 5, p95 7"
    assert found.limits == Slo(ttft_p99_ms=500, tpot_p99_ms=40)


def test_one_limit_of_a_length_may_be_changed_alone(tmp_path: Path) -> None:
    found = load(file(tmp_path), overrides={"tasks.chat.prompt.tokens.max": "900"})
    assert str(found.tasks[0].prompt.tokens) == "median 400, p95 2000, max 900"  # type: ignore[union-attr]


def test_another_kind_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    found = load(file(tmp_path), overrides={"arrivals.kind": "constant", "arrivals.rate": "3"})
    assert found.rate(found.arrivals) == 3  # type: ignore[arg-type]


def test_the_capacity_moves_all_rates(tmp_path: Path) -> None:
    found = load(file(tmp_path), overrides={"capacity": "200"})
    assert found.mean_rate == pytest.approx(100)


def test_what_is_resolved_makes_the_same_scenario(tmp_path: Path) -> None:
    for name in names():
        for scale in ("full", "small"):
            found = load(name, scale=scale)
            assert Scenario.of(yaml.safe_load(yaml.safe_dump(found.resolved()))) == found


def test_what_is_resolved_says_what_it_comes_to() -> None:
    assert load("surge").resolved()["expected"] == {
        "open": True, "seconds": 160, "window": [20, 140], "peak_rate": pytest.approx(119.4),
        "mean_rate": pytest.approx(76.6, abs=0.1),
    }  # fmt: skip
    assert load("multi-turn").resolved()["expected"] == {"open": False, "seconds": 250, "window": [60, 240]}


def test_files_are_looked_for_beside_the_scenario(tmp_path: Path) -> None:
    lines = [f'{{"at": {at}, "prompt_tokens": 5, "output_tokens": 5}}\n' for at in (0, 30)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    text = GOOD.replace("{kind: poisson, rate: 0.5x}", "{kind: trace, path: t.jsonl}")
    assert load(file(tmp_path, text)).plan(1).arrivals()


def test_a_class_of_a_credential_is_that_of_its_tasks() -> None:
    assert {task.name: task.klass for task in load("surge").tasks} == {
        name: name for name in ("emergency", "interactive", "standard", "batch")
    }
    assert load("surge").credential("emergency").env == "VITALIS_LOAD_KEY_EMERGENCY"
    assert load("short-chat").labels == [""]


# the ten


@pytest.mark.parametrize("name", names())
def test_a_scenario_in_small_suits_two_cores(name: str) -> None:
    found = load(name, scale="small")
    assert found.name == name
    assert 15 <= found.seconds <= 45
    assert load(name).seconds >= 120
    assert found.about.endswith(".")
    assert found.slo
    overloads = name in ("surge", "overload", "noisy-neighbour", "burst")
    assert found.mean_rate <= (15 if overloads else 1.5)


def test_surge_asks_for_ten_times_the_capacity_beside_emergencies() -> None:
    found = load("surge")
    assert found.capacity is not None
    assert found.peak_rate == pytest.approx(10 * found.capacity, rel=0.02)
    assert next(task for task in found.tasks if task.klass == "emergency").slo["failed_share"] == 0


def test_a_neighbour_asks_for_ten_times_its_share() -> None:
    victim, neighbour = load("noisy-neighbour").tasks
    assert victim.arrivals is not None
    assert neighbour.arrivals is not None
    assert victim.arrivals == neighbour.arrivals
    assert load("noisy-neighbour").course(neighbour).peak == 10
    assert load("noisy-neighbour").course(victim).peak == 1


# mistakes


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("capacity", "capcity", "mine.yaml:2: capcity is not known; did you mean capacity?"),
        ("kind: poisson", "kind: poison", "mine.yaml:3: arrivals.kind 'poison' is not known; did you mean poisson?"),
        ("kind: poisson, ", "", "mine.yaml:3: arrivals needs a kind: users, constant, poisson, trace"),
        ("rate: 0.5x", "rate: fast", "mine.yaml:3: arrivals.rate: must be requests a second (12.5), or a multiple"),
        ("rate: 0.5x", "rate: 0", "mine.yaml:3: arrivals.rate: must be requests a second"),
        ("rate: 0.5x", "rate: 5, burst: 3", "mine.yaml:3: arrivals.burst is not known; allowed: kind, rate, seed"),
        ("capacity: 10\n", "", "capacity is missing: a rate is a multiple of it"),
        ("seconds: 60", "seconds: -1", "mine.yaml:4: shape.seconds must be greater than 0, not -1"),
        ("seconds: 60", "seconds: .inf", "mine.yaml:4: shape.seconds must be a finite number, not inf"),
        ("{seconds: 60}", "{kind: steady}", "shape.seconds is missing: how long it is measured"),
        ("{seconds: 60}", "{kind: spike, seconds: 9, at: 140%}", "shape.at: must be seconds (30), or a share"),
        ("ttft_p99_ms", "ttft_p99", "mine.yaml:5: slo: ttft_p99 is not known; did you mean ttft_p99_ms?"),
        ("p95: 2000, max", "max", "tasks.chat.prompt.tokens: median and p95 go together"),
        ("p95: 2000", "p95: 200", "tasks.chat.prompt.tokens: p95 (200) is below median (400)"),
        ("output: 20", "output: true", "mine.yaml:13: tasks.other.output"),
        ("output: 20", "outputs: 20", "mine.yaml:13: tasks.other.outputs is not known; did you mean output?"),
        ("api: completions", "api: chats", "mine.yaml:11: tasks.other.api 'chats' is not known; did you mean chat?"),
        ("api: completions", "stream: yess", "mine.yaml:11: tasks.other.stream must be true or false, not 'yess'"),
        ("api: completions", "body: {model: x}", "tasks.other: body must not have model: made by the load test itself"),
        ("api: completions", "class: high", "mine.yaml:11: tasks.other.class 'high' is not known"),
        ("name: other", "name: chat", "tasks: two tasks are called chat; each needs a name of its own"),
        ("name: mine", "name: my own", "mine.yaml:1: name may have letters, digits and _ . - only, not 'my own'"),
        ("api: completions", "shape: {kind: ramp}", "tasks.other: shape needs arrivals of its own beside it"),
        ("slo:", "credentials: {vicitm: {class: batch}}\nslo:", "credentials of no task: vicitm"),
        ("name: mine", "name: mine\nname: other", "mine.yaml:2: name stands twice (first in line 1)"),
        ("name: mine", "name: [mine", "not YAML: "),
        ("name: mine", "7: mine", "mine.yaml:1: '7' is not a field's name"),
        ("kind: poisson, rate: 0.5x", "kind: trace, path: nowhere.jsonl", "nowhere.jsonl: the trace lines cannot be"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in GOOD
    message = complaint(tmp_path, GOOD.replace(old, new, 1))
    assert words in message
    assert "mine.yaml" in message or "nowhere.jsonl" in message
    assert "pydantic" not in message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = complaint(tmp_path, GOOD.replace("capacity", "capcity").replace("median: 150", "medan: 150"))
    assert message.splitlines()[0].endswith("mistakes:")
    assert "capcity is not known" in message
    assert "medan" in message


def test_mistakes_of_options_name_the_option(tmp_path: Path) -> None:
    for overrides, words in (
        ({"arrivals.rate": "-1"}, "--set arrivals.rate=-1: arrivals.rate: must be requests a second"),
        ({"tasks.caht.output": "3"}, "--set tasks.caht.output=3: there is no 'caht' to change; there is chat, other"),
        (
            {"tasks.chat.outputs": "3"},
            "--set tasks.chat.outputs=3: tasks.chat.outputs is not known; did you mean output?",
        ),
        ({"shape.seconds": "[1"}, "--set shape.seconds=[1: the value is not YAML"),
        ({"arrivals..rate": "1"}, "needs a field's name"),
        ({"name": "{a: b}"}, "--set name={a: b}: name must be a text"),
    ):
        assert words in complaint(tmp_path, GOOD, overrides=overrides)


def test_mistakes_of_small_name_their_line(tmp_path: Path) -> None:
    message = complaint(tmp_path, GOOD.replace("output: 8", "output: nothing"), scale="small")
    assert "mine.yaml:19: tasks.chat.output" in message


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just words\n"])
def test_what_is_no_scenario_is_told_so(tmp_path: Path, content: str) -> None:
    assert "a scenario is a mapping of fields" in complaint(tmp_path, content)


def test_what_is_not_there_is_told_so(tmp_path: Path) -> None:
    for name, words in (
        ("short-caht", "did you mean short-chat?"),
        ("zzz", "there is burst, long-context"),
        (str(tmp_path / "no.yaml"), "cannot be read (No such file or directory)"),
        (str(tmp_path) + os.sep, "cannot be read (Is a directory)"),
    ):
        with pytest.raises(LoadFailure) as failure:
            load(name)
        assert words in failure.value.message
    (tmp_path / "b.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(LoadFailure, match="is not text in UTF-8"):
        load(tmp_path / "b.yaml")


JUNK = [
    None, True, -1, 0, 1e300, float("nan"), "", "x", "7x", "-1x", "9%", [], [1], {}, {"kind": "x"}, {"kind": []},
    {"median": 5}, {"min": 3, "max": 1}, {"*": 1}, {"name": {}}, "2026-11-22",
]  # fmt: skip


def _spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _spots(item, (*path, key))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_junk_anywhere_is_a_sentence_or_a_scenario(tmp_path: Path, data: st.DataObject) -> None:
    tree = yaml.safe_load(GOOD)
    spot = data.draw(st.sampled_from(list(_spots(tree))))
    inner = tree
    for key in spot[:-1]:
        inner = inner[key]
    inner[spot[-1]] = data.draw(st.sampled_from(JUNK))
    path = file(tmp_path, yaml.safe_dump(tree))
    failure = ""
    try:
        found = load(path, scale=data.draw(st.sampled_from(["full", "small"])))
    except LoadFailure as why:
        failure = why.message
    assert "mine.yaml" in failure if failure else Scenario.of(found.resolved()) == found


def test_a_scenario_that_holds_itself_is_refused(tmp_path: Path) -> None:
    assert "mine.yaml: holds itself" in complaint(tmp_path, "name: a\ntasks: &a [*a]\n")


# the command


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    return subprocess.run(
        [sys.executable, "-m", "vitalis_load", "scenarios", *words],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_command_lists_them_and_shows_one() -> None:
    listed = run()
    assert listed.returncode == 0, listed.stderr
    assert all(f"{name}: " in listed.stdout for name in names())
    shown = run("surge", "--scale", "small", "--set", "capacity=3")
    assert "VITALIS_LOAD_KEY_EMERGENCY" in shown.stdout
    assert Scenario.of(yaml.safe_load(shown.stdout)) == load("surge", scale="small", overrides={"capacity": "3"})


def test_the_command_says_what_is_wrong_in_a_sentence() -> None:
    failed = run("short-chat", "--set", "tasks.chat.wieght=3")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr == (
        "vitalis-load: --set tasks.chat.wieght=3: tasks.chat.wieght is not known; did you mean weight?\n"
    )

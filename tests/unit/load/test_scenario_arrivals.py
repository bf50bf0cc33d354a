"""When requests are due: rates, shapes and traces, against what they promise."""

import json
import random
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitalis_load.arrivals import Constant, Poisson, due
from vitalis_load.errors import LoadFailure
from vitalis_load.scenario import Scenario, load
from vitalis_load.shapes import Course, Ramp, Soak, Spike, Steady, Step

TASK = {"name": "chat", "prompt": {"tokens": 50}, "output": 10}


def made(**fields: Any) -> Scenario:
    start: dict[str, Any] = {"name": "t", "warmup_seconds": 0, "cooldown_seconds": 0, "tasks": [TASK]}
    return Scenario.of(start | fields)


def times(scenario: Scenario, seed: int = 1) -> list[float]:
    return [arrival.at for arrival in scenario.plan(seed).arrivals()]


def test_constant_arrivals_keep_their_distance_to_the_end() -> None:
    at = times(made(arrivals={"kind": "constant", "rate": 4}, shape={"seconds": 10}))
    assert len(at) == 40
    assert at[0] == pytest.approx(0.125)
    assert {round(b - a, 9) for a, b in zip(at, at[1:], strict=False)} == {0.25}


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    at = times(made(arrivals={"kind": "poisson", "rate": 50}, shape={"seconds": 400}))
    gaps = [b - a for a, b in zip(at, at[1:], strict=False)]
    assert len(at) == pytest.approx(20_000, rel=0.03)
    assert pstdev(gaps) == pytest.approx(fmean(gaps), rel=0.05)  # an exponential's deviation is its mean


def test_the_same_seed_comes_at_the_same_times_and_another_does_not() -> None:
    scenario = made(arrivals={"kind": "poisson", "rate": 5}, shape={"seconds": 60})
    assert times(scenario, 3) == times(scenario, 3) != times(scenario, 4)


def test_arrivals_with_a_seed_of_their_own_come_when_they_come_whatever_the_run_s() -> None:
    scenario = made(arrivals={"kind": "poisson", "rate": 5, "seed": 9}, shape={"seconds": 60})
    assert times(scenario, 3) == times(scenario, 4)


def test_processes_share_every_arrival_and_none_comes_twice() -> None:
    plan = made(arrivals={"kind": "poisson", "rate": 20}, shape={"seconds": 20}).plan(1)
    parts = [list(plan.split(3, process)) for process in range(3)]
    assert [part[0].index for part in parts] == [0, 1, 2]
    assert sorted((one for part in parts for one in part), key=lambda one: one.index) == list(plan.arrivals())


@pytest.mark.parametrize(
    ("shape", "checks"),
    [
        (Steady(), {0: 1, 50: 1, 100: 1}),
        (Ramp(kind="ramp", start=0, end=2), {0: 0, 25: 0.5, 100: 2}),
        (Spike(kind="spike", low=1, high=5), {0: 1, 39.9: 1, 40: 5, 59.9: 5, 60: 1, 100: 1}),
        (
            Spike.model_validate({"kind": "spike", "at": 5, "lasts": 2, "every": "50%"}),
            {4: 1, 6: 5, 8: 1, 56: 5, 58: 1},
        ),
        (Step(kind="step", start=1, end=4, steps=4), {0: 1, 24: 1, 26: 2, 51: 3, 76: 4, 100: 4}),
        (Soak(kind="soak", swing=0.5, period_seconds=40), {0: 1, 10: 1.5, 20: 1, 30: 0.5, 50: 1.5, 95: 1.25}),
    ],
)
def test_shapes_over_a_hundred_seconds(shape: Any, checks: dict[float, float]) -> None:
    course = Course(shape.knots(100))
    assert {at: course.factor(at) for at in checks} == {at: pytest.approx(factor) for at, factor in checks.items()}


@given(
    st.lists(st.tuples(st.floats(0.1, 50), st.floats(0, 10)), min_size=2, max_size=8).filter(
        lambda steps: sum(factor for _, factor in steps) > 0.1
    ),
    st.floats(0, 0.999),
)
def test_the_moment_of_a_load_is_where_so_much_load_has_come(steps: list[tuple[float, float]], share: float) -> None:
    at, knots = 0.0, []
    for seconds, factor in steps:
        knots.append((at, factor))
        at += seconds
    course = Course(knots)
    load = share * course.load
    moment = course.when(load)
    assert 0 <= moment <= course.seconds
    assert course.between(0, moment) == pytest.approx(load, abs=1e-6 + 1e-6 * course.load)


def test_a_ramp_s_arrivals_grow_with_it() -> None:
    at = times(
        made(arrivals={"kind": "constant", "rate": 10}, shape={"kind": "ramp", "seconds": 100, "start": 0, "end": 1})
    )
    assert len(at) == 500
    assert sum(one < 50 for one in at) == 125  # a quarter of a triangle lies in its first half


def test_warm_up_comes_before_the_shape_and_cool_down_after_it() -> None:
    scenario = made(
        arrivals={"kind": "constant", "rate": 10}, warmup_seconds=5, cooldown_seconds=3,
        shape={"kind": "step", "seconds": 20, "start": 1, "end": 3, "steps": 2},
    )  # fmt: skip
    at = times(scenario)
    assert scenario.window == (5, 25)
    assert scenario.seconds == 28
    assert [sum(a <= one < b for one in at) for a, b in ((0, 5), (5, 15), (15, 25), (25, 28))] == [50, 100, 300, 90]


def test_users_follow_the_shape() -> None:
    scenario = made(
        arrivals={"kind": "users", "users": 20}, shape={"kind": "ramp", "seconds": 10, "start": 0.1, "end": 1}
    )
    assert [scenario.users_at(at) for at in (0, 5, 10)] == [2, 11, 20]
    assert not scenario.open
    assert times(scenario) == []


def test_a_task_with_arrivals_of_its_own_goes_its_own_way() -> None:
    scenario = made(
        capacity=10, shape={"seconds": 40},
        tasks=[
            TASK | {"name": "calm", "arrivals": {"kind": "constant", "rate": "0.1x"}},
            TASK | {
                "name": "wild", "arrivals": {"kind": "constant", "rate": "0.5x"},
                "shape": {"kind": "spike", "low": 0, "high": 10, "at": "50%", "lasts": "25%"},
            },
        ],
    )  # fmt: skip
    arrivals = list(scenario.plan(1).arrivals())
    wild = [one.at for one in arrivals if one.task.name == "wild"]
    assert len(arrivals) - len(wild) == 40
    assert len(wild) == 500
    assert min(wild) >= 20
    assert max(wild) <= 30
    assert [one.at for one in arrivals] == sorted(one.at for one in arrivals)


def test_tasks_come_as_often_as_their_weights_say() -> None:
    scenario = made(
        arrivals={"kind": "constant", "rate": 100}, shape={"seconds": 100},
        tasks=[TASK | {"weight": 3}, TASK | {"name": "rare", "weight": 1}],
    )  # fmt: skip
    rare = sum(one.task.name == "rare" for one in scenario.plan(1).arrivals())
    assert rare == pytest.approx(2500, rel=0.08)


def test_due_never_ends_early_or_late() -> None:
    course = Course([(0, 1), (10, 1)])
    for arrivals in (Constant(kind="constant", rate=3), Poisson(kind="poisson", rate=3)):
        at = list(due(arrivals, 3, course, random.Random(1)))
        assert all(0 <= a <= b < 10 for a, b in zip(at, at[1:], strict=False))


# traces


def written(path: Path, *lines: Any) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_trace_is_replayed_at_its_times_with_its_lengths(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t.jsonl",
        {"timestamp": 103, "prompt_tokens": 300, "output_tokens": 30, "model": "passed over"},
        {"timestamp": 101, "prompt_tokens": 100, "output_tokens": 10},
        "\n",
        {"at": 105, "input_length": 500, "output_length": 50},
    )
    scenario = made(arrivals={"kind": "trace", "path": path, "speed": 2})
    plan = scenario.plan(1)
    arrivals = list(plan.arrivals())
    assert [(one.at, one.prompt_tokens, one.output_tokens) for one in arrivals] == [
        (0, 100, 10),
        (1, 300, 30),
        (2, 500, 50),
    ]
    asks = [plan.request(one) for one in arrivals]
    assert [ask.wanted_tokens for ask in asks] == [10, 30, 50]
    assert [ask.prompt_tokens for ask in asks] == [pytest.approx(tokens, abs=2) for tokens in (100, 300, 500)]
    assert scenario.seconds == 3


def test_a_trace_asks_for_what_is_in_its_window(tmp_path: Path) -> None:
    """400 requests in the warm-up, and then two a second."""
    moments = [*(n * 0.02 for n in range(400)), *(8 + n * 0.5 for n in range(64))]
    path = written(
        tmp_path / "t.jsonl",
        *({"timestamp": at, "prompt_tokens": 9, "output_tokens": 1} for at in moments),
    )
    scenario = made(arrivals={"kind": "trace", "path": path}, warmup_seconds=10, cooldown_seconds=5)
    assert scenario.mean_rate == pytest.approx(2, rel=0.05)
    assert scenario.peak_rate == 50
    halved = made(
        arrivals={"kind": "trace", "path": path, "speed": 0.5}, shape={"seconds": 10}, warmup_seconds=20,
        cooldown_seconds=5,
    )  # fmt: skip
    assert halved.mean_rate == pytest.approx(1, rel=0.1)


def test_a_trace_that_ends_in_the_warm_up_is_refused(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t.jsonl",
        *({"timestamp": at, "prompt_tokens": 9, "output_tokens": 1} for at in range(9)),
    )
    file = tmp_path / "s.yaml"
    file.write_text(
        f"name: s\narrivals: {{kind: trace, path: {path}}}\ntasks: [{{name: a, prompt: {{tokens: 9}}, output: 1}}]\n"
    )
    with pytest.raises(LoadFailure, match=r"lasts 8 s, all of it within the warm-up of 10 s.*--set warmup_seconds=0"):
        load(file)
    assert load(file, overrides={"warmup_seconds": "0", "cooldown_seconds": "0"}).measured_seconds == 9


def test_a_trace_in_milliseconds_names_its_tasks_and_ends_with_the_scenario(tmp_path: Path) -> None:
    lines = [{"timestamp": 500 * n, "input_length": 9, "output_length": 1, "task": "ba"[n % 2]} for n in range(100)]
    path = written(tmp_path / "t.jsonl", *lines)
    scenario = made(
        arrivals={"kind": "trace", "path": path, "unit": "milliseconds"}, shape={"seconds": 10},
        tasks=[TASK | {"name": "a"}, TASK | {"name": "b"}],
    )  # fmt: skip
    arrivals = list(scenario.plan(1).arrivals())
    assert "".join(one.task.name for one in arrivals) == "ba" * 10


def test_a_trace_may_have_dates(tmp_path: Path) -> None:
    dates = ("2026-11-22T10:00:00.500Z", "2026-11-22T11:00:03+01:00", "2026-11-22 10:00:01")
    lines = [{"timestamp": date, "prompt_tokens": 5, "output_tokens": 5} for date in dates]
    path = written(tmp_path / "t.jsonl", *lines)
    scenario = made(arrivals={"kind": "trace", "path": path, "unit": "milliseconds"})
    assert times(scenario) == pytest.approx([0, 0.5, 2.5])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{oops\n", "line 2: is not JSON ('{oops')"),
        ({"prompt_tokens": 1, "output_tokens": 1}, 'line 2: has no "timestamp"'),
        ({"at": 1, "output_tokens": 1}, 'line 2: has no "prompt_tokens"'),
        ({"at": 1, "prompt_tokens": 1}, 'line 2: has no "output_tokens"'),
        ({"at": 1, "prompt_tokens": -1, "output_tokens": 1}, "line 2: lengths must be above 0"),
        ({"at": "noon", "prompt_tokens": 1, "output_tokens": 1}, 'line 2: "timestamp" must be a number or a date'),
        ({"at": 1, "prompt_tokens": 1, "output_tokens": 1, "task": "chta"}, "line 2: the scenario has no task 'chta'"),
        ('{"at": NaN, "prompt_tokens": 1, "output_tokens": 1}\n', "line 2: is not JSON"),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(tmp_path: Path, line: Any, words: str) -> None:
    path = written(tmp_path / "t.jsonl", {"at": 0, "prompt_tokens": 1, "output_tokens": 1}, line)
    with pytest.raises(LoadFailure) as failure:
        times(made(arrivals={"kind": "trace", "path": path}))
    assert words in failure.value.message
    assert path in failure.value.message


def test_of_many_wrong_lines_ten_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", *["x\n"] * 25)
    with pytest.raises(LoadFailure, match="line 10: .*and 15 more"):
        times(made(arrivals={"kind": "trace", "path": path}))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_trace_is_refused(tmp_path: Path, content: str) -> None:
    path = written(tmp_path / "t.jsonl", content)
    with pytest.raises(LoadFailure, match="no trace lines in it"):
        times(made(arrivals={"kind": "trace", "path": path}))

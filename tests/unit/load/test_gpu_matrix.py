"""The cells of the matrix, their order, and their table."""

import pytest
from vitalis_load import gpu_matrix
from vitalis_load.gpu_matrix import SHAPES, STREAMS, Cell, Outcome
from vitalis_load.scenario import Scenario
from vitalis_load.searching import Point


def test_the_whole_matrix_needs_each_options_engine_once():
    cells = gpu_matrix.cells(["default", "tuned"], SHAPES, STREAMS)
    assert len(cells) == len(set(cells)) == 2 * 3 * 7 * 2
    changes = sum(a.options != b.options for a, b in zip(cells, cells[1:], strict=False))
    assert changes == 1, "an engine is not started twice with the same options"
    pairs = list(zip(cells[::2], cells[1::2], strict=True))
    assert all(
        (a.way, b.way) == ("direct", "gateway") and (a.shape, a.streams) == (b.shape, b.streams) for a, b in pairs
    )


def test_what_failed_is_tried_again_and_what_was_measured_is_not():
    cells = gpu_matrix.cells(["default"], SHAPES[:1], [1, 32])
    done = [Outcome(cell=cells[0], point=Point(load=1)), Outcome(cell=cells[1], problem="the engine died")]
    assert gpu_matrix.remaining(cells, done) == cells[1:]
    done.append(Outcome(cell=cells[1], point=Point(load=1)))
    assert gpu_matrix.remaining(cells, done) == cells[2:]


def test_the_table_has_both_ways_side_by_side():
    cells = gpu_matrix.cells(["default"], SHAPES[:1], [1, 32])
    done = [
        Outcome(cell=cells[0], point=_point(1000, 40)),
        Outcome(cell=cells[1], point=_point(990, 41)),
        Outcome(cell=cells[2], point=_point(5000, 80)),
        Outcome(cell=cells[3], problem="the engine died"),
    ]
    rows = gpu_matrix.rows(cells, done)
    assert [row.ratio for row in rows] == [0.99, None]
    lines = gpu_matrix.table(rows).splitlines()
    assert lines[2] == (
        "| default | 1k-1k | 1 | 1,000 | 990 | 0.990 | 40.0 / 80.0 | 41.0 / 82.0 | 10.0 / 20.0 | 10.0 / 20.0 |  |"
    )
    assert lines[3].endswith("| gateway: the engine died |")
    assert {line.count("|") for line in lines} == {12}


def test_a_client_that_was_full_is_marked_in_the_table():
    cell = Cell(options="default", shape="1k-1k", streams=1024, way="direct")
    point = _point(20_000, 300)
    point.client_bound = "cpu 0.99 of a core"
    assert "20,000 (client-bound)" in gpu_matrix.table(gpu_matrix.rows([cell], [Outcome(cell=cell, point=point)]))


@pytest.mark.parametrize("shape", [*SHAPES, *gpu_matrix.SMALL_SHAPES], ids=lambda shape: f"{shape.name}-{shape.prompt}")
def test_each_cell_is_a_scenario_of_fixed_lengths(shape):
    timing = gpu_matrix.timing(60, None)
    made = Scenario.model_validate(gpu_matrix.scenario(shape, 8, timing, 600))
    ask = made.plan(1, model="gpt-oss-20b").next_request(user=0, turn=0)
    assert (ask.api, ask.document["ignore_eos"], ask.document["max_tokens"]) == ("completions", True, shape.output)
    assert made.arrivals.users == 8
    assert made.seconds == timing.whole
    assert ask.prompt_tokens == pytest.approx(shape.prompt, abs=25), (
        "what joins a shared prefix and a question is not counted"
    )


def test_a_cell_lasts_as_long_as_the_answers_of_the_one_before_say():
    """4 s with 32 streams are 8 s at most with 64."""
    assert gpu_matrix.timing(60, None) == gpu_matrix.Timing(15, 60, 15)
    assert gpu_matrix.timing(60, Point(load=32, e2e_p99_ms=4_000)) == gpu_matrix.Timing(15, 60, 15)
    assert gpu_matrix.timing(60, Point(load=512, e2e_p99_ms=30_000)) == gpu_matrix.Timing(30, 120, 60)


def test_the_time_left_counts_a_start_for_each_options():
    cells = gpu_matrix.cells(["default", "tuned"], SHAPES[:1], [1])
    both = gpu_matrix.expected_seconds(cells, 60, 300)
    assert both == 4 * (60 + gpu_matrix.WAITS_SECONDS) + 2 * 300


def _point(tokens: float, ttft: float) -> Point:
    return Point(
        load=1, tokens_per_second=tokens, ttft_p50_ms=ttft, ttft_p99_ms=2 * ttft, tpot_p50_ms=10, tpot_p99_ms=20
    )


def test_the_gateway_refuses_and_keeps_back_nothing():
    made = gpu_matrix.open_gateway(1024, 512, 900)
    assert made["engines.slots"] == 1024
    assert made["gateway.queue.reserved_share"] == made["gateway.queue.overload_seconds"] == 0
    assert made["gateway.queue.max_seconds"] == made["gateway.deadlines.first_token_seconds"] == 900
    assert gpu_matrix.open_gateway(4, 512, 900)["engines.slots"] == 512

"""The speed model: in steps and modelled seconds where that can be had, on a real clock once."""

import itertools
from pathlib import Path

import pytest
from simulator.answers import MEDIAN_TOKENS, P95_TOKENS, chat_layout, natural_tokens
from simulator.options import Options
from simulator.schedule import Schedule, Sequence
from simulator.speed import PRESETS

from tests.support import client, simulator


def run(schedule: Schedule, until: int = 10_000_000) -> tuple[float, int]:
    """Steps until there is no work: modelled seconds, and how many steps."""
    seconds = 0.0
    for count in itertools.count():
        if not schedule.has_work() or count == until:
            return seconds, count
        seconds += schedule.begin(seconds)
        for sequence in schedule.finish():
            if not sequence.first_token:
                sequence.first_token = seconds
            if sequence.generated == sequence.target:
                schedule.remove(sequence)
    raise AssertionError


def sequences(count: int, prompt: int, target: int, **more: int) -> list[Sequence]:
    return [Sequence(None, prompt, target, **more) for _ in range(count)]


def test_a_step_takes_what_the_preset_says() -> None:
    schedule = Schedule(Options())
    schedule.add(Sequence(None, 2000, 11))
    seconds, steps = run(schedule)
    assert steps == 11
    # the first step is the prefill of 2,000 tokens at 20,000/s, then ten decodes of one sequence
    assert seconds == pytest.approx(0.008 + 0.1 + 10 * 0.0081)


def test_sixty_four_run_and_the_rest_wait() -> None:
    schedule = Schedule(Options())
    for one in sequences(100, 8, 50):
        schedule.add(one)
    schedule.begin(0.0)
    assert (len(schedule.running), schedule.waiting_count) == (64, 36)
    schedule.finish()
    seconds, steps = run(schedule, 40)
    assert seconds == pytest.approx(40 * (0.008 + 64 * 0.0001))


def test_prefill_is_shared_and_cut_into_chunks() -> None:
    schedule = Schedule(Options())
    first, second = sequences(2, 10_000, 2)
    schedule.add(first)
    schedule.add(second)
    run(schedule)
    assert first.first_token == pytest.approx(5 * 0.008 + 10_240 / 20_000)
    # 20,000 tokens in ten chunks; one decode of the first falls among them
    assert second.first_token == pytest.approx(10 * 0.008 + 20_000 / 20_000 + 0.0001)


def test_a_pool_that_is_full_makes_the_youngest_start_over() -> None:
    schedule = Schedule(Options(kv_cache_tokens=320))
    first, second = sequences(2, 100, 100)
    schedule.add(first)
    schedule.add(second)
    run(schedule)
    assert schedule.preemptions == 1
    assert (first.generated, second.generated) == (100, 100)
    assert schedule.blocks.used == 0
    assert schedule.generation_tokens == 200


def test_a_removed_sequence_leaves_nothing() -> None:
    schedule = Schedule(Options(max_num_seqs=1))
    first, second = sequences(2, 100, 100)
    schedule.add(first)
    schedule.add(second)
    schedule.begin(0.0)
    schedule.finish()
    schedule.remove(second)
    schedule.remove(first)
    schedule.remove(first)
    assert (schedule.waiting_count, len(schedule.running), schedule.blocks.used) == (0, 0, 0)
    assert not schedule.has_work()


def test_lengths_are_log_normal_with_the_stated_median_and_tail() -> None:
    drawn = sorted(natural_tokens(b"prompt %d" % index) for index in range(20_000))
    assert drawn[10_000] == pytest.approx(MEDIAN_TOKENS, rel=0.05)
    assert drawn[19_000] == pytest.approx(P95_TOKENS, rel=0.05)


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_layouts_add_up(finish_reason: str) -> None:
    for tokens in range(1, 100):
        layout = chat_layout(tokens, finish_reason)
        assert layout.total == tokens
        assert layout.content > 0


def test_the_preset_on_a_real_clock(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with simulator.started("--log-token-times", preset="sim-20b", log=log) as engine:
        body = {"messages": [{"role": "user", "content": "a"}], "sim_output_tokens": 100, "stream": True}
        wires = [client.connect(engine.address) for _ in range(8)]
        for wire in wires:
            wire.send(client.post("/v1/chat/completions", body))
        for wire in wires:
            assert wire.read_response().events[-1].data == "[DONE]"
            wire.close()
        records = engine.wait_for_log(8)
        state = engine.state()
    # eight streams that come together share their steps: their number does not depend on the machine's speed
    assert 100 <= state["steps"] <= 108
    step = PRESETS["sim-20b"].decode_step_seconds + 8 * PRESETS["sim-20b"].per_sequence_seconds
    times = records[0]["token_times"]
    assert len(times) == 100
    pace = (times[-1] - times[10]) / 89
    # never faster than the model; slower only by as much as the machine was too busy, which it reports
    assert pace > step * 0.97
    if not state["late_steps"]:
        assert pace < step * 1.2

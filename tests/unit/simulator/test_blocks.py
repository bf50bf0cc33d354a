"""The KV cache: shared prefixes, what is remembered and for how long, preemption."""

import random

import pytest
from simulator.blocks import Blocks, Holding
from simulator.options import Options
from simulator.schedule import Schedule, Sequence
from simulator.speed import Speed

BLOCK = 16
OPTIONS = Options(kv_cache_tokens=40 * BLOCK, max_num_batched_tokens=4096, speed=Speed(0.01, 0, 0))


def names(prefix: str, count: int, own: str = "", extra: int = 0) -> tuple[int, ...]:
    """A chain of block names: `count` of the prefix, then `extra` of one's own."""
    return tuple(hash((prefix, at)) for at in range(count)) + tuple(hash((prefix, own, at)) for at in range(extra))


def asking(block_names: tuple[int, ...], target: int = 5, tail: int = 8) -> Sequence:
    return Sequence(None, len(block_names) * BLOCK + tail, target, block_hashes=block_names)


def step(schedule: Schedule, steps: int = 1) -> None:
    for _ in range(steps):
        schedule.begin(0.0)
        for sequence in schedule.finish():
            if sequence.generated == sequence.target:
                schedule.remove(sequence)


def test_a_live_prefix_is_held_once() -> None:
    schedule = Schedule(OPTIONS)
    schedule.add(asking(names("a", 10, "x", 2)))
    step(schedule)
    assert schedule.blocks.used == 13
    for own in ("y", "z"):
        schedule.add(asking(names("a", 10, own, 2)))
    step(schedule)
    assert schedule.blocks.used == 13 + 2 * 3
    assert schedule.cache_hits == 2 * 10 * BLOCK
    step(schedule, 10)
    assert schedule.blocks.used == 0
    assert schedule.blocks.remembered == 10 + 3 * 2


def test_a_prompt_that_is_all_there_still_computes_its_last_block() -> None:
    schedule = Schedule(OPTIONS)
    for _ in range(2):
        schedule.add(asking(names("a", 4), tail=0))
        step(schedule, 5)
    assert schedule.cache_hits == 3 * BLOCK


def test_only_what_is_computed_is_found() -> None:
    schedule = Schedule(Options(kv_cache_tokens=40 * BLOCK, max_num_batched_tokens=4 * BLOCK))
    schedule.add(asking(names("a", 10)))
    step(schedule)  # the first four blocks
    second = asking(names("a", 10))
    schedule.add(second)
    step(schedule)  # four more of the first; no room in the step for the second
    assert (second.cached, len(schedule.running)) == (0, 1)
    step(schedule)
    assert second.cached == 8 * BLOCK  # the ten of the first are not done when it is admitted


def test_the_least_recently_used_is_forgotten_first() -> None:
    schedule = Schedule(OPTIONS)
    for prefix in ("a", "b", "c"):
        schedule.add(asking(names(prefix, 10)))
        step(schedule, 5)
    schedule.add(asking(names("a", 10)))  # used again
    step(schedule, 5)
    schedule.add(asking(names("d", 18)))  # needs the place of "b"
    step(schedule, 5)
    found = {prefix: schedule.blocks.found(names(prefix, 10), 10) for prefix in "abcd"}
    assert found["a"] == found["c"] == found["d"] == 10
    # a prefix outlives what extends it: the blocks that are left are the first ones
    assert found["b"] < 10


def test_a_cache_that_is_off_finds_nothing() -> None:
    schedule = Schedule(Options(prefix_caching=False))
    for _ in range(2):
        schedule.add(asking(names("a", 10)))
        step(schedule, 5)
    assert (schedule.cache_queries, schedule.cache_hits, schedule.blocks.remembered) == (0, 0, 0)


def test_a_preempted_sequence_finds_its_own_prefix_again_and_is_not_readmitted_in_the_same_step() -> None:
    schedule = Schedule(Options(kv_cache_tokens=20 * BLOCK))
    first, second = asking(names("a", 9), target=60, tail=15), asking(names("b", 9), target=60, tail=15)
    schedule.add(first)
    schedule.add(second)
    step(schedule)  # ten blocks each: full, and the 160th token of each is there
    step(schedule)
    assert (schedule.preemptions, list(schedule.running)) == (1, [first])
    queries = schedule.cache_queries
    step(schedule, 200)
    assert not schedule.has_work()
    assert second.generated == 60
    assert schedule.blocks.used == 0
    assert schedule.cache_queries == queries  # vLLM counts a request once


def test_context_makes_a_step_longer() -> None:
    schedule = Schedule(Options(speed=Speed(0.01, 0.001, 0, per_context_token_seconds=1e-6)))
    schedule.add(Sequence(None, 1000, 3))
    assert schedule.begin(0.0) == pytest.approx(0.01)
    schedule.finish()
    assert schedule.begin(0.0) == pytest.approx(0.011 + 1001e-6)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_held_when_all_have_gone(seed: int) -> None:
    draw = random.Random(seed)
    blocks, live = Blocks(60), []
    for _ in range(400):
        if live and draw.random() < 0.5:
            holding, chain = live[draw.randrange(len(live))]
            if draw.random() < 0.4:
                blocks.release(holding)
                live.remove((holding, chain))
            elif draw.random() < 0.5:
                blocks.grow(holding, holding.count + 1)
            else:
                blocks.name(holding, chain[: draw.randint(0, len(chain))])
        else:
            chain = names(draw.choice("abc"), draw.randint(0, 6), draw.choice("xyz"), draw.randint(0, 6))
            holding = Holding()
            if blocks.begin(holding, len(chain) + 1, chain[: blocks.found(chain, 99)]):
                live.append((holding, chain))
        assert 0 <= blocks.used <= blocks.total
        assert blocks.used + blocks.remembered <= blocks.total
        shared = {name for holding, _ in live for name in holding.names}
        alone = sum(holding.count - len(holding.names) for holding, _ in live)
        assert blocks.used == len(shared) + alone
    for holding, _ in live:
        blocks.release(holding)
    assert blocks.used == 0

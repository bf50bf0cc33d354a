"""Affinity finds prefixes again, without a replica being left behind by its load."""

from functools import partial

import pytest

from tests.simulation.beside import RunAll, run_all
from tests.simulation.routing_table import POLICIES, measure

__all__ = ["run_all"]


@pytest.mark.parametrize("replicas", [4, 12])
def test_affinity_finds_prefixes_where_others_do_not(run_all: RunAll, replicas: int) -> None:
    affinity, tokens, turns = run_all(*(partial(measure, replicas, 0.7, name, seconds=22) for name in POLICIES))
    assert affinity.hits > 0.72
    assert affinity.hits > 1.25 * max(tokens.hits, turns.hits)
    assert affinity.imbalance < 1.5
    assert affinity.ttft_p99 < 1.2 * max(tokens.ttft_p99, turns.ttft_p99)
    assert affinity.answered == 1.0


def test_affinity_carries_more_than_the_others_when_all_is_full(run_all: RunAll) -> None:
    affinity, tokens = run_all(*(partial(measure, 4, 1.3, name, seconds=22) for name in POLICIES[:2]))
    assert affinity.hits > tokens.hits
    assert affinity.answered > 1.1 * tokens.answered
    assert affinity.imbalance < 1.1

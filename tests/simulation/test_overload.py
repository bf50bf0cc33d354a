"""What admission promises when more is asked than there is, on sim-20b engines, with the default options.

`python tests/simulation/figures.py` prints the same figures for several seeds.
"""

from functools import partial

import pytest
from vitalis_serve.gateway.admission import AdmissionOptions

from tests.simulation import figures
from tests.simulation.beside import RunAll, run_all

__all__ = ["run_all"]

ONE, WORKERS, GATEWAYS = {"gateways": 1}, {"gateways": 1, "workers": 3}, {"gateways": 2}
ARRANGEMENTS = pytest.mark.parametrize(
    "arranged", [ONE, WORKERS, GATEWAYS], ids=["one gateway", "three workers", "two gateways"]
)


@pytest.mark.parametrize(
    ("replicas", "arranged", "seeds"),
    [(1, ONE, 3), (2, ONE, 3), (4, ONE, 1), (2, WORKERS, 3), (2, GATEWAYS, 3)],
)
def test_a_flooding_tenant_does_not_hurt_its_neighbours(
    run_all: RunAll, replicas: int, arranged: dict[str, int], seeds: int
) -> None:
    """Victims at their fair share of 80 % load; the flooder offers ten times its own."""
    victims = partial(figures.victims, replicas, **arranged)
    found = run_all(*(partial(victims, times=t, seed=s) for t in (10, 1) for s in range(1, seeds + 1)))
    pairs = list(zip(found[seeds:], found[:seeds], strict=True))
    assert max(beside.refused for _, beside in pairs) <= 0.01
    ratios = [beside.ttft_p99 / solo.ttft_p99 for solo, beside in pairs]
    assert max(ratios) <= 2.0
    assert sorted(ratios)[seeds // 2] <= 1.3


def test_a_flooding_tenant_does_not_hurt_neighbours_that_use_nearly_all_of_their_share(run_all: RunAll) -> None:
    seeds = (2, 3)
    victims = partial(figures.victims, 2, 1, load=0.9, seconds=70)
    found = run_all(*(partial(victims, times=times, seed=seed) for times in (10, 1) for seed in seeds))
    for seed, solo, beside in zip(seeds, found[2:], found[:2], strict=True):
        assert beside.ttft_p99 <= 2 * solo.ttft_p99, seed


def test_equal_tenants_are_served_equally(run_all: RunAll) -> None:
    """Eight tenants, four of which offer three times as much as the others, all more than their share."""
    arrangements = (GATEWAYS, WORKERS, ONE)
    found = run_all(*(partial(figures.equality, **arranged, seconds=60) for arranged in arrangements))
    assert min(found) >= 0.99, [*zip(arrangements, found, strict=True)]


@pytest.mark.parametrize(("replicas", "arranged"), [(1, ONE), (4, ONE), (2, WORKERS), (2, GATEWAYS)])
def test_emergency_keeps_its_time_to_first_token(run_all: RunAll, replicas: int, arranged: dict[str, int]) -> None:
    """Beside ten times what the fleet can carry, of all other classes: within 0.5 s, and nobody is turned away."""
    beside, alone = run_all(*(partial(figures.emergency, replicas, times, **arranged) for times in (10, 0)))
    assert beside.refused == 0
    assert beside.ttft_p99 <= alone.ttft_p99 + 0.25
    assert beside.ttft_p50 <= alone.ttft_p50 + 0.06


@ARRANGEMENTS
def test_goodput_holds_at_twice_and_three_times_the_capacity(run_all: RunAll, arranged: dict[str, int]) -> None:
    loads = (3.0, 2.0, 1.3, 1.1, 1.0)
    three, two, *others = run_all(*(partial(figures.offered, load, **arranged) for load in loads))
    assert two >= 0.97 * max(others)
    assert three >= 0.95 * max(others)


def test_without_admission_goodput_is_lost() -> None:
    """The simulation can fail: the same load straight into the engines."""
    assert figures.offered(2.0, plain=True) < 1.0


@pytest.mark.parametrize(
    ("background", "burst", "replicas", "arranged"),
    [
        (0.3, 300, 1, ONE), (0.5, 300, 1, WORKERS), (0.5, 300, 1, GATEWAYS), (0.5, 300, 2, GATEWAYS),
        (0.7, 250, 1, ONE), (0.7, 250, 1, WORKERS), (0.7, 250, 2, ONE),
    ],
)  # fmt: skip
def test_clients_that_come_back_when_told_get_in(
    run_all: RunAll, background: float, burst: int, replicas: int, arranged: dict[str, int]
) -> None:
    """A burst in five seconds on top of a background; as many as fit into the 60 s that may be said."""
    retries = partial(figures.retries, background, burst, replicas=replicas, **arranged)
    for refused, admitted in run_all(*(partial(retries, seed=seed) for seed in (4, 8))):
        assert refused > 50
        assert admitted >= 0.95


def test_who_comes_back_to_another_gateway_is_not_known_there(run_all: RunAll) -> None:
    """With all that two gateways can carry on its way back, half of it to the one that has told it nothing."""
    for _, admitted in run_all(*(partial(figures.retries, 0.7, 250, **GATEWAYS, seed=seed) for seed in (4, 8))):
        assert admitted >= 0.90


@pytest.mark.parametrize(("replicas", "arranged"), [(1, ONE), (2, ONE), (2, WORKERS), (2, GATEWAYS)])
def test_a_flood_of_long_prompts_does_not_delay_others_by_more_than_one_of_them(
    run_all: RunAll, replicas: int, arranged: dict[str, int]
) -> None:
    """An 8,000-token prompt is 0.4 s of prefill that cannot be interrupted, with slots free all the time."""
    run = partial(figures.long_prompts, replicas, **arranged)
    no_cap = AdmissionOptions(prefill_seconds=1e6)
    beside, uncapped, alone = run_all(
        partial(run, flood=True), partial(run, flood=True, options=no_cap), partial(run, flood=False)
    )
    assert beside.ttft_p99 <= alone.ttft_p99 + 0.5
    assert beside.ttft_p50 <= alone.ttft_p50 + 0.12
    assert beside.refused <= 0.005
    assert uncapped.ttft_p99 > 3 * beside.ttft_p99

"""What admission promises when more is asked than there is, on sim-20b engines, with the default options.

`python tests/simulation/figures.py` prints the same figures for several seeds.
"""

import pytest
from vitalis_serve.gateway.admission import AdmissionOptions

from tests.simulation import figures

ONE, WORKERS, GATEWAYS = {"gateways": 1}, {"gateways": 1, "workers": 3}, {"gateways": 2}
ARRANGEMENTS = pytest.mark.parametrize(
    "arranged", [ONE, WORKERS, GATEWAYS], ids=["one gateway", "three workers", "two gateways"]
)


@pytest.mark.parametrize(
    ("replicas", "arranged", "seeds"),
    [(1, ONE, 3), (2, ONE, 3), (4, ONE, 1), (2, WORKERS, 3), (2, GATEWAYS, 3)],
)
def test_a_flooding_tenant_does_not_hurt_its_neighbours(replicas: int, arranged: dict[str, int], seeds: int) -> None:
    """Victims at their fair share of 80 % load; the flooder offers ten times its own."""
    ratios = []
    for seed in range(1, seeds + 1):
        solo, beside = figures.neighbours(replicas, **arranged, seed=seed)
        ratios.append(beside.ttft_p99 / solo.ttft_p99)
        assert beside.refused <= 0.01
    assert max(ratios) <= 2.0
    assert sorted(ratios)[seeds // 2] <= 1.3


@pytest.mark.parametrize("seed", [2, 3])
def test_a_flooding_tenant_does_not_hurt_neighbours_that_use_nearly_all_of_their_share(seed: int) -> None:
    solo, beside = figures.neighbours(2, 1, seed=seed, load=0.9, seconds=70)
    assert beside.ttft_p99 <= 2 * solo.ttft_p99


@ARRANGEMENTS
def test_equal_tenants_are_served_equally(arranged: dict[str, int]) -> None:
    """Eight tenants, four of which offer three times as much as the others, all more than their share."""
    assert figures.equality(**arranged) >= 0.99


@pytest.mark.parametrize(("replicas", "arranged"), [(1, ONE), (4, ONE), (2, WORKERS), (2, GATEWAYS)])
def test_emergency_keeps_its_time_to_first_token(replicas: int, arranged: dict[str, int]) -> None:
    """Beside ten times what the fleet can carry, of all other classes: within 0.5 s, and nobody is turned away."""
    alone, beside = (figures.emergency(replicas, times, **arranged) for times in (0, 10))
    assert beside.refused == 0
    assert beside.ttft_p99 <= alone.ttft_p99 + 0.25
    assert beside.ttft_p50 <= alone.ttft_p50 + 0.06


@ARRANGEMENTS
def test_goodput_holds_at_twice_and_three_times_the_capacity(arranged: dict[str, int]) -> None:
    best = max(figures.offered(load, **arranged) for load in (1.0, 1.1, 1.3))
    assert figures.offered(2.0, **arranged) >= 0.97 * best
    assert figures.offered(3.0, **arranged) >= 0.95 * best


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
@pytest.mark.parametrize("seed", [4, 8])
def test_clients_that_come_back_when_told_get_in(
    background: float, burst: int, replicas: int, arranged: dict[str, int], seed: int
) -> None:
    """A burst in five seconds on top of a background; as many as fit into the 60 s that may be said."""
    refused, admitted = figures.retries(background, burst, replicas=replicas, seed=seed, **arranged)
    assert refused > 50
    assert admitted >= 0.95


@pytest.mark.parametrize("seed", [4, 8])
def test_who_comes_back_to_another_gateway_is_not_known_there(seed: int) -> None:
    """With all that two gateways can carry on its way back, half of it to the one that has told it nothing."""
    _, admitted = figures.retries(0.7, 250, **GATEWAYS, seed=seed)
    assert admitted >= 0.90


@pytest.mark.parametrize(("replicas", "arranged"), [(1, ONE), (2, ONE), (2, WORKERS), (2, GATEWAYS)])
def test_a_flood_of_long_prompts_does_not_delay_others_by_more_than_one_of_them(
    replicas: int, arranged: dict[str, int]
) -> None:
    """An 8,000-token prompt is 0.4 s of prefill that cannot be interrupted, with slots free all the time."""
    alone, beside = (figures.long_prompts(replicas, flood=flood, **arranged) for flood in (False, True))
    assert beside.ttft_p99 <= alone.ttft_p99 + 0.5
    assert beside.ttft_p50 <= alone.ttft_p50 + 0.12
    assert beside.refused <= 0.005
    no_cap = AdmissionOptions(prefill_seconds=1e6)
    uncapped = figures.long_prompts(replicas, flood=True, options=no_cap, **arranged)
    assert uncapped.ttft_p99 > 3 * beside.ttft_p99

"""What the gateway costs, from short rounds that asked the same engine directly and through it in turn. Pure.

A figure of one machine at one time says little: what is compared is a direct round with the gateway's round beside it.
"""

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from vitalis_load.estimates import Estimate, estimate

Way = Literal["direct", "gateway"]
WAYS: Final[tuple[Way, Way]] = ("direct", "gateway")


class Round(msgspec.Struct, kw_only=True):
    """One short run. Times in seconds."""

    way: Way
    pair: int
    seconds: float  # what was measured of it
    tokens_per_second: float  # of output
    requests: int
    failed: int
    events: int  # chunks with tokens that came in the whole round
    ttft: list[float] = []
    tpot: list[float] = []
    gateway_cpu: float = 0.0  # seconds of all the gateway's processes in the whole round
    whole_seconds: float = 0.0
    partial: str = ""  # why it is not a whole round
    client_bound: str = ""
    run: str = ""


class Added(msgspec.Struct, kw_only=True):
    """The same percentile of both ways over all rounds, in milliseconds. `pairs`: what was added within each pair."""

    direct: float
    gateway: float
    pairs: Estimate | None

    @property
    def added(self) -> float:
        return self.gateway - self.direct


class Overhead(msgspec.Struct, kw_only=True):
    """What came of it. None where no round can tell."""

    schema: str = "vitalis-load-overhead/1"
    pairs: int
    ratio: Estimate | None  # output tokens/s through the gateway over direct, within each pair
    tokens_per_second: dict[str, Estimate | None]
    ttft_p50: Added | None
    ttft_p99: Added | None
    tpot_p50: Added | None
    tpot_p99: Added | None
    requests: dict[str, int]
    failed: dict[str, int]
    cpu_us_per_event: float | None  # of the gateway's processes, less what they take with nothing to do
    cpu_us_per_event_gross: float | None
    cpu_idle: float | None  # cores, in the direct rounds
    doubts: list[str]  # why the figures may not be what they seem


def order(pairs: int) -> list[tuple[int, Way]]:
    """Direct and gateway in turn; who is first changes, so that what only drifts is no difference."""
    return [(pair, way) for pair in range(pairs) for way in (WAYS if pair % 2 == 0 else WAYS[::-1])]


def overhead(rounds: Sequence[Round]) -> Overhead:
    """Of whole pairs; a round without its other half is left out."""
    pairs = _pairs(rounds)
    ways: dict[Way, list[Round]] = {"direct": [d for d, _ in pairs], "gateway": [g for _, g in pairs]}
    idle = _idle_cores(ways["direct"])
    cpu = sum(each.gateway_cpu for each in ways["gateway"])
    events = sum(each.events for each in ways["gateway"])
    seconds = sum(each.whole_seconds for each in ways["gateway"])
    known = bool(cpu and events)
    return Overhead(
        pairs=len(pairs),
        ratio=estimate(g.tokens_per_second / d.tokens_per_second if d.tokens_per_second else None for d, g in pairs),
        tokens_per_second={way: estimate(each.tokens_per_second for each in ways[way]) for way in WAYS},
        ttft_p50=_added(pairs, "ttft", 0.5),
        ttft_p99=_added(pairs, "ttft", 0.99),
        tpot_p50=_added(pairs, "tpot", 0.5),
        tpot_p99=_added(pairs, "tpot", 0.99),
        requests={way: sum(each.requests for each in ways[way]) for way in WAYS},
        failed={way: sum(each.failed for each in ways[way]) for way in WAYS},
        cpu_us_per_event=max(0.0, cpu - (idle or 0.0) * seconds) / events * 1e6 if known else None,
        cpu_us_per_event_gross=cpu / events * 1e6 if known else None,
        cpu_idle=idle,
        doubts=_doubts(pairs),
    )


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share does not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-len(ordered) * share // 1) - 1))]


def _pairs(rounds: Sequence[Round]) -> list[tuple[Round, Round]]:
    found = {(each.pair, each.way): each for each in rounds}
    numbers = sorted({each.pair for each in rounds})
    return [
        (found[number, "direct"], found[number, "gateway"])
        for number in numbers
        if (number, "direct") in found and (number, "gateway") in found
    ]


def _values(each: Round, figure: Literal["ttft", "tpot"]) -> list[float]:
    return each.ttft if figure == "ttft" else each.tpot


def _added(pairs: Sequence[tuple[Round, Round]], figure: Literal["ttft", "tpot"], share: float) -> Added | None:
    direct = percentile([value for d, _ in pairs for value in _values(d, figure)], share)
    gateway = percentile([value for _, g in pairs for value in _values(g, figure)], share)
    if direct is None or gateway is None:
        return None
    within = []
    for d, g in pairs:
        one, other = percentile(_values(d, figure), share), percentile(_values(g, figure), share)
        within.append(None if one is None or other is None else (other - one) * 1e3)
    return Added(direct=direct * 1e3, gateway=gateway * 1e3, pairs=estimate(within))


def _idle_cores(direct: Sequence[Round]) -> float | None:
    seconds = sum(each.whole_seconds for each in direct)
    return sum(each.gateway_cpu for each in direct) / seconds if seconds else None


def _doubts(pairs: Sequence[tuple[Round, Round]]) -> list[str]:
    doubts = []
    if len(pairs) < 3:
        doubts.append(f"so few pairs of rounds ({len(pairs)}) say little: 3 or more show by how much they differ")
    for way, index in (("direct", 0), ("gateway", 1)):
        rounds = [pair[index] for pair in pairs]
        bound = [each for each in rounds if each.client_bound]
        if bound:
            doubts.append(
                f"the load generator was full in {len(bound)} of {len(rounds)} rounds ({way}): {bound[0].client_bound}"
            )
        failed, requests = sum(each.failed for each in rounds), sum(each.requests for each in rounds)
        if failed:
            doubts.append(f"{failed} of {requests} requests failed ({way})")
        if 0 < requests < 1000:
            doubts.append(
                f"{requests} requests ({way}) are few for a p99: it is one of the slowest {max(1, requests // 100)}"
            )
    return doubts

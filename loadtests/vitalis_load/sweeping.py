"""Where a server saturates, and the best goodput it gives under an SLO: which load to measure next, and what the
measured ones say. Pure.

The load is doubled until a limit of the SLO is missed or the server no longer keeps up (where the load generator was
full, that load is tried once more: it may have been by chance); then the gap between the highest load that held and the
lowest that did not is halved, by its geometric mean, until it is narrow enough; then the best one is measured again, in
full.
"""

from collections.abc import Mapping, Sequence
from math import hypot, sqrt
from typing import Final, Literal

import msgspec

from vitalis_load.searching import Point, Step, Unit

KEEPS_UP: Final = 0.95  # of the requests asked for, per second, below which a server does not
GROWS: Final = 1.05  # times the tokens/s of fewer users, below which more users bring nothing
SATURATED: Final = 0.95  # of the most tokens/s seen
# Times the load, from which two points tell whether more load brings more: nearer ones differ by noise.
COMPARABLE: Final[Mapping[Unit, float]] = {"requests/s": 1.4, "users": 1.2}

Why = Literal["", "slo", "saturated", "client", "partial", "failing"]


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep may do."""

    unit: Unit
    first: float
    most: float
    least: float = 0.0  # 0: an eighth of the first, and at least one user
    growth: float = 2.0
    precision: float = 0.1  # it stops where the lowest that failed is within this of the highest that held
    points: int = 14  # it stops after so many
    confirm: int = 3  # repeats of the best one; 1: none

    @property
    def floor(self) -> float:
        least = self.least or self.first / 8
        return max(1.0, least) if self.unit == "users" else least


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What the points say. `best` is None where no load held."""

    best: Point | None
    saturation: Point | None  # the lowest load with nearly all the tokens/s there are
    saturated: bool  # a load beyond it was seen to bring no more
    said: str  # one sentence for a person


def next_step(points: Sequence[Point], bounds: Bounds) -> Step | None:
    """What to measure next, given all that was measured, in order; None: enough."""
    if not points:
        return Step(_rounded(bounds.first, bounds))
    known = latest(points)
    if len(points) < bounds.points and (unclear := _unclear(points, known, bounds)):
        return Step(unclear.load, unclear.repeats)
    if len(points) < bounds.points and (load := _load(known, bounds)) is not None:
        return Step(load)
    found = best(points, bounds)
    if found is not None and found.repeats < bounds.confirm and len(points) < bounds.points + bounds.confirm:
        return Step(found.load, bounds.confirm)
    return None


def latest(points: Sequence[Point]) -> list[Point]:
    """The last measurement of each load, by load: a repeated one is in the place of the first look."""
    return sorted({point.load: point for point in points}.values(), key=lambda point: point.load)


def why_not(point: Point, below: Sequence[Point], unit: Unit) -> Why:
    """Why this load does not hold; "" where it does. `below`: the points with less load.

    A full load generator sends and reads late, which makes a server look worse than it is: what holds all the same
    does hold, and of what does not nothing is known."""
    if point.partial:
        return "partial"
    if point.requests_per_second <= 0 or point.failed_share > 0.5:
        return "failing"
    if point.slo_met and _keeps_up(point, below, unit):
        return ""
    if point.client_bound:
        return "client"
    return "saturated" if point.slo_met else "slo"


def holding(points: Sequence[Point], unit: Unit) -> list[Point]:
    """Those that hold, up to the first that does not: one above that was luck."""
    held: list[Point] = []
    for point in latest(points):
        if why_not(point, held, unit):
            break
        held.append(point)
    return held


def best(points: Sequence[Point], bounds: Bounds) -> Point | None:
    """The highest goodput of those that hold. None where none does."""
    return max(holding(points, bounds.unit), key=lambda point: point.goodput, default=None)


def findings(points: Sequence[Point], bounds: Bounds) -> Findings:
    known = latest(points)
    found = best(points, bounds)
    most = max((point.tokens_per_second for point in known), default=0.0)
    knee = next((point for point in known if most and point.tokens_per_second >= SATURATED * most), None)
    # None of them has many more tokens/s than the knee, else that were no knee.
    saturated = knee is not None and known[-1].load >= knee.load * COMPARABLE["users"]
    return Findings(
        best=found, saturation=knee, saturated=saturated, said=_sentence(known, found, knee, saturated, bounds)
    )


def _load(known: Sequence[Point], bounds: Bounds) -> float | None:
    held = holding(known, bounds.unit)
    floor = held[-1].load if held else None
    ceiling = next((point.load for point in known if floor is None or point.load > floor), None)
    if ceiling is None:
        assert floor is not None
        more = _rounded(floor * bounds.growth, bounds)
        if bounds.unit == "users":
            more = max(more, floor + 1)  # a quarter more of two is two
        return None if floor >= bounds.most else min(more, bounds.most)
    if floor is None:
        lower = _rounded(ceiling / bounds.growth, bounds)
        if bounds.unit == "users":
            lower = min(lower, ceiling - 1)
        return lower if bounds.floor <= lower < ceiling else None
    if bounds.unit == "users" and why_not(_at(known, ceiling), held, bounds.unit) == "saturated":
        return None  # more of them only wait longer
    if ceiling / floor <= 1 + bounds.precision:
        return None
    middle = _rounded(sqrt(floor * ceiling), bounds)
    return middle if floor < middle < ceiling else None


def _unclear(points: Sequence[Point], known: Sequence[Point], bounds: Bounds) -> Point | None:
    """The load at which the load generator was full or lost a process for once: perhaps another program was at work
    just then."""
    held = holding(known, bounds.unit)
    first = next(iter(known[len(held) :]), None)
    if first is None or why_not(first, held, bounds.unit) not in ("client", "partial"):
        return None
    return first if sum(point.load == first.load for point in points) == 1 else None


def _at(known: Sequence[Point], load: float) -> Point:
    return next(point for point in known if point.load == load)


def _keeps_up(point: Point, below: Sequence[Point], unit: Unit) -> bool:
    if unit == "requests/s":
        # A short run is asked for more or less than its rate says, and answers some of it after its end.
        due = _due(point)
        if point.requests_per_second < (KEEPS_UP - min(_chance(point), 0.25)) * due:
            return False
        # Those that had to wait are answered later, and count as answered; the tokens per second tell.
        fewer = [other for other in below if _due(other) <= due / COMPARABLE["requests/s"]][-1:]
        if not fewer:
            return True
        wanted = 1 + (due / _due(fewer[0]) - 1) / 2
        by_chance = min(0.5, hypot(_chance(point), _chance(fewer[0])))
        return point.tokens_per_second >= (1 - by_chance) * wanted * fewer[0].tokens_per_second
    fewer = [other for other in below if other.load <= point.load / COMPARABLE["users"]]
    return not fewer or point.tokens_per_second >= GROWS * max(other.tokens_per_second for other in fewer)


def _due(point: Point) -> float:
    return point.offered_per_second or point.load


def _chance(point: Point) -> float:
    """By which share a rate of so many requests, that come as they like, may differ from what it is on average."""
    return 2 / sqrt(max(point.requests, 1))


def _rounded(load: float, bounds: Bounds) -> float:
    """Whole users; of rates the first three digits."""
    return float(max(1, round(load))) if bounds.unit == "users" else float(f"{load:.3g}")


_WHY: Final = {
    "slo": "the SLO is missed",
    "saturated": "more load brings no more",
    "client": "nothing can be said, since the load generator was full",
    "partial": "nothing can be said, since the load generator lost a process",
    "failing": "most requests fail",
}


def _sentence(known: Sequence[Point], found: Point | None, knee: Point | None, saturated: bool, bounds: Bounds) -> str:
    if not known:
        return "nothing was measured"
    ends = next((p for p in known if found is None or p.load > holding(known, bounds.unit)[-1].load), None)
    parts = []
    if found is None:
        why = _WHY[why_not(known[0], [], bounds.unit) or "slo"]
        missed = f" ({', '.join(known[0].missed)})" if known[0].missed else ""
        parts.append(f"no load held: at {show(known[0].load, bounds.unit)} {why}{missed}")
    else:
        parts.append(
            f"best goodput {found.goodput:.3g} good requests/s at {show(found.load, bounds.unit)}"
            f" ({found.tokens_per_second:.0f} output tokens/s)"
        )
        if found.client_bound:
            parts.append("the load generator was full there, so the server may do better")
        if ends is not None:
            why = why_not(ends, holding(known, bounds.unit), bounds.unit)
            missed = f" ({', '.join(ends.missed)})" if ends.missed else ""
            parts.append(f"at {show(ends.load, bounds.unit)} {_WHY[why or 'slo']}{missed}")
        elif found.load >= bounds.most:
            parts.append("no more was asked for (--most)")
    if knee is not None and saturated:
        parts.append(f"saturated from {show(knee.load, bounds.unit)} ({knee.tokens_per_second:.0f} output tokens/s)")
    else:
        parts.append("saturation was not reached")
    return "; ".join(parts)


def show(load: float, unit: Unit) -> str:
    return f"{load:g} {unit if load != 1 or unit != 'users' else 'user'}"

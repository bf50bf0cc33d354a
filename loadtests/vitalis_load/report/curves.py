"""Drawings of distributions, and of throughput against latency."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

import msgspec

from vitalis_load.distributions import SHARES, Distribution
from vitalis_load.report import numbers
from vitalis_load.report.axes import Axis, around, from_zero, reaching
from vitalis_load.report.plots import Drawing

BARS = 44
NINES = ((0.0, "0"), (0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (0.999, "p99.9"), (0.9999, "p99.99"))


def histogram(title: str, whole: Distribution, limit: float | None) -> str:
    """Where the values lie, over a logarithmic axis, with the usual percentiles marked."""
    drawing = Drawing(128, f"{title}: how often each duration came", left=8)
    across = around(reaching(whole.values, limit), drawing.x0, drawing.x1)
    edges = [across.low * (across.high / across.low) ** (i / BARS) for i in range(BARS + 1)]
    parts = [after - before for before, after in pairwise(below(whole, edge) for edge in edges)]
    drawing.y1 = 32  # room for the percentiles' names, and above them for the limit's
    most = max(parts) or 1
    for (left, right), part in zip(pairwise(edges), parts, strict=True):
        if part > 0:
            about = f"{numbers.seconds(left)} to {numbers.seconds(right)}: {numbers.share(part)}"
            top = drawing.y0 - max(1.0, part / most * (drawing.y0 - drawing.y1))
            drawing.box(across.place(left) + 0.5, top, across.place(right) - 0.5, drawing.y0, "bar", about)
    drawing.line(drawing.x0, drawing.y0, drawing.x1, drawing.y0, "base")
    drawing.feet(across, "s")
    free = -math.inf
    for share, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
        x = across.place(at(whole, share))
        drawing.line(x, drawing.y0, x, drawing.y1 - 6, "mark")
        if x > free:
            drawing.text(x, drawing.y1 - 9, name, "strong", anchor="middle")
            free = x + 26
    if limit is not None and across.low <= limit <= across.high:
        x = across.place(limit)
        drawing.line(x, drawing.y0, x, drawing.y1 - 18, "limit")
        drawing.text(x, drawing.y1 - 22, "SLO", "limit", "middle")
    elif limit is not None and limit > across.high:
        drawing.text(drawing.x1, drawing.y1 - 22, f"SLO {numbers.tick(limit, 's')} →", "limit", "end")
    return str(drawing)


def tail(title: str, whole: Distribution, repeats: Sequence[Distribution], limit: float | None) -> str:
    """Percentiles, stretched so that each nine takes as much room; faint lines are the single repeats."""
    drawing = Drawing(150, f"{title} by percentile")
    most = _reach(whole.count)
    across, up, places = _frame(drawing, (whole, *repeats), most, limit)
    if limit is not None:
        drawing.limit(up, limit, f"SLO {numbers.tick(limit, 's')}")
    for each in repeats if len(repeats) > 1 else ():
        drawing.path(_percentiles(each, places, across, up), "line faint")
    drawing.path(_percentiles(whole, places, across, up), "line t1")
    for share, name in NINES[1:]:
        if share <= most:
            value = at(whole, share)
            about = f"{name}: {numbers.seconds(value)}"
            drawing.dot(across.place(stretched(share)), up.place(value), 3, "dot t1", about)
    return str(drawing)


def tails(title: str, wholes: Sequence[Distribution]) -> str:
    """The percentiles of several runs, as `tail` draws those of one."""
    drawing = Drawing(180, f"{title} by percentile")
    most = _reach(min(whole.count for whole in wholes))
    across, up, places = _frame(drawing, wholes, most, None)
    for tone, whole in enumerate(wholes, 1):
        drawing.path(_percentiles(whole, places, across, up), f"line t{tone}")
    return str(drawing)


def _reach(count: int) -> float:
    """The highest percentile that so many values can tell."""
    return max(nine for nine, _ in NINES if nine <= 1 - 1 / max(count, 2) or nine <= 0.9)


def _frame(
    drawing: Drawing, wholes: Sequence[Distribution], most: float, limit: float | None
) -> tuple[Axis, Axis, list[int]]:
    """Draws the axes of a tail up to the percentile `most`; and which of SHARES are within."""
    across = Axis(0, stretched(most) * 1.04, drawing.x0, drawing.x1)
    places = [place for place, share in enumerate(SHARES) if share <= most]
    seen = [each.values[place] for each in wholes for place in places]
    up = around(reaching(seen, limit), drawing.y0, drawing.y1)
    drawing.levels(up, "s")
    for share, name in NINES:
        if share <= most:
            x = across.place(stretched(share))
            drawing.line(x, drawing.y0, x, drawing.y1, "grid")
            drawing.text(x, drawing.y0 + 14, name if share else "min", anchor="middle")
    return across, up, places


def _percentiles(each: Distribution, places: Sequence[int], across: Axis, up: Axis) -> list[tuple[float, float]]:
    return [(across.place(stretched(SHARES[place])), up.place(each.values[place])) for place in places]


def stretched(share: float) -> float:
    """p90 is 1, p99 is 2, p99.9 is 3."""
    return -math.log10(max(1 - share, 1e-6))


def at(whole: Distribution, share: float) -> float:
    """The value that this share of all does not exceed."""
    return whole.values[min(range(len(SHARES)), key=lambda place: abs(SHARES[place] - share))]


def below(whole: Distribution, value: float) -> float:
    """The share of all that does not exceed `value`."""
    values = whole.values
    if value < values[0]:
        return 0.0
    for place in range(len(values) - 1, -1, -1):
        if values[place] <= value:
            if place == len(values) - 1:
                return 1.0
            inside = (value - values[place]) / (values[place + 1] - values[place])
            return SHARES[place] + inside * (SHARES[place + 1] - SHARES[place])
    return 0.0


class Spot(msgspec.Struct, kw_only=True):
    """One measured point: from, typical, to. `mark` is written beside it."""

    x: tuple[float, float, float]
    y: tuple[float, float, float]
    about: str
    mark: str = ""
    kind: str = ""  # best, missed, faint


class Curve(msgspec.Struct, kw_only=True):
    name: str
    spots: list[Spot]
    tone: str = "1"
    joined: bool = True


def against(
    title: str, curves: Sequence[Curve], *, across: str, up: str, up_unit: str = "s", limit: float | None = None,
    log: bool = True, width: float = 440,
) -> str:  # fmt: skip
    """One figure against another; `across` and `up` name them."""
    spots = [spot for curve in curves for spot in curve.spots]
    if not spots:
        return ""
    drawing = Drawing(260, f"{title}: {up} against {across}", width=width)
    drawing.y0 -= 16
    drawing.y1 += 14
    lying = from_zero((spot.x[2] for spot in spots), drawing.x0, drawing.x1)
    heights = [value for spot in spots for value in spot.y]
    heights = reaching(heights, limit)
    standing = around(heights, drawing.y0, drawing.y1) if log else from_zero(heights, drawing.y0, drawing.y1)
    drawing.levels(standing, up_unit)
    drawing.feet(lying, "1/s", lines=True)
    drawing.text(drawing.x1, drawing.height - 4, f"{across} →", "name", "end")
    drawing.text(2, 12, f"↑ {up}", "name")
    if limit is not None:
        drawing.limit(standing, limit, f"SLO {numbers.tick(limit, up_unit)}")
    for curve in curves:
        if curve.joined:
            points = [(lying.place(spot.x[1]), standing.place(spot.y[1])) for spot in curve.spots]
            drawing.path(points, f"line t{curve.tone}")
        for spot in curve.spots:
            _spot(drawing, spot, curve.tone, lying, standing)
    _marks(drawing, curves, lying, standing)
    legend = "".join(f'<span class="key t{curve.tone}"><i></i>{escape(curve.name)}</span>' for curve in curves)
    return (
        f'<figure class="plot"><figcaption><h4>{escape(title)}</h4><span class="legend">{legend}</span></figcaption>'
        f"{drawing}</figure>"
    )


def _spot(drawing: Drawing, spot: Spot, tone: str, lying: Axis, standing: Axis) -> None:
    x, y = lying.place(spot.x[1]), standing.place(spot.y[1])
    if spot.kind == "faint":
        drawing.dot(x, y, 2.2, f"dot t{tone} faint", spot.about)
        return
    drawing.line(lying.place(spot.x[0]), y, lying.place(spot.x[2]), y, f"whisker t{tone}")
    drawing.line(x, standing.place(spot.y[0]), x, standing.place(spot.y[2]), f"whisker t{tone}")
    if spot.kind == "best":
        drawing.dot(x, y, 9, f"ring t{tone}")
    drawing.dot(x, y, 4.5, f"{'hollow' if spot.kind == 'missed' else 'dot'} t{tone}", spot.about)


def _marks(drawing: Drawing, curves: Sequence[Curve], lying: Axis, standing: Axis) -> None:
    """Beside their points, each on the first side where it covers no point and no other mark; else not at all."""
    dots = [
        (curve, spot, lying.place(spot.x[1]), standing.place(spot.y[1])) for curve in curves for spot in curve.spots
    ]
    taken = [(x - 5, y - 5, x + 5, y + 5) for _, _, x, y in dots]
    for curve, spot, x, y in dots:
        wide = 7.0 * len(spot.mark)
        for left, base, anchor in (
            (x - wide / 2, y + 17, "middle"),
            (x - wide / 2, y - 9, "middle"),
            (x + 8, y + 4, "start"),
            (x - 8 - wide, y + 4, "end"),
        ):
            box = (left, base - 9, left + wide, base + 1)
            outside = left < drawing.x0 or left + wide > drawing.width or base > drawing.y0
            if spot.mark and not outside and not any(_overlap(box, other) for other in taken):
                place = {"middle": x, "start": left, "end": left + wide}[anchor]
                drawing.text(place, base, spot.mark, f"mark-text t{curve.tone}", anchor)
                taken.append(box)
                break


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def bars(parts: Mapping[str, float], tone: str = "1") -> dict[str, str]:
    """A bar for each, all of one scale; for cells of a table."""
    most = max(parts.values(), default=0) or 1
    result = {}
    for name, value in parts.items():
        drawing = Drawing(8, name, width=100, left=0)
        drawing.box(0, 1, max(0.5, 100 * value / most), 7, f"bar t{tone}")
        result[name] = str(drawing)
    return result

"""Drawings as inline SVG. Colours are classes of page.css, so that light and dark are the page's business."""

from collections.abc import Sequence
from html import escape

import msgspec

from vitalis_load.report import numbers
from vitalis_load.report.axes import Axis, from_zero

Series = Sequence[float | None]
WIDTH = 400.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 8.0, 8.0, 20.0


class Trace(msgspec.Struct, kw_only=True):
    """One line of a drawing. `tone` is a colour, 1 to 6, or "bad"."""

    name: str
    values: Series
    tone: str = "1"
    area: bool = False
    dashed: bool = False


class Drawing:
    """An SVG with a frame for axes. It is 400 wide, which is near to the pixels on a page and on a phone."""

    def __init__(self, height: float, title: str, *, width: float = WIDTH, left: float = LEFT) -> None:
        self.width, self.height, self.left = width, height, left
        self.x0, self.x1 = left, width - RIGHT
        self.y0, self.y1 = height - BOTTOM, TOP
        self._title = title
        self._parts: list[str] = []

    def add(self, markup: str) -> None:
        self._parts.append(markup)

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        name = f' class="{kind}"' if kind else ""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(words)}</text>')

    def line(self, x0: float, y0: float, x1: float, y1: float, kind: str) -> None:
        self.add(f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>')

    def box(self, x0: float, y0: float, x1: float, y1: float, kind: str, about: str = "") -> None:
        told = f"<title>{escape(about)}</title>" if about else ""
        self.add(
            f'<rect x="{min(x0, x1):.1f}" y="{min(y0, y1):.1f}" width="{abs(x1 - x0):.1f}" '
            f'height="{abs(y1 - y0):.1f}" class="{kind}">{told}</rect>'
        )

    def dot(self, x: float, y: float, radius: float, kind: str, about: str = "") -> None:
        told = f"<title>{escape(about)}</title>" if about else ""
        self.add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}">{told}</circle>')

    def path(self, points: Sequence[tuple[float, float]], kind: str, extra: str = "") -> None:
        if points:
            steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            self.add(f'<path d="M{steps}" class="{kind}"{extra}/>')

    def levels(self, axis: Axis, unit: str, about: int = 4) -> None:
        """The ticks of an upright axis, with a line across at each."""
        for tick in axis.ticks(about):
            y = axis.place(tick)
            self.line(self.x0, y, self.x1, y, "base" if tick == 0 else "grid")
            self.text(self.x0 - 5, y + 3.5, numbers.tick(tick, unit), anchor="end")

    def feet(self, axis: Axis, unit: str, about: int = 5, *, lines: bool = False) -> None:
        """The ticks of a lying axis."""
        for tick in axis.ticks(about):
            x = axis.place(tick)
            self.line(x, self.y0, x, self.y1 if lines else self.y0 + 3, "grid")
            anchor = "end" if x > self.x1 - 14 else "middle"
            self.text(min(x, self.x1), self.y0 + 14, numbers.tick(tick, unit), anchor=anchor)

    def limit(self, axis: Axis, value: float, words: str) -> None:
        """A dashed line across at a limit, or where it lies beyond the drawing."""
        if axis.low <= value <= axis.high:
            y = axis.place(value)
            self.line(self.x0, y, self.x1, y, "limit")
            self.text(self.x1 - 2, y - 4 if y > self.y1 + 12 else y + 12, words, "limit", anchor="end")
        elif value > axis.high:
            self.text(self.x1 - 2, self.y1 + 9, f"{words} ↑", "limit", anchor="end")

    def __str__(self) -> str:
        frame = f'viewBox="0 0 {self.width:g} {self.height:g}"'
        return f'<svg {frame} role="img" aria-label="{escape(self._title)}">{"".join(self._parts)}</svg>'


def runs(values: Series) -> list[list[tuple[int, float]]]:
    """The stretches without a gap."""
    found: list[list[tuple[int, float]]] = [[]]
    for place, value in enumerate(values):
        if value is not None:
            found[-1].append((place, value))
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def over_time(
    title: str, traces: Sequence[Trace], *, unit: str, bin_seconds: float, seconds: float,
    cut: tuple[float, float] | None = None, top: float | None = None, log: Axis | None = None,
    limit: tuple[float, str] | None = None, height: float = 132,
) -> str:  # fmt: skip
    """A figure with its legend. `cut`: the window that was measured; what lies outside is shaded.

    Args:
        top: The least that the upright axis reaches to.
        log: The upright axis' values where it is logarithmic; it is placed anew.
    """
    shown = [trace for trace in traces if any(value is not None for value in trace.values)]
    if not shown:
        return ""
    drawing = Drawing(height, title)
    across = Axis(0, seconds, drawing.x0, drawing.x1)
    if log is not None:
        up = Axis(log.low, log.high, drawing.y0, drawing.y1, log=True)
    else:
        every = [value for trace in shown for value in trace.values if value is not None]
        up = from_zero(every, drawing.y0, drawing.y1, least=top or 0.0)
        if top is not None and max(every, default=0) <= top:
            up.high = top
    if cut is not None:
        for start, end in ((0.0, cut[0]), (cut[1], seconds)):
            if end > start + 1e-9:
                drawing.box(across.place(start), drawing.y1, across.place(end), drawing.y0, "cut")
    drawing.levels(up, unit, 3)
    drawing.feet(across, "s")
    if limit is not None:
        drawing.limit(up, *limit)
    for trace in shown:
        _trace(drawing, trace, across, up, bin_seconds, unit)
    drawing.add(f'<line class="cross" x1="0" x2="0" y1="{drawing.y1:g}" y2="{drawing.y0:g}"/>')
    legend = "".join(
        f'<span class="key t{trace.tone}{" dashed" if trace.dashed else ""}"><i></i>{escape(trace.name)} <b></b></span>'
        for trace in shown
    )
    frame = f"{drawing.x0:g} {drawing.x1:g} {seconds:g} {bin_seconds:g}"
    return (
        f'<figure class="plot time" data-frame="{frame}"><figcaption><h4>{escape(title)}</h4>'
        f'<span class="legend">{legend}</span></figcaption>{drawing}</figure>'
    )


def _trace(drawing: Drawing, trace: Trace, across: Axis, up: Axis, bin_seconds: float, unit: str) -> None:
    values = " ".join("" if value is None else numbers.of(value, unit).replace(" ", "_") for value in trace.values)
    told = f' data-values="{escape(values, quote=True)}"'
    for stretch in runs(trace.values):
        points = [(across.place((place + 0.5) * bin_seconds), up.place(value)) for place, value in stretch]
        if trace.area:
            base = [(points[-1][0], drawing.y0), (points[0][0], drawing.y0)]
            drawing.path([*points, *base], f"area t{trace.tone}")
        if len(points) == 1:
            drawing.dot(*points[0], 1.6, f"dot t{trace.tone}")
        drawing.path(points, f"line t{trace.tone}{' dashed' if trace.dashed else ''}", told)
        told = ""  # once for each trace


def strip(values: Sequence[float], unit: str) -> str:
    """The same figure of several repeats, as dots between its least and its most."""
    low, high = min(values), max(values)
    # Ten per cent to each side at least: what lies close together is drawn close together.
    room = max((high - low) * 0.6, abs(high + low) * 0.05, 1e-12)
    middle = (high + low) / 2
    axis = Axis(middle - room, middle + room, 4, 116)
    drawing = Drawing(12, "the repeats", width=120, left=0)
    drawing.line(2, 6, 118, 6, "grid")
    for number, value in enumerate(values, 1):
        drawing.dot(axis.place(value), 6, 3.2, "dot t1", f"repeat {number}: {numbers.of(value, unit)}")
    return str(drawing)

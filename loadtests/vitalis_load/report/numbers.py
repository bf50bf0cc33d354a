"""Numbers as people read them."""

import math
from collections.abc import Sequence

NONE = "–"


def seconds(value: float | None) -> str:
    """Three digits, in the unit that fits."""
    if value is None:
        return NONE
    for least, factor, unit in ((120, 1 / 60, "min"), (1, 1, "s"), (0.001, 1e3, "ms")):
        if abs(value) >= least * 0.9995:
            return f"{digits(value * factor)} {unit}"
    return f"{digits(value * 1e6)} µs" if value else "0 ms"


def digits(value: float, count: int = 3) -> str:
    """Without exponent, thousands grouped; so many digits, and of whole ones all."""
    if not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    rounded = float(f"{value:.{count}g}")
    places = max(0, min(6, count - 1 - math.floor(math.log10(abs(rounded)))))
    return f"{value:,.{places}f}"


def share(value: float | None) -> str:
    """In per cent; what is next to nothing is not called nothing."""
    if value is None:
        return NONE
    if 0 < value < 0.00005:
        return "<0.01 %"
    if 0.99995 < value < 1:
        return ">99.99 %"
    return f"{digits(value * 100) if value != 1 else 100} %"


def size(value: float | None) -> str:
    if value is None:
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{digits(value)} {unit}"
        value /= 1024
    return f"{digits(value)} GiB"


def of(value: float | None, unit: str) -> str:
    """In a unit of figures.Unit, "bytes" or any other word, which is put behind."""
    if value is None:
        return NONE
    if unit == "s":
        return seconds(value)
    if unit == "share":
        return share(value)
    if unit == "bytes":
        return size(value)
    if unit == "count":
        return f"{value:,.0f}"
    if unit in ("", "1/s", "tokens"):
        return digits(value)
    return f"{digits(value)} {unit}"


def span(values: Sequence[float], unit: str) -> str:
    """From the least to the most."""
    low, high = of(min(values), unit), of(max(values), unit)
    if low == high:
        return low
    head, _, tail = low.partition(" ")
    return f"{head if tail and high.endswith(' ' + tail) else low}–{high}"


def tick(value: float, unit: str) -> str:
    """As short as it can be."""
    if value == 0:
        return "0"
    if unit in ("s", "bytes", "share"):
        text = of(value, unit)
        head, space, tail = text.partition(" ")
        return (head.rstrip("0").rstrip(".") if "." in head else head) + (space + tail)
    if abs(value) >= 10_000:
        return f"{value / 1000:,.10g}k"
    return f"{value:,.10g}" if abs(value) >= 0.001 else f"{value:.1g}"

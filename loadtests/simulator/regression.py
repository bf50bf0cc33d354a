"""Least squares for a handful of unknowns, that a few strange rows do not spoil. Pure.

`fit` weighs each row by what one may expect of its error and then, again and again, less where it is far off (Huber).
How far the coefficients can be trusted comes from leaving out one stretch of the rows after the other (jackknife):
rows that follow each other are not independent, and their residuals alone would promise too much.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Row = tuple[float, ...]

_ROUNDS = 12
_HUBER = 1.5  # of the median error: what is beyond weighs less
_GROUPS = 10
_STRETCHES = 3  # of each group
_SINGULAR = 1e-7  # of columns scaled to length 1


class Undetermined(Exception):
    """The rows do not tell the unknowns apart."""


@dataclass(frozen=True, slots=True)
class Solution:
    """`errors`: standard errors. `residuals`: of each row, its target less what the coefficients say."""

    coefficients: Row
    errors: Row
    residuals: Row


def fit(rows: Sequence[Row], targets: Sequence[float], scales: Sequence[float]) -> Solution:
    """Coefficients so that rows x coefficients is near targets. `scales`: the error to expect of each target.
    Rows are in the order in which they were measured. Raises Undetermined."""
    if len(rows) < 3 * len(rows[0]):
        raise Undetermined
    lengths = [math.sqrt(sum((row[at] / scale) ** 2 for row, scale in zip(rows, scales, strict=True)))
               for at in range(len(rows[0]))]  # fmt: skip
    if not all(lengths):
        raise Undetermined
    scaled = [tuple(value / length for value, length in zip(row, lengths, strict=True)) for row in rows]
    weights = [1 / scale**2 for scale in scales]
    solved = _solve(_system(scaled, targets, weights))
    for _ in range(_ROUNDS):
        off = [abs(r) / scale for r, scale in zip(_residuals(scaled, targets, solved), scales, strict=True)]
        usual = max(1.4826 * statistics.median(off), 1e-12)
        less = [min(1.0, _HUBER * usual / max(one, 1e-12)) for one in off]
        weights = [factor / scale**2 for factor, scale in zip(less, scales, strict=True)]
        before, solved = solved, _solve(_system(scaled, targets, weights))
        if max(abs(new - old) for new, old in zip(solved, before, strict=True)) < 1e-6 * max(map(abs, solved)):
            break
    errors = _jackknife(scaled, targets, weights)
    return Solution(
        tuple(value / length for value, length in zip(solved, lengths, strict=True)),
        tuple(value / length for value, length in zip(errors, lengths, strict=True)),
        tuple(_residuals(scaled, targets, solved)),
    )


def _jackknife(rows: Sequence[Row], targets: Sequence[float], weights: Sequence[float]) -> Row:
    """Standard errors. Each of the groups that is left out has short stretches from the whole of the measurement, so
    that no phase of the load is missing in any of them."""
    stretch = max(1, len(rows) // (_GROUPS * _STRETCHES))
    groups: list[list[int]] = [[] for _ in range(_GROUPS)]
    for at in range(len(rows)):
        groups[at // stretch % _GROUPS].append(at)
    parts = [
        _system([rows[at] for at in group], [targets[at] for at in group], [weights[at] for at in group])
        for group in groups
    ]
    whole = _sum(parts)
    without = [_solve(_sum([whole, part], (1.0, -1.0))) for part in parts]
    errors = []
    for column in range(len(rows[0])):
        values = [one[column] for one in without]
        middle = statistics.fmean(values)
        errors.append(math.sqrt((_GROUPS - 1) / _GROUPS * sum((value - middle) ** 2 for value in values)))
    return tuple(errors)


def predict(row: Row, coefficients: Row) -> float:
    return sum(value * coefficient for value, coefficient in zip(row, coefficients, strict=True))


def _residuals(rows: Sequence[Row], targets: Sequence[float], coefficients: Row) -> list[float]:
    return [target - predict(row, coefficients) for row, target in zip(rows, targets, strict=True)]


def _system(rows: Sequence[Row], targets: Sequence[float], weights: Sequence[float]) -> list[list[float]]:
    """The normal equations: a line for each unknown, its right side last."""
    count = len(rows[0]) if rows else 0
    system = [[0.0] * (count + 1) for _ in range(count)]
    for row, target, weight in zip(rows, targets, weights, strict=True):
        for i in range(count):
            line, left = system[i], weight * row[i]
            if left:
                for j in range(count):
                    line[j] += left * row[j]
                line[count] += left * target
    return system


def _sum(systems: Sequence[list[list[float]]], signs: Sequence[float] | None = None) -> list[list[float]]:
    signs = signs or [1.0] * len(systems)
    lines, width = len(systems[0]), len(systems[0]) + 1
    return [
        [sum(sign * system[line][at] for sign, system in zip(signs, systems, strict=True)) for at in range(width)]
        for line in range(lines)
    ]


def _solve(system: list[list[float]]) -> Row:
    """By elimination with pivots. Raises Undetermined."""
    system = [list(line) for line in system]
    count = len(system)
    for at in range(count):
        pivot = max(range(at, count), key=lambda line: abs(system[line][at]))
        if abs(system[pivot][at]) < _SINGULAR:
            raise Undetermined
        system[at], system[pivot] = system[pivot], system[at]
        for line in range(count):
            if line != at:
                factor = system[line][at] / system[at][at]
                system[line] = [mine - factor * its for mine, its in zip(system[line], system[at], strict=True)]
    return tuple(system[at][count] / system[at][at] for at in range(count))

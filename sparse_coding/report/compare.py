"""Architectures at equal L0: each family's trade-off curve, read between its points.

A sweep meets no L0 exactly, so a value at L0 = l is interpolated linearly in log L0 between the two members around l.
Where a measure is traded for sparsity (FVU, loss recovered), only the Pareto frontier counts: members that no sparser
one equals. The match with the truth is no such trade (it peaks near the true L0), so there every member counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sparse_coding.report.families import families
from sparse_coding.report.page import Cell, Row, Table, number_cell, text_cell
from sparse_coding.report.records import Record, grid_matrix, short
from sparse_coding.report.trade_off import Measure

LEVELS = tuple(2.0**exponent for exponent in range(0, 13))
"""L0 at which families are compared, where at least two reach it."""
MOST_LEVELS = 6
SLACK = 0.05
"""A curve is read up to 5% beyond its ends: the L0 of k = 8 is seldom 8 to the last digit."""
WIDEST = 8.0
"""Nothing is read between members whose L0 differs by a larger factor, such as a collapsed one and its neighbour."""

Point = tuple[float, float]
"""L0 and the value of a measure."""


@dataclass(frozen=True)
class EqualL0:
    """A measure per family at some L0; NaN outside a family's range."""

    measure: Measure
    levels: list[float]
    values: dict[str, list[float]]
    """Family -> one value per level."""
    sizes: dict[str, list[float]]
    """Family -> the dictionary ratio that gives it."""

    def winners(self) -> list[tuple[float, str, float]]:
        """Level, best family, its value; the first family of those that tie."""
        found = []
        for index, level in enumerate(self.levels):
            at = {family: row[index] for family, row in self.values.items() if math.isfinite(row[index])}
            name = (min if self.measure.lower_is_better else max)(at, key=lambda family: at[family])
            found.append((level, name, at[name]))
        return found


def pareto_points(points: Sequence[Point], lower_is_better: bool) -> list[Point]:
    """The points that no other of the same or a smaller L0 equals or beats, by ascending L0."""
    sign = 1.0 if lower_is_better else -1.0
    frontier: list[Point] = []
    for x, y in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not frontier or sign * y < sign * frontier[-1][1]:
            frontier.append((x, y))
    return frontier


def interpolate(points: Sequence[Point], l0: float) -> float:
    """The value at `l0`, linear in log L0 between neighbours; NaN outside the points.

    `points` have ascending positive L0; of points with the same L0 the first counts. Up to `SLACK` beyond an end the
    line through the two outermost points goes on; a gap wider than `WIDEST` has no line.
    """
    if any(x == l0 for x, _ in points):
        return next(y for x, y in points if x == l0)
    spans = [(a, b) for a, b in pairwise(points) if a[0] < b[0]]
    if not spans or not spans[0][0][0] * (1 - SLACK) <= l0 <= spans[-1][1][0] * (1 + SLACK):
        return math.nan
    (x0, y0), (x1, y1) = next((span for span in spans if l0 < span[1][0]), spans[-1])
    if x1 > WIDEST * x0:
        return math.nan
    return y0 + (y1 - y0) * math.log(l0 / x0) / math.log(x1 / x0)


def curves(records: Sequence[Record], measure: Measure) -> dict[float, list[Point]]:
    """Dictionary ratio -> points of one family, averages over seeds, ready to interpolate."""
    _, ratios, l0 = grid_matrix(records, "l0")
    values = grid_matrix(records, measure.name)[2]
    found = {}
    for row, size in enumerate(ratios):
        usable = np.isfinite(values[row]) & (l0[row] > 0)
        points = list(zip(l0[row][usable].tolist(), values[row][usable].tolist(), strict=True))
        found[size] = sorted(points) if measure.name == "mmcs" else pareto_points(points, measure.lower_is_better)
    return found


def at_equal_l0(records: Sequence[Record], measure: Measure, levels: Sequence[float] = LEVELS) -> EqualL0 | None:
    """Every family at the levels that at least two of them reach, each at the size that is best there.

    Of more than `MOST_LEVELS` levels those stay that most families reach. None where no two families share a level.
    """
    known = {family: curves(found, measure) for family, found in families(records).items()}
    best = {
        family: [_best(sizes, level, measure.lower_is_better) for level in levels] for family, sizes in known.items()
    }
    reach = [sum(math.isfinite(row[index][0]) for row in best.values()) for index in range(len(levels))]
    kept = [index for index in sorted(range(len(levels)), key=lambda index: -reach[index]) if reach[index] >= 2]
    kept = sorted(kept[:MOST_LEVELS])
    if not kept:
        return None
    best = {family: row for family, row in best.items() if any(math.isfinite(row[index][0]) for index in kept)}
    values = {family: [row[index][0] for index in kept] for family, row in best.items()}
    sizes = {family: [row[index][1] for index in kept] for family, row in best.items()}
    return EqualL0(measure, [levels[index] for index in kept], values, sizes)


def _best(sizes: dict[float, list[Point]], level: float, lower_is_better: bool) -> tuple[float, float]:
    """The best value over sizes at a level, and its size."""
    found = [(value, size) for size, points in sizes.items() if math.isfinite(value := interpolate(points, level))]
    if not found:
        return math.nan, math.nan
    return (min if lower_is_better else max)(found, key=lambda pair: pair[0])


def equal_l0_table(compared: EqualL0) -> Table:
    """One row per family, one column per L0, the best of each column marked."""
    word = compared.measure.label.split(" (")[0]
    best = [name for _, name, _ in compared.winners()]
    headers = [("architecture", ""), *((f"L0 = {short(level, 4)}", f"{word} at this L0") for level in compared.levels)]
    rows = []
    for family, values in compared.values.items():
        marked = [family == name for name in best]
        rows.append(Row([text_cell(family), *map(_cell, values, compared.sizes[family], marked)]))
    caption = (
        "Interpolated in log L0 along each architecture's frontier, at the dictionary size that is best there (on "
        "hover); blank where its members do not reach. Marked: the best of a column."
    )
    return Table(f"{word[0].upper()}{word[1:]} at equal L0", headers, rows, caption)


def _cell(value: float, size: float, marked: bool) -> Cell:
    cell = number_cell(value)
    title = f"{value!r} at ratio {short(size)}" if math.isfinite(value) else "outside the range of its members"
    return Cell(cell.text, cell.key, title, best=marked)


def equal_l0_words(compared: EqualL0) -> str:
    """Who wins where, in one sentence."""
    word = compared.measure.label.split(" (")[0]
    extreme = "lowest" if compared.measure.lower_is_better else "highest"
    runs: list[tuple[str, list[str]]] = []
    for index, (level, name, value) in enumerate(compared.winners()):
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        reach, count = sum(math.isfinite(row[index]) for row in compared.values.values()), len(compared.values)
        among = f", which {reach} of {count} reach" if reach < count else ""
        runs[-1][1].append(f"{short(value)} at {short(level, 4)}{among}")
    told = "; ".join(f"{name} ({', '.join(where)})" for name, where in runs)
    return f"The {extreme} {word} at equal L0: {told}."

"""Trade-off curves over L0, of one family or of many architectures on one picture."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any

from sparse_coding.report.canvas import (
    CATEGORIES,
    CATEGORY_MARKERS,
    DASHES,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    canvas,
    drawn,
    number_axis,
    place,
    sequence,
)
from sparse_coding.report.pictures import Curve, Panel
from sparse_coding.report.point_labels import write_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VIEW = 50.0
"""A picture of several families begins at their median L0 over this."""
NARROWEST = 1.2
"""Times its beginning that an axis of L0 ends at, at least."""
CHARACTER = 0.076
"""Inches of a character of a legend."""
LEGEND_ROWS = 20
"""Families in one column of the legend."""

MARKER_SIZES = {"o": 5.5, "s": 5.2, "D": 5.0, "*": 9.0}
"""So that all look of one size; 7 for the others."""


@dataclass(frozen=True)
class Look:
    """How a curve is drawn."""

    colour: Any
    marker: str
    filled: bool = True
    dashes: str = "-"
    thin: bool = False
    """For context only: a thin pale line without markers."""
    size: float = 4.5

    def drawn_as(self) -> dict[str, Any]:
        """Keywords of a matplotlib line."""
        rim = {"markeredgecolor": PAPER, "markeredgewidth": 0.5, "markerfacecolor": self.colour}
        if not self.filled:
            rim = {"markeredgecolor": self.colour, "markeredgewidth": 1.2, "markerfacecolor": PAPER}
        found = {"color": self.colour, "linestyle": self.dashes, "marker": self.marker, "markersize": self.size, **rim}
        return {**found, "marker": "", "linewidth": 1.1, "alpha": 0.6} if self.thin else found


def looks(panels: Sequence[Panel]) -> dict[tuple[str, str], Look]:
    """The look of each (family, size).

    One family: an ordered colour per size. Several: colour and marker of the family (hollow markers where the colours
    come round again), line style of the size, the largest solid and the others thin behind it.
    """
    curves = [curve for panel in panels for curve in panel.curves if not curve.faded]
    families = list(dict.fromkeys(curve.family for curve in curves))
    sizes = sorted(dict.fromkeys(_size(curve) for curve in curves), key=_order)
    if not several(panels):
        drawn_as = zip(sizes, sequence(len(sizes)), cycle(MARKERS), strict=False)
        return {(family, size): Look(colour, marker) for size, colour, marker in drawn_as for family in families}
    found = {}
    for index, family in enumerate(families):
        turn, at = divmod(index, len(CATEGORIES))
        colour, marker = CATEGORIES[at], CATEGORY_MARKERS[(at + 3 * turn) % len(CATEGORY_MARKERS)]
        for back, size in enumerate(reversed(sizes)):
            dashes, thin = DASHES[back % len(DASHES)], back > 0
            found[family, size] = Look(colour, marker, turn % 2 == 0, dashes, thin, MARKER_SIZES.get(marker, 7.0))
    return found


def _order(size: str) -> tuple[float, str]:
    """Sizes as numbers where they are some."""
    try:
        return float(size.replace(",", "")), size
    except ValueError:
        return math.inf, size


def several(panels: Sequence[Panel]) -> bool:
    """Whether the picture compares families."""
    return len({curve.family for panel in panels for curve in panel.curves}) > 1


def view_start(panels: Sequence[Panel]) -> float:
    """L0 at which a picture of several families begins, so that collapsed members do not press the rest together."""
    found = [x for panel in panels for curve in panel.curves for x in curve.x]
    return median(found) / VIEW if several(panels) else 0.0


def _limit(axes: Axes, panel: Panel, start: float) -> None:
    """Limits by the points in view, within the bounds of the panel."""
    if any(x < start for curve in panel.curves for x in curve.x):
        curves = [*panel.curves, *panel.points]
        seen = [(x, y) for curve in curves for x, y in zip(curve.x, curve.y, strict=True) if x >= start]
        low, high = (end(y for _, y in seen) for end in (min, max))
        axes.set_ylim(low - 0.05 * (high - low or 1.0), high + 0.05 * (high - low or 1.0))
        axes.set_xlim(min(x for x, _ in seen) / 1.15, max(x for x, _ in seen) * 1.15)
    low, high = axes.get_ylim()
    axes.set_ylim(low if panel.y_low is None else max(low, panel.y_low),
                  high if panel.y_high is None else min(high, panel.y_high))  # fmt: skip
    x_low, x_high = axes.get_xlim()
    if x_high < NARROWEST * x_low:  # of TopK all are at k, but for what rounding leaves
        middle = (x_low * x_high) ** 0.5
        x_low, x_high = middle / NARROWEST**0.5, middle * NARROWEST**0.5
    axes.set_xlim(x_low, x_high * (x_high / x_low) ** 0.04)
    number_axis(axes.xaxis)


def _size(curve: Curve) -> str:
    return curve.size or curve.name


@drawn
def frontier(panels: Sequence[Panel], x_label: str, legend_title: str, family_title: str = "architecture") -> Figure:
    """Trade-off curves over a log x axis, side by side; points carry their labels where there is room.

    `legend_title` is what sizes are called, `family_title` what families are, where there are several.
    """
    known, start = looks(panels), view_start(panels)
    entries = _entries(panels, known, legend_title, family_title)
    width, height, left, gap, bottom, top, right = 4.6, 3.7, 0.75, 0.95, 0.7, 0.45, _room(entries)
    count = max(len(panels), 1)
    figure = canvas(left + count * width + (count - 1) * gap + right, bottom + height + top)
    for index, panel in enumerate(panels):
        axes = place(figure, left + index * (width + gap), bottom, width, height)
        axes.set_xscale("log")
        axes.grid(True)
        background: list[Any] = []
        labels = _draw(axes, panel, known, background)
        axes.set(title=panel.title, xlabel=x_label, ylabel=panel.y_label)
        _limit(axes, panel, start)
        for value in panel.edges.values():
            axes.axvline(value, color=INK, linestyle=":", linewidth=1.1, zorder=1)
        write_labels(axes, labels, background=background)
    _legends(figure, entries, right)
    return figure


FADED: dict[str, Any] = {"color": MUTED, "alpha": 0.35, "marker": "o", "markersize": 2.5, "linewidth": 1.1}


def _draw(
    axes: Axes, panel: Panel, known: Mapping[tuple[str, str], Look], background: list[Any]
) -> list[tuple[float, float, str]]:
    """Curves, the grey ones first (they join `background`), then baselines; returns what to write at which point."""
    labels: list[tuple[float, float, str]] = []
    for curve in sorted(panel.curves, key=lambda curve: not curve.faded):
        if curve.faded:
            background += axes.plot(curve.x, curve.y, **FADED, zorder=1.5)
            continue
        look = known[curve.family, _size(curve)]
        axes.plot(curve.x, curve.y, **look.drawn_as(), zorder=1.8 if look.thin else 2)
        labels += zip(curve.x, curve.y, curve.labels, strict=False)
    for curve in panel.points:
        axes.plot(curve.x, curve.y, color=MUTED, marker="s", markersize=4.5, linestyle="--", linewidth=1)
        labels.insert(0, (curve.x[-1], curve.y[-1], curve.name))
    return labels


Entries = list[tuple[str, dict[str, Any]]]
"""Legends from top to bottom: title, and handle by name."""


def _entries(panels: Sequence[Panel], known: Mapping[tuple[str, str], Look], sizes: str, families: str) -> Entries:
    from matplotlib.lines import Line2D

    def handle(look: Look, **changes: Any) -> Line2D:
        return Line2D([], [], **{**look.drawn_as(), **changes})

    if several(panels):
        of_family = {family: handle(replace(look, dashes="-", thin=False)) for (family, _), look in known.items()}
        faded = dict.fromkeys(_size(curve) for panel in panels for curve in panel.curves if curve.faded)
        of_size = {size: handle(look, color=MUTED, marker="") for (_, size), look in known.items()}
        if faded:
            where = f" (ratio {', '.join(faded)})" if len(of_size) > 1 else ""
            of_family[f"the others{where}"] = Line2D([], [], **FADED)
        found = [(families, of_family), *([(sizes, of_size)] if len(of_size) > 1 else [])]
    else:
        found = [(sizes, {size: handle(look) for (_, size), look in known.items()})]
    marks = dict.fromkeys(name for panel in panels for name in panel.edges)
    lines = {name: Line2D([], [], color=INK, linestyle=":", linewidth=1.1) for name in marks}
    return [(title, names) for title, names in [*found, ("", lines)] if names]


def _columns(names: Collection[str]) -> int:
    return -(-len(names) // LEGEND_ROWS)


def _room(entries: Entries) -> float:
    """Inches right of the last panel."""

    def width(names: Sequence[str]) -> float:
        rows = -(-len(names) // _columns(names))
        parts = [names[start : start + rows] for start in range(0, len(names), rows)]
        return sum(0.62 + CHARACTER * max(map(len, part)) for part in parts)

    return max([1.55, *(0.15 + width([*names]) for _, names in entries)])


def _legends(figure: Figure, entries: Entries, room: float) -> None:
    """One below the other, in the right margin."""
    if len(entries) == 1 and _columns(entries[0][1]) == 1:
        title, names = entries[0]
        figure.legend(names.values(), names.keys(), title=title, loc="upper right", borderaxespad=0.6,
                      alignment="left")  # fmt: skip
        return
    wide, high = figure.get_size_inches()
    y = high - 0.08
    for title, names in entries:
        columns = _columns(names)
        figure.legend(names.values(), names.keys(), title=title or None, loc="upper left", ncols=columns,
                      bbox_to_anchor=((wide - room + 0.12) / wide, y / high), borderaxespad=0, alignment="left",
                      columnspacing=1.0)  # fmt: skip
        y -= 0.19 * (-(-len(names) // columns)) + (0.32 if title else 0.12)

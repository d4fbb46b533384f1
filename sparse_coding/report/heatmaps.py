"""Heat maps over sparsity and dictionary size, with the controls drawn in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_coding.report.canvas import BLANK, INK, MUTED, PAPER, canvas, drawn, place
from sparse_coding.report.records import by_ratio, labels, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

CELL, ROW, GAP = 0.47, 0.34, 0.16
"""Inches: width of a cell, its height, and the space between parts."""
LEAST_WIDTH = 3.2
"""Inches: so that a title fits above a map of few columns."""
MOST_PRINTED = 24
"""Values are printed in the cells of maps of up to this many columns."""


@dataclass(frozen=True)
class Scale:
    """How values become colours."""

    label: str
    """What the colour bar is called."""
    low: float | None = None
    """Value at the lower end; None takes it from the data."""
    high: float | None = None
    log: bool = False
    colours: str = "viridis"
    """A colour-blind-safe matplotlib map."""
    marks: Mapping[str, float | tuple[float, float]] = field(default_factory=dict)
    """Values to mark on the colour bar, or ranges, by their names."""
    bar_format: Callable[[float], str] = short
    shade: Callable[[np.ndarray], np.ndarray] = field(default=lambda values: values)
    """What the colour shows of a value; the cells print the value itself."""
    unit: float = 1.0
    """The printed numbers are in this unit."""

    def norm(self, values: np.ndarray) -> Normalize:
        from matplotlib.colors import LogNorm, Normalize

        finite = values[np.isfinite(values)]
        finite = finite[finite > 0] if self.log else finite
        low = self.low if self.low is not None else (finite.min() if finite.size else 0.1 if self.log else 0.0)
        high = self.high if self.high is not None else (finite.max() if finite.size else 1.0)
        if not low < high:
            low, high = (low / 2, high * 2) if self.log else (low - 0.5, high + 0.5)
        return LogNorm(low, high, clip=True) if self.log else Normalize(low, high, clip=True)


@dataclass(frozen=True)
class Grid:
    """A matrix `[n_ratios n_knobs]` and its axes; NaN is drawn as a blank cell."""

    knobs: Sequence[float]
    ratios: Sequence[float]
    values: np.ndarray
    knob_label: str = "L1 coefficient"
    ratio_label: str = "dictionary ratio"


@drawn
def heat_map(title: str, grid: Grid, scale: Scale, strip: Mapping[str, Any] | None = None, edge: Any = None) -> Figure:
    """One map with its controls.

    `strip` holds control columns drawn beside the map in its colours, each a number for all ratios or a mapping
    ratio -> number. `edge` is a sparsity setting per ratio (number or mapping): a staircase parts the cells beyond it.
    """
    rows, columns = grid.values.shape
    controls = {name: _column(values, grid) for name, values in (strip or {}).items()}
    controls = {name: column for name, column in controls.items() if np.isfinite(column).any()}
    left, bottom, top, bar_room = 0.85, 0.9, 0.42, 1.95
    width, height = max(columns * CELL, LEAST_WIDTH), max(rows * ROW, 1.6)
    strip_width = len(controls) * CELL + (GAP if controls else 0)
    figure = canvas(left + width + strip_width + GAP + bar_room, bottom + height + top)
    norm = scale.norm(scale.shade(grid.values))  # of the map alone: an exact control must not stretch the colours
    main = place(figure, left, bottom, width, height)
    _cells(main, grid.values, scale, norm)
    _ticks(main, grid)
    main.set_title(title, pad=8)
    if edge is not None:
        _draw_edge(main, grid, edge)
    if controls:
        beside = place(figure, left + width + GAP, bottom, len(controls) * CELL, height)
        _cells(beside, np.stack(list(controls.values()), axis=1), scale, norm)
        beside.set_yticks([])
        beside.set_xticks(range(len(controls)), list(controls), rotation=60, ha="right", rotation_mode="anchor")
        beside.set_title("controls", pad=8, color=MUTED, fontweight="normal")
    _colour_bar(place(figure, left + width + strip_width + GAP, bottom, 0.16, height), scale, norm)
    return figure


@drawn
def heat_maps(panels: Sequence[tuple[str, Grid, Scale]], across: int = 2) -> Figure:
    """Several small maps in one figure, each with its own colours."""
    shapes = [panel[1].values.shape for panel in panels]
    cell = max(CELL, 2.2 / max(max(columns for _, columns in shapes), 1))
    width, height = cell * max(columns for _, columns in shapes), max(ROW * max(rows for rows, _ in shapes), 1.6)
    across = 1 if width > 6 else min(across, len(panels))
    down = -(-len(panels) // across)
    left, bottom, top, right = 0.75, 0.9, 0.42, 0.95
    figure = canvas(across * (left + width + right), down * (bottom + height + top))
    for index, (title, grid, scale) in enumerate(panels):
        x = (index % across) * (left + width + right) + left
        y = (down - 1 - index // across) * (bottom + height + top) + bottom
        main = place(figure, x, y, width, height)
        norm = scale.norm(grid.values)
        _cells(main, grid.values, scale, norm)
        _ticks(main, grid)
        main.set_title(title, pad=8)
        _colour_bar(place(figure, x + width + GAP, y, 0.14, height), scale, norm)
    return figure


def _column(values: Any, grid: Grid) -> np.ndarray:
    return np.array([by_ratio(values, ratio) for ratio in grid.ratios])


def cell_text(value: float) -> str:
    """A value short enough for a cell: two digits, no leading zero, k and M from 1000, ~0 for what is nearly zero."""
    if not math.isfinite(value):
        return ""
    size = abs(value)
    if size >= 999_500:
        return f"{value / 1e6:.2g}M"
    if size >= 999.5:
        return f"{value / 1e3:.2g}k" if size < 9_950 else f"{value / 1e3:.0f}k"
    if size >= 9.95:
        return f"{value:.0f}"
    if float(value).is_integer():
        return f"{value:.0f}"
    if size >= 0.995:
        return f"{value:.1f}"
    if size >= 0.00995:
        return f"{value:.2f}".replace("0.", ".", 1)
    if size < 5e-6:
        return "~0"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _cells(axes: Axes, values: np.ndarray, scale: Scale, norm: Normalize) -> None:
    from matplotlib import colormaps

    rows, columns = values.shape
    colours = colormaps[scale.colours]
    shown = scale.shade(values)
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    axes.set_facecolor(BLANK)
    axes.pcolormesh(*edges, np.ma.masked_invalid(shown), cmap=colours, norm=norm, edgecolors=PAPER, linewidth=0.6)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(-0.5, rows - 0.5))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    if columns > MOST_PRINTED:
        return
    for row in range(rows):
        for column in range(columns):
            value = values[row, column]
            if not math.isfinite(value):
                continue
            red, green, blue, _ = colours(norm(shown[row, column]))
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            words = cell_text(value / scale.unit)
            colour = "#101010" if bright else "#fefefe"
            axes.text(column, row, words, ha="center", va="center", fontsize=7.6, color=colour)


def _ticks(axes: Axes, grid: Grid) -> None:
    size = 8.5 if len(grid.knobs) <= MOST_PRINTED else 6.5
    names = labels(grid.knobs)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(range(len(grid.ratios)), labels(grid.ratios), fontsize=8.5)
    axes.set_xlabel(grid.knob_label)
    axes.set_ylabel(grid.ratio_label)


def edge_positions(knobs: Sequence[float], ratios: Sequence[float], edge: Any) -> list[int]:
    """How many columns of each row lie at or below the edge; all of them where the edge is unknown."""
    values = [by_ratio(edge, ratio) for ratio in ratios]
    return [sum(not knob > value for knob in knobs) for value in values]


def _draw_edge(axes: Axes, grid: Grid, edge: Any) -> None:
    from matplotlib.patheffects import Normal, Stroke

    columns = len(grid.knobs)
    positions = edge_positions(grid.knobs, grid.ratios, edge)
    inside = [row for row, position in enumerate(positions) if 0 < position < columns]
    if not inside:
        return
    first, last = max(inside[0] - 1, 0), min(inside[-1] + 1, len(positions) - 1)
    x, y = [], []
    for row in range(first, last + 1):
        x += [positions[row] - 0.5] * 2
        y += [row - 0.5, row + 0.5]
    start, end = 0 if first == inside[0] else 1, len(x) if last == inside[-1] else len(x) - 1  # not along the border
    effects = [Stroke(linewidth=4.2, foreground="#101010"), Normal()]
    axes.plot(x[start:end], y[start:end], color="#fefefe", linewidth=2.0, path_effects=effects, clip_on=False)


def _colour_bar(axes: Axes, scale: Scale, norm: Normalize) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import FixedLocator, NullFormatter

    low, high = float(norm.vmin or 0.0), float(norm.vmax or 1.0)
    values = np.geomspace(low, high, 65) if scale.log else np.linspace(low, high, 65)
    middles = np.sqrt(values[1:] * values[:-1]) if scale.log else (values[1:] + values[:-1]) / 2
    colours = colormaps[scale.colours]
    axes.pcolormesh([0, 1], values, middles[:, None], cmap=colours, norm=norm, edgecolors="face", linewidth=0.3)
    axes.set_yscale("log" if scale.log else "linear")
    axes.set(xlim=(0, 1), ylim=(low, high))
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(FixedLocator([]))
    ticks = _bar_ticks(low, high, scale.log)
    axes.set_yticks(ticks, [scale.bar_format(tick) for tick in ticks], fontsize=8)
    axes.tick_params(length=2.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(scale.label, fontsize=8, fontweight="normal", color=MUTED, pad=8)
    _marks(axes, scale, low, high)


def _bar_ticks(low: float, high: float, log: bool) -> list[float]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    ticks: list[float] = []
    slack_low, slack_high = (low * 1e-6, high * 1e-6) if log else [1e-6 * (high - low)] * 2
    for locator in [LogLocator(), LogLocator(subs=(1, 3))] if log else [MaxNLocator(5)]:
        ticks = [float(tick) for tick in locator.tick_values(low, high) if low - slack_low <= tick <= high + slack_high]
        if len(ticks) >= 3:
            break
    return ticks if len(ticks) >= 2 else [low, math.sqrt(low * high) if log else (low + high) / 2, high]


def _marks(axes: Axes, scale: Scale, low: float, high: float) -> None:
    """Brackets for ranges and ticks for single values, right of the numbers; names that would touch are moved up."""

    def fraction(value: float) -> float:
        value = min(max(value, low), high)
        return math.log(value / low) / math.log(high / low) if scale.log else (value - low) / (high - low)

    height = axes.get_window_extent().height / axes.figure.dpi
    apart, floor, x = 0.15 / height, -1.0, 4.0
    transform = axes.transAxes
    for name, mark in sorted(scale.marks.items(), key=lambda item: fraction(float(np.mean(item[1])))):
        ends = mark if isinstance(mark, tuple) else (mark, mark)
        if not all(math.isfinite(end) for end in ends) or ends[1] < low or ends[0] > high:
            continue
        y0, y1 = fraction(ends[0]), fraction(ends[1])
        at = max((y0 + y1) / 2, floor + apart)
        floor = at
        axes.plot([x, x], [y0, y1], color=INK, linewidth=1.6, transform=transform, clip_on=False)
        for y in {y0, y1}:
            axes.plot([x - 0.35, x], [y, y], color=INK, linewidth=1.2, transform=transform, clip_on=False)
        axes.plot([x, x + 0.5], [(y0 + y1) / 2, at], color=MUTED, linewidth=0.8, transform=transform, clip_on=False)
        axes.text(x + 0.65, at, name, fontsize=7.6, va="center", color=INK, transform=transform)

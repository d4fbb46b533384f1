"""Curves and histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_coding.report.canvas import (
    ACCENT,
    INK,
    MUTED,
    RULE,
    WARN,
    canvas,
    drawn,
    number_axis,
    place,
    sequence,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """One line: its name, its points, and what to write at them."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    low: Sequence[float] = ()
    """Lower and upper end of the spread around `y`, where it is known."""
    high: Sequence[float] = ()
    size: str = ""
    """The dictionary size of a trade-off curve; by default the name."""
    family: str = ""
    """The family of a trade-off curve, such as its architecture."""
    faded: bool = False
    """Drawn in grey behind the others, without a name of its own."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes of a figure."""

    title: str
    curves: Sequence[Curve]
    y_label: str = ""
    levels: Mapping[str, float] = field(default_factory=dict)
    """Horizontal dashed lines by name."""
    edges: Mapping[str, float] = field(default_factory=dict)
    """Vertical dotted lines by name."""
    points: Sequence[Curve] = ()
    """Baselines: drawn in grey with their names."""
    y_low: float | None = None
    y_high: float | None = None
    log_y: bool = False


@drawn
def small_multiples(
    panels: Sequence[Panel], x_label: str, across: int = 3, share_y: tuple[float, float] | None = None
) -> Figure:
    """A curve per panel on shared axes, with its own levels and edges."""
    across = min(across, len(panels))
    down = -(-len(panels) // across)
    width, height, left, gap, bottom, top = 2.75, 1.55, 0.65, 0.42, 0.52, 0.55
    figure = canvas(left + across * (width + gap), bottom + down * (height + gap) + top - gap)
    colour = sequence(3)[1]
    xs = [x for panel in panels for curve in panel.curves for x in curve.x]
    for index, panel in enumerate(panels):
        row, column = divmod(index, across)
        axes = place(figure, left + column * (width + gap), bottom + (down - 1 - row) * (height + gap), width, height)
        for curve in panel.curves:
            if len(curve.low):
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(curve.x, curve.y, color=colour, marker="o", markersize=3)
        _guides(axes, panel)
        axes.set_xscale("log")
        axes.set_xlim(min(xs) / 1.4, max(xs) * 1.4)
        number_axis(axes.xaxis)
        axes.set_title(panel.title)
        axes.grid(axis="y")
        if share_y:
            axes.set_ylim(*share_y)
        if column == 0:
            axes.set_ylabel(panel.y_label)
        if index + across >= len(panels):
            axes.set_xlabel(x_label)
        else:
            axes.set_xticklabels([])
    if panels:
        _guide_legend(figure, [*panels[0].levels], [*panels[0].edges])
    return figure


LEVEL_STYLES = ((MUTED, (0, (4, 3))), (ACCENT, (0, (6, 2))), (WARN, (0, (1, 1.5))))


def _guides(axes: Axes, panel: Panel) -> None:
    for (colour, dashes), value in zip(LEVEL_STYLES, panel.levels.values(), strict=False):
        if math.isfinite(value):
            axes.axhline(value, color=colour, linestyle=dashes, linewidth=1.2)
    for value in panel.edges.values():
        if value > 0:
            axes.axvline(value, color=INK, linestyle=":", linewidth=1.1)


def _guide_legend(figure: Figure, levels: Sequence[str], edges: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, linestyle=d) for (c, d), _ in zip(LEVEL_STYLES, levels, strict=False)]
    handles += [Line2D([], [], color=INK, linestyle=":") for _ in edges]
    if handles:
        figure.legend(handles, [*levels, *edges], loc="upper right", ncols=len(handles), borderaxespad=0.2)


@drawn
def histograms(
    panels: Sequence[tuple[str, Sequence[float], Mapping[str, float]]], x_label: str, y_label: str, across: int = 3
) -> Figure:
    """Small multiples of histograms of cosines in 40 bins, each `(title, values, vertical lines by name)`."""
    across = min(across, len(panels))
    down = -(-len(panels) // across)
    width, height, left, gap, bottom, top = 2.75, 1.35, 0.65, 0.42, 0.52, 0.55
    figure = canvas(left + across * (width + gap), bottom + down * (height + gap) + top - gap)
    low = min([0.0, *(math.floor(min(values) * 10) / 10 for _, values, _ in panels if len(values))])
    edges = np.linspace(low, 1.0, 41)
    fractions = [np.histogram(np.clip(v, low, 1), edges)[0] / max(len(v), 1) for _, v, _ in panels]
    highest = max((float(f.max()) for f in fractions), default=1.0)
    for index, ((title, _, marks), heights) in enumerate(zip(panels, fractions, strict=True)):
        row, column = divmod(index, across)
        axes = place(figure, left + column * (width + gap), bottom + (down - 1 - row) * (height + gap), width, height)
        axes.stairs(heights, edges, fill=True, color=sequence(3)[1])
        for (colour, dashes), value in zip(LEVEL_STYLES, marks.values(), strict=False):
            if math.isfinite(value):
                axes.axvline(value, color=colour, linestyle=dashes, linewidth=1.3)
        axes.set(xlim=(low, 1.0), ylim=(0, highest * 1.06), title=title)
        axes.grid(axis="y")
        if column == 0:
            axes.set_ylabel(y_label)
        else:
            axes.set_yticklabels([])
        if index + across >= len(panels):
            axes.set_xlabel(x_label)
        else:
            axes.set_xticklabels([])
    if panels:
        _guide_legend(figure, [*panels[0][2]], [])
    return figure


@drawn
def overlays(
    panels: Sequence[Panel], x_label: str, legend_title: str, steps: bool = False, order: Sequence[str] = ()
) -> Figure:
    """Panels side by side that overlay one line per sparsity setting (densities as steps: x holds the bin edges).

    Curves are coloured in the order of first appearance, or in `order`.
    """
    width, height, left, gap, bottom, top, right = 2.9, 2.1, 0.75, 0.35, 0.7, 0.4, 1.2
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    figure = canvas(left + across * width + (across - 1) * gap + right, down * (bottom + height + top))
    names = list(order) or list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    colours = dict(zip(names, sequence(len(names)), strict=True))
    highest = max((max(c.y, default=0.0) for panel in panels for c in panel.curves), default=1.0)
    for index, panel in enumerate(panels):
        row, column = divmod(index, across)
        axes = place(figure, left + column * (width + gap), (down - 1 - row) * (bottom + height + top) + bottom,
                     width, height)  # fmt: skip
        for curve in panel.curves:
            if steps:
                axes.stairs(curve.y, curve.x, color=colours[curve.name], linewidth=1.5)
            else:
                axes.plot(curve.x, curve.y, color=colours[curve.name])
        axes.set(title=panel.title, xlabel=x_label, ylim=(0, (highest or 1.0) * 1.05))
        axes.grid(True)
        if column == 0:
            axes.set_ylabel(panel.y_label)
        else:
            axes.set_yticklabels([])
    _side_legend(figure, names, colours, legend_title)
    return figure


def _side_legend(figure: Figure, names: Sequence[str], colours: Mapping[str, Any], title: str) -> None:
    from matplotlib.lines import Line2D

    shown = list(names)
    if len(shown) > 12:  # evenly, with both ends
        shown = [shown[round(i * (len(shown) - 1) / 11)] for i in range(12)]
    handles = [Line2D([], [], color=colours[name]) for name in shown]
    figure.legend(handles, shown, title=title, loc="upper right", borderaxespad=0.6, alignment="left")


@drawn
def training_curves(rows: Sequence[Sequence[Panel]], x_label: str, legend_title: str) -> Figure:
    """One row of panels per quantity, one column per dictionary size; colours say the sparsity setting."""
    across, down = max(len(row) for row in rows), len(rows)
    width, height, left, gap, bottom, top, right = 2.6, 1.3, 0.85, 0.3, 0.6, 0.4, 1.25
    figure = canvas(left + across * width + (across - 1) * gap + right, bottom + down * (height + 0.22) + top)
    names = list(dict.fromkeys(curve.name for row in rows for panel in row for curve in panel.curves))
    colours = dict(zip(names, sequence(len(names)), strict=True))
    for r, row in enumerate(rows):
        values = np.array([y for panel in row for curve in panel.curves for y in curve.y], dtype=float)
        values = values[np.isfinite(values)]
        for c, panel in enumerate(row):
            axes = place(figure, left + c * (width + gap), bottom + (down - 1 - r) * (height + 0.22), width, height)
            for curve in panel.curves:
                axes.plot(curve.x, curve.y, color=colours[curve.name], linewidth=1.2)
            axes.grid(True, color=RULE)
            _scale_rows(axes, panel, values)
            if r == 0:
                axes.set_title(panel.title)
            if c == 0:
                axes.set_ylabel(panel.y_label)
            else:
                axes.set_yticklabels([])
            if r == down - 1:
                axes.set_xlabel(x_label)
                axes.xaxis.set_major_formatter(_quantity)
                axes.xaxis.set_major_locator(_few())
            else:
                axes.set_xticklabels([])
    _side_legend(figure, names, colours, legend_title)
    return figure


def _scale_rows(axes: Axes, panel: Panel, values: np.ndarray) -> None:
    """The same y axis along a row of panels."""
    if panel.log_y and values.size and (values > 0).any():
        axes.set_yscale("log")
        low, high = values[values > 0].min(), values.max()
        axes.set_ylim(low / 1.3, high * 1.3)
        number_axis(axes.yaxis)
    elif values.size:
        low, high = min(0.0, values.min()), values.max()
        axes.set_ylim(low, high + 0.05 * ((high - low) or 1.0))


def _quantity(value: float, _: float) -> str:
    from sparse_coding.progress import quantity

    return quantity(value)


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3)

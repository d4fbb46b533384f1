"""The picture of a language model's training: losses beside what counting achieves, learning rate, gradient norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sparse_coding.progress import quantity
from sparse_coding.report.canvas import ACCENT, INK, MUTED, PAPER, RULE, canvas, drawn, place, save, sequence
from sparse_coding.report.records import number, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = ("loss", "train_loss", "val_loss")
STRIPS = {"lr": "learning rate", "grad_norm": "gradient norm"}
SMOOTHED = 50
"""Updates in the log from which on a running median is drawn over them."""
MOST_POINTS = 2000
"""Points drawn of one curve: two for each dot across the picture."""
SPIKE = 4
"""Losses above this multiple of the median, and above every baseline, do not stretch the axis."""


def write_loss_curve(
    path: Path, lines: Sequence[Mapping[str, Any]], baselines: Mapping[str, float], kept: int | None = None
) -> None:
    """Draw the lines of a train_log.jsonl as a PNG, which appears whole or not at all.

    lines: of updates (`iteration`, `tokens`, `loss`, `lr`, `grad_norm`) and of evaluations (`train_loss`, `val_loss`),
    losses in nats per token. baselines: more such losses by name. kept: the update whose weights were kept.
    """
    save(loss_curve(lines, baselines, kept), path)


@drawn
def loss_curve(lines: Sequence[Mapping[str, Any]], baselines: Mapping[str, float], kept: int | None = None) -> Figure:
    """Losses over updates, `baselines` as dashed lines with their names at the right, and thin `STRIPS` below."""
    levels = {f"{name} {value:.2f}": value for name, value in baselines.items() if math.isfinite(value)}
    strips = [key for key in STRIPS if len(_points(lines, key)[0])]
    left, width, height, strip, gap, bottom, top = 0.7, 6.4, 3.2, 0.5, 0.3, 0.72, 0.36
    right = 0.3 + 0.078 * max(map(len, levels), default=0)
    below = bottom + len(strips) * (strip + gap)
    figure = canvas(left + width + right, below + height + top)

    main = place(figure, left, below, width, height)
    _draw_losses(main, lines, kept)
    _limit(main, np.concatenate([_points(lines, key)[1] for key in LOSSES]), list(levels.values()))
    _draw_levels(main, levels, 0.16 / height)
    main.set_ylabel("loss (nats per token)")
    main.grid(True)
    if main.get_legend_handles_labels()[0]:
        figure.legend(loc="upper left", bbox_to_anchor=((left - 0.1) / figure.get_figwidth(), 1), ncols=5,
                      columnspacing=1.6, handlelength=1.8)  # fmt: skip
    for index, key in enumerate(reversed(strips)):
        axes = place(figure, left, bottom + index * (strip + gap), width, strip)
        _draw_strip(axes, *_points(lines, key))
        axes.set_title(STRIPS[key], fontsize=8.5, fontweight="normal", pad=3)
    _count_updates(figure.axes, lines)
    return figure


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Updates and the finite values of `key`."""
    found = [(number(line.get("iteration")), number(line.get(key))) for line in lines]
    x, y = np.array([pair for pair in found if all(map(math.isfinite, pair))], dtype=float).reshape(-1, 2).T
    return x, y


def _draw_losses(axes: Axes, lines: Sequence[Mapping[str, Any]], kept: int | None) -> None:
    dark, middle, _ = sequence(3)
    x, y = _points(lines, "loss")
    noisy = len(x) >= SMOOTHED
    if len(x):
        axes.plot(*_thinned(x, y), color=middle, linewidth=0.8, alpha=0.5 if noisy else 1, label="updates",
                  marker="." if len(x) == 1 else None)  # fmt: skip
    if noisy:
        axes.plot(*_running_median(x, y), color=middle, linewidth=1.8, label="running median")
    looks = {"train_loss": (dark, "o", "training text"), "val_loss": (ACCENT, "s", "held-out text")}
    for key, (colour, marker, name) in looks.items():
        x, y = _points(lines, key)
        if len(x):
            axes.plot(*_thinned(x, y), color=colour, marker=marker if len(x) <= 60 else None, markersize=3.5,
                      linewidth=1.2, markeredgecolor=PAPER, markeredgewidth=0.4, label=name)  # fmt: skip
        if key == "val_loss" and kept is not None and (x == kept).any():
            axes.plot(kept, y[x == kept][-1], linestyle="none", marker="o", markersize=10, fillstyle="none", color=INK,
                      label=f"kept: {kept:,}", zorder=5)  # fmt: skip


def _limit(axes: Axes, losses: Float[np.ndarray, "N"], levels: Sequence[float]) -> None:
    """Show everything but spikes, and say how many those are."""
    highest = max([SPIKE * float(np.median(losses)) if len(losses) else 0.0, *levels])
    spikes = losses[losses > highest]
    shown = np.append(losses[losses <= highest], levels)
    if len(shown):
        margin = 0.04 * (shown.max() - shown.min() or 1.0)
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
    if len(spikes):
        words = f"{len(spikes):,} above, up to {short(spikes.max())}"
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
        axes.text(0.995, 0.985, words, transform=axes.transAxes, ha="right", va="top", fontsize=8, bbox=box)


def _draw_levels(axes: Axes, levels: Mapping[str, float], gap: float) -> None:
    """Dashed lines with their names right of the axes, at least `gap` of the height apart."""
    low, high = axes.get_ylim()
    names = sorted(levels, key=lambda name: levels[name])
    places: list[float] = []
    for name in names:
        y = (levels[name] - low) / (high - low)
        places.append(max(y, places[-1] + gap) if places else y)
    ceiling = 1.0
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    leader = {"arrowstyle": "-", "color": RULE, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
    for name, y in zip(names, places, strict=True):
        axes.axhline(levels[name], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
        axes.annotate(name, (1, levels[name]), (1.02, y), axes.get_yaxis_transform(), axes.transAxes, va="center",
                      color=MUTED, annotation_clip=False, arrowprops=leader)  # fmt: skip


def _draw_strip(axes: Axes, x: Float[np.ndarray, "N"], y: Float[np.ndarray, "N"]) -> None:
    """A small curve from zero up; on a log axis if spikes would press the rest to the floor."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.plot(*_thinned(x, y), color=MUTED, linewidth=1.0, marker="." if len(x) == 1 else None)
    axes.grid(True)
    if y.min() > 0 and y.max() > 15 * np.median(y):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(min(0.0, y.min()), 1.1 * y.max() or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(2))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _count_updates(all_axes: Sequence[Axes], lines: Sequence[Mapping[str, Any]]) -> None:
    """The same updates across all axes; the lowest says how many, and how many tokens that is."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    updates, tokens = _points(lines, "tokens")
    last = max(updates.max(initial=0.0), 1.0)
    each = tokens.max(initial=0.0) / last
    for axes in all_axes:
        axes.set_xlim(-0.015 * last, 1.015 * last)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(labelbottom=False)
    lowest = min(all_axes, key=lambda axes: axes.get_position().y0)
    lowest.tick_params(labelbottom=True)
    lowest.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x:,.0f}" + (f"\n{quantity(x * each)}" if each else ""))
    )
    lowest.set_xlabel("updates, tokens seen" if each else "updates")


def _running_median(
    x: Float[np.ndarray, "N"], y: Float[np.ndarray, "N"]
) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """Over about a fiftieth of the curve around each of its points; narrower at the start, where the loss falls."""
    at = np.unique(np.linspace(0, len(x) - 1, MOST_POINTS // 2).astype(int))
    reach = np.minimum(at, max(5, len(x) // 100))
    return x[at], np.array([np.median(y[i - r : i + r + 1]) for i, r in zip(at, reach, strict=True)])


def _thinned(
    x: Float[np.ndarray, "N"], y: Float[np.ndarray, "N"]
) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """At most `MOST_POINTS`: the lowest and the highest of each stretch, so that a spike stays."""
    if len(x) <= MOST_POINTS:
        return x, y
    stretches = np.array_split(np.arange(len(x)), MOST_POINTS // 2)
    at = np.unique([end for part in stretches for end in (part[y[part].argmin()], part[y[part].argmax()])])
    return x[at], y[at]

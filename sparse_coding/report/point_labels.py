"""Names beside points, only where they cover nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sparse_coding.report.canvas import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_labels(
    axes: Axes, labels: Sequence[tuple[float, float, str]], size: float = 7.2, background: Sequence[Any] = ()
) -> None:
    """Write each label beside its point, where nothing but `background` lines is covered; leave it out where there is
    no room."""
    spots: list[tuple[float, float]] = [tuple(axes.transData.transform((x, y))) for x, y, _ in labels]
    scale = axes.figure.dpi / 72
    box = axes.get_window_extent()
    lines = [line for line in axes.lines if line not in background]
    taken = [(x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale) for x, y in spots]
    taken += [(x - scale, y - scale, x + scale, y + scale) for line in lines for x, y in _along(line, 4 * scale)]
    for (x, y), (_, _, words) in zip(spots, labels, strict=True):
        width, height = len(words) * size * 0.64 * scale, size * 1.15 * scale
        for right, up in ((1, 0.6), (1, -0.6), (-1, 0.6), (-1, -0.6), (0, 1.3), (0, -1.3)):
            cx = x + right * (width / 2 + 4 * scale)
            cy = y + up * 8 * scale
            spot = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            outside = spot[0] < box.x0 or spot[2] > box.x1 or spot[1] < box.y0 or spot[3] > box.y1
            if outside or any(_overlap(spot, other) for other in taken):
                continue
            taken.append(spot)
            at = axes.transAxes.inverted().transform((cx, cy))
            axes.text(at[0], at[1], words, transform=axes.transAxes, ha="center", va="center", fontsize=size, color=INK)
            break


def _along(line: Any, step: float) -> list[tuple[float, float]]:
    """Pixels along a drawn line, `step` apart."""
    points = line.axes.transData.transform(line.get_xydata())
    found = []
    for (x0, y0), (x1, y1) in pairwise(points):
        count = max(int(math.hypot(x1 - x0, y1 - y0) / step), 1)
        found += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count)]
    return found


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

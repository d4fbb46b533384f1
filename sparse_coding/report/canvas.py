"""Figures without global state: sizes in inches, one palette, PNG for the folder, SVG in the page's colours.

matplotlib draws with the colours below; in the SVG each becomes a CSS variable, so one picture suits light and dark.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sparse_coding.report.records import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER, BLANK = "#1b2430", "#66707d", "#d9dee5", "#ffffff", "#e9ecf1"
ACCENT, WARN = "#d1495b", "#e08e0b"
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--card", BLANK: "--blank"}
MARKERS = "osD^v<>ph"
DASHES = ("-", "--", ":", "-.")
CATEGORIES = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#5a32e6",
    "#774422",
    "#335555",
    "#8888ff",
)
"""Colours without an order, for architectures: those of Okabe and Ito that show on light and dark pages, and four far
from them in ordinary, red-blind and green-blind sight (a test)."""
CATEGORY_MARKERS = "osD^vX<P>*"

RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "sparse_coding",
}

P = ParamSpec("P")
T = TypeVar("T")


def drawn(function: Callable[P, T]) -> Callable[P, T]:
    """Run a drawing function in the report's style, whatever style the caller's matplotlib has."""

    @wraps(function)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(RC)
            return function(*args, **kwargs)

    return styled


def canvas(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def place(figure: Figure, left: float, bottom: float, width: float, height: float, **kwargs: Any) -> Axes:
    """Axes at a place in inches from the lower left corner."""
    total_width, total_height = figure.get_size_inches()
    box = (left / total_width, bottom / total_height, width / total_width, height / total_height)
    return figure.add_axes(box, **kwargs)


def sequence(count: int) -> list[Any]:
    """`count` ordered colours from viridis, without the ends that vanish on a dark or a light page."""
    from matplotlib import colormaps

    viridis = colormaps["viridis"]
    return [viridis(0.28 + 0.55 * index / max(count - 1, 1)) for index in range(count)]


def number_axis(axis: Any) -> None:
    """Plain numbers on a log axis that holds its data already: 1, 3, 10, 30; powers of ten on a long one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 3) if high < 600 * low else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


@drawn
def save(figure: Figure, path: Path) -> str:
    """Write the figure as PNG, whole or not at all, and return it as SVG for the page; both repeat byte for byte."""
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=130, metadata={"Software": None})
    figure.savefig(svg, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(png.getvalue())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return page_svg(svg.getvalue(), path.stem)


def page_svg(text: str, prefix: str) -> str:
    """An SVG file made fit for the inside of a page: no prolog, own ids, the page's fonts and colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    found = re.search(r'viewBox="([^"]+)"', head)
    box = found[1] if found else "0 0 100 100"
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", prefix)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = body.replace('xlink:href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    body = re.sub(r"'DejaVu Sans'(?:, [^;\"]*)?", "var(--font)", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return f'<svg viewBox="{box}" width="{box.split()[2]}pt" role="img">{body}'

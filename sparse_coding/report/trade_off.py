"""What is traded for sparsity, read from records: reconstruction, behaviour and match with the truth over L0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_coding.errors import UserError, near
from sparse_coding.report.canvas import DASHES, save
from sparse_coding.report.families import by_site, families, knob_word
from sparse_coding.report.frontier import frontier
from sparse_coding.report.page import visible
from sparse_coding.report.pictures import Curve, Panel
from sparse_coding.report.records import Record, grid_matrix, has, labels, metric, number, ratio

RECOVERED = ("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean")
L0_LABEL = "L0 (mean active latents per token)"


@dataclass(frozen=True)
class Measure:
    """A quantity that is traded for sparsity."""

    name: str
    title: str
    label: str
    low: float
    """The y axis never goes further."""
    high: float
    lower_is_better: bool = False


def measures(records: Sequence[Record]) -> list[Measure]:
    """Those that any member has: FVU, the first measure of recovered behaviour, MMCS with the truth."""
    found = []
    if has(records, "fvu"):
        found.append(Measure("fvu", "Reconstruction", "FVU (lower is better)", 0.0, 1.05, True))
    if recovered := recovered_metric(records):
        label = f"{recovered_words(recovered)} (higher is better)"
        found.append(Measure(recovered, "Behaviour of the model", label, -0.05, 1.02))
    if has(records, "mmcs"):
        found.append(Measure("mmcs", "Match with the truth", "MMCS (higher is better)", 0.0, 1.02))
    return found


def recovered_metric(records: Sequence[Record]) -> str:
    """The first measure of recovered behaviour that any member has, or ''."""
    return next((name for name in RECOVERED if has(records, name)), "")


def recovered_words(name: str) -> str:
    return "loss recovered" if name.startswith("ce_") else "KL recovered"


def trade_off(
    records: Sequence[Record], measure: Measure, baselines: Mapping[str, Any] | None = None, highlight: str = ""
) -> Panel:
    """One curve per family and size over L0, a point per sparsity setting, averages over seeds.

    Points carry their setting where there is one family, and on the family to `highlight` (its name, or that of its
    architecture); the others are grey then, and drawn at the largest size alone.
    """
    parts = families(records)
    bright = {name for name, found in parts.items() if highlight in ("", name, str(found[0].get("architecture")))}
    words = dict(zip(shown := shown_ratios(records), labels(shown), strict=True))
    curves = []
    for family, found in parts.items():
        labelled = family in bright and len(bright) == 1
        for size, x, y, settings in _lines(found, measure.name):
            if size in words and (family in bright or size == shown[-1]):
                name = f"{words[size]} ({family})" if family else words[size]
                curves.append(Curve(name, x, y, settings if labelled else (), size=words[size], family=family,
                                    faded=family not in bright))  # fmt: skip
    (alone,) = bright if len(bright) == 1 else ("",)
    said = len(bright) == 1 and measure.name == "fvu"
    title = f"{measure.title} (points: {knob_word(parts[alone])})" if said else measure.title
    points = [p for key, found in (baselines or {}).items() if (p := _baseline(visible(str(key)), found, measure.name))]
    return Panel(title, curves, measure.label, points=points, y_low=measure.low, y_high=measure.high)


def shown_ratios(records: Sequence[Record]) -> list[float]:
    """Sizes that are drawn: all of one family, of several as many as there are line styles, evenly with both ends."""
    ratios = sorted({value for record in records if math.isfinite(value := ratio(record))})
    if len(ratios) <= len(DASHES) or len(families(records)) == 1:
        return ratios
    return [ratios[round(i * (len(ratios) - 1) / (len(DASHES) - 1))] for i in range(len(DASHES))]


def _lines(records: Sequence[Record], name: str) -> list[tuple[float, list[float], list[float], list[str]]]:
    """Size, L0, value and knob labels of each row of one family's grid that has a point."""
    knobs, ratios, l0 = grid_matrix(records, "l0")
    values, words = grid_matrix(records, name)[2], labels(knobs)
    found = []
    for row, size in enumerate(ratios):
        at = np.flatnonzero(np.isfinite(values[row]) & (l0[row] > 0))
        if len(at):
            found.append((size, l0[row][at].tolist(), values[row][at].tolist(), [words[i] for i in at]))
    return found


def _baseline(name: str, found: Any, measure: str) -> Curve | None:
    """A baseline is one object of metrics or a list of them (a curve)."""
    parts = [part for part in (found if isinstance(found, list) else [found]) if isinstance(part, Mapping)]
    pairs = sorted((number(part.get("l0")), number(part.get(measure))) for part in parts)
    pairs = [(x, y) for x, y in pairs if x > 0 and math.isfinite(y)]
    return Curve(name, [x for x, _ in pairs], [y for _, y in pairs]) if pairs else None


def trade_off_figure(
    records: Sequence[Record],
    baselines: Mapping[str, Any] | None = None,
    highlight: str = "",
    true_l0: float = math.nan,
    x_label: str = L0_LABEL,
) -> tuple[Any, list[Panel]]:
    """All measures side by side, and the panels; (None, []) where no member has an L0 and a measure."""
    panels = [trade_off(records, measure, baselines, highlight) for measure in measures(records)]
    panels = [panel for panel in panels if panel.curves]
    if not panels:
        return None, []
    if true_l0 > 0:
        panels = [Panel(**{**vars(panel), "edges": {"true L0": true_l0}}) for panel in panels]
    one = len({str(record.get("architecture")) for record in records}) == 1
    return frontier(panels, x_label, "dictionary ratio", "family" if one else "architecture"), panels


def architecture_frontier(
    records: Sequence[Record], path: Path, highlight: str = "", true_l0: float | None = None
) -> Path:
    """Draw every architecture on one picture, FVU and loss recovered (or MMCS, of toy records) over L0, as a PNG.

    `highlight` names the one architecture (or family, see `families.families`) to colour, the rest is grey. `true_l0`
    is marked on the pictures of toy records; by default it is the mean of their l0_true. Raises UserError where the
    records come from several sites, none has a positive L0 and a measure, or none is of the highlighted family.
    """
    sites = by_site(records)
    if len(sites) > 1:
        raise UserError(f"the records come from {', '.join(sites)}: give those of one site, others do not compare")
    names = {
        name for family, found in families(records).items() for name in (family, str(found[0].get("architecture")))
    }
    if highlight and highlight not in names:
        known = sorted(name for name in names if name)
        raise UserError(f"no record is of {highlight!r}: there are {', '.join(known)}{near(highlight, known)}")
    if true_l0 is None:
        true_l0 = mean_true_l0(records)
    toy = has(records, "mmcs")
    label = "L0 (mean active latents per sample)" if toy else L0_LABEL
    figure, _ = trade_off_figure(records, highlight=highlight, true_l0=true_l0, x_label=label)
    if figure is None:
        raise UserError(f"none of the {len(records)} records has a positive L0 and a finite FVU: nothing to draw")
    save(figure, path)
    return path


def mean_true_l0(records: Sequence[Record]) -> float:
    """Mean number of active features per sample that the records state, or NaN."""
    known = [value for record in records if math.isfinite(value := metric(record, "l0_true"))]
    return float(np.mean(known)) if known else math.nan

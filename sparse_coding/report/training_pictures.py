"""Training curves of a language-model sweep, one figure per family."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparse_coding.report.families import families, file_words, knob_label
from sparse_coding.report.page import Picture
from sparse_coding.report.pictures import Curve, Panel, training_curves
from sparse_coding.report.records import Record, axes, knob, labels, number, ratio
from sparse_coding.report.run_pictures import Site

MOST_POINTS = 300
"""Points drawn of one training curve; longer logs are thinned evenly, the last point stays."""
MOST_FAMILIES = 12
"""Figures of one site."""

CURVES = {"loss": ("loss", True), "fvu": ("FVU", False), "l0": ("L0", True), "dead": ("dead fraction", False)}


def training(site: Site) -> list[Picture]:
    """Loss, FVU, L0 and dead latents over training, a column per size; a figure per family."""
    column = {name: index for index, name in enumerate(site.run.member_names)}
    log = [line for line in site.run.log if math.isfinite(number(line.get("tokens")))]
    if len(log) < 2:
        return []
    if len(log) > MOST_POINTS:
        log = [log[round(i * (len(log) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
    parts = families(site.records)
    words = file_words(parts)
    left = max(len(parts) - MOST_FAMILIES, 0)
    found = []
    for index, (family, records) in enumerate([*parts.items()][:MOST_FAMILIES]):
        members = [record for record in records if record["name"] in column and math.isfinite(ratio(record))]
        rows = _rows(members, log, column)
        if not rows:
            continue
        caption = (
            f"Each line is one member (each seed has its own); colours say the {knob_label(members)}. Lines that "
            "still fall at the right end are under-trained, and dictionaries of a language model need far more "
            "steps than their loss suggests: look at L0 and the dead fraction, which settle last."
        )
        note = f"{left} more families are in log.jsonl and not drawn." if left and index == MOST_FAMILIES - 1 else ""
        figure = training_curves(rows, "training tokens", knob_label(members))
        name = f"training-{words[family]}" if family else "training"
        title = f"Training ({family})" if family else "Training"
        found.append(site.picture(name, title, figure, caption, note))
    return found


def _rows(members: Sequence[Record], log: Sequence[Record], column: dict[str, int]) -> list[list[Panel]]:
    """The panels of one family, a row per quantity that was logged."""
    knobs, ratios = axes(members)
    words = dict(zip(knobs, labels(knobs), strict=True))
    ordered = sorted(members, key=lambda record: knob(record) if math.isfinite(knob(record)) else math.inf)
    rows = []
    for name, (label, log_y) in CURVES.items():
        row = []
        for at, size in zip(ratios, labels(ratios), strict=True):
            curves = [
                Curve(words.get(knob(record), "–"), *_series(log, name, column[record["name"]], record))
                for record in ordered
                if ratio(record) == at
            ]
            row.append(Panel(f"ratio {size}", [curve for curve in curves if len(curve.x)], label, log_y=log_y))
        if any(panel.curves for panel in row):
            rows.append(row)
    return rows


def _series(log: Sequence[Record], name: str, column: int, record: Record) -> tuple[list[float], list[float]]:
    """Tokens and the finite values of one member; dead counts become fractions."""
    size = number(record.get("d_sae")) if name == "dead" else 1.0
    x, y = [], []
    for line in log:
        values = line.get(name)
        value = number(values[column]) / size if isinstance(values, list) and column < len(values) else math.nan
        if math.isfinite(value):
            x.append(number(line["tokens"]))
            y.append(value)
    return x, y

"""The pictures of a language-model sweep, site by site, and how to read each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_coding.report.canvas import save
from sparse_coding.report.heatmaps import Grid, Scale, heat_maps
from sparse_coding.report.page import Picture, visible
from sparse_coding.report.pictures import Curve, Panel, frontier, overlays, training_curves
from sparse_coding.report.records import (
    Record,
    RunData,
    axes,
    grid_matrix,
    groups,
    has,
    knob,
    labels,
    metric,
    number,
    ratio,
    short,
)
from sparse_coding.report.tables import blanks, knob_label

RECOVERED = ("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean")
MOST_POINTS = 300
"""Points drawn of one training curve; longer logs are thinned evenly, the last point stays."""


@dataclass(frozen=True)
class Site:
    """The members of one site and where their pictures go."""

    name: str
    records: list[Record]
    run: RunData
    folder: Path
    prefix: str = ""

    def picture(self, name: str, title: str, figure: Any, caption: str, note: str = "") -> Picture:
        path = self.folder / f"{self.prefix}{name}.png"
        return Picture(title, save(figure, path), caption, f"pictures/{path.name}", note)

    @property
    def baselines(self) -> Mapping[str, Any]:
        """controls.sites[site].baselines, or controls.baselines for all sites."""
        controls = self.run.settings.get("controls")
        controls = controls if isinstance(controls, Mapping) else {}
        sites = controls.get("sites")
        own = sites.get(self.name) if isinstance(sites, Mapping) else None
        found = (own if isinstance(own, Mapping) else controls).get("baselines")
        return found if isinstance(found, Mapping) else {}


def recovered_metric(records: Sequence[Record]) -> str:
    """The first measure of recovered behaviour that any member has, or ''."""
    return next((name for name in RECOVERED if has(records, name)), "")


def families(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Members by what varies besides sparsity, size and seed (architecture, learning rate), under a short name."""
    parts = groups(records, "architecture", "lr")
    architectures, lrs = {key[0] for key in parts}, {key[1] for key in parts}
    named = {}
    for (architecture, lr), found in parts.items():
        words = [visible(str(architecture))] if len(architectures) > 1 else []
        words += [f"lr {short(number(lr))}"] if len(lrs) > 1 else []
        named[", ".join(words)] = found
    return named


def frontiers(site: Site) -> list[Picture]:
    """FVU and loss recovered over L0, one line per dictionary size."""
    recovered = recovered_metric(site.records)
    panels = []
    for name, title, label in (
        ("fvu", "Reconstruction (points: L1)", "FVU (lower is better)"),
        (
            recovered,
            "Behaviour of the model",
            f"{'loss' if recovered.startswith('ce') else 'KL'} recovered (higher is better)",
        ),
    ):
        if name and has(site.records, name):
            panels.append(_trade_off(site, name, title, label))
    panels = [panel for panel in panels if panel.curves]
    if not panels:
        return []
    figure = frontier(panels, "L0 (mean active latents per token)", "dictionary ratio")
    left = sum(math.isnan(metric(record, "fvu")) or not metric(record, "l0") > 0 for record in site.records)
    caption = (
        f"One line per dictionary size, a point per {knob_label(site.records)} (written beside it where there is "
        "room); averages over seeds. Left is sparser: compare sizes at equal L0, and prefer the point after which "
        "more active latents buy little. A line that folds back or falls off at its left end has mostly dead members "
        "there."
    )
    if len(panels) == 1:
        caption += " Loss recovered was not measured in this run." if panels[0].title.startswith("Rec") else ""
    note = f"{left} members have no finite value at a positive L0 and are not drawn." if left else ""
    return [site.picture("frontier", "Trade-off between sparsity and faithfulness", figure, caption, note)]


def _trade_off(site: Site, name: str, title: str, label: str) -> Panel:
    curves = []
    for index, (family, records) in enumerate(families(site.records).items()):
        knobs, ratios, l0 = grid_matrix(records, "l0")
        values, words = grid_matrix(records, name)[2], labels(knobs)
        for row, size in enumerate(labels(ratios)):
            ok = np.isfinite(values[row]) & (l0[row] > 0)
            if ok.any():
                at = np.flatnonzero(ok)
                name_ = f"{size} ({family})" if family else size
                curves.append(
                    Curve(name_, l0[row][at], values[row][at], [words[i] for i in at], size=size, family=index)
                )
    points = [point for key, found in site.baselines.items() if (point := _baseline(visible(str(key)), found, name))]
    bounds = (0.0, 1.05) if name == "fvu" else (-0.05, 1.02)
    return Panel(title, curves, label, points=points, y_low=bounds[0], y_high=bounds[1])


def _baseline(name: str, found: Any, measure: str) -> Curve | None:
    """A baseline is one object of metrics or a list of them (a curve)."""
    parts = [part for part in (found if isinstance(found, list) else [found]) if isinstance(part, Mapping)]
    pairs = sorted((number(part.get("l0")), number(part.get(measure))) for part in parts)
    pairs = [(x, y) for x, y in pairs if x > 0 and math.isfinite(y)]
    return Curve(name, [x for x, _ in pairs], [y for _, y in pairs]) if pairs else None


MAPS = {
    "fvu": ("Fraction of variance unexplained", Scale("FVU", 0.0, 1.0)),
    "l0": ("Active latents (L0)", Scale("L0", log=True)),
    "dead_fraction": ("Dead fraction", Scale("dead", 0.0, 1.0, colours="cividis")),
    "mmcs_next_larger": ("MMCS with next larger", Scale("MMCS", 0.0, 1.0)),
}


def maps(site: Site) -> list[Picture]:
    """The four maps of the 2023 study, for every architecture and learning rate."""
    found = []
    for index, (family, records) in enumerate(families(site.records).items()):
        panels = []
        for name, (title, scale) in MAPS.items():
            if has(records, name):
                grid = Grid(*grid_matrix(records, name), knob_label(records), "ratio  d_sae / d_in")
                panels.append((title, grid, scale))
        if not panels:
            continue
        caption = (
            "Sparsity across, dictionary size up. Good members lie where FVU and the dead fraction are both low at "
            "an L0 far below the width; MMCS with the next larger dictionary asks whether another size finds the "
            "same directions, the only one of the four that speaks of the features themselves, and it is high for "
            "trivial reasons where most latents are dead."
        )
        note = " ".join(text for title, grid, _ in panels if (text := _blank_note(title, grid)))
        title = "Maps over sparsity and size" + (f" ({family})" if family else "")
        name = "maps" if not index else f"maps-{index}"
        found.append(site.picture(name, title, heat_maps(panels), caption, note))
    return found


def _blank_note(title: str, grid: Grid) -> str:
    if "next larger" in title:
        return "MMCS with next larger is blank for the largest dictionary."
    text = blanks(grid.values)
    return f"{title}: {text}" if text else ""


def densities(site: Site) -> list[Picture]:
    """How often latents fire: a panel per size, a line per sparsity setting (of the first family and seed)."""
    panels = []
    family, records = next(iter(families(site.records).items()))
    knobs, ratios = axes(records)
    for at, size in zip(ratios, labels(ratios), strict=True):
        curves = []
        for value, word in zip(knobs, labels(knobs), strict=True):
            members = [record for record in records if ratio(record) == at and knob(record) == value]
            histogram = next((found for record in members if (found := _density(record))), None)
            if histogram:
                curves.append(Curve(word, *histogram))
        if curves:
            panels.append(Panel(f"ratio {size}", curves, "share of latents"))
    if not panels:
        return []
    figure = overlays(panels, "log₁₀ density (share of tokens)", knob_label(records), steps=True)
    caption = (
        "How often each latent fires; dead latents are not in the histograms (see the dead fraction). Latents that "
        "stand for single meanings fire on few tokens, between 10⁻⁵ and 10⁻² say; a hump to the right of that is "
        "dense directions, and a second hump far to the left is latents that are nearly dead."
    )
    note = "One seed is drawn where there are several." if len({record.get("seed") for record in records}) > 1 else ""
    note = f"{note} Drawn for {family}.".strip() if family else note
    return [site.picture("densities", "Feature densities", figure, caption, note)]


def _density(record: Record) -> tuple[list[float], list[float]] | None:
    """Bin edges and share of latents per bin, or None where the record has no usable histogram."""
    density = record.get("density")
    if not isinstance(density, Mapping):
        return None
    edges, counts = density.get("log10_edges"), density.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1:
        return None
    edges, counts = [number(edge) for edge in edges], [number(count) for count in counts]
    total = sum(counts)
    if not total > 0 or any(map(math.isnan, edges)):
        return None
    return edges, [count / total for count in counts]


CURVES = {"loss": ("loss", True), "fvu": ("FVU", False), "l0": ("L0", True), "dead": ("dead fraction", False)}


def training(site: Site) -> list[Picture]:
    """Loss, FVU, L0 and dead latents over training, a column per size."""
    column = {name: index for index, name in enumerate(site.run.member_names)}
    members = [record for record in site.records if record["name"] in column and math.isfinite(ratio(record))]
    log = [line for line in site.run.log if math.isfinite(number(line.get("tokens")))]
    if not members or len(log) < 2:
        return []
    if len(log) > MOST_POINTS:
        log = [log[round(i * (len(log) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
    knobs, ratios = axes(members)
    words = dict(zip(knobs, labels(knobs), strict=True))
    rows = []
    for name, (label, log_y) in CURVES.items():
        row = []
        for at, size in zip(ratios, labels(ratios), strict=True):
            curves = [
                Curve(words.get(knob(record), "–"), *_series(log, name, column[record["name"]], record))
                for record in sorted(
                    members, key=lambda record: knob(record) if math.isfinite(knob(record)) else math.inf
                )
                if ratio(record) == at
            ]
            row.append(Panel(f"ratio {size}", [curve for curve in curves if len(curve.x)], label, log_y=log_y))
        if any(panel.curves for panel in row):
            rows.append(row)
    if not rows:
        return []
    figure = training_curves(rows, "training tokens", knob_label(members))
    caption = (
        "Each line is one member (each seed and learning rate has its own); colours say the sparsity setting. Lines "
        "that still fall at the right end are under-trained, and dictionaries of a language model need far more "
        "steps than their loss suggests: look at L0 and the dead fraction, which settle last."
    )
    return [site.picture("training", "Training", figure, caption)]


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

"""The pictures of a language-model sweep, site by site, and how to read each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_coding.report.canvas import save
from sparse_coding.report.families import families, file_words, knob_label, knob_word
from sparse_coding.report.frontier import view_start
from sparse_coding.report.heatmaps import Grid, Scale, heat_maps
from sparse_coding.report.page import Picture
from sparse_coding.report.pictures import Curve, Panel, overlays
from sparse_coding.report.records import (
    Record,
    RunData,
    axes,
    grid_matrix,
    has,
    knob,
    labels,
    metric,
    number,
    ratio,
    short,
)
from sparse_coding.report.tables import blanks
from sparse_coding.report.trade_off import shown_ratios, trade_off_figure

MOST_PANELS = 12
"""Panels of feature densities."""
RANKS = ("sparsest", "sparser", "middle", "denser", "densest")
"""Lines of a density panel where panels have settings of their own."""


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


def frontiers(site: Site) -> list[Picture]:
    """FVU and loss recovered over L0: a line per dictionary size, or per architecture where there are several."""
    figure, panels = trade_off_figure(site.records, site.baselines)
    if figure is None:
        return []
    several = len(families(site.records)) > 1
    left = sum(math.isnan(metric(record, "fvu")) or not metric(record, "l0") > 0 for record in site.records)
    caption = _several_words(site) if several else _one_words(site)
    if len(panels) == 1 and panels[0].title.startswith("Rec"):
        caption += " Loss recovered was not measured in this run."
    note = f"{left} members have no finite value at a positive L0 and are not drawn." if left else ""
    start = view_start(panels)
    if any(x < start for panel in panels for curve in panel.curves for x in curve.x):
        note += f" The picture begins at L0 {short(start, 2)}: collapsed members lie left of it."
    return [site.picture("frontier", "Trade-off between sparsity and faithfulness", figure, caption, note.strip())]


def _one_words(site: Site) -> str:
    return (
        f"One line per dictionary size, a point per {knob_label(site.records)} (written beside it where there is "
        "room); averages over seeds. Left is sparser: compare sizes at equal L0, and prefer the point after which "
        "more active latents buy little. A line that folds back or falls off at its left end has mostly dead members "
        "there."
    )


def _several_words(site: Site) -> str:
    sizes = {value for record in site.records if math.isfinite(value := ratio(record))}
    drawn = shown_ratios(site.records)
    words = (
        "One colour and marker per architecture, a point per sparsity setting; averages over seeds. Left is sparser: "
        "compare at equal L0, where the lower FVU and the higher loss recovered win (the tables below read the lines "
        "there)."
    )
    if len(sizes) > 1:
        words += " The line style says the size, solid is the largest; compare lines of one style."
    if len(drawn) < len(sizes):
        words += f" {len(drawn)} of {len(sizes)} sizes are drawn."
    return words


MAPS = {
    "fvu": ("Fraction of variance unexplained", Scale("FVU", 0.0, 1.0)),
    "l0": ("Active latents (L0)", Scale("L0", log=True)),
    "dead_fraction": ("Dead fraction", Scale("dead", 0.0, 1.0, colours="cividis")),
    "mmcs_next_larger": ("MMCS with next larger", Scale("MMCS", 0.0, 1.0)),
}


def maps(site: Site) -> list[Picture]:
    """The four maps of the 2023 study, for every architecture and learning rate."""
    found = []
    parts = families(site.records)
    words = file_words(parts)
    for family, records in parts.items():
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
        name = f"maps-{words[family]}" if family else "maps"
        found.append(site.picture(name, title, heat_maps(panels), caption, note))
    return found


def _blank_note(title: str, grid: Grid) -> str:
    if "next larger" in title:
        return "MMCS with next larger is blank for the largest dictionary."
    text = blanks(grid.values)
    return f"{title}: {text}" if text else ""


def densities(site: Site) -> list[Picture]:
    """How often latents fire: a panel per size, or per family at the largest size; a line per sparsity setting."""
    parts = families(site.records)
    panels = _sizes(site.records) if len(parts) == 1 else [p for item in parts.items() for p in _family(*item)]
    left, panels = max(len(panels) - MOST_PANELS, 0), panels[:MOST_PANELS]
    if not panels:
        return []
    label, order = (knob_label(site.records), ()) if len(parts) == 1 else ("within a panel", RANKS)
    figure = overlays(panels, "log₁₀ density (share of tokens)", label, steps=True, order=order)
    caption = (
        "How often each latent fires; dead latents are not in the histograms (see the dead fraction). Latents that "
        "stand for single meanings fire on few tokens, between 10⁻⁵ and 10⁻² say; a hump to the right of that is "
        "dense directions, and a second hump far to the left is latents that are nearly dead."
    )
    notes = ["One seed is drawn where there are several."] if _several_seeds(site.records) else []
    notes += [f"One panel per architecture, at its largest size; settings in its title.{_left(left)}"] if order else []
    return [site.picture("densities", "Feature densities", figure, caption, " ".join(notes))]


def _left(count: int) -> str:
    return f" {count} more are not drawn." if count else ""


def _several_seeds(records: Sequence[Record]) -> bool:
    return len({record.get("seed") for record in records}) > 1


def _sizes(records: Sequence[Record]) -> list[Panel]:
    """A panel per size of one family, a line per sparsity setting."""
    panels = []
    knobs, ratios = axes(records)
    for at, size in zip(ratios, labels(ratios), strict=True):
        members = [record for record in records if ratio(record) == at]
        found = [(word, _at(members, value)) for value, word in zip(knobs, labels(knobs), strict=True)]
        if curves := [Curve(word, *histogram) for word, histogram in found if histogram]:
            panels.append(Panel(f"ratio {size}", curves, "share of latents"))
    return panels


def _family(name: str, records: Sequence[Record]) -> list[Panel]:
    """The panel of a family among others: its largest size, lines ranked by L0, settings in the title."""
    knobs, ratios = axes(records)
    for at in reversed(ratios):
        members = [record for record in records if ratio(record) == at]
        l0 = dict(zip(knobs, grid_matrix(members, "l0")[2][0] if axes(members)[0] == knobs else knobs, strict=True))
        found = [(value, histogram) for value in knobs if (histogram := _at(members, value))]
        found.sort(key=lambda pair: l0[pair[0]] if math.isfinite(l0[pair[0]]) else 0.0)
        if found:
            values = [value for value, _ in found]
            ends = labels(sorted({min(values), max(values)}))
            steps = [round((len(RANKS) - 1) * i / max(len(found) - 1, 1)) for i in range(len(found))]
            curves = [Curve(RANKS[step], *histogram) for step, (_, histogram) in zip(steps, found, strict=True)]
            return [Panel(f"{name}\n{knob_word(records)} {' to '.join(ends)}", curves, "share of latents")]
    return []


def _at(members: Sequence[Record], value: float) -> tuple[list[float], list[float]] | None:
    """The first usable histogram at a sparsity setting."""
    return next((found for record in members if knob(record) == value and (found := _density(record))), None)


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

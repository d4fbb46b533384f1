"""The pictures of the toy study and how to read each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_coding.report.canvas import save
from sparse_coding.report.families import knob_label, knob_word
from sparse_coding.report.heatmaps import Grid, Scale, cell_text, heat_map
from sparse_coding.report.page import Picture
from sparse_coding.report.pictures import Curve, Panel, histograms, small_multiples
from sparse_coding.report.records import (
    Record,
    by_ratio,
    grid_matrix,
    grid_spread,
    has,
    knob,
    labels,
    number,
    ratio,
    short,
)
from sparse_coding.report.tables import blanks
from sparse_coding.report.trade_off import mean_true_l0

L0_RANGE = 4.0
"""Half the range of the L0 map, in factors of two."""


@dataclass(frozen=True)
class Study:
    """Members that share a map (one family) and what to draw beside them."""

    records: list[Record]
    controls: Mapping[str, Any]
    folder: Path
    """Where the PNG files go."""
    prefix: str = ""
    clip_dead: float | None = None

    @property
    def seeds(self) -> int:
        return len({record.get("seed") for record in self.records})

    def grid(self, name: str) -> Grid:
        knobs, ratios, values = grid_matrix(self.records, name)
        return Grid(knobs, ratios, values, knob_label(self.records), "ratio  d_sae / G")

    def baselines(self, name: str) -> dict[str, Any]:
        """Baseline -> its value of a metric: a number, or a mapping ratio -> number."""
        found = self.controls.get("baselines")
        found = found if isinstance(found, Mapping) else {}
        return {str(key): values.get(name) for key, values in found.items() if isinstance(values, Mapping)}

    @property
    def edge(self) -> Any:
        """L1 of the predicted collapse, which holds for members that divide their L1 term as the toy study of 2023."""
        divided = {(record.get("settings") or {}).get("l1_scaling") for record in self.records}
        return self.controls.get("collapse_l1") if divided == {"toy-2023"} else None

    @property
    def l0_true(self) -> float:
        said = number(self.controls.get("l0_true"))
        return said if math.isfinite(said) else mean_true_l0(self.records)

    def picture(self, name: str, title: str, figure: Any, caption: str, note: str = "") -> Picture:
        path = self.folder / f"{self.prefix}{name}.png"
        return Picture(title, save(figure, path), caption, f"pictures/{path.name}", note)


def maps(study: Study) -> list[Picture]:
    """Every map whose metric was measured."""
    makers: dict[str, Callable[[Study], Picture]] = {
        "mmcs": _mmcs,
        "fraction_above_0.9": _found,
        "l0": _l0,
        "dead": _dead,
        "dead_fraction": _dead_fraction,
        "mse": _mse,
        "mmcs_next_larger": _next_larger,
    }
    wanted = [name for name in makers if has(study.records, name)]
    if study.clip_dead is None:
        wanted = [name for name in wanted if name != "dead"]
    if not math.isfinite(study.l0_true):
        wanted = [name for name in wanted if name != "l0"]
    return [makers[name](study) for name in wanted]


def _edge_words(study: Study) -> str:
    if not study.edge:
        return ""
    return " The white staircase is the predicted collapse: beyond it the penalty outweighs the largest coefficient."


def _span(values: Any, ratios: list[float] | Any) -> tuple[float, float] | None:
    found = [value for at in ratios if math.isfinite(value := by_ratio(values, at))]
    return (min(found), max(found)) if found else None


def _mmcs(study: Study) -> Picture:
    grid = study.grid("mmcs")
    chance, ceiling = study.controls.get("chance_mmcs"), study.controls.get("ceiling")
    marks: dict[str, Any] = {}
    if (span := _span(chance, grid.ratios)) is not None:
        marks["chance"] = span
    for at in sorted({min(at, 1.0) for at in grid.ratios}) if ceiling else []:
        nearest = next(value for value in grid.ratios if min(value, 1.0) == at)
        word = f"ceiling r={at:.3g}" if at < 1 else "ceiling r≥1"
        marks[word] = by_ratio(ceiling, nearest)
    strip = {"chance": chance, "ceiling": ceiling, **study.baselines("mmcs")}
    figure = heat_map("MMCS with the truth", grid, Scale("MMCS", 0, 1, marks=marks), strip=strip, edge=study.edge)
    caption = (
        "For each true feature the largest cosine with any atom, averaged over features; read a cell against the "
        "chance and ceiling columns of its own row, not against 1. Below ratio 1 there are fewer atoms than "
        "features, so a dictionary that finds one feature per atom scores its ceiling (atoms between features can "
        "score a little more), and a collapsed one shows chance, the score of random atoms."
    )
    if study.edge and len({round(by_ratio(study.edge, at), 9) for at in grid.ratios}) > 1:
        slope = by_ratio(study.edge, grid.ratios[-1]) / grid.ratios[-1]
        caption += (
            " The recovered region is a diagonal band, because this penalty is divided by the number of latents: its "
            f"upper edge is predicted at {cell_text(slope)} × ratio (white staircase; real coefficients are smaller "
            "than the largest, so the collapse comes earlier)."
        )
    else:
        caption += _edge_words(study)
    return study.picture("mmcs", "MMCS with the true features", figure, caption, blanks(grid.values))


def _found(study: Study) -> Picture:
    grid = study.grid("fraction_above_0.9")
    figure = heat_map("True features found (cosine > 0.9)", grid, Scale("fraction", 0, 1), edge=study.edge,
                      strip=study.baselines("fraction_above_0.9"))  # fmt: skip
    caption = (
        "The fraction of true features that some atom matches with a cosine above 0.9: a count of successes where "
        "MMCS is an average that half-right atoms can raise. A dictionary of ratio r < 1 can score at most r, and "
        "random atoms score 0, so a high MMCS beside a low fraction here means blurred features rather than found "
        "ones."
    )
    return study.picture("fraction_found", "Features found", figure, caption, blanks(grid.values))


def _l0(study: Study) -> Picture:
    grid, true = study.grid("l0"), study.l0_true

    def factor(values: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.clip(np.log2(values / true), -L0_RANGE, L0_RANGE)

    scale = Scale("L0 / true L0", -L0_RANGE, L0_RANGE, colours="PuOr_r", bar_format=_times, shade=factor)
    title = f"Active latents (truth: {true:.3g})"
    figure = heat_map(title, grid, scale, strip=study.baselines("l0"), edge=study.edge)
    caption = (
        "The number printed is the mean count of active latents per sample; the colour is its ratio to the "
        f"{true:.3g} features that are truly active, on a log scale that is pale at equality. Orange cells use too "
        "many latents (dense codes, mixed directions) and purple ones too few (features left out, 0 is a collapsed "
        "dictionary): look for the pale diagonal and whether the best MMCS lies on it."
    )
    note = f"Colours stop at a factor of {2**L0_RANGE:.0f} either way."
    return study.picture("l0", "L0 against the true L0", figure, caption, f"{note} {blanks(grid.values)}".strip())


def _times(exponent: float) -> str:
    return f"×{2**exponent:.3g}" if exponent >= 0 else f"÷{2**-exponent:.3g}"


def _dead_words(study: Study, published: bool = False) -> str:
    expected = number(study.controls.get("expected_dead_published" if published else "expected_dead"))
    if math.isnan(expected):
        return "Some rare features may not occur in the evaluation at all, so a few dead latents are expected."
    if expected < 0.5:
        return "Every true feature should occur in the samples counted, so a dead latent stands for nothing."
    return (
        f"About {expected:.3g} true features never occur in the samples counted: that many dead latents are expected "
        "even of a perfect one-to-one dictionary."
    )


def _dead(study: Study) -> Picture:
    published = has(study.records, "dead_published")
    grid, clip = study.grid("dead_published" if published else "dead"), study.clip_dead
    marks = {}
    expected = number(study.controls.get("expected_dead_published" if published else "expected_dead"))
    if math.isfinite(expected):
        marks = {"expected dead": expected}
    figure = heat_map("Dead latents", grid, Scale("dead latents", 0, clip, marks=marks), edge=study.edge)
    samples = "the few samples of the published count" if published else "the evaluation"
    caption = f"Latents that never fired in {samples}. {_dead_words(study, published)}"
    note = f"Colours end at {clip:.3g}, as in the published picture; the printed counts are not clipped."
    return study.picture("dead", "Dead latents", figure, caption, f"{note} {blanks(grid.values)}".strip())


def _dead_fraction(study: Study) -> Picture:
    grid = study.grid("dead_fraction")
    scale = Scale("fraction", 0, 1, colours="cividis")
    figure = heat_map("Dead fraction", grid, scale, edge=study.edge, strip=study.baselines("dead_fraction"))
    caption = (
        f"Dead latents over all latents of the dictionary, which compares sizes fairly. {_dead_words(study)} "
        "Well above ratio 1 the surplus latents have nothing left to find, so dead latents there are no failure; "
        "a whole row turning yellow at its right end is the collapse."
    )
    return study.picture("dead_fraction", "Dead fraction", figure, caption, blanks(grid.values))


def _mse(study: Study) -> Picture:
    grid = study.grid("mse")
    square = number(study.controls.get("data_mean_square"))
    marks = {"data mean square": square} if square > 0 else {}
    finite = grid.values[np.isfinite(grid.values)]
    log = bool((finite > 0).all())
    high = max(square, float(finite.max())) if square > 0 else None
    exponent = math.floor(math.log10(largest)) if (largest := float(finite.max())) > 0 else 0
    scale = Scale("MSE", None if log else 0.0, high, log=log, marks=marks, unit=10.0**exponent)
    title = f"Reconstruction error, in 1e{exponent}"
    figure = heat_map(title, grid, scale, strip=study.baselines("mse"), edge=study.edge)
    caption = (
        "Squared error without the penalty, mean over samples and dimensions, on held-out rows. Small penalties "
        "always win here, which is why a low error alone says nothing about the features; the flat plateau at strong "
        "penalties is the mean square of the data, the error of a dictionary that outputs zero."
    )
    note = f"Controls outside the range of the map have its end colours. {blanks(grid.values)}".strip()
    return study.picture("mse", "Reconstruction error", figure, caption, note)


def _next_larger(study: Study) -> Picture:
    grid = study.grid("mmcs_next_larger")
    figure = heat_map("MMCS with the next larger dictionary", grid, Scale("MMCS", 0, 1), edge=study.edge)
    caption = (
        "For each atom the largest cosine with an atom of the next larger dictionary at the same sparsity setting: "
        "the stand-in for MMCS with the truth that also exists for language models. It is useful only so far as its "
        "bright region agrees with that of the first map; collapsed dictionaries compare one random initialisation "
        "with another."
    )
    note = "The largest ratio is blank: there is no larger dictionary to compare it with."
    return study.picture("mmcs_next_larger", "MMCS with the next larger dictionary", figure, caption, note)


def curves(study: Study) -> Picture | None:
    """MMCS against sparsity, a panel per ratio, with chance and ceiling."""
    grid, spread = study.grid("mmcs"), grid_spread(study.records, "mmcs")
    positive = np.array([value > 0 for value in grid.knobs])
    if not has(study.records, "mmcs") or positive.sum() < 2:
        return None
    panels = []
    for row, (at, name) in enumerate(zip(grid.ratios, labels(grid.ratios), strict=True)):
        x, y = np.array(grid.knobs)[positive], grid.values[row][positive]
        half = spread[row][positive]
        known = np.isfinite(half).any()
        spread_ = {"low": (y - half).tolist(), "high": (y + half).tolist()} if known else {}
        line = Curve(name, x.tolist(), y.tolist(), **spread_)
        levels = {
            "chance": by_ratio(study.controls.get("chance_mmcs"), at),
            "ceiling": by_ratio(study.controls.get("ceiling"), at),
        }
        edges = {"predicted collapse": by_ratio(study.edge, at)} if study.edge else {}
        panels.append(Panel(f"ratio {name}", [line], "MMCS", levels, edges))
    figure = small_multiples(panels, knob_label(study.records), share_y=(0.0, 1.04))
    dotted = " and predicted collapse (dotted)" if study.edge else ""
    band = "The band is one standard deviation over seeds. " if study.seeds > 1 else ""
    caption = (
        f"The rows of the first map as curves, each with its own chance level and ceiling (dashed){dotted}. "
        f"{band}A good row climbs from a plateau of mixed directions to a peak and then drops to "
        "the chance line; how near the peak comes to the ceiling, and how wide it is, says how much tuning the "
        "method needs."
    )
    return study.picture("mmcs_curves", "MMCS against sparsity", figure, caption)


def match_histograms(study: Study) -> Picture | None:
    """Largest cosine of each true feature, for the best cell of each ratio, seeds pooled."""
    grid, word = study.grid("mmcs"), knob_word(study.records)
    panels = []
    for row, (at, name) in enumerate(zip(grid.ratios, labels(grid.ratios), strict=True)):
        if not np.isfinite(grid.values[row]).any():
            continue
        best = grid.knobs[int(np.nanargmax(grid.values[row]))]
        members = [record for record in study.records if ratio(record) == at and knob(record) == best]
        cosines = [number(value) for record in members for value in record["metrics"].get("max_cosines") or ()]
        values = [value for value in cosines if math.isfinite(value)]
        if values:
            marks = {"chance": by_ratio(study.controls.get("chance_mmcs"), at), "found (0.9)": 0.9}
            panels.append((f"ratio {name}, {word} {short(best)}", values, marks))
    if not panels:
        return None
    figure = histograms(panels, "largest cosine of a true feature", "share of features")
    caption = (
        f"The distribution behind the mean: one histogram per ratio, at the {knob_label(study.records)} with the best "
        "MMCS (in the title). Found features pile up near 1 and missed ones near the chance line; a two-humped shape "
        "means a mixture of found and missed features, while a single hump in between means that all of them are "
        "blurred."
    )
    return study.picture("cosine_histograms", "Which features are found", figure, caption)

"""The report of the toy study: how well the true features were found, over sparsity and dictionary size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparse_coding.report.compare import EqualL0, at_equal_l0, equal_l0_table, equal_l0_words
from sparse_coding.report.families import families, file_words, knob_label
from sparse_coding.report.page import Page, Picture, Section, Table, pretty, write_page
from sparse_coding.report.records import (
    Record,
    axes,
    by_ratio,
    grid_matrix,
    has,
    knob,
    metric,
    number,
    ratio,
    read_run,
    short,
)
from sparse_coding.report.tables import cell_table, facts, health_warnings, look_up, member_table
from sparse_coding.report.toy_pictures import Study, curves, maps, match_histograms
from sparse_coding.report.trade_off import Measure, measures, trade_off_figure

PUBLISHED_CLIP = 100.0
"""Dead latents at which the colours of the published map end."""


def write_toy_report(folder: Path) -> Path:
    """Draw `report.html` and `pictures/*.png` from the data files of a finished toy run; returns the page's path.

    Dead latents are drawn as counts too, with the colours clipped as published, where settings.json says
    "published_metrics" (or "clip_dead", the number to clip at); the data files are never clipped.
    Nothing is measured here, so a report can be redrawn at any time and comes out the same. Raises UserError where a
    data file is missing, empty or damaged.
    """
    run = read_run(folder)
    controls = run.settings.get("controls")
    controls = controls if isinstance(controls, Mapping) else {}
    clip = PUBLISHED_CLIP if look_up(run.settings, "published_metrics") else number(look_up(run.settings, "clip_dead"))
    sections = _comparison(Study(run.records, controls, folder / "pictures"))
    parts = families(run.records)
    words = file_words(parts)
    for name, records in parts.items():
        prefix = "" if len(parts) == 1 else f"{words[name]}-"
        study = Study(records, controls, folder / "pictures", prefix, None if math.isnan(clip) else clip)
        sections += _sections(study, name)
    best = _best(run.records)
    caption = "One row per member, unrounded values on hover; click a header to sort."
    table = member_table(run.records, {best["name"]} if best else set(), "All members", caption, folded=True)
    sections.append(Section("Every member", tables=[table]))
    sections.append(Section("Settings", raw=pretty(run.settings)))
    page = Page(
        title="Do sparse dictionaries find the true features?",
        subtitle="Toy study",
        facts=facts(run.settings, _shape(run.records, run.settings, controls)),
        summary=_summary(run.records, controls) + _settled(run.records, number(look_up(run.settings, "steps"))),
        warnings=health_warnings(run.records),
        sections=sections,
    )
    return write_page(page, folder / "report.html")


def _comparison(study: Study) -> list[Section]:
    """All families on one picture, and at equal L0 around the truth; nothing where there is one family."""
    if len(families(study.records)) == 1:
        return []
    true = study.l0_true
    label = "L0 (mean active latents per sample)"
    figure, _ = trade_off_figure(study.records, true_l0=true, x_label=label)
    if figure is None:
        return []
    caption = (
        "One colour and marker per architecture, a point per sparsity setting, averages over seeds; the line style "
        "says the size where there are several, the largest is solid. A low FVU says little about the features, MMCS "
        "with the truth does: compare its peaks, and whether they lie at the true L0 (dotted)."
    )
    picture = study.picture("frontier", "Architectures against one another", figure, caption)
    compared = [found for measure in measures(study.records) if (found := _near_truth(study.records, measure, true))]
    return [Section("Architectures", pictures=[picture], tables=[*map(equal_l0_table, compared)])]


def _near_truth(records: list[Record], measure: Measure, true: float) -> EqualL0 | None:
    """At half, once and twice the true L0, where it is known."""
    return at_equal_l0(records, measure, (true / 2, true, 2 * true)) if true > 0 else at_equal_l0(records, measure)


def _sections(study: Study, name: str) -> list[Section]:
    suffix = f" ({name})" if name else ""
    pictures: list[Picture] = maps(study)
    intro = "Each cell is one sparsity setting (across) and one dictionary ratio, latents per true feature (up)."
    if study.seeds > 1:
        intro += f" Cells show the mean over {study.seeds} seeds; their spread is in the table."
    sections = [Section(f"Maps{suffix}", intro, pictures)]
    details = [picture for picture in (curves(study), match_histograms(study)) if picture]
    if details:
        sections.append(Section(f"Curves and histograms{suffix}", pictures=details))
    caption = "One row per cell" + (", mean ± sample standard deviation over seeds" if study.seeds > 1 else "")
    table: Table = cell_table(study.records, "", f"{caption}; the best MMCS is highlighted, a click on a header sorts.")
    sections.append(Section(f"Table{suffix}", tables=[table]))
    return sections


def _best(records: list[Record]) -> Record | None:
    usable = [record for record in records if not math.isnan(metric(record, "mmcs"))]
    return max(usable, key=lambda record: metric(record, "mmcs"), default=None)


def _shape(records: list[Record], settings: Mapping[str, Any], controls: Mapping[str, Any]) -> list[tuple[str, str]]:
    features = {len(r["metrics"]["max_cosines"]) for r in records if isinstance(r["metrics"].get("max_cosines"), list)}
    widths = sorted({int(number(record.get("d_in"))) for record in records if number(record.get("d_in")) > 0})
    shape = [
        ("true features", ", ".join(map(str, sorted(features)))),
        ("width", ", ".join(map(str, widths))),
        ("active per sample", short(number(controls.get("l0_true"))) if "l0_true" in controls else ""),
        ("members", str(len(records))),
        ("seeds", str(len({record.get("seed") for record in records}))),
    ]
    for label, names in (("world", ("world_name", "preset")), ("steps", ("steps",)), ("batch", ("batch_size",))):
        if (value := look_up(settings, *names)) is not None:
            shape.append((label, str(value)))
    return shape


def _summary(records: list[Record], controls: Mapping[str, Any]) -> list[str]:
    """A few sentences on what the study found, computed from the records."""
    parts = families(records)
    ratios = {value for record in records if math.isfinite(value := ratio(record))}
    seeds = len({record.get("seed") for record in records})
    many = _count(len(parts), "family", "families") if len(parts) > 1 else ""
    said = [
        f"{_count(len(records), 'dictionary', 'dictionaries')}: "
        f"{many or _count(len(axes(records)[0]), 'sparsity setting')}, "
        f"{_count(len(ratios), 'size')}, {_count(seeds, 'seed')}."
    ]
    best = _best(records)
    if best is None:
        return [*said, "No member has a finite MMCS, so nothing can be said about the true features."]
    at = ratio(best)
    sentence = f"The best match with the truth is MMCS {metric(best, 'mmcs'):.3f}, at ratio {short(at)}"
    family = next(name for name, members in parts.items() if any(member is best for member in members))
    sentence += f" and {knob_label([best])} {short(knob(best))}" + (f" ({family})" if family else "")
    levels = {"chance": by_ratio(controls.get("chance_mmcs"), at), "the ceiling": by_ratio(controls.get("ceiling"), at)}
    known = [f"{word} is {value:.3f}" for word, value in levels.items() if math.isfinite(value)]
    said.append(sentence + (f" ({' and '.join(known)} there)." if known else "."))
    if has([best], "fraction_above_0.9"):
        share = f"{metric(best, 'fraction_above_0.9'):.0%} of the true features with a cosine above 0.9"
        said.append(f"That dictionary finds {share}{_l0_clause(best, controls)}.")
    cells = [grid_matrix(part, "mmcs")[2] for part in parts.values()]
    good, measured = (int(sum(count.sum() for count in found)) for found in (
        [matrix > 0.9 for matrix in cells], [np.isfinite(matrix) for matrix in cells]))  # fmt: skip
    said.append(f"The mean MMCS is above 0.9 in {good} of {_count(measured, 'cell')}.")
    true = number(controls.get("l0_true"))
    for measure in measures(records):
        if len(parts) > 1 and (found := _near_truth(records, measure, true)):
            said.append(equal_l0_words(found))
    rivals = {name: by_ratio(values.get("mmcs"), at) for name, values in _baselines(controls).items()}
    rivals = {name: value for name, value in rivals.items() if math.isfinite(value) and name != "oracle"}
    if rivals:
        name = max(rivals, key=lambda key: rivals[key])
        said.append(f"The strongest baseline at that ratio, {name}, reaches {rivals[name]:.3f}.")
    return said


def _settled(records: list[Record], steps: float) -> list[str]:
    """How many members stopped before the last of the run's `steps`, where any did."""
    early = [int(value) for record in records if (value := number(record.get("updates"))) < steps]
    if not early:
        return []
    first, last = (f"{value:,}" for value in (min(early), max(early)))
    return [
        f"{_count(len(early), 'dictionary', 'dictionaries')} settled and stopped early, after "
        f"{first if first == last else f'{first} to {last}'} of {steps:,.0f} updates."
    ]


def _count(number: int, word: str, plural: str = "") -> str:
    return f"{number} {word if number == 1 else plural or word + 's'}"


def _l0_clause(best: Record, controls: Mapping[str, Any]) -> str:
    true, found = number(controls.get("l0_true")), metric(best, "l0")
    true = metric(best, "l0_true") if math.isnan(true) else true
    if math.isnan(true) or math.isnan(found):
        return ""
    return f" and has {short(found)} latents active per sample where {short(true)} features are"


def _baselines(controls: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found = controls.get("baselines")
    return (
        {str(key): value for key, value in found.items() if isinstance(value, Mapping)}
        if isinstance(found, Mapping)
        else {}
    )

"""The report of a sweep on a language model: trade-offs, maps, densities, training curves, table, top contexts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_coding.report.choose import MOSTLY_DEAD, best_members
from sparse_coding.report.latents import read_latents
from sparse_coding.report.page import Page, Section, pretty, visible, write_page
from sparse_coding.report.records import (
    Record,
    RunData,
    axes,
    groups,
    has,
    metric,
    number,
    read_run,
    short,
)
from sparse_coding.report.run_pictures import (
    Site,
    densities,
    frontiers,
    maps,
    recovered_metric,
    training,
)
from sparse_coding.report.tables import facts, health_warnings, look_up, member_table


def write_run_report(folder: Path) -> Path:
    """Draw `report.html` and `pictures/*.png` from the data files of a finished sweep; returns the page's path.

    Reads latents.json too, where there is one. Nothing is measured here, so a report can be redrawn at any time and
    comes out the same. Raises UserError where a data file is missing, empty or damaged.
    """
    run = read_run(folder)
    best = best_members(run.records)
    sites = groups(run.records, "site")
    sections = [_site_section(run, str(name), index, len(sites), best) for index, (name,) in enumerate(sites)]
    caption = "Highlighted: the member at the knee of the L0-FVU frontier. Unrounded values on hover; a click sorts."
    table = member_table(run.records, set(best.values()), "", caption)
    sections.append(Section("All members", tables=[table]))
    for member, cards in read_latents(folder):
        intro = "Text on which each latent is most active; the deepest colour is the latent's largest activation."
        sections.append(Section(visible(f"Latents of {member}"), intro, latents=cards))
    sections.append(Section("Settings", raw=pretty(run.settings)))
    page = Page(
        title=_title(run),
        subtitle="Sweep of sparse dictionaries",
        facts=facts(run.settings, _shape(run)),
        summary=_summary(run.records, best),
        warnings=health_warnings(run.records),
        sections=sections,
    )
    return write_page(page, folder / "report.html")


def _site_section(run: RunData, name: str, index: int, count: int, best: Mapping[str, str]) -> Section:
    records = [record for record in run.records if str(record.get("site")) == name]
    word = re.sub(r"[^A-Za-z0-9.]+", "_", name)[:60]
    prefix = "" if count == 1 else f"{index}-{word}-"
    site = Site(name, records, run, run.folder / "pictures", prefix)
    pictures = [*frontiers(site), *maps(site), *densities(site), *training(site)]
    intro = f"Best trade-off at this site: {best[name]}." if name in best else ""
    return Section(visible(f"Site {name}"), visible(intro), pictures)


def _title(run: RunData) -> str:
    model = look_up(run.settings, "model", "model_name")
    return visible(f"Sparse dictionaries of {model}") if isinstance(model, str) else "Sparse dictionaries of a model"


def _shape(run: RunData) -> list[tuple[str, str]]:
    shape = [("model", visible(str(look_up(run.settings, "model", "model_name") or "")))]
    shape.append(("text", visible(str(_text_source(run.settings) or ""))))
    shape.append(("sites", visible(", ".join(str(site) for (site,) in groups(run.records, "site")))))
    tokens = number(run.log[-1].get("tokens")) if run.log else math.nan
    if not math.isnan(tokens):
        shape.append(("training tokens", f"{tokens:,.0f}"))
    shape.append(("members", str(len(run.records))))
    return shape


def _text_source(settings: Mapping[str, Any]) -> Any:
    """data.text.text.source, which is what was read, else what was asked for."""
    part: Any = settings
    for name in ("data", "text", "text", "source"):
        part = part.get(name) if isinstance(part, Mapping) else None
    return part or look_up(settings, "dataset", "text")


def _summary(records: Sequence[Record], best: Mapping[str, str]) -> list[str]:
    """A few sentences on what the sweep found, computed from the records."""
    knobs, ratios = axes(records)
    sites = len(groups(records, "site"))
    where = f" at {sites} sites" if sites > 1 else ""
    said = [f"{len(records)} dictionaries{where}: {_count(knobs, 'sparsity setting')}, {_count(ratios, 'size')}."]
    recovered = recovered_metric(records)
    if recovered:
        said += _best_recovered(records, recovered)
    fvu = [metric(record, "fvu") for record in records if not math.isnan(metric(record, "fvu"))]
    l0 = [metric(record, "l0") for record in records if not math.isnan(metric(record, "l0"))]
    if fvu and l0:
        said.append(
            f"FVU runs from {short(min(fvu))} to {short(max(fvu))} and L0 from {short(min(l0))} to {short(max(l0))}."
        )
    for site, name in best.items():
        record = next(record for record in records if record["name"] == name and str(record.get("site")) == site)
        at = visible(f" at {site}") if sites > 1 else ""
        more = f", {recovered_words(recovered)} {metric(record, recovered):.1%}" if recovered else ""
        said.append(visible(f"The knee of the L0-FVU frontier{at} is {name}: L0 {short(metric(record, 'l0'))}, "
                            f"FVU {short(metric(record, 'fvu'))}{more}."))  # fmt: skip
    return said


def _best_recovered(records: Sequence[Record], recovered: str) -> list[str]:
    """The highest loss recovered by a member that is sparse (L0 at most a tenth of d_in) and not mostly dead."""

    def sparse(record: Record) -> bool:
        alive = not metric(record, "dead_fraction") >= MOSTLY_DEAD
        return alive and metric(record, "l0") <= max(number(record.get("d_in")) / 10, 1.0)

    usable = [record for record in records if sparse(record) and has([record], recovered)]
    bound = max((number(record.get("d_in")) / 10 for record in records), default=math.nan)
    if not usable:
        return ["No member is both sparse (L0 up to a tenth of the width) and mostly alive."]
    top = max(usable, key=lambda record: metric(record, recovered))
    return [
        f"With at most a tenth of the width active (L0 up to {max(bound, 1):.3g}), the highest "
        f"{recovered_words(recovered)} is {metric(top, recovered):.1%}, at L0 {short(metric(top, 'l0'))} "
        f"({visible(top['name'])})."
    ]


def recovered_words(name: str) -> str:
    return "loss recovered" if name.startswith("ce_") else "KL recovered"


def _count(values: Sequence[Any], word: str) -> str:
    return f"{len(values)} {word}{'' if len(values) == 1 else 's'}"

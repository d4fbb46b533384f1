"""The report of a sweep on a language model: trade-offs, maps, densities, training curves, table, top contexts."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_coding.report.choose import MOSTLY_DEAD, best_by_site
from sparse_coding.report.compare import at_equal_l0, equal_l0_table, equal_l0_words
from sparse_coding.report.families import by_site, families
from sparse_coding.report.latents import read_latents
from sparse_coding.report.page import Page, Section, pretty, visible, write_page
from sparse_coding.report.records import (
    Record,
    RunData,
    axes,
    has,
    metric,
    number,
    ratio,
    read_run,
    short,
)
from sparse_coding.report.run_pictures import Site, densities, frontiers, maps
from sparse_coding.report.tables import facts, health_warnings, look_up, member_table, site_table
from sparse_coding.report.trade_off import measures, recovered_metric, recovered_words
from sparse_coding.report.training_pictures import training


def write_run_report(folder: Path) -> Path:
    """Draw `report.html` and `pictures/*.png` from the data files of a finished sweep; returns the page's path.

    Reads latents.json too, where there is one. Nothing is measured here, so a report can be redrawn at any time and
    comes out the same. Raises UserError where a data file is missing, empty or damaged.
    """
    run = read_run(folder)
    best = best_by_site(run.records)
    sites = by_site(run.records)
    sections = [_site_section(run, name, index, len(sites), best) for index, name in enumerate(sites)]
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
    records = by_site(run.records)[name]
    word = re.sub(r"[^A-Za-z0-9.]+", "_", name)[:60]
    prefix = "" if count == 1 else f"{index}-{word}-"
    site = Site(name, records, run, run.folder / "pictures", prefix)
    pictures = [*frontiers(site), *maps(site), *densities(site), *training(site)]
    intro = f"Best trade-off at this site: {best[name]}." if name in best else ""
    compared = [found for measure in measures(records) if (found := at_equal_l0(records, measure))]
    tables = [*map(equal_l0_table, compared), *([table] if (table := site_table(records)) else [])]
    return Section(visible(f"Site {name}"), visible(intro), pictures, tables)


def _title(run: RunData) -> str:
    model = look_up(run.settings, "model", "model_name")
    return visible(f"Sparse dictionaries of {model}") if isinstance(model, str) else "Sparse dictionaries of a model"


def _shape(run: RunData) -> list[tuple[str, str]]:
    shape = [("model", visible(str(look_up(run.settings, "model", "model_name") or "")))]
    shape.append(("text", visible(str(_text_source(run.settings) or ""))))
    shape.append(("sites", visible(", ".join(by_site(run.records)))))
    tokens = number(run.log[-1].get("tokens")) if run.log else math.nan
    if not math.isnan(tokens):
        shape.append(("training tokens", f"{tokens:,.0f}"))
    shape.append(("members", str(len(run.records))))
    waited = run.settings.get("training")
    share = number(waited.get("share_waiting")) if isinstance(waited, Mapping) else math.nan
    if not math.isnan(share):
        shape.append(("waiting for data", f"{share:.1%} of the training time"))
    return shape


def _text_source(settings: Mapping[str, Any]) -> Any:
    """data.text.text.source, which is what was read, else what was asked for."""
    part: Any = settings
    for name in ("data", "text", "text", "source"):
        part = part.get(name) if isinstance(part, Mapping) else None
    return part or look_up(settings, "dataset", "text")


def _summary(records: Sequence[Record], best: Mapping[str, str]) -> list[str]:
    """A few sentences on what the sweep found, computed from the records."""
    parts = by_site(records)
    said = [f"{len(records)} dictionaries{f' at {len(parts)} sites' if len(parts) > 1 else ''}: {_varied(records)}."]
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
        record = next(record for record in parts[site] if record["name"] == name)
        at = visible(f" at {site}") if len(parts) > 1 else ""
        more = f", {recovered_words(recovered)} {metric(record, recovered):.1%}" if recovered else ""
        said.append(visible(f"The knee of the L0-FVU frontier{at} is {name}: L0 {short(metric(record, 'l0'))}, "
                            f"FVU {short(metric(record, 'fvu'))}{more}."))  # fmt: skip
    for site, members in parts.items():
        words = [equal_l0_words(found) for measure in measures(members) if (found := at_equal_l0(members, measure))]
        said += [visible(f"At {site}:"), *words] if words and len(parts) > 1 else words
    return said


def _varied(records: Sequence[Record]) -> str:
    """What the sweep went through."""
    found = families(records)
    sizes = _count({value for record in records if math.isfinite(value := ratio(record))}, "size")
    if len(found) == 1:
        return f"{_count(axes(records)[0], 'sparsity setting')}, {sizes}"
    architectures = {str(record.get("architecture")) for record in records}
    words = [_count(architectures, "architecture")] if len(architectures) > 1 else []
    words += [_count(found, "family", "families")] if len(found) != len(architectures) else []
    return ", ".join([*words, sizes])


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


def _count(values: Collection[Any], word: str, plural: str = "") -> str:
    return f"{len(values)} {word if len(values) == 1 else plural or word + 's'}"

"""Tables and header facts that both reports share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_coding.progress import duration
from sparse_coding.report.families import KNOB_LABELS, KNOB_WORDS, by_site, knob_label, site_label
from sparse_coding.report.page import Cell, Row, Table, number_cell, text_cell, visible
from sparse_coding.report.records import (
    KNOBS,
    Record,
    grid_matrix,
    grid_spread,
    has,
    knob,
    knob_name,
    metric,
    number,
    ratio,
    short,
)

METRICS = {
    "mmcs": ("MMCS", "mean over true features of the largest cosine with an atom"),
    "mmcs_dict_to_truth": ("MMCS back", "mean over atoms of the largest cosine with a true feature"),
    "uniqueness": ("unique", "share of atoms with a best-matching true feature of their own"),
    "mcc": ("MCC", "mean |cosine| under the best one-to-one matching"),
    "fraction_above_0.9": ("found", "fraction of true features with a cosine above 0.9"),
    "fvu": ("FVU", "fraction of variance unexplained: squared error over variance"),
    "mse": ("MSE", "squared error, mean over rows and dimensions"),
    "l0": ("L0", "mean number of active latents"),
    "l1": ("L1 norm", "mean sum of the codes"),
    "dead": ("dead", "latents that never fired in the evaluation"),
    "dead_fraction": ("dead share", "dead latents over all latents"),
    "relative_bias": ("rel. bias", "energy of the reconstruction over its overlap with x: below 1 is shrunk"),
    "cosine": ("cosine", "mean cosine of an activation and its reconstruction"),
    "mmcs_next_larger": ("MMCS next", "MMCS with the next larger dictionary at the same sparsity setting"),
    "ce_recovered_zero": ("CE rec.", "loss recovered: 1 is the model untouched, 0 is the site set to zero"),
    "ce_recovered_mean": ("CE rec. mean", "loss recovered: 1 is the model untouched, 0 is the site set to its mean"),
    "ce_spliced": ("CE", "cross-entropy with the reconstruction spliced in, nats per token"),
    "kl_spliced": ("KL", "KL divergence of the spliced model from the untouched one, nats per token"),
    "kl_recovered_zero": ("KL rec.", "1 - KL over the KL with the site set to zero"),
    "kl_recovered_mean": ("KL rec. mean", "1 - KL over the KL with the site set to its mean"),
}
"""Metric -> column header and explanation, in the order of the columns."""


@dataclass(frozen=True)
class Column:
    """One column of the table of members, and when it is worth showing."""

    header: str
    explanation: str
    cell: Callable[[Record], Cell]
    shown: bool = True


def _columns(records: Sequence[Record]) -> list[Column]:
    """Identity, knobs, size, seed and every metric that any member has."""

    def text(name: str, explanation: str = "") -> Column:
        values = {str(record.get(name) or "") for record in records}
        return Column(name, explanation, lambda record: text_cell(record.get(name) or ""), len(values) > 1)

    def exact(name: str, explanation: str = "") -> Column:
        return Column(name, explanation, lambda record: _exact(record.get(name)))

    def turned(name: str) -> Column:
        header = KNOB_LABELS[name] if len(knobs) == 1 else KNOB_WORDS[name]
        return Column(header, "", lambda one: number_cell(knob(one) if knob_name([one]) == name else math.nan))

    def measured(name: str) -> Column:
        return Column(*METRICS[name], lambda record: number_cell(metric(record, name)), has(records, name))

    updates = {record.get("updates") for record in records}
    in_use = {knob_name([record]) for record in records}
    knobs = [name for name in KNOBS if name in in_use]
    columns = [
        Column("member", "name of the folder under dictionaries/", lambda record: text_cell(record["name"])),
        Column("site", "", lambda record: text_cell(site_label(record)), len(by_site(records)) > 1),
        text("architecture"),
        text("variant", "other settings that set it apart"),
        *map(turned, knobs),
        Column("ratio", "dictionary ratio", lambda record: number_cell(ratio(record))),
        exact("d_sae", "number of latents"),
        exact("lr", "learning rate"),
        exact("seed"),
        Column("updates", "done when it stopped", lambda record: _exact(record.get("updates")), len(updates) > 1),
        *map(measured, METRICS),
    ]
    return [column for column in columns if column.shown]


def member_table(
    records: Sequence[Record], best: Collection[str], title: str, caption: str, folded: bool = False
) -> Table:
    """One row per member, with every metric that any of them has; the rows of `best` are highlighted.

    Site, architecture and variant have columns where there are several; each knob in use has one.
    """
    columns = _columns(records)
    rows = [
        Row([column.cell(record) for column in columns], record["name"] in best)
        for record in sorted(records, key=_order)
    ]
    return Table(title, [(column.header, column.explanation) for column in columns], rows, caption, folded)


def site_table(records: Sequence[Record]) -> Table | None:
    """FVU of crosscoders at each of their sites, a row per member; None where there are none."""
    found = [(record, sites) for record in records if (sites := _by_site(record))]
    names = list(dict.fromkeys(name for _, sites in found for name in sites))
    if not found:
        return None
    headers = [("member", ""), *((visible(name), "FVU of this site alone") for name in names)]
    rows = [
        Row([text_cell(record["name"]), *(number_cell(number(sites.get(name))) for name in names)])
        for record, sites in sorted(found, key=lambda pair: _order(pair[0]))
    ]
    return Table("FVU site by site", headers, rows, "Of members that reconstruct several sites.", folded=len(rows) > 12)


def _by_site(record: Record) -> Mapping[str, Any]:
    found = (record.get("metrics") or {}).get("fvu_by_site")
    return found if isinstance(found, Mapping) else {}


def _order(record: Record) -> tuple:
    keys = (ratio(record), knob(record), number(record.get("lr")), number(record.get("seed")))
    return (site_label(record), str(record.get("architecture")), str(record.get("variant") or ""), knob_name([record]),
            *(math.inf if math.isnan(key) else key for key in keys), record["name"])  # fmt: skip


def _exact(value: Any) -> Cell:
    found = number(value)
    return number_cell(found, text=f"{found:.6g}")


def cell_table(records: Sequence[Record], title: str, caption: str) -> Table:
    """One row per cell of the grid: mean over seeds ± their sample standard deviation. The best MMCS is highlighted."""
    shown = [name for name in METRICS if has(records, name)]
    means = {name: grid_matrix(records, name) for name in shown}
    spreads = {name: grid_spread(records, name) for name in shown}
    knobs, ratios, _ = grid_matrix(records, "mmcs")
    counts = {key: len(found) for key, found in _cells(records).items()}
    scores = means["mmcs"][2] if "mmcs" in means else None
    best = float(scores[~(scores != scores)].max()) if scores is not None else math.nan
    rows = []
    for r, at_ratio in enumerate(ratios):
        for k, at_knob in enumerate(knobs):
            if (at_ratio, at_knob) not in counts:
                continue
            cells = [number_cell(at_ratio), number_cell(at_knob), number_cell(counts[at_ratio, at_knob])]
            cells += [_mean_cell(means[name][2][r, k], spreads[name][r, k]) for name in shown]
            rows.append(Row(cells, scores is not None and scores[r, k] == best))
    headers = [("ratio", "dictionary ratio"), (knob_label(records), ""), ("seeds", "members in the cell")]
    return Table(title, [*headers, *(METRICS[name] for name in shown)], rows, caption)


def _cells(records: Sequence[Record]) -> dict[tuple[float, float], list[Record]]:
    cells: dict[tuple[float, float], list[Record]] = {}
    for record in records:
        cells.setdefault((ratio(record), knob(record)), []).append(record)
    return cells


def _mean_cell(mean: float, spread: float) -> Cell:
    if not math.isfinite(spread):
        return number_cell(mean)
    cell = number_cell(mean, text=f"{short(mean)} ± {short(spread, 2)}")
    return Cell(cell.text, cell.key, f"{mean!r} ± {spread!r}") if cell.text else cell


def facts(settings: Mapping[str, Any], shape: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The header of a page: what was run (`shape`), then provenance: date, command, versions, git state, machine."""
    origin = settings.get("provenance")
    origin = origin if isinstance(origin, Mapping) else {}
    found = [(name, value) for name, value in shape if value]
    for name in ("date", "command"):
        if origin.get(name):
            found.append((name, str(origin[name])))
    training = settings.get("training")
    seconds = number(training.get("seconds")) if isinstance(training, Mapping) else math.nan
    if math.isfinite(seconds):
        found.append(("training took", duration(seconds)))
    versions = origin.get("versions")
    if isinstance(versions, Mapping):
        named = {"sparse_coding": origin.get("version"), "python": origin.get("python"), **versions}
        found.append(("versions", ", ".join(f"{name} {version}" for name, version in named.items() if version)))
    git = origin.get("git")
    if isinstance(git, Mapping) and git.get("commit"):
        changed = " with uncommitted changes" if git.get("changed") else ""
        found.append(("git", f"{str(git['commit'])[:12]}{changed}"))
    machine = [str(origin[name]) for name in ("gpu", "platform") if origin.get(name)]
    if machine:
        found.append(("machine", ", ".join(machine)))
    return found


def look_up(settings: Mapping[str, Any], *names: str) -> str | float | None:
    """The first text or number of these names in settings.json: at its top, under "run", or one group below either."""
    run = settings.get("run")
    levels = [settings, *([run] if isinstance(run, Mapping) else [])]
    levels += [part for level in levels[:] for part in level.values() if isinstance(part, Mapping) and part is not run]
    found = (level.get(name) for name in names for level in levels)
    return next((value for value in found if isinstance(value, (str, int, float))), None)


def health_warnings(records: Sequence[Record]) -> list[str]:
    """What a reader must know before believing the pictures."""
    total = len(records)
    dead = sum(metric(record, "dead_fraction") >= 0.5 for record in records)
    broken = sum(math.isnan(metric(record, "fvu")) and math.isnan(metric(record, "mse")) for record in records)
    worse = sum(metric(record, "fvu") > 1 for record in records)
    found = []
    if dead:
        found.append(f"{dead} of {total} members {'is' if dead == 1 else 'are'} mostly dead: at least half of their "
                     "latents never fired in the evaluation.")  # fmt: skip
    if broken:
        found.append(f"{broken} of {total} members have no finite reconstruction error: they diverged or were not "
                     "evaluated; their cells are blank.")  # fmt: skip
    if worse:
        found.append(f"{worse} of {total} members reconstruct worse than the mean of the data would (FVU above 1).")
    return found


def blanks(matrix: Any) -> str:
    """A note on blank cells, empty where there are none."""
    missing = int((matrix != matrix).sum())
    if not missing:
        return ""
    return f"{missing} of {matrix.size} cells are blank: no finite value was measured there."

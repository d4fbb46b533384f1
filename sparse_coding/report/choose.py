"""Which member of a sweep to look at first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_coding.errors import UserError
from sparse_coding.report.families import site_label
from sparse_coding.report.records import metric

MOSTLY_DEAD = 0.5
"""A member with this fraction of dead latents or more is not recommended while another is left."""


def pareto(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The members that no other beats in both L0 and FVU, by ascending L0 (and so descending FVU).

    Members without a positive L0 and a finite FVU take no part.
    """
    usable = [record for record in records if metric(record, "l0") > 0 and math.isfinite(metric(record, "fvu"))]
    frontier: list[Mapping[str, Any]] = []
    for record in sorted(usable, key=lambda record: (metric(record, "l0"), metric(record, "fvu"), record["name"])):
        if not frontier or metric(record, "fvu") < metric(frontier[-1], "fvu"):
            frontier.append(record)
    return frontier


def best_member(records: Sequence[Mapping[str, Any]]) -> str:
    """Name of the member at the knee of the L0-FVU frontier.

    Candidates are the members with fewer than half of their latents dead and FVU below 0.5; where there are none, those
    with fewer than half dead; where there are none either, all. On their Pareto frontier, log L0 and FVU are scaled to
    [0, 1] and the smallest sum wins: the point farthest below the straight line between the ends of the frontier. Ties
    go to the lower FVU. Members of different sites must not be compared: give those of one site, see `best_members`.

    Raises UserError where no member has a positive L0 and a finite FVU.
    """
    alive = [record for record in records if not metric(record, "dead_fraction") >= MOSTLY_DEAD]
    good = [record for record in alive if metric(record, "fvu") < 0.5]
    frontier = next((found for group in (good, alive, records) if (found := pareto(group))), None)
    if frontier is None:
        raise UserError(f"none of the {len(records)} members has a positive L0 and a finite FVU: see results.jsonl")
    l0 = [math.log(metric(record, "l0")) for record in frontier]
    fvu = [metric(record, "fvu") for record in frontier]

    def cost(index: int) -> tuple[float, float]:
        width, height = (l0[-1] - l0[0]) or 1.0, (fvu[0] - fvu[-1]) or 1.0
        total = (l0[index] - l0[0]) / width + (fvu[index] - fvu[-1]) / height
        return round(total, 9), fvu[index]

    return frontier[min(range(len(frontier)), key=cost)]["name"]


def best_members(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Site -> name of its best member, for every site that has a usable one.

    Members of one site that predict different targets do not compare: those of its first target are taken here, and
    `best_by_site` has the others.
    """
    best, found = best_by_site(records), {}
    for record in records:
        if site_label(record) in best:
            found.setdefault(str(record.get("site")), best[site_label(record)])
    return found


def best_by_site(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The same by site label: a site, or `input -> target` for transcoders."""
    sites: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        sites.setdefault(site_label(record), []).append(record)
    return {site: best_member(members) for site, members in sites.items() if pareto(members)}

"""What a line of log.jsonl holds of every member, and what of it the progress line shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_coding.progress import quantity
from sparse_coding.training.stack import Stack
from sparse_coding.training.sweep import Member


def averages(
    groups: Sequence[Sequence[int]], stacks: Sequence[Stack], members: Sequence[Member], moments: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """Column -> the value of each member, averaged since the last line; waits for the device, and begins anew.

    `moments` hold, by site, the sum of the batches' total variances and the number of batches. NaN where a member has
    no such value.
    """
    columns: dict[str, list[float]] = {}
    for group, stack in zip(groups, stacks, strict=True):
        for name, values in stack.averages().items():
            column = columns.setdefault(name, [math.nan] * len(members))
            for index, value in zip(group, values, strict=True):
                column[index] = value
    variances = {site: (sums[0] / sums[1]).item() for site, sums in moments.items()}
    for sums in moments.values():
        sums.zero_()
    squared_error = columns.pop("squared_error")
    columns["mse"] = [e / m.settings.target_width for e, m in zip(squared_error, members, strict=True)]
    columns["fvu"] = [
        e / variances[m.output_site] if variances[m.output_site] > 0 else math.nan
        for e, m in zip(squared_error, members, strict=True)
    ]
    return columns


def mean(values: Sequence[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def summary(record: dict[str, Any], rows: int) -> str:
    """Ranges over the members, for the progress line."""
    words = []
    for name in ("fvu", "l0"):
        values = [value for value in record[name] if value is not None]
        if values:
            words.append(f"{name} {min(values):.3g} to {max(values):.3g}")
    words.append(f"{quantity(record['step'] * rows)} rows")
    return ", ".join(words)

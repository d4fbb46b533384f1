"""The stacks of a sweep, with their initial weights."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_coding.dictionaries import Sample, architecture
from sparse_coding.training.precision import products_dtype
from sparse_coding.training.settings import TrainingSettings
from sparse_coding.training.stack import Stack
from sparse_coding.training.stream import Stream, first_rows
from sparse_coding.training.sweep import Member

SAMPLE_ROWS = 32_768
"""Rows that initial values are taken from."""


def build_stacks(
    members: Sequence[Member],
    groups: Sequence[Sequence[int]],
    stream: Stream,
    settings: TrainingSettings,
    device: str,
) -> list[Stack]:
    """The stacks of a sweep with their initial weights, which may be taken from the stream's first rows."""
    dtype = products_dtype(settings.precision, device)
    rows = None
    if any(architecture(m.architecture).needs_sample(m.settings) for m in members):
        rows = {site: x.cpu() for site, x in first_rows(stream, SAMPLE_ROWS).items()}
    stacks = []
    for group in groups:
        chosen = [members[index] for index in group]
        sample = Sample(rows[chosen[0].site], rows[chosen[0].output_site]) if rows else None
        stacks.append(Stack(chosen, settings.optimizer, device, dtype, settings.dead, sample))
    return stacks

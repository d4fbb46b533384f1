"""What every study records of a trained sweep: one line of results.jsonl per member."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_coding.config import to_dict
from sparse_coding.dictionaries import Dictionary
from sparse_coding.formats.saelens import Normalised, save_dictionary
from sparse_coding.metrics.matching import mmcs_with_larger
from sparse_coding.metrics.reconstruction import Reconstruction
from sparse_coding.training.sweep import Member
from sparse_coding.training.trainer import Trainer


def save_dictionaries(
    trainer: Trainer,
    folder: Path,
    normalised: Callable[[Member], Normalised] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Every member into `folder/dictionaries/<name>`; `normalised` says what training did to its activations."""
    for index, member in enumerate(trainer.members):
        metadata = {**(facts or {}), "hook_name": member.site}
        if member.target:
            metadata["hook_name_out"] = member.target
        target = folder / "dictionaries" / member.name
        own = normalised(member) if normalised else None
        save_dictionary(trainer.dictionary(index), member.architecture, target, own, metadata)


def next_larger(members: Sequence[Member]) -> list[int | None]:
    """For each member the index of the next larger dictionary that differs from it in size alone."""

    def but_for_size(member: Member) -> Member:
        known = {**vars(member.settings), "d_sae": 0}
        return replace(member, settings=known)

    found: list[int | None] = []
    for member in members:
        larger = [
            (other.settings.d_sae, index)
            for index, other in enumerate(members)
            if other.settings.d_sae > member.settings.d_sae and but_for_size(other) == but_for_size(member)
        ]
        found.append(min(larger)[1] if larger else None)
    return found


def stability(members: Sequence[Member], dictionary: Callable[[int], Dictionary]) -> list[float | None]:
    """MMCS of each dictionary with the next larger one at the same settings, None for the largest.

    The study of 2022 reads it where the truth is unknown: directions that a larger dictionary finds again are likely
    to be features.
    """
    return [
        None if larger is None else mmcs_with_larger(dictionary(index).atoms, dictionary(larger).atoms)
        for index, larger in enumerate(next_larger(members))
    ]


def record(member: Member, ratio: float, reconstruction: Reconstruction, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """One line of results.jsonl: settings, seed and every metric, unrounded and unclipped."""
    settings = to_dict(member.settings)
    return {
        "name": member.name,
        "site": member.site,
        "target": member.target,
        "architecture": member.architecture,
        "variant": member.variant,
        "d_in": member.settings.d_in,
        "d_sae": member.settings.d_sae,
        "ratio": ratio,
        **{name: settings[name] for name in member.settings.per_member},
        "lr": member.lr,
        "seed": member.seed,
        "settings": settings,
        "metrics": {**reconstruction.result(), **metrics},
        "density": reconstruction.density_histogram(),
    }

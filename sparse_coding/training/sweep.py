"""A sweep: grid -> members -> stacks.

What multiplies (L1, learning rate) is a number per member inside a stack; what changes shapes or control flow splits
the stack. A stack is also cut to a size in memory, since beyond it batching gains nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from sparse_coding.config import from_dict, to_dict
from sparse_coding.dictionaries import DictionarySettings, architecture
from sparse_coding.errors import UserError, near

STACK_BYTES = {"cpu": 64 * 2**20}
ELSEWHERE = 4 * 2**30
"""How much a stack may touch in one step: on a CPU about the last-level cache (larger stacks gain nothing and take
memory), on a GPU enough to fill it."""


@dataclass(frozen=True)
class Member:
    """One dictionary of a sweep: architecture, hyperparameters, seed."""

    architecture: str
    settings: DictionarySettings
    site: str = "synthetic"
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"the learning rate is {self.lr}: it must be positive")

    @property
    def name(self) -> str:
        """Unique in a sweep, fit for a file name."""
        numbers = {field: getattr(self.settings, field) for field in self.settings.per_member}
        varied = [f"{field.removesuffix('_coefficient')}_{value:.6g}" for field, value in numbers.items()]
        words = [self.architecture, str(self.settings.d_sae), *varied, f"lr_{self.lr:.6g}", f"seed_{self.seed}"]
        prefix = "" if self.site == "synthetic" else re.sub(r"[^A-Za-z0-9.]+", "_", self.site) + "-"
        return prefix + "-".join(words)

    def generator(self) -> torch.Generator:
        """The member's own source of randomness, the same alone and in a sweep."""
        return torch.Generator().manual_seed(self.seed)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **to_dict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Member:
        settings = from_dict(architecture(data["architecture"]).Settings, data["settings"])
        return Member(data["architecture"], settings, data["site"], data["lr"], data["seed"])


def grid(
    architecture_name: str,
    widths: Mapping[str, int],
    ratios: Iterable[float],
    lrs: Iterable[float] = (1e-3,),
    seeds: Iterable[int] = (0,),
    varied: Mapping[str, Iterable[Any]] | None = None,
    **shared: Any,
) -> list[Member]:
    """Every combination: site x ratio x varied settings x learning rate x seed.

    `ratios` are d_sae / d_in; `varied` maps a setting of the architecture to its values, such as
    `{"l1_coefficient": [0.1, 0.3]}`; `shared` are settings that all members have in common.
    """
    settings_class = architecture(architecture_name).Settings
    known = [field.name for field in fields(settings_class)]
    varied = {name: tuple(values) for name, values in (varied or {}).items()}
    for name in (*varied, *shared):
        if name not in known:
            raise UserError(
                f"{architecture_name} has no setting {name!r}: it has {', '.join(known)}{near(name, known)}"
            )
    ratios, lrs, seeds = tuple(ratios), tuple(lrs), tuple(seeds)
    for name, values in {"ratios": ratios, "learning rates": lrs, "seeds": seeds, **varied}.items():
        for value in values:
            if values.count(value) > 1:
                raise UserError(f"{name} holds {value} twice: leave out the repeated value")
    members = []
    for (site, d_in), ratio in itertools.product(widths.items(), ratios):
        for values in itertools.product(*varied.values()):
            chosen = dict(zip(varied, values, strict=True), **shared)
            settings = settings_class(d_in=d_in, d_sae=round(d_in * ratio), **chosen)
            members += [Member(architecture_name, settings, site, lr, seed) for lr in lrs for seed in seeds]
    names = [member.name for member in members]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the grid holds {twice} twice: two ratios give the same number of latents")
    if not members:
        raise UserError("the grid is empty: give at least one value for each of its axes")
    return members


def split_into_stacks(
    members: Sequence[Member], batch_size: int, most_bytes: int = STACK_BYTES["cpu"]
) -> list[list[int]]:
    """Indices of the members of each stack: one architecture, site and shape, touching at most `most_bytes` a step."""
    groups: dict[tuple, list[int]] = {}
    for index, member in enumerate(members):
        neutral = replace(member.settings, **dict.fromkeys(member.settings.per_member, 1))
        groups.setdefault((member.architecture, member.site, neutral), []).append(index)
    stacks = []
    for indices in groups.values():
        settings = members[indices[0]].settings
        # per latent: two weight vectors with moments, gradient and bf16 copy (20 bytes a number), four bf16 codes a row
        touched = settings.d_sae * (2 * 20 * settings.d_in + 4 * 2 * batch_size)
        size = max(1, most_bytes // touched)
        stacks += [indices[start : start + size] for start in range(0, len(indices), size)]
    return stacks


def stack_bytes(device: str) -> int:
    """The limit for `split_into_stacks` on a device."""
    return STACK_BYTES.get(device.split(":")[0], ELSEWHERE)

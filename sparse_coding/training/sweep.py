"""A sweep: grid -> members -> stacks.

What multiplies or counts (L1, k, learning rate) is a number per member inside a stack; what changes shapes or control
flow splits the stack. A stack is also cut to a size in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from sparse_coding.config import from_dict, to_dict
from sparse_coding.dictionaries import DictionarySettings, architecture, require_setting, settings_of
from sparse_coding.errors import UserError

STACK_BYTES = {"cpu": 512 * 2**20}
ELSEWHERE = 4 * 2**30
"""How much a stack may touch in one step: on a CPU as much as gives every thread whole members for a while without
many gradients waiting in memory, on a GPU enough to fill it."""
TILE_BYTES = 64 * 2**20
"""How much members may touch that a CPU takes through autograd at once: about the last-level cache, beyond which their
codes pass through memory at every operation."""


@dataclass(frozen=True)
class Member:
    """One dictionary of a sweep: architecture, hyperparameters, seed."""

    architecture: str
    settings: DictionarySettings
    site: str = "synthetic"
    target: str | None = None
    """The site a transcoder predicts; None: x itself is the target."""
    lr: float = 1e-3
    seed: int = 0
    variant: str = ""
    """What sets it apart from members of its architecture besides the numbers in its name, such as selection_abs."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"the learning rate is {self.lr}: it must be positive")

    @property
    def name(self) -> str:
        """Unique in a sweep, fit for a file name."""
        settings = self.settings
        defaults = {field.name: field.default for field in fields(settings)}
        told = [n for n in settings.per_member if n in settings.named or getattr(settings, n) != defaults[n]]
        varied = [f"{n.removesuffix('_coefficient')}_{getattr(settings, n):.6g}" for n in told]
        words = [self.architecture, str(settings.d_sae), *varied, f"lr_{self.lr:.6g}", f"seed_{self.seed}"]
        if self.variant:
            words.insert(1, self.variant)
        sites = [self.site, *([self.target] if self.target else [])]
        return ("" if self.site == "synthetic" else _short(_word("-to-".join(sites))) + "-") + "-".join(words)

    def generator(self) -> torch.Generator:
        """The member's own source of randomness, the same alone and in a sweep."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def output_site(self) -> str:
        """The site that x_hat is compared with."""
        return self.target or self.site

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **to_dict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Member:
        known = {key: value for key, value in data.items() if key not in ("name", "settings")}
        return Member(settings=from_dict(architecture(data["architecture"]).Settings, data["settings"]), **known)


def grid(
    architecture_name: str,
    widths: Mapping[str, int],
    ratios: Iterable[float],
    lrs: Iterable[float] = (1e-3,),
    seeds: Iterable[int] = (0,),
    varied: Mapping[str, Iterable[Any]] | None = None,
    targets: Mapping[str, str] | None = None,
    parts: Mapping[str, Sequence[int]] | None = None,
    **shared: Any,
) -> list[Member]:
    """Every combination: site x ratio x varied settings x learning rate x seed.

    `widths` are those of the sites in the stream. `ratios` are d_sae / d_in; `varied` maps a setting of the
    architecture to its values, such as `{"l1_coefficient": [0.1, 0.3]}`; `shared` are settings that all members have in
    common. `targets` maps input sites to the sites that transcoders predict from them: dictionaries are trained on its
    keys alone. `parts` maps sites that hold several side by side to their widths (crosscoders).
    """
    varied = {name: tuple(values) for name, values in (varied or {}).items()}
    for name in (*varied, *shared):
        require_setting(name, [architecture_name])
    ratios, lrs, seeds = tuple(ratios), tuple(lrs), tuple(seeds)
    for name, values in {"ratios": ratios, "learning rates": lrs, "seeds": seeds, **varied}.items():
        for value in values:
            if values.count(value) > 1:
                raise UserError(f"{name} holds {value} twice: leave out the repeated value")
    for ratio in ratios:
        if not 0 < ratio < math.inf:
            raise UserError(f"a ratio is {ratio}: it must be a positive number, such as 0.5 or 4")
    settings_class = architecture(architecture_name).Settings
    members = []
    for site, ratio in itertools.product(targets or widths, ratios):
        target = (targets or {}).get(site)
        shape: dict[str, Any] = {"d_in": widths[site], "d_sae": round(widths[site] * ratio)}
        if target is not None:
            require_setting("d_out", [architecture_name])
            shape["d_out"] = widths[target]
        if site in (parts or {}) and "parts" in settings_of(architecture_name):
            shape["parts"] = tuple((parts or {})[site])
        for values in itertools.product(*varied.values()):
            chosen = dict(zip(varied, values, strict=True))
            settings = settings_class(**{**shape, **shared, **chosen})
            words = [f"{name}_{_word(value)}" for name, value in chosen.items() if name not in settings.per_member]
            variant = "-".join(words)
            members += [
                Member(architecture_name, settings, site, target, lr, seed, variant) for lr in lrs for seed in seeds
            ]
    require_distinct(members)
    return members


def require_distinct(members: Sequence[Member]) -> None:
    """Raise UserError for a sweep without members, or with one twice."""
    names = [member.name for member in members]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"the grid holds {twice} twice: two ratios give the same number of latents, or two values of a setting "
            "agree to six digits"
        )
    if not members:
        raise UserError("the grid is empty: give at least one value for each of its axes")


def _short(word: str, most: int = 100) -> str:
    """A word that fits into a file name: the middle of a long one (many sites) gives way to a hash of the whole."""
    if len(word) <= most:
        return word
    digest = hashlib.sha256(word.encode()).hexdigest()[:8]
    return f"{word[: most // 2 - 5]}-{digest}-{word[-most // 2 + 5 :]}"


def _word(value: Any) -> str:
    """A value of a setting, fit for a file name."""
    values = value if isinstance(value, tuple) else (value,)
    return "_".join(
        f"{one:.6g}" if isinstance(one, float) else re.sub(r"[^A-Za-z0-9.]+", "_", str(one)) for one in values
    )


def split_into_stacks(
    members: Sequence[Member], batch_size: int, most_bytes: int = STACK_BYTES["cpu"]
) -> list[list[int]]:
    """Indices of the members of each stack: one architecture, site and shape, touching at most `most_bytes` a step."""
    groups: dict[tuple, list[int]] = {}
    for index, member in enumerate(members):
        own = member.settings
        fixed = tuple(getattr(own, field.name) for field in fields(own) if field.name not in own.per_member)
        groups.setdefault((member.architecture, member.site, member.target, fixed), []).append(index)
    stacks = []
    for indices in groups.values():
        size = members_within(most_bytes, members[indices[0]].settings, batch_size)
        stacks += [indices[start : start + size] for start in range(0, len(indices), size)]
    return stacks


def members_within(most_bytes: int, settings: DictionarySettings, rows: int) -> int:
    """How many members of a shape touch at most `most_bytes` in a step on `rows` rows; one at least."""
    # per latent: two weight vectors with moments, gradient and bf16 copy (20 bytes a number), four bf16 codes a row
    return max(1, most_bytes // (settings.d_sae * (2 * 20 * settings.d_in + 4 * 2 * rows)))


def stack_bytes(device: str) -> int:
    """The limit for `split_into_stacks` on a device."""
    return STACK_BYTES.get(device.split(":")[0], ELSEWHERE)

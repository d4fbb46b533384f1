"""Members that have nothing left to learn stop early: they keep their state and take no further updates.

Training looks at each member once in a window of updates, at its loss alone, as a share of the variance of the rows
(which takes out what differs between windows). A member is settled when that has not fallen by more than `tolerance`,
relative to its lowest so far, for `patience` windows in a row: dictionaries whose latents have died, and those at their
minimum. What a member would be measured by afterwards (a match with known features, say) plays no part.

A member that stops holds, bit for bit, what it would have held at that update had nothing been looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.errors import UserError


@dataclass(frozen=True)
class SettlingSettings:
    """When a member is settled."""

    every: int = 0
    """Updates of a window; 0: nothing is looked at, every member takes every update."""
    tolerance: float = 1e-3
    """How much the loss must fall, relative to its lowest, to count as falling."""
    patience: int = 3
    """Windows in a row without that."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"settling.every is {self.every}: it must be 0 (never) or more")
        if not 0 <= self.tolerance < 1:
            raise UserError(f"settling.tolerance is {self.tolerance}: it must be at least 0 and below 1")
        if self.patience < 1:
            raise UserError(f"settling.patience is {self.patience}: it must be at least 1")


STARTS = {"losses": 0, "variances": 0, "lowest": torch.inf, "calm": 0, "stopped": -1}
"""What a run remembers of each member, and what that is before the first update."""


class Settling:
    """What is remembered of each of `n_members`, all of it state of the run."""

    def __init__(self, settings: SettlingSettings, n_members: int, device: str):
        self.settings = settings
        self.losses, self.variances, self.lowest = torch.zeros(3, n_members, dtype=torch.float64, device=device)
        self.calm = torch.zeros(n_members, dtype=torch.int64, device=device)
        """Windows in a row in which the loss did not fall."""
        self.stopped = torch.zeros(n_members, dtype=torch.int64)
        """Updates done when the member stopped; -1 while it goes on. Known to the CPU."""
        self.begin()

    def begin(self) -> None:
        """As before the first update."""
        for name, start in STARTS.items():
            getattr(self, name).fill_(start)

    def state(self) -> dict[str, Tensor]:
        """By a flat name, sharing memory; nothing where nothing is looked at."""
        return {f"settling/{name}": getattr(self, name) for name in STARTS} if self.settings.every else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(state[name])

    def count(self, members: Sequence[int], losses: Float[Tensor, " m"], variance: Float[Tensor, ""]) -> None:
        """Add the losses of one update, and the total variance of the rows they were made on."""
        if self.settings.every:
            places = self._places(tuple(members))
            self.losses.index_add_(0, places, losses.double())
            self.variances.index_add_(0, places, variance.double().expand(len(places)))

    @cache  # noqa: B019 (it lives as long as the run, as this does)
    def _places(self, members: tuple[int, ...]) -> Tensor:
        """Indices where the sums lie: a list would be sent there at every update, which a GPU is waited for."""
        return torch.tensor(members, device=self.losses.device)

    def look(self, step: int) -> bool:
        """At the end of a window, when `step` updates are done: mark what is settled; whether any is new."""
        if not self.settings.every or step % self.settings.every:
            return False
        share = (self.losses / self.variances).nan_to_num(nan=torch.inf)
        falls = share < self.lowest * (1 - self.settings.tolerance)
        self.calm = torch.where(falls, 0, self.calm + 1)
        self.lowest = torch.minimum(self.lowest, share)
        self.losses.zero_()
        self.variances.zero_()
        new = (self.calm.cpu() >= self.settings.patience) & (self.stopped < 0)
        self.stopped[new] = step
        return bool(new.any())

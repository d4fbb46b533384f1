"""Mean and variance per channel of rows that come in pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.stores.manifest import Statistics

PIECE_ROWS = 4096
"""Rows turned to float64 at once."""


@dataclass
class Running:
    """(rows, mean, variance) of all rows so far, float64 on the CPU; its state is what the manifest holds.

    Two are merged by Chan, Golub, LeVeque, 1979 ("Updating formulae and a pairwise algorithm for computing sample
    variances"), eq. 2.1.
    """

    rows: int
    mean: Float[Tensor, " d"]
    variance: Float[Tensor, " d"]

    @classmethod
    def of(cls, rows: int, statistics: Statistics | None, width: int) -> Running:
        """As a manifest has them; None for no rows."""
        if statistics is None:
            return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
        mean, variance = (torch.tensor(one, dtype=torch.float64) for one in (statistics.mean, statistics.variance))
        return cls(rows, mean, variance)

    def said(self) -> Statistics:
        return Statistics(tuple(self.mean.tolist()), tuple(self.variance.tolist()))

    def add(self, x: Float[Tensor, "n d"]) -> int | None:
        """Count rows. Returns the first row with NaN or infinity, if there is one; those must not be counted on."""
        for start in range(0, len(x), PIECE_ROWS):
            part = x[start : start + PIECE_ROWS]
            part = (part.cpu() if part.device.type == "mps" else part).to(torch.float64, copy=True)
            mean = part.sum(0) / len(part)
            if not torch.isfinite(mean).all():
                return start + int((~torch.isfinite(part).all(1)).nonzero()[0])
            variance = part.sub_(mean).square_().sum(0) / len(part)  # twice as fast as torch.var_mean on a CPU
            other = Running(len(part), mean.cpu(), variance.cpu())
            self.merge(other)
        return None

    def merge(self, other: Running) -> None:
        rows = self.rows + other.rows
        if not other.rows:
            return
        share, delta = other.rows / rows, other.mean - self.mean
        self.mean = self.mean + delta * share
        self.variance = self.variance * (1 - share) + other.variance * share + delta.square() * (share * (1 - share))
        self.rows = rows

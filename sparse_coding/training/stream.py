"""What the trainer reads: batches that are a pure function of the position, so a resumed run needs no stream state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.errors import UserError


class Stream(Protocol):
    """Activations of one or several sites, in batches of `batch_size` rows."""

    batch_size: int

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of the activations by site."""
        ...

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d_in"]]:
        """Batch number `step` of each site. Any step may be asked for; asking in order is fastest."""
        ...


class TensorStream:
    """A stream over rows already in memory, in an order that is a pure function of (seed, epoch)."""

    def __init__(self, rows: Mapping[str, Float[Tensor, "N d_in"]], batch_size: int, seed: int = 0):
        sizes = {len(value) for value in rows.values()}
        if len(sizes) != 1 or min(sizes) < batch_size:
            raise UserError(f"the sites hold {sorted(sizes)} rows: they need one common number, at least {batch_size}")
        self.rows, self.batch_size, self.seed = dict(rows), batch_size, seed
        self.per_epoch = sizes.pop() // batch_size
        self._order: tuple[int, Tensor] | None = None

    @property
    def widths(self) -> Mapping[str, int]:
        return {site: value.shape[1] for site, value in self.rows.items()}

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d_in"]]:
        epoch, position = divmod(step, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            n_rows = len(next(iter(self.rows.values())))
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(n_rows, generator=generator)
        chosen = self._order[1][position * self.batch_size : (position + 1) * self.batch_size]
        return {site: value[chosen.to(value.device)] for site, value in self.rows.items()}


class ScaledStream:
    """Each site multiplied by one number, so that rows have mean norm sqrt(d_in) and an L1 value means the same
    on every model. The number is measured on the first batch alone, hence the same after a resume."""

    def __init__(self, stream: Stream):
        self.stream, self.batch_size = stream, stream.batch_size
        self.scales: dict[str, float] = {}
        for site, x in stream.batch(0).items():
            mean_norm = x.float().norm(dim=1).mean().item()
            if not mean_norm > 0:
                raise UserError(f"the activations at {site} are all zero: choose another site")
            self.scales[site] = x.shape[1] ** 0.5 / mean_norm

    @property
    def widths(self) -> Mapping[str, int]:
        return self.stream.widths

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d_in"]]:
        return {site: x * self.scales[site] for site, x in self.stream.batch(step).items()}

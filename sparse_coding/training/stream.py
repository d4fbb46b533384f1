"""What the trainer reads: batches that are a pure function of the position, so a resumed run needs no stream state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.normalise import Affine, Normalisation, RowNorm, row_statistics, scaling, whitening
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


class NormalisedStream:
    """Each site normalised, so that settings such as L1 weights mean the same on every model.

    What depends on the data as a whole (a mean norm, a covariance) is measured on the first batches alone, hence the
    same after a resume. See dictionaries/normalise.py for the kinds.
    """

    def __init__(self, stream: Stream, kind: Normalisation):
        self.stream, self.batch_size, self.kind = stream, stream.batch_size, kind
        self.maps: dict[str, Affine] = {}
        """What is done to all rows of a site alike, to be folded into dictionaries; identities for row-wise kinds."""
        self.row_norm: RowNorm | None = kind if kind in ("unit-norm", "layer-norm") else None
        """What is done to each row by itself."""
        for site, rows in first_rows(stream, WHITENING_ROWS if kind == "whiten" else 1).items():
            norm = rows.norm(dim=1).mean().item()
            if not norm > 0:
                raise UserError(f"the activations at {site} are all zero: choose another site")
            if kind == "whiten":
                self.maps[site] = whitening(rows)
            else:
                self.maps[site] = scaling(rows.shape[1] ** 0.5 / norm if kind == "mean-norm" else 1.0, rows.shape[1])

    @property
    def widths(self) -> Mapping[str, int]:
        return self.stream.widths

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d_in"]]:
        return {site: self.normalise(site, x) for site, x in self.stream.batch(step).items()}

    def normalise(self, site: str, x: Float[Tensor, "B d_in"]) -> Float[Tensor, "B d_in"]:
        if self.row_norm:
            shift, scale = row_statistics(x, self.row_norm)
            return (x - shift) / scale
        return self.maps[site](x)

    def undo(self, site: str, step: int) -> Callable[[Tensor], Tensor]:
        """The way back to raw activations for reconstructions `[... B d_in]` of batch `step`; differentiable."""
        if not self.row_norm:
            return self.maps[site].undo
        shift, scale = row_statistics(self.stream.batch(step)[site], self.row_norm)
        return lambda x_hat: x_hat * scale + shift


WHITENING_ROWS = 65_536
MOST_SKIPPED = 20
"""Batches with NaN or infinity one after another that are passed over or left out: more are no accident."""


def first_rows(stream: Stream, wanted: int) -> dict[str, Float[Tensor, "N d_in"]]:
    """The first batches of each site, float32, at least `wanted` rows in all (at least one batch).

    Batches with NaN or infinity are passed over: whether they stop the run is the trainer's to say. Raises `UserError`
    where too many follow each other.
    """
    batches: list[dict[str, Tensor]] = []
    step = bad = 0
    while len(batches) * stream.batch_size < max(1, wanted):
        batch, step = stream.batch(step), step + 1
        if sound(batch):
            batches.append(batch)
            bad = 0
            continue
        bad += 1
        if bad == MOST_SKIPPED:
            raise UserError(
                f"the activations at {', '.join(batch)} hold NaN or infinity in batch after batch (batches "
                f"{step - bad + 1:,} to {step:,}): use another model, site or model dtype"
            )
    return {site: torch.cat([batch[site] for batch in batches]).float() for site in batches[0]}


def sound(batch: Mapping[str, Tensor]) -> bool:
    """Whether all rows of a batch, and their squares, are numbers; waits for the device."""
    return all(bool(x.float().square().sum().isfinite()) for x in batch.values())

"""Normalisation of activations before dictionaries are trained on them.

    mean-norm   every row times one number, so that the mean norm is sqrt(d)     folded into the saved weights
    whiten      (x - mean) E (L + 1e-3 tr(L)/d)^(-1/2), E L E^T the covariance   folded (after arXiv 2511.13981)
    unit-norm   each row times sqrt(d) / ||x||                                   done again at inference, row by row
    layer-norm  each row minus its mean, over its standard deviation             done again at inference, row by row

The first two are one affine map for all rows (`Affine`); the last two depend on the row (`row_statistics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Normalisation = Literal["none", "mean-norm", "whiten", "unit-norm", "layer-norm"]
RowNorm = Literal["unit-norm", "layer-norm"]
RIDGE = 1e-3
"""Of the mean variance, added to each variance before whitening: directions without variance are not blown up."""
EPSILON = 1e-5


@dataclass(frozen=True)
class Affine:
    """x -> (x - shift) T, and back."""

    factor: Float[Tensor, " d"] | Float[Tensor, "d d"]
    """T: a diagonal, or a full matrix."""
    inverse: Float[Tensor, " d"] | Float[Tensor, "d d"]
    shift: Float[Tensor, " d"]

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        factor, shift = self.factor.to(x), self.shift.to(x)
        return (x - shift) * factor if factor.ndim == 1 else (x - shift) @ factor

    def undo(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The inverse map; differentiable."""
        inverse, shift = self.inverse.to(x), self.shift.to(x)
        return (x * inverse if inverse.ndim == 1 else x @ inverse) + shift

    def before(self, weight: Float[Tensor, "... d n"]) -> Float[Tensor, "... d n"]:
        """T @ weight: what takes raw rows, where `weight` took transformed ones (but for the shift)."""
        factor = self.factor.to(weight)
        return factor.unsqueeze(-1) * weight if factor.ndim == 1 else factor @ weight

    def after(self, weight: Float[Tensor, "... n d"]) -> Float[Tensor, "... n d"]:
        """weight @ T^-1: what gives raw rows, where `weight` gave transformed ones (but for the shift)."""
        inverse = self.inverse.to(weight)
        return weight * inverse if inverse.ndim == 1 else weight @ inverse


def scaling(scale: float, width: int) -> Affine:
    """x -> scale x."""
    return Affine(torch.full((width,), scale), torch.full((width,), 1 / scale), torch.zeros(width))


def whitening(rows: Float[Tensor, "N d"]) -> Affine:
    """The map that gives these rows zero mean and (but for the ridge) unit covariance."""
    x = rows.double().cpu()
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    variances, directions = torch.linalg.eigh(covariance)
    deviations = (variances.clamp_min(0) + RIDGE * covariance.trace() / len(mean)).sqrt()
    factor, inverse = directions / deviations, (directions * deviations).T
    return Affine(factor.float(), inverse.float().contiguous(), mean.float())


def joined(maps: Sequence[Affine]) -> Affine:
    """The map of sites side by side, from the maps of each."""
    if all(one.factor.ndim == 1 for one in maps):
        factor, inverse = (torch.cat([getattr(one, name) for one in maps]) for name in ("factor", "inverse"))
    else:
        full = [
            (one.factor, one.inverse) if one.factor.ndim == 2 else (one.factor.diag(), one.inverse.diag())
            for one in maps
        ]
        factor, inverse = torch.block_diag(*(f for f, _ in full)), torch.block_diag(*(i for _, i in full))
    return Affine(factor, inverse, torch.cat([one.shift for one in maps]))


def row_statistics(
    x: Float[Tensor, "... d"], kind: RowNorm, parts: Sequence[int] = ()
) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... d"]]:
    """(shift, scale) of each row, such that (x - shift) / scale is normalised; sites side by side (`parts`) each alone.

    layer-norm divides by the unbiased standard deviation + 1e-5, as SAELens and OpenAI do.
    """
    shifts, scales = [], []
    for part in x.split(list(parts) or [x.shape[-1]], dim=-1):
        if kind == "layer-norm":
            shift, scale = part.mean(-1, keepdim=True), part.std(-1, keepdim=True) + EPSILON
        else:
            scale = part.norm(dim=-1, keepdim=True).clamp_min(EPSILON) / part.shape[-1] ** 0.5
            shift = torch.zeros_like(scale)
        shifts.append(shift.expand_as(part))
        scales.append(scale.expand_as(part))
    return torch.cat(shifts, -1), torch.cat(scales, -1)

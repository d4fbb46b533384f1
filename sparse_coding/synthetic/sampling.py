"""Exact draws: seeds for every position, probabilities with a given sum, and sparse Bernoulli cells.

All draws are made on the CPU, whatever device the activations go to: the same seed is then the same world everywhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SPLITS = ("world", "train", "held-out")
STEP_BITS = 30
_MASK32, _MASK64 = 2**32 - 1, 2**64 - 1

# 1 - p of a certain feature is e^-37 < 2^-53, below the resolution of the uniform numbers themselves.
_CERTAIN = 37.0


def generator(seed: int, split: str, step: int) -> torch.Generator:
    """The random numbers of one position: a CPU generator seeded by a pure function of (seed, split, step).

    PyTorch's CPU generator reads only the low 32 bits of its seed, so well-mixed 64-bit seeds would still collide: over
    20,000 batches with a chance of 5%. Here (split, step) is numbered, split·2^30 + step, and sent through a
    *permutation* of the 32-bit numbers that is keyed by the world's seed: within a world no two positions ever share a
    seed, and held-out rows are disjoint from training rows by construction.
    """
    assert split in SPLITS, split
    assert 0 <= step < 2**STEP_BITS, step
    key = _splitmix64(seed)
    position = (SPLITS.index(split) << STEP_BITS) | step
    position = _permute32(_permute32(position ^ (key & _MASK32)) ^ (key >> 32))
    return torch.Generator().manual_seed(position)


def _splitmix64(number: int) -> int:
    """The 64-bit mixer of Steele, Lea and Flood (2014), a bijection."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK64
    return number ^ (number >> 31)


def _permute32(number: int) -> int:
    """The 32-bit finaliser of MurmurHash3: xor-shifts and odd multipliers, each invertible, so a bijection."""
    number = ((number ^ (number >> 16)) * 0x85EBCA6B) & _MASK32
    number = ((number ^ (number >> 13)) * 0xC2B2AE35) & _MASK32
    return number ^ (number >> 16)


def with_sum(weights: Float[Tensor, "*rows G"], total: float) -> Float[Tensor, "*rows G"]:
    """Probabilities min(1, s·w_i), with s chosen in each row such that they sum to `total` (at most G).

    Where s·w_i exceeds 1 it is clamped and the excess goes to the other features: with the m largest weights at 1, the
    rest are scaled to sum to total - m, and m is the smallest for which none of the rest exceeds 1. A row with fewer
    than `total` weights above zero (they can underflow) sums to less.
    """
    p = weights * (total / weights.sum(-1, keepdim=True).clamp(min=1e-30))
    if p.device.type == "cpu" and float(p.max()) <= 1:  # a shortcut; asking a GPU would cost more than it saves
        return p
    sizes = weights.sort(dim=-1, descending=True).values
    rest = sizes.flip(-1).cumsum(-1).flip(-1).clamp(min=1e-30)  # sum of the m-th largest weight and all smaller ones
    scales = (total - torch.arange(sizes.shape[-1], device=sizes.device)).clamp(min=0) / rest
    fits = scales * sizes <= 1 + 1e-6
    m = fits.int().argmax(-1, keepdim=True)  # the first m that fits
    return (weights * scales.gather(-1, m)).clamp(max=1)


def bernoulli_cells(
    p: Float[Tensor, "*B G"], batch_size: int, gen: torch.Generator
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """(sample, feature) of every active cell of a [B G] table of independent Bernoulli(p) cells, in row-major order.

    With one p [G] for all samples the work grows with the number of active cells: Poisson darts. Cell (b, i) owns an
    interval of length λ_i = -log(1 - p_i) of a line of length B·Σλ; as many darts as a Poisson(B·Σλ) draw says are
    thrown uniformly; a cell is active if hit at least once. Darts in disjoint intervals are independent and Poisson,
    so cells are independent and P(hit) = 1 - exp(-λ_i) = p_i, exactly. No cell without a dart is ever visited.

    With a p of its own for each sample [B G] the table exists already, and every cell is compared with a uniform
    (whose resolution is 2^-24).
    """
    if p.ndim == 2:
        samples, features = (torch.rand(p.shape, generator=gen) < p).nonzero(as_tuple=True)
        return samples, features
    ends = (-torch.log1p(-p.double())).clamp(max=_CERTAIN).cumsum(0)
    row = ends[-1]  # length of one sample's stretch of the line
    n_darts = int(torch.poisson(row * batch_size, generator=gen))
    # Sorted uniforms without sorting: sums of n + 1 exponential gaps, divided by the last sum.
    sums = torch.rand(n_darts + 1, generator=gen, dtype=torch.float64).neg_().log1p_().cumsum_(0)
    darts = sums[:-1] * (batch_size / sums[-1])
    samples = darts.long().clamp_(max=batch_size - 1)  # the last dart may round up to the very end
    features = torch.searchsorted(ends, darts.frac_().mul_(row), right=True)
    cells = torch.unique_consecutive(samples * len(p) + features)
    return cells // len(p), cells % len(p)


def fill_empty(
    samples: Int[Tensor, " n"], features: Int[Tensor, " n"], batch_size: int, n_features: int, gen: torch.Generator
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Bool[Tensor, " m"]]:
    """Give each sample without an active feature one, chosen uniformly; also says which entries are these fillers."""
    counts = torch.bincount(samples, minlength=batch_size)
    filled_counts = counts.clamp(min=1)
    all_samples = torch.repeat_interleave(filled_counts)
    is_filler = (counts == 0)[all_samples]
    all_features = torch.empty_like(all_samples)
    all_features[~is_filler] = features
    all_features[is_filler] = torch.randint(n_features, (len(all_samples) - len(samples),), generator=gen)
    return all_samples, all_features, is_filler

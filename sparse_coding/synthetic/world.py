"""A toy world: fixed true directions, and batches of sparse sums of them that can be asked for in any order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from sparse_coding.errors import UserError, near
from sparse_coding.synthetic.sampling import SPLITS, STEP_BITS, bernoulli_cells, fill_empty, generator, with_sum
from sparse_coding.synthetic.settings import WorldSettings

# The numbered draws of the "world" split.
_DIRECTIONS, _COVARIANCE, _FIXED, _EXPECTED = range(4)


class WorldBatch(NamedTuple):
    """Activations and the truth behind them; the codes are kept as their n active entries, ordered by sample."""

    x: Float[Tensor, "B d_in"]
    """Activations, codes @ directions plus noise."""
    samples: Int[Tensor, " n"]
    """Which row each active entry belongs to."""
    features: Int[Tensor, " n"]
    """Which true feature it is."""
    values: Float[Tensor, " n"]
    """Its true coefficient (with double_uniform the product of both factors)."""
    directions: Float[Tensor, "G d_in"]
    """The true directions, unit rows."""

    @property
    def codes(self) -> Float[Tensor, "B G"]:
        """The true coefficients as a dense table."""
        codes = self.values.new_zeros(len(self.x), len(self.directions))
        codes[self.samples, self.features] = self.values
        return codes


class World:
    """Feature directions and the law of the samples (see `settings`), with every batch a pure function of its position.

    A batch is decided by (settings, split, step, batch_size) alone. `split` is "train" or "held-out": their draws never
    share a seed. Batches are made on the CPU and then moved, so a world is bit for bit the same on every device; at the
    sizes of toy worlds making one takes a fraction of a millisecond.
    """

    def __init__(self, settings: WorldSettings, device: torch.device | str = "cpu") -> None:
        self.settings = settings
        self.device = torch.device(device)
        shape = (settings.n_features, settings.d_in)
        rows = torch.randn(shape, generator=self._generator(_DIRECTIONS), dtype=torch.float64)
        self._cpu_directions = (rows / rows.norm(dim=1, keepdim=True)).float()
        self.directions: Float[Tensor, "G d_in"] = self._cpu_directions.to(self.device)
        self._decay = _decay_factors(settings)
        self._factor = covariance_factor(settings)
        self._fixed: Float[Tensor, " G"] | None = None
        if settings.covariance == "uncorrelated" or settings.probability_draw == "fixed":
            self._fixed = self._draw_probabilities(1, self._generator(_FIXED))[0]

    def batch(self, step: int, batch_size: int, split: str = "train", noisy: bool = True) -> WorldBatch:
        """Batch number `step` (from 0) of a split. `noisy=False` leaves out the noise: the same rows, clean.

        When probabilities are drawn per batch, one batch is not a sample of the world's marginal law, however large;
        many batches are. Raises UserError for an unknown split, a negative step or a batch of no rows.
        """
        gen = self._position(step, batch_size, split)
        settings = self.settings
        p = self._probabilities(batch_size, gen)
        samples, features = bernoulli_cells(p, batch_size, gen)
        values = torch.rand(len(samples), generator=gen)
        if settings.filler:
            samples, features, is_filler = fill_empty(samples, features, batch_size, settings.n_features, gen)
            values = torch.ones(len(samples)).masked_scatter_(~is_filler, values)
        if settings.magnitude == "double_uniform":
            values *= torch.rand(len(samples), generator=gen)
        starts = torch.searchsorted(samples, torch.arange(batch_size))
        # codes @ directions, by the active entries only
        x = embedding_bag(features, self._cpu_directions, starts, mode="sum", per_sample_weights=values)
        if noisy and settings.noise > 0:
            x += settings.noise * torch.randn(x.shape, generator=gen)
        x, samples, features, values = (part.to(self.device) for part in (x, samples, features, values))
        return WorldBatch(x, samples, features, values, self.directions)

    def probabilities(self, step: int, batch_size: int, split: str = "train") -> Float[Tensor, "*B G"]:
        """The p that this batch is drawn with, on the CPU: [B G] if drawn per sample, else [G] for all samples."""
        return self._probabilities(batch_size, self._position(step, batch_size, split))

    def probability_draws(self, n_draws: int) -> Float[Tensor, "n_draws G"]:
        """Independent draws of p for statistics of the world, apart from those of any batch; [1 G] if p is fixed."""
        if self._fixed is not None:
            return self._fixed[None]
        return self._draw_probabilities(n_draws, self._generator(_EXPECTED))

    def _probabilities(self, batch_size: int, gen: torch.Generator) -> Float[Tensor, "*B G"]:
        if self._fixed is not None:
            return self._fixed
        if self.settings.probability_draw == "per_batch":
            return self._draw_probabilities(1, gen)[0]
        return self._draw_probabilities(batch_size, gen)

    def _draw_probabilities(self, n_draws: int, gen: torch.Generator) -> Float[Tensor, "n_draws G"]:
        """Steps 2 and 3 of the recipe; costs n_draws·G² for a covariance that is not diagonal."""
        if self.settings.covariance == "uncorrelated":
            return with_sum(self._decay[None], self.settings.mean_active)
        z = torch.randn(n_draws, self.settings.n_features, generator=gen)
        return probabilities_from(self.settings, z, self._factor, self._decay)

    def _generator(self, draw: int) -> torch.Generator:
        return generator(self.settings.seed, "world", draw)

    def _position(self, step: int, batch_size: int, split: str) -> torch.Generator:
        check_position(step, batch_size, split)
        return generator(self.settings.seed, split, step)


def check_position(step: int, batch_size: int, split: str) -> None:
    """Raise UserError unless a batch of `batch_size` rows can be asked for at this step of this split."""
    known = SPLITS[1:]  # all but the world's own draws
    if split not in known:
        raise UserError(f"split {split!r} is unknown; known are {', '.join(known)}{near(split, known)}")
    if not 0 <= step < 2**STEP_BITS:
        raise UserError(f"step = {step} is out of range; it must be at least 0 and below 2^{STEP_BITS}")
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size} is out of range; it must be at least 1")


def probabilities_from(
    settings: WorldSettings,
    normal: Float[Tensor, "n G"],
    factor: Float[Tensor, "G G"] | None,
    decay: Float[Tensor, " G"],
) -> Float[Tensor, "n G"]:
    """p from independent normal numbers, by the factor of the covariance and what u is multiplied by."""
    u = torch.special.ndtr(normal if factor is None else normal @ factor.T)
    return with_sum(u**decay if settings.decay == "power" else u * decay, settings.mean_active)


def covariance_matrix(settings: WorldSettings) -> Float[Tensor, "G G"]:
    """C of the world with these settings, in float64. Raises UserError for uncorrelated, which has none."""
    G, gen = settings.n_features, generator(settings.seed, "world", _COVARIANCE)
    if settings.covariance == "uncorrelated":
        raise UserError("covariance 'uncorrelated' draws no z and has no matrix; use 'identity' for independent z")
    if settings.covariance == "identity":
        return torch.eye(G, dtype=torch.float64)
    if settings.covariance == "wishart":
        A = torch.randn(G, G, generator=gen, dtype=torch.float64)
        return A @ A.T
    R = torch.rand(G, G, generator=gen, dtype=torch.float64)
    S = (R + R.T) / 2
    smallest = float(torch.linalg.eigvalsh(S)[0])
    C = S - 1.001 * min(smallest, 0.0) * torch.eye(G, dtype=torch.float64)
    if settings.covariance == "unit_diagonal":
        scale = C.diagonal().rsqrt()
        C = scale[:, None] * C * scale
    return C


def covariance_factor(settings: WorldSettings) -> Float[Tensor, "G G"] | None:
    """L with L·Lᵀ = C (factored in float64, returned in float32); None where z needs no matrix product."""
    if settings.covariance in ("identity", "uncorrelated"):
        return None
    return torch.linalg.cholesky(covariance_matrix(settings)).float()


def _decay_factors(settings: WorldSettings) -> Float[Tensor, " G"]:
    """What u is multiplied by (power: raised to), feature by feature."""
    index = torch.arange(settings.n_features, dtype=torch.float64)
    rate = settings.decay_rate
    if settings.decay == "geometric":
        factors = rate**index
    elif settings.decay == "power":
        factors = rate * index
    elif settings.decay == "zipf":
        factors = (index + 1) ** -rate
    else:
        factors = torch.ones_like(index)
    return factors.float()

"""What to expect before training anything: chance, ceilings, collapse and the features nobody could see.

Draw these next to every result: a score means little without the score of a random dictionary and of a perfect one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.synthetic.world import World


def chance_mmcs(n_atoms: int, d_in: int) -> float:
    """MMCS of a dictionary of `n_atoms` random unit atoms with any true features: E of the largest of n iid cosines.

    The angle θ of a random direction above the equator of a given one has density ∝ cos^(d_in-2) θ, and with its
    distribution function F the largest sine has mean 1 - ∫ F(θ)^n cos θ dθ over (-π/2, π/2). No sampling: the integral
    is taken on a grid, to about 1e-5.

    Raises UserError for no atoms or a width below 2.
    """
    if n_atoms < 1 or d_in < 2:
        raise UserError(f"chance_mmcs needs at least 1 atom and a width of at least 2, not {n_atoms} and {d_in}")
    half = torch.pi / 2
    theta = torch.linspace(-half, half, 20_001, dtype=torch.float64)
    density = theta.cos().clamp(min=0) ** (d_in - 2)
    F = torch.cumulative_trapezoid(density, theta)
    F = torch.cat([F.new_zeros(1), F / F[-1]])
    return 1 - float(torch.trapezoid(F**n_atoms * theta.cos(), theta))


def mmcs_ceiling(ratio: float, chance: float) -> float:
    """Best MMCS with `ratio` = d_sae / G: every atom finds another feature, features left over stay at `chance`."""
    return min(1.0, ratio) + max(0.0, 1.0 - ratio) * chance


def collapse_l1(ratio: float, d_in: int, n_features: int) -> float:
    """L1 coefficient above which a dictionary of ratio·G latents should be dead: 2·d_sae/d_in.

    For the loss of 2023, mean over rows *and* dimensions of the squared error + α·‖f‖₁/d_sae: one active feature with
    coefficient a and its own atom gets f = a - α·d_in/(2·d_sae), which is positive for the largest a = 1 only below
    this α. In practice the collapse comes earlier, since most coefficients are smaller. Without the 1/d_sae divide by
    d_sae (2/d_in); with the error summed over dimensions multiply that by d_in (2).
    """
    return 2.0 * ratio * n_features / d_in


def expected_dead(world: World, n_samples: int, batch_size: int = 256, n_draws: int = 4096) -> float:
    """Number of features that never fire in `n_samples` of a world: the dead latents of a perfect 1:1 dictionary.

    A latent that looks dead in a short evaluation may only have met no example; subtract this before calling it dead.
    Feature i stays silent in b samples of one draw of p with probability (1 - q_i)^b, where q_i is p_i plus its
    share of the filler, Π_j(1 - p_j)/G; draws are independent, so the mean over draws is raised to their number. A draw
    lasts one sample, one batch, or for ever: rare features that are off for a whole batch are missed more often.
    """
    settings = world.settings
    p = world.probability_draws(n_draws).double()
    silent = _stays_silent(p, settings.filler)
    if len(p) == 1:  # fixed
        never = silent[0] ** n_samples
    elif settings.probability_draw == "per_sample":
        never = silent.mean(0) ** n_samples
    else:
        whole, rest = divmod(n_samples, batch_size)
        never = (silent**batch_size).mean(0) ** whole * (silent**rest).mean(0)
    return float(never.sum())


def _stays_silent(p: Float[Tensor, "n_draws G"], filler: bool) -> Float[Tensor, "n_draws G"]:
    """Probability that a feature is not active in one sample, given p."""
    if not filler:
        return 1 - p
    return 1 - p - (1 - p).prod(-1, keepdim=True) / p.shape[-1]

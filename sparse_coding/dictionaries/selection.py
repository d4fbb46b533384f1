"""Which latents of a row, or of a whole batch, are kept: the masks of the TopK family, k per member."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_coding.errors import UserError

START = 10
"""k warm-up starts from ten times d_in latents, or from all where there are fewer (sparsify)."""


def require_k(k: float, d_sae: int, whole: bool) -> None:
    """Raise UserError unless 1 <= k <= d_sae, and k is whole where it is counted in each row."""
    if k < 1:
        raise UserError(f"k is {k:g}: it must be at least 1")
    if not k <= d_sae:
        raise UserError(f"k is {k:g}, but the dictionary has {d_sae} latents: k must lie between 1 and {d_sae}")
    if whole and k != int(k):
        raise UserError(
            f"k is {k:g}: it is a whole number of latents in each row; batchtopk and matryoshka take a mean"
        )


def warmed_up(k: Float[Tensor, "..."], sparsity: float, d_in: int, d_sae: int) -> Float[Tensor, "..."]:
    """k on its way from min(d_sae, 10 d_in) down to itself, as `sparsity` goes from 0 to 1."""
    return k if sparsity >= 1 else k + (min(d_sae, START * d_in) - k).clamp(min=0) * (1 - sparsity)


def most_warmed_up(k: float, sparsity: float, d_in: int, d_sae: int) -> int:
    """At least what `warmed_up` makes of `k`, rounded either way: known without a tensor."""
    if sparsity >= 1:
        return math.ceil(k)
    return min(d_sae, math.ceil(k + max(min(d_sae, START * d_in) - k, 0) * (1 - sparsity)) + 1)


def largest_per_row(
    scores: Float[Tensor, "... B d_sae"], k: Float[Tensor, "..."], most: int
) -> Bool[Tensor, "... B d_sae"]:
    """True at the round(k) largest scores of each row; `most` is at least the largest k of all members."""
    index = scores.topk(most, dim=-1).indices
    kept = torch.arange(most, device=scores.device) < k.round()[..., None, None]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(-1, index, kept.expand_as(index))


def largest_per_group(
    scores: Float[Tensor, "... B d_sae"], k: Float[Tensor, "..."], most: int
) -> Bool[Tensor, "... B d_sae"]:
    """GroupMax: the latents are cut into round(k) runs of equal length (but for rounding); True at each run's best."""
    d_sae = scores.shape[-1]
    place = torch.arange(d_sae, device=scores.device)
    group = (place * k.round()[..., None] / d_sae).long()  # [... d_sae]
    groups = group.unsqueeze(-2).expand(scores.shape)
    best = torch.full((*scores.shape[:-1], most), -torch.inf, dtype=scores.dtype, device=scores.device)
    best = best.scatter_reduce(-1, groups, scores.detach(), "amax")
    return scores == best.gather(-1, groups)


def largest_of_batch(
    scores: Float[Tensor, "... B d_sae"], k: Float[Tensor, "..."], most: float
) -> Bool[Tensor, "... B d_sae"]:
    """True at the int(k B) largest scores of each member's whole batch; ties with the last one kept are kept too."""
    rows = scores.shape[-2]
    flat = scores.detach().flatten(-2)
    count = (k * rows).long().clamp(1, flat.shape[-1])
    # one more than int(most * rows): the product above may round up
    values = flat.topk(min(int(most * rows) + 1, flat.shape[-1]), dim=-1).values
    last = values.gather(-1, (count - 1).unsqueeze(-1))
    return scores >= last.unsqueeze(-1)


def smallest_kept(f: Float[Tensor, "... B d_sae"]) -> Float[Tensor, "..."]:
    """The smallest positive code of each member's batch; infinity where none is positive."""
    return torch.where(f > 0, f, torch.inf).flatten(-2).amin(-1)


def group_ends(fractions: tuple[float, ...], d_sae: int) -> list[int]:
    """Where each group of a nested dictionary ends, from shares of its latents that sum to 1."""
    if not fractions or not min(fractions) > 0 or not abs(sum(fractions) - 1) <= 1e-6:
        shown = "/".join(f"{share:g}" for share in fractions)
        raise UserError(
            f"the group fractions ({shown}) sum to {sum(fractions):g}: they are shares of the latents, "
            "each above 0, that must sum to 1, such as 0.125/0.125/0.25/0.5"
        )
    ends, total = [], 0.0
    for share in fractions:
        total += share
        ends.append(round(total * d_sae))
    if len(set(ends)) < len(ends) or ends[0] < 1:
        raise UserError(f"{len(ends)} groups of {d_sae} latents leave some group empty: give fewer or larger fractions")
    ends[-1] = d_sae
    return ends


def random_ends(count: int, d_sae: int, exponent: float, generator: torch.Generator) -> list[int]:
    """`count` ends of prefixes, the last d_sae, the others drawn without replacement from P(m) ~ m^(-1 - exponent)."""
    if min(count, d_sae) == 1:
        return [d_sae]
    weights = torch.arange(1, d_sae, dtype=torch.float64) ** (-1 - exponent)
    drawn: Int[Tensor, " n"] = torch.multinomial(weights, min(count - 1, d_sae - 1), generator=generator) + 1
    return [*sorted(drawn.tolist()), d_sae]


DECAY = 0.99
"""Of the running mean of the smallest code kept."""


def following_threshold(
    threshold: Float[Tensor, "... d_sae"], seen: Float[Tensor, "..."], smallest: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "... d_sae"], Float[Tensor, "..."]]:
    """(the running mean of the smallest code kept, how many batches it is of) with this batch, from those before.

    Weights are 0.99^age and sum to 1 from the first batch on. A batch that keeps no positive code (infinity) does not
    count.
    """
    counts = smallest.isfinite()
    seen = seen + counts
    rate = (1 - DECAY) / (1 - DECAY ** seen.clamp(min=1))
    moved = threshold + rate.unsqueeze(-1) * (torch.where(counts, smallest, 0.0).unsqueeze(-1) - threshold)
    return torch.where(counts.unsqueeze(-1), moved, threshold), seen

"""Terms that the losses of several architectures are made of: the reconstruction error, AuxK, ghost gradients.

All run over leading axes and give one value per member.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_coding.dictionaries.base import stop_gradient

ErrorKind = Literal["mse", "fvu", "l2"]


def reconstruction_error(
    x_hat: Float[Tensor, "... B d"], target: Float[Tensor, "B d"], kind: ErrorKind
) -> Float[Tensor, "..."]:
    """mse  the batch mean of ||target - x_hat||^2, summed over dims
    fvu  sum ||target - x_hat||^2 / sum ||target - batch mean||^2       (sparsify, OpenAI up to the batch)
    l2   the batch mean of ||target - x_hat||, the norm itself
    """
    difference = target - x_hat
    if kind == "l2":
        return difference.norm(dim=-1).mean(-1)
    squared = difference.square().sum(-1)
    if kind == "fvu":
        return squared.sum(-1) / (target - target.mean(0)).square().sum()
    return squared.mean(-1)


def auxk_error(
    pre: Float[Tensor, "... B d_sae"],
    residual: Float[Tensor, "... B d_out"],
    W_dec: Float[Tensor, "... d_sae d_out"],
    dead: Bool[Tensor, "... d_sae"],
    k_aux: int,
    scores: Float[Tensor, "... B d_sae"] | None = None,
    signed: bool = False,
) -> Float[Tensor, "..."]:
    """How badly the dead latents alone explain what the living ones leave (Gao et al., arXiv 2406.04093, section A.2).

        mean_b ||e - e_hat||^2 * min(n_dead / k_aux, 1)        e = stop_gradient(target - x_hat)
        e_hat = relu(the k_aux largest pre-activations of dead latents) W_dec, without a bias

    The factor (sparsify, SAELens) keeps a handful of dead latents from being pulled at as hard as k_aux of them.
    OpenAI divide by the variance of e instead; the weight of either matters little, as Adam divides it out of the
    parameters that no other term reaches. `residual` is target - x_hat; 0 where nothing is dead. Dead latents are
    ranked by `scores` (pre itself by default); `signed`: those chosen keep their sign, without relu (AbsTopK).
    """
    k_aux = min(k_aux, pre.shape[-1])
    scores = torch.where(dead.unsqueeze(-2), pre if scores is None else scores, -torch.inf)
    index = scores.topk(k_aux, dim=-1).indices
    values = torch.where(dead.unsqueeze(-2), pre if signed else torch.relu(pre), 0.0).gather(-1, index)
    f = torch.zeros_like(pre).scatter(-1, index, values)
    distance = (stop_gradient(residual) - f @ W_dec).square().sum(-1).mean(-1)
    return distance * (dead.sum(-1) / k_aux).clamp(max=1)


def ghost_error(
    pre: Float[Tensor, "... B d_sae"],
    x_hat: Float[Tensor, "... B d_out"],
    target: Float[Tensor, "B d_out"],
    W_dec: Float[Tensor, "... d_sae d_out"],
    dead: Bool[Tensor, "... d_sae"],
) -> Float[Tensor, "..."]:
    """Ghost gradients in their original form (Anthropic, January 2024 update; mats_sae_training of February 2024).

        r = target - x_hat          g = exp(pre of dead latents) W_dec, scaled per row to half the length of r
        l = (g - r)^2 / ||r - mean_b r||    m = (x_hat - target)^2 / ||target - mean_b||    per element, norms per row
        ghost = mean of stop_gradient(m / (l + 1e-6)) * l

    so that it has the size of the error itself. r, the lengths and m are constants. 0 where nothing is dead.
    """
    residual = stop_gradient(target - x_hat)
    ghost = torch.where(dead.unsqueeze(-2), pre, -torch.inf).exp() @ W_dec
    lengths = residual.norm(dim=-1, keepdim=True) / (1e-6 + 2 * ghost.norm(dim=-1, keepdim=True))
    ghost = ghost * stop_gradient(lengths)
    spread = (residual - residual.mean(-2, keepdim=True)).norm(dim=-1, keepdim=True)
    distance = (ghost - residual).square() / spread
    error = residual.square() / (target - target.mean(-2, keepdim=True)).norm(dim=-1, keepdim=True)
    rescaled = stop_gradient(error / (distance + 1e-6)) * distance
    return torch.where(dead.any(-1), rescaled.mean((-2, -1)), 0.0)

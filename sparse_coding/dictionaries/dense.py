"""The dense step of a linear dictionary: what its settings and the moment say, in the words of `kernels/dense.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import Moment
from sparse_coding.dictionaries.linear import LinearDictionary
from sparse_coding.kernels.dense import DenseProblem, DenseResult, dense_step
from sparse_coding.kernels.result import StepResult


class Dense(NamedTuple):
    """A dense step: what there is to hand back, and what an architecture's own terms are made of."""

    result: StepResult
    dense: DenseResult
    l1: Float[Tensor, " M"]
    """The penalty without its weight: E sum_i of what is penalised, times the norms where it counts them."""


def dense_gradients(
    dictionary: LinearDictionary,
    x: Float[Tensor, "B d_in"],
    target: Float[Tensor, "B d_out"] | None,
    moment: Moment,
    dtype: torch.dtype,
    l1_weight: Float[Tensor, " M"],
    counts_norms: bool,
    error_weight: float = 1.0,
    bias: str = "b_enc",
    **own: Any,
) -> Dense | None:
    """The step of loss = error_weight E ||x_hat - target||^2 + l1_weight E sum_i f_i [||W_dec_i||], norms where it
    `counts_norms`; `own` are fields of `DenseProblem`, `bias` names what is added to x W_enc.

    None where the definition has to do it: another error, a skip connection, and what revives dead latents.
    """
    settings, values = dictionary.settings, dictionary.tensors()
    revives = moment.dead is not None and settings.dead_latents != "none"
    if settings.error != "mse" or settings.skip or moment.error or revives:
        return None
    weight, norms, learning = l1_weight.unsqueeze(1), None, dictionary.learning
    penalty, slope = weight.expand_as(values[bias]), None
    if counts_norms:
        norms = dictionary.norms.detach()
        penalty = weight * norms
        learning = None if settings.parts else learning  # which knows one norm an atom
        slope = None if learning is None else torch.where(norms > 0, weight / norms, 0.0)
    problem = DenseProblem(
        x, x if target is None else target, values.get("W_enc"), values[bias], values["W_dec"], values.get("b_dec"),
        settings.subtracts, penalty, error_weight, norm_slope=slope, learning=learning,
        unit=settings.decoder == "unit", projects=settings.decoder == "unit" and settings.remove_parallel_gradient,
        **own,
    )  # fmt: skip
    dense = dense_step(problem, dtype)
    gradients = dict(dense.gradients)
    gradients[bias] = gradients.pop("b_enc")
    if norms is not None and "W_dec" in gradients:
        add_slope_of_norms_(gradients["W_dec"], dictionary, weight * dense.gates)
    sizes = dense.codes.sum(1)
    if norms is not None:
        l1 = (dense.gates * norms).sum(1)
    else:
        l1 = sizes if dense.gates is dense.codes else dense.gates.sum(1)
    loss = error_weight * dense.squared_error + l1_weight * l1 + dense.auxiliary
    result = StepResult(gradients, loss, dense.squared_error, sizes, dense.active)
    return Dense(result, dense, l1)


@torch.no_grad()
def add_slope_of_norms_(
    gradient: Float[Tensor, "M d_sae d_out"], dictionary: LinearDictionary, weights: Float[Tensor, "M d_sae"]
) -> None:
    """Add the gradient of sum_i weights_i norms_i: atom i over its norm, part by part for a crosscoder."""
    parts = list(dictionary.settings.parts) or [gradient.shape[-1]]
    for own, atoms in zip(gradient.split(parts, -1), dictionary.W_dec.detach().split(parts, -1), strict=True):
        norms = atoms.norm(dim=-1)
        factor = torch.where(norms > 0, weights / norms, 0.0)
        own.addcmul_(atoms, factor.unsqueeze(-1))

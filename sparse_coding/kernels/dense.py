"""The dense step: loss and gradients of a stack of ReLU or gated dictionaries, without autograd.

    e = (x - b_dec) W_enc
    ReLU     f = relu(e + b_enc)
    gated    g = relu(e + b_enc)        f = H(g) relu(exp(r_mag) e + b_mag)
    x_hat = f W_dec + b_dec

    loss = error_weight E ||x_hat - target||^2 + E sum_i penalty_i f_i                               (ReLU)
    loss = error_weight E ||x_hat - target||^2 + E sum_i penalty_i g_i + E ||g W_dec + b_dec - target||^2       (gated)

Five matrix products for each member, 10 B d_in d_sae FLOP (gated: seven), in fp32 or bf16 with sums in fp32. The
gradient of `b_dec` through the encoder is a matrix-vector product, so a learned `b_dec` costs no sixth.

There are two implementations of one interface: `dense_native.py` hands the step to C++ (cpp/), which keeps a tile of
rows or latents in cache from one product to the next; `dense_operators.py` does the same in torch's operators, on
any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.kernels import dense_native, dense_operators, triton
from sparse_coding.kernels.problem import LinearProblem


@dataclass(frozen=True)
class DenseProblem(LinearProblem):
    """What one dense step computes."""

    penalty: Float[Tensor, "M d_sae"]
    """Weight of the batch mean of each latent's code (gated: of its open gate)."""
    error_weight: float = 1.0
    b_mag: Float[Tensor, "M d_sae"] | None = None
    r_mag: Float[Tensor, "M d_sae"] | None = None
    """Given with b_mag: gated."""
    frozen: bool = True
    """The last term of the gated loss trains neither W_dec nor, but for x - b_dec, b_dec."""
    norm_slope: Float[Tensor, "M d_sae"] | None = None
    """Where an update has to count the penalty's slope in the norms: times the mean of what is penalised and the atom,
    it is added to the atom's gradient."""


class DenseResult(NamedTuple):
    """Gradients of the loss, and its parts as means over rows."""

    gradients: dict[str, Tensor]
    """Of the parameters that were given, by name, but for those that were updated."""
    squared_error: Float[Tensor, " M"]
    auxiliary: Float[Tensor, " M"]
    """The squared error of the gates' own x_hat; 0 without gates."""
    codes: Float[Tensor, "M d_sae"]
    """Mean of f."""
    gates: Float[Tensor, "M d_sae"]
    """Mean of what is penalised: the open gates, or f."""
    active: Float[Tensor, "M d_sae"]
    """On how many rows f is above 0."""


@torch.no_grad()
def dense_step(problem: DenseProblem, dtype: torch.dtype) -> DenseResult:
    """The step with products in `dtype`."""
    if dtype in (torch.float32, torch.bfloat16) and triton.serves(problem.x):
        from sparse_coding.kernels.triton import dense as on_gpu  # imports Triton, which a CPU need not have

        with torch.cuda.device_of(problem.x):
            return on_gpu.step(problem, dtype)
    return (dense_native.step(problem, dtype) if dense_native.serves(problem, dtype) else None) or dense_operators.step(
        problem, dtype
    )

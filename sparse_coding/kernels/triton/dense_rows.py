"""What the latents learn in a dense step: from the gradients that the products give to new weights, in one pass.

A program owns a row of a matrix. Gradients are read as the products leave them, so there is no copy of them in fp32,
and the copy of the weights for the next step's products is written beside the weights.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sparse_coding.kernels.triton.adam import RowAdam, learn_row, read_row

if TYPE_CHECKING:
    from sparse_coding.kernels.dense import DenseProblem

WARP = 256
"""Numbers of a row for each warp."""


@triton.jit
def _learn_dense(gradients, others, penalised, norm_slope, weights, moments1, moments2, half, rates, roots, counts,
                 beta1, beta2, eps, d_sae, width, stride_member, stride_latent, stride_dim, PROJECTS: tl.constexpr,
                 UNIT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A latent's row of a matrix learns from its gradients, and where `norm_slope` from the penalty of its norm."""
    latent, member, dims = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    place, ok = member * d_sae + latent, dims < width
    at = member * stride_member + latent.to(tl.int64) * stride_latent + dims * stride_dim
    gradient = tl.load(gradients + place * width + dims, mask=ok, other=0.0).to(tl.float32)
    value, moment1, moment2 = read_row(weights, moments1, moments2, at, ok)
    if others is not None:
        gradient += tl.load(others + place * width + dims, mask=ok, other=0.0).to(tl.float32)
    if norm_slope is not None:
        gradient += tl.load(norm_slope + place) * tl.load(penalised + place) * value
    learn_row(value, moment1, moment2, gradient, at, latent * width + dims, ok, member, weights, moments1, moments2,
              half, rates, roots, counts, beta1, beta2, eps, PROJECTS, UNIT)  # fmt: skip


def learn(
    problem: DenseProblem,
    learning: RowAdam,
    d_decoder: Float[Tensor, "M d_sae d_out"],
    d_columns: Float[Tensor, "M d_sae d_in"],
    penalised: Float[Tensor, "M d_sae"],
) -> None:
    """Update W_dec and W_enc in place; where they are tied, W_dec by the sum of both gradients."""
    n_members, d_sae, _ = problem.W_dec.shape
    learning.begin()
    for name, matrix, gradient in (
        ("W_dec", problem.W_dec, d_decoder),
        ("W_enc", None if problem.W_enc is None else problem.W_enc.mT, d_columns),
    ):
        if matrix is None:
            continue
        width, decodes = matrix.shape[2], name == "W_dec"
        block = triton.next_power_of_2(width)
        _learn_dense[(d_sae, n_members)](
            gradient, d_columns if decodes and problem.W_enc is None else None, penalised,
            problem.norm_slope if decodes else None, *learning.of(name, gradient.dtype), d_sae, width,
            *matrix.stride(), PROJECTS=decodes and problem.projects, UNIT=decodes and problem.unit, BLOCK=block,
            num_warps=max(1, min(8, block // WARP)),
        )  # fmt: skip

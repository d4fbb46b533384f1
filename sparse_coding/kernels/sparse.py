"""The sparse step: loss and gradients of a stack in which few latents of a row are active, without autograd.

    pre = (x - b_dec) W_enc + b_enc        f = the entries of pre that a rule keeps, 0 elsewhere
    x_hat_g = f[..ends_g] W_dec[..ends_g] + b_dec, for each prefix g of the latents (mostly one: all of them)

    loss = sum_g error(x_hat_g, target) + penalty * sum_i f_i  [+ aux_weight * AuxK]        summed over rows

One dense product, the encoder's, 2 B d_in d_sae FLOP; everything else runs over the A active entries, 8 A d FLOP.
Nothing of size [B k d] is made, and no gradient of x.

There are two implementations of one interface: `sparse_native.py` hands the step to C++ (cpp/), compiled when first
needed; `sparse_operators.py` does the same in torch's operators, and is what runs where there is no compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_coding.kernels import sparse_native, sparse_operators

DENSEST = {"native": 3 / 16, "operators": 1 / 24}
"""Share of active entries up to which an implementation is faster than autograd; measured, see docs/kernels.md."""

Rule = Literal["topk", "batch", "above"]


@dataclass(frozen=True)
class SparseProblem:
    """What one step computes; all tensors float32 and contiguous on one device, `[M ...]` but for rows."""

    x: Float[Tensor, "B d_in"]
    target: Float[Tensor, "B d_out"]
    W_enc: Float[Tensor, "M d_in d_sae"] | None
    """None: tied, W_dec^T."""
    b_enc: Float[Tensor, "M d_sae"]
    W_dec: Float[Tensor, "M d_sae d_out"]
    b_dec: Float[Tensor, "M d_out"] | None
    subtracts: bool
    """Whether the encoder sees x - b_dec."""
    rule: Rule
    """topk: the k largest scores of each row; batch: of the whole batch, with what equals the last of them; both where
    positive (not 0 where `signed`). above: pre > threshold, or > 0 where there is none."""
    k: Int[Tensor, " M"] | None = None
    """Of each row (topk), of the whole batch (batch)."""
    norms: Float[Tensor, "M d_sae"] | None = None
    """Scores are pre times these."""
    signed: bool = False
    """Scores are sizes, and codes keep their sign (topk alone)."""
    threshold: Float[Tensor, "M d_sae"] | None = None
    window: Float[Tensor, " M"] | None = None
    """Width of the window around the threshold in which entries count for its gradient."""
    penalty: Float[Tensor, " M"] | None = None
    """Of each unit of each code of each row."""
    ends: tuple[int, ...] = ()
    """Where the prefixes end, the last at d_sae; empty: there is only the whole."""
    norm_error: bool = False
    """The error of a row is its length, not the length squared."""
    error_weight: float = 1.0
    """Of the error of each row."""
    dead: Bool[Tensor, "M d_sae"] | None = None
    """Latents that AuxK lets learn what is left: the k_aux with the largest scores in each row."""
    k_aux: int = 0
    aux_weight: Float[Tensor, " M"] | None = None
    """Of the squared distance of each row."""

    @property
    def prefixes(self) -> tuple[int, ...]:
        return self.ends or (self.W_dec.shape[1],)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """M, B, d_in, d_out, d_sae."""
        n_members, d_sae, d_out = self.W_dec.shape
        rows, d_in = self.x.shape
        return n_members, rows, d_in, d_out, d_sae


class SparseResult(NamedTuple):
    """Gradients of the loss, and its parts as sums over rows."""

    gradients: dict[str, Tensor]
    """Of the parameters that were given, by name. That of the threshold is left to its owner, see `inside`."""
    errors: Float[Tensor, "M n_prefixes"]
    squared_error: Float[Tensor, " M"]
    """Of the whole."""
    auxk: Float[Tensor, " M"]
    """Squared distances, without weight."""
    l1: Float[Tensor, " M"]
    active: Float[Tensor, "M d_sae"]
    """On how many rows each latent fired."""
    smallest: Float[Tensor, " M"] | None = None
    """The smallest positive score kept (batch); infinity where there is none."""
    inside: Float[Tensor, "M d_sae"] | None = None
    """Sum of d loss / d f over the rows inside the window."""
    n_inside: Float[Tensor, "M d_sae"] | None = None
    """How many those are."""


@torch.no_grad()
def sparse_step(problem: SparseProblem, dtype: torch.dtype, densest: float = 1.0) -> SparseResult | None:
    """The step with products in `dtype` (fp32 or bf16), sums in fp32; None where it would not pay (more than `DENSEST`,
    or than a share `densest`, is active: of some rows, or of the batch), or on another device than the CPU."""
    if problem.x.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    name, step = ("native", sparse_native.step) if sparse_native.loaded() else ("operators", sparse_operators.step)
    densest = min(densest, DENSEST[name])
    if problem.k is not None:
        rows = len(problem.x) if problem.rule == "batch" else 1
        if int(problem.k.max()) > densest * rows * problem.W_dec.shape[1]:
            return None
    return step(problem, dtype, densest)

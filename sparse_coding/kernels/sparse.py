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

from sparse_coding.kernels import sparse_native, sparse_operators, triton
from sparse_coding.kernels.problem import LinearProblem

DENSEST = {"native": 3 / 16, "operators": 1 / 24}
"""Share of active entries up to which an implementation is faster than autograd; measured, see docs/kernels.md."""

Rule = Literal["topk", "batch", "above"]


@dataclass(frozen=True)
class SparseProblem(LinearProblem):
    """What one sparse step computes."""

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
    error_weight: float | Tensor = 1.0
    """Of the error of each row."""
    dead: Bool[Tensor, "M d_sae"] | None = None
    """Latents that AuxK lets learn what is left: the k_aux with the largest scores in each row."""
    k_aux: int = 0
    aux_weight: Float[Tensor, " M"] | None = None
    """Of the squared distance of each row."""
    most: int = 0
    """No k is larger; known without asking the device."""
    density: float = 0.0
    """Share of the entries that is thought to be active (above); a GPU goes by it, as asking it would be waiting."""

    @property
    def prefixes(self) -> tuple[int, ...]:
        return self.ends or (self.W_dec.shape[1],)


class SparseResult(NamedTuple):
    """Gradients of the loss, and its parts as sums over rows."""

    gradients: dict[str, Tensor]
    """Of the parameters that were given, by name. That of the threshold is left to its owner, see `inside`."""
    errors: Float[Tensor, "M n_prefixes"]
    squared_error: Float[Tensor, " M"]
    """Of the whole."""
    auxk: Float[Tensor, " M"] | None
    """Squared distances, without weight; there are some where latents are dead."""
    l1: Float[Tensor, " M"]
    active: Float[Tensor, "M d_sae"]
    """On how many rows each latent fired."""
    smallest: Float[Tensor, " M"] | None = None
    """The smallest positive score kept (batch); infinity where there is none."""
    inside: Float[Tensor, "M d_sae"] | None = None
    """Sum of d loss / d f over the rows inside the window."""
    n_inside: Float[Tensor, "M d_sae"] | None = None
    """How many those are."""
    left: Bool[Tensor, " M"] | None = None
    """Members that are left to others: nothing else here says anything of them. None: there are none."""


@torch.no_grad()
def sparse_step(problem: SparseProblem, dtype: torch.dtype, densest: float = 1.0) -> SparseResult | None:
    """The step with products in `dtype` (fp32 or bf16), sums in fp32. Members for which it would not pay are left: more
    than `DENSEST`, or than a share `densest`, is active of some rows, or of the batch. None where all are, and where
    there is no step for the device; on a GPU all members are taken or none, as it is not asked."""
    if dtype in (torch.float32, torch.bfloat16) and triton.serves(problem.x):
        from sparse_coding.kernels.triton import step as on_gpu  # imports Triton, which a CPU need not have

        with torch.cuda.device_of(problem.x):
            return on_gpu.step(problem, dtype)
    if problem.x.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    name, step = ("native", sparse_native.step) if sparse_native.loaded() else ("operators", sparse_operators.step)
    densest = min(densest, DENSEST[name])
    left = torch.zeros(len(problem.W_dec), dtype=torch.bool)
    if problem.k is not None:
        rows = len(problem.x) if problem.rule == "batch" else 1
        left |= problem.k > densest * rows * problem.W_dec.shape[1]
    marks = left.numpy()  # the same memory
    found = None if marks.all() else step(problem, left, dtype, densest)
    if found is None or marks.all():
        return None
    return found._replace(left=left if marks.any() else None)

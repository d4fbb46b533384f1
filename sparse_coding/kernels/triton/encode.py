"""The encoder's product, and in its epilogue the largest score of every group of latents.

    pre = inputs W + b        best[g] = the key of the largest score among the latents of group g

The k largest of a row lie in the k groups with the largest maxima, so that the choice (choose.py) reads pre-activations
of k groups instead of all. It is exact whatever the data are: no guess of a threshold, nothing that can overflow.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

GROUP = 32
"""Latents of a group."""


@triton.jit
def key_of(score):
    """Scores above 0 in their order as int32; 0 for all others, and above all for what is no number."""
    return tl.where(score != score, 0x7FFFFFFF, tl.maximum(score.to(tl.int32, bitcast=True), 0))


@triton.jit
def score_of(pre, norms, latent, inside, SIGNED: tl.constexpr):
    """What latents are chosen by; `norms` are those of the member, or None."""
    score = tl.abs(pre) if SIGNED else pre
    if norms is not None:
        score = score * tl.load(norms + latent, mask=inside, other=0.0)
    return score


@triton.jit
def passes(pre, threshold, window, member, latent, inside):
    """Whether an entry takes part where it has to be above 0, or a threshold, or in the window around that."""
    if threshold is None:
        taken = (pre <= 0) == 0  # NaN too
    else:
        distance = pre - tl.load(threshold + latent, mask=inside, other=0.0)
        taken = distance > 0
        if window is not None:
            taken = taken | (tl.abs(distance) < tl.load(window + member) / 2)
    return taken & inside


@triton.jit
def _encode(
    inputs, weights, bias, norms, threshold, window, dead, pre, best, best_dead,
    n_rows, d_in, d_sae, n_groups, stride_member, stride_in, stride_latent, stride_weights,
    SIGNED: tl.constexpr, ABOVE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_LATENTS: tl.constexpr,
    BLOCK_IN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    member, tiles = tl.program_id(1), tl.cdiv(n_rows, BLOCK_ROWS)
    rows = tl.program_id(0) % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # rows run fastest: weights stay in L2
    first = tl.program_id(0) // tiles * BLOCK_LATENTS
    latents, inner = first + tl.arange(0, BLOCK_LATENTS), tl.arange(0, BLOCK_IN)
    row_ok, latent_ok = rows[:, None] < n_rows, latents[None, :] < d_sae
    left = inputs + member.to(tl.int64) * stride_member + rows.to(tl.int64)[:, None] * d_in
    right = weights + member.to(tl.int64) * stride_weights + latents.to(tl.int64)[None, :] * stride_latent
    total = tl.zeros((BLOCK_ROWS, BLOCK_LATENTS), dtype=tl.float32)
    for start in range(0, d_in, BLOCK_IN):
        dims = start + inner
        a = tl.load(left + dims[None, :], mask=row_ok & (dims[None, :] < d_in), other=0.0)
        b = tl.load(right + dims[:, None] * stride_in, mask=(dims[:, None] < d_in) & latent_ok, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    total += tl.load(bias + member * d_sae + latents, mask=latents < d_sae, other=0.0)[None, :]
    place = (member.to(tl.int64) * n_rows + rows)[:, None]
    tl.store(pre + place * d_sae + latents[None, :], total, mask=row_ok & latent_ok)

    own = None if norms is None else norms + member * d_sae
    keys = tl.where(latent_ok, key_of(score_of(total, own, latents[None, :], latent_ok, SIGNED)), 0)
    found = keys
    if ABOVE:
        found = passes(total, threshold, window, member, member * d_sae + latents[None, :], latent_ok).to(tl.int32)
    groups = first // GROUP + tl.arange(0, BLOCK_LATENTS // GROUP)
    group_ok = row_ok & (groups[None, :] < n_groups)
    largest = tl.max(tl.reshape(found, (BLOCK_ROWS, BLOCK_LATENTS // GROUP, GROUP)), axis=2)
    tl.store(best + place * n_groups + groups[None, :], largest, mask=group_ok)
    if dead is not None:
        is_dead = tl.load(dead + member * d_sae + latents, mask=latents < d_sae, other=0) != 0
        keys = tl.where(is_dead[None, :], keys, 0)
        largest = tl.max(tl.reshape(keys, (BLOCK_ROWS, BLOCK_LATENTS // GROUP, GROUP)), axis=2)
        tl.store(best_dead + place * n_groups + groups[None, :], largest, mask=group_ok)


class Encoded(NamedTuple):
    """Pre-activations in fp32, and the largest key of each group of latents: of all, and of the dead alone."""

    pre: Float[Tensor, "M B d_sae"]
    best: Int[Tensor, "M B n_groups"]
    best_dead: Int[Tensor, "M B n_groups"] | None


def encode(
    inputs: Float[Tensor, "M B d_in"],
    weights: Float[Tensor, "M d_in d_sae"],
    bias: Float[Tensor, "M d_sae"],
    norms: Float[Tensor, "M d_sae"] | None,
    signed: bool,
    dead: Bool[Tensor, "M d_sae"] | None,
    above: bool = False,
    threshold: Float[Tensor, "M d_sae"] | None = None,
    window: Float[Tensor, " M"] | None = None,
) -> Encoded:
    """The product in the dtype of `inputs` and `weights`, summed in fp32; either may be strided, rows may be shared.

    above: `best` says instead whether any latent of the group is above 0, or its threshold, or in the window around it.
    """
    n_members, d_in, d_sae = weights.shape
    n_rows, n_groups = inputs.shape[1], triton.cdiv(d_sae, GROUP)
    assert inputs.stride()[1:] == (d_in, 1)
    pre = torch.empty(n_members, n_rows, d_sae, device=inputs.device)
    best = torch.empty(n_members, n_rows, n_groups, dtype=torch.int32, device=inputs.device)
    best_dead = None if dead is None else torch.empty_like(best)
    half = inputs.dtype != torch.float32
    block_rows, block_latents, block_in = (128, 256, 64) if half else (64, 64, 32)
    grid = (triton.cdiv(n_rows, block_rows) * triton.cdiv(d_sae, block_latents), n_members)
    _encode[grid](
        inputs, weights, bias, norms, threshold, window, None if dead is None else dead.view(torch.uint8),
        pre, best, best_dead,
        n_rows, d_in, d_sae, n_groups, inputs.stride(0), weights.stride(1), weights.stride(2), weights.stride(0),
        SIGNED=signed, ABOVE=above, BLOCK_ROWS=block_rows, BLOCK_LATENTS=block_latents, BLOCK_IN=block_in, GROUP=GROUP,
        num_warps=8 if half else 4, num_stages=stages(inputs.device),
    )  # fmt: skip
    return Encoded(pre, best, best_dead)


def stages(device: torch.device) -> int:
    """Tiles in flight: three take 144 KiB, more than the shared memory of cards that are not for data centres."""
    if device.type != "cuda":
        return 3
    return 3 if torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 160 * 2**10 else 2

"""The encoder's product, and in its epilogue the largest score of every group of latents.

    pre = inputs W + b        best[g] = the key of the largest score among the latents of group g

The k largest of a row lie in the k groups with the largest maxima, so that the choice (choose.py) reads pre-activations
of k groups instead of all. It is exact whatever the data are: no guess of a threshold, nothing that can overflow.

There are two kernels for the one product: `_encode` for every card, dtype and layout, and `_encode_by_tiles`, where
Hopper's copy engine brings the tiles and a program goes on to its next tile while it writes the last.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

GROUP = 32
"""Latents of a group."""
NOT_A_NUMBER = tl.constexpr(0x7FFF0000)
"""The key of NaN, above all others; like those of bf16 it has nothing in its lower half."""


@triton.jit
def key_of(score):
    """Scores above 0 in their order as int32; 0 for all others, and above all for what is no number."""
    return tl.where(score != score, NOT_A_NUMBER, tl.maximum(score.to(tl.int32, bitcast=True), 0))


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
def finish(
    total, rows, first, member, bias, norms, threshold, window, pre, best, n_rows, d_sae, n_groups,
    SIGNED: tl.constexpr, ABOVE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_LATENTS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """What is done with a tile of products: the bias, and what is kept of it."""
    latents = first + tl.arange(0, BLOCK_LATENTS)
    row_ok, latent_ok = rows[:, None] < n_rows, latents[None, :] < d_sae
    total += tl.load(bias + member * d_sae + latents, mask=latents < d_sae, other=0.0)[None, :]
    kept = total.to(pre.dtype.element_ty)
    place = (member.to(tl.int64) * n_rows + rows)[:, None]
    tl.store(pre + place * d_sae + latents[None, :], kept, mask=row_ok & latent_ok)
    total = kept.to(tl.float32)
    if ABOVE:
        found = passes(total, threshold, window, member, member * d_sae + latents[None, :], latent_ok).to(tl.int32)
    else:
        own = None if norms is None else norms + member * d_sae
        found = tl.where(latent_ok, key_of(score_of(total, own, latents[None, :], latent_ok, SIGNED)), 0)
    groups = first // GROUP + tl.arange(0, BLOCK_LATENTS // GROUP)
    largest = tl.max(tl.reshape(found, (BLOCK_ROWS, BLOCK_LATENTS // GROUP, GROUP)), axis=2)
    tl.store(best + place * n_groups + groups[None, :], largest, mask=row_ok & (groups[None, :] < n_groups))


@triton.jit
def _encode(
    inputs, weights, bias, norms, threshold, window, pre, best,
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
    finish(total, rows, first, member, bias, norms, threshold, window, pre, best, n_rows, d_sae, n_groups,
           SIGNED, ABOVE, BLOCK_ROWS, BLOCK_LATENTS, GROUP)  # fmt: skip


@triton.jit
def _encode_by_tiles(
    inputs, weights, bias, norms, threshold, window, pre, best,
    n_members, n_rows, d_in, d_sae, n_groups, rows_of_member,
    SIGNED: tl.constexpr, ABOVE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_LATENTS: tl.constexpr,
    BLOCK_IN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`inputs` and `weights` describe [. d_in] and [M * d_sae d_in]; `rows_of_member`: 0 where members share rows."""
    down, across = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(d_sae, BLOCK_LATENTS)
    for tile in tl.range(tl.program_id(0), down * across * n_members, tl.num_programs(0), flatten=True):
        top, first, member = tile % down * BLOCK_ROWS, tile // down % across * BLOCK_LATENTS, tile // (down * across)
        total = tl.zeros((BLOCK_ROWS, BLOCK_LATENTS), dtype=tl.float32)
        for step in range(tl.cdiv(d_in, BLOCK_IN)):
            a = inputs.load([member * rows_of_member + top, step * BLOCK_IN])
            b = weights.load([member * d_sae + first, step * BLOCK_IN])
            total = tl.dot(a, b.T, total)
        finish(total, top + tl.arange(0, BLOCK_ROWS), first, member, bias, norms, threshold, window, pre, best,
               n_rows, d_sae, n_groups, SIGNED, ABOVE, BLOCK_ROWS, BLOCK_LATENTS, GROUP)  # fmt: skip


class Encoded(NamedTuple):
    """Pre-activations, and the largest key of each group of latents."""

    pre: Float[Tensor, "M B d_sae"]
    best: Int[Tensor, "M B n_groups"]


def encode(
    inputs: Float[Tensor, "M B d_in"],
    weights: Float[Tensor, "M d_in d_sae"],
    bias: Float[Tensor, "M d_sae"],
    norms: Float[Tensor, "M d_sae"] | None,
    signed: bool,
    kept: torch.dtype = torch.float32,
    above: bool = False,
    threshold: Float[Tensor, "M d_sae"] | None = None,
    window: Float[Tensor, " M"] | None = None,
) -> Encoded:
    """The product in the dtype of `inputs` and `weights`, summed in fp32; either may be strided, rows may be shared.

    `kept`: what pre-activations are rounded to, and then compared in. above: `best` says instead whether any latent of
    the group is above 0, or its threshold, or in the window around it.
    """
    n_members, d_in, d_sae = weights.shape
    n_rows, n_groups = inputs.shape[1], triton.cdiv(d_sae, GROUP)
    assert inputs.stride()[1:] == (d_in, 1)
    pre = torch.empty(n_members, n_rows, d_sae, device=inputs.device, dtype=kept)
    best = torch.empty(n_members, n_rows, n_groups, dtype=torch.int32, device=inputs.device)
    kinds = {"SIGNED": signed, "ABOVE": above, "GROUP": GROUP}
    given = inputs, weights, bias, norms, threshold, window, pre, best
    if in_tiles(inputs, weights):
        encode_by_tiles(*given, **kinds)
        return Encoded(pre, best)
    half = inputs.dtype != torch.float32
    block_rows, block_latents, block_in = (128, 256, 64) if half else (64, 64, 32)
    grid = (triton.cdiv(n_rows, block_rows) * triton.cdiv(d_sae, block_latents), n_members)
    _encode[grid](
        *given, n_rows, d_in, d_sae, n_groups,
        inputs.stride(0), weights.stride(1), weights.stride(2), weights.stride(0),
        BLOCK_ROWS=block_rows, BLOCK_LATENTS=block_latents, BLOCK_IN=block_in, **kinds,
        num_warps=8 if half else 4, num_stages=stages(inputs.device),
    )  # fmt: skip
    return Encoded(pre, best)


def in_tiles(inputs: Tensor, weights: Tensor) -> bool:
    """Whether the copy engine can bring both: bf16 on Hopper or later, latents side by side, rows of whole 16 bytes."""
    capable = TensorDescriptor and inputs.is_cuda and torch.cuda.get_device_capability(inputs.device) >= (9, 0)
    laid_out = weights.mT.is_contiguous() and (inputs.stride(0) == 0 or inputs.is_contiguous())
    return bool(capable) and inputs.dtype == torch.bfloat16 and laid_out and inputs.shape[2] % 8 == 0


TILES = {"BLOCK_ROWS": 128, "BLOCK_LATENTS": 256, "BLOCK_IN": 64, "num_warps": 8, "num_stages": 3}
WIDE_TILES = {"BLOCK_ROWS": 128, "BLOCK_LATENTS": 128, "BLOCK_IN": 64, "num_warps": 8, "num_stages": 4}
"""For pre-activations in fp32, which the epilogue stages in shared memory: four bytes each."""


def encode_by_tiles(inputs: Tensor, weights: Tensor, *rest: Tensor | None, **kinds: int) -> None:
    (n_members, d_in, d_sae), n_rows = weights.shape, inputs.shape[1]
    pre, best = rest[-2:]
    assert pre is not None
    assert best is not None
    tiles = WIDE_TILES if pre.dtype == torch.float32 else TILES
    left = inputs[0] if inputs.stride(0) == 0 else inputs.reshape(-1, d_in)
    right = weights.mT.reshape(-1, d_in)
    grid = triton.cdiv(n_rows, tiles["BLOCK_ROWS"]) * triton.cdiv(d_sae, tiles["BLOCK_LATENTS"]) * n_members
    _encode_by_tiles[(min(grid, multiprocessors(pre.device)),)](
        TensorDescriptor.from_tensor(left, [tiles["BLOCK_ROWS"], tiles["BLOCK_IN"]]),
        TensorDescriptor.from_tensor(right, [tiles["BLOCK_LATENTS"], tiles["BLOCK_IN"]]),
        *rest, n_members, n_rows, d_in, d_sae, best.shape[2], 0 if len(left) == n_rows else n_rows, **kinds, **tiles,
    )  # fmt: skip


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def stages(device: torch.device) -> int:
    """Tiles in flight: three take 144 KiB, more than the shared memory of cards that are not for data centres."""
    if device.type != "cuda":
        return 3
    return 3 if torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 160 * 2**10 else 2

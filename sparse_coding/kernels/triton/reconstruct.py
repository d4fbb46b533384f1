"""One program for a row: its x_hat, its error, and the gradients of its codes, in one pass over its atoms.

    x_hat_g = sum of f_i W_dec_i over the entries up to prefix g, + b_dec      error_g = x_hat_g - target
    learns_g = sum over h >= g of d error(x_hat_h) / d x_hat_h         slope_i = W_dec_i . learns_g(i) [+ penalty]

`learns_g` is what the atoms of prefix g learn from; it is kept in the dtype of the products, all else is fp32.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.kernels.triton.choose import Entries

AT_ONCE = 8
"""Atoms in flight."""


@triton.jit
def _reconstruct(
    latent, f, count, first_of, atoms, bias, target, weight, penalty, ends,
    learns, parts, squared, left, sizes, slope, d_f, n_rows, d_sae, d_out, slots, stride_atoms, n_ends,
    NORM: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    member, n = row // n_rows, tl.load(count + row)
    dims, few = tl.arange(0, BLOCK), tl.arange(0, AT_ONCE)
    width = dims < d_out
    begin = row * slots
    if first_of is not None:
        begin = member * slots + tl.load(first_of + row)
    latent, f, slope = latent + begin, f + begin, slope + begin
    atoms += member * stride_atoms
    scale = tl.load(weight + (member if OWN else 0))
    error = -tl.load(target + (row if OWN else row % n_rows) * d_out + dims, mask=width, other=0.0)
    if bias is not None:
        error += tl.load(bias + member * d_out + dims, mask=width, other=0.0)
    first, magnitude = 0, 0.0
    for g in range(n_ends):
        last = n
        if n_ends > 1:
            end = tl.load(ends + g)
            last = first
            for t in range(first, n, AT_ONCE):
                ids = tl.load(latent + t + few, mask=t + few < n, other=d_sae)
                last += tl.sum((ids < end).to(tl.int32), axis=0)
        for t in range(first, last, AT_ONCE):
            mine = t + few < last
            ids = tl.load(latent + t + few, mask=mine, other=0)
            codes = tl.load(f + t + few, mask=mine, other=0.0)
            tile = tl.load(atoms + ids.to(tl.int64)[:, None] * d_out + dims[None, :],
                           mask=mine[:, None] & width[None, :], other=0.0)  # fmt: skip
            error += tl.sum(codes[:, None] * tile.to(tl.float32), axis=0)
            magnitude += tl.sum(tl.abs(codes), axis=0)
        size = tl.sum(error * error, axis=0)
        tl.store(squared + row * n_ends + g, size)
        factor = 2 * scale
        if NORM:
            factor = tl.where(size > 0, scale / tl.sqrt(size), 0.0)
        tl.store(parts + (row * n_ends + g) * d_out + dims, factor * error, mask=width)
        first = last
    tl.store(sizes + row, magnitude)
    if left is not None:
        tl.store(left + row * d_out + dims, -error, mask=width)
    tl.debug_barrier()  # what a thread wrote to `parts` another may read
    below, total = n, tl.zeros((BLOCK,), dtype=tl.float32)
    for back in range(n_ends):
        g = n_ends - 1 - back
        total += tl.load(parts + (row * n_ends + g) * d_out + dims, mask=width, other=0.0)
        tl.store(learns + (row * n_ends + g) * d_out + dims, total, mask=width)
        start = 0
        if g > 0:
            end = tl.load(ends + g - 1)
            for t in range(0, below, AT_ONCE):
                ids = tl.load(latent + t + few, mask=t + few < below, other=d_sae)
                start += tl.sum((ids < end).to(tl.int32), axis=0)
        for t in range(start, below, AT_ONCE):
            mine = t + few < below
            ids = tl.load(latent + t + few, mask=mine, other=0)
            tile = tl.load(atoms + ids.to(tl.int64)[:, None] * d_out + dims[None, :],
                           mask=mine[:, None] & width[None, :], other=0.0)  # fmt: skip
            found = tl.sum(tile.to(tl.float32) * total[None, :], axis=1)
            if d_f is not None:
                tl.store(d_f + begin + t + few, found, mask=mine)
            if penalty is not None:
                found += tl.load(penalty + member)
            active = tl.load(f + t + few, mask=mine, other=0.0) != 0
            tl.store(slope + t + few, tl.where(active, found, 0.0), mask=mine)
        below = start


class Reconstructed(NamedTuple):
    """Of one step, row by row."""

    learns: Tensor
    """[M B n_ends d_out]: what the atoms of each prefix learn from, in the dtype of the products."""
    parts: Float[Tensor, "M B n_ends d_out"]
    """The gradient of each prefix's own error."""
    squared: Float[Tensor, "M B n_ends"]
    """Squared distance of each prefix's x_hat to the target."""
    left: Float[Tensor, "M B d_out"] | None
    """target - x_hat of the whole."""
    l1: Float[Tensor, "M B"]
    slope: Tensor
    """d loss / d pre of each entry."""
    d_f: Tensor | None
    """The same without the penalty, and for entries that are 0 too."""


def reconstruct(
    entries: Entries,
    atoms: Float[Tensor, "M d_sae d_out"],
    bias: Float[Tensor, "M d_out"] | None,
    target: Tensor,
    weight: Float[Tensor, " #M"],
    penalty: Float[Tensor, " M"] | None,
    ends: Int[Tensor, " n_ends"],
    norm_error: bool,
    keeps_left: bool,
    keeps_d_f: bool,
) -> Reconstructed:
    """`target` [B d_out] and `weight` [1] of each row's error; or for each member its own, [M B d_out] and [M]."""
    n_members, n_rows = entries.count.shape
    d_sae, d_out, n_ends, device = atoms.shape[1], atoms.shape[2], len(ends), atoms.device
    assert atoms.stride()[1:] == (d_out, 1)
    learns = torch.empty(n_members, n_rows, n_ends, d_out, dtype=atoms.dtype, device=device)
    parts = torch.empty(n_members, n_rows, n_ends, d_out, device=device)
    squared = torch.empty(n_members, n_rows, n_ends, device=device)
    sizes = torch.empty(n_members, n_rows, device=device)
    slope = torch.empty_like(entries.f)
    left = torch.empty(n_members, n_rows, d_out, device=device) if keeps_left else None
    d_f = torch.empty_like(slope) if keeps_d_f else None
    block = triton.next_power_of_2(d_out)
    _reconstruct[(n_members * n_rows,)](
        entries.latent, entries.f, entries.count, entries.first, atoms, bias, target, weight, penalty, ends,
        learns, parts, squared, left, sizes, slope, d_f,
        n_rows, d_sae, d_out, entries.latent.shape[-1], atoms.stride(0), n_ends,
        NORM=norm_error, OWN=len(weight) > 1, BLOCK=block, AT_ONCE=AT_ONCE,
        num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    return Reconstructed(learns, parts, squared, left, sizes, slope, d_f)

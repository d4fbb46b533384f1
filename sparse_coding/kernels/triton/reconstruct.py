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

AT_ONCE = 4
"""Atoms in flight."""


@triton.jit
def _reconstruct(
    latent, f, count, first_of, atoms, bias, target, weight, penalty, ends,
    learns, parts, squared, left, sizes, slope, d_f, n_rows, d_sae, d_out, slots, stride_atoms, n_ends,
    NORM: tl.constexpr, OWN: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
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
    first, magnitude, part = 0, 0.0, error
    for g in range(n_ends):
        last = n
        if MANY:
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
        part = factor * error
        if parts is not None:
            tl.store(parts + (row * n_ends + g) * d_out + dims, part, mask=width)
        first = last
    tl.store(sizes + row, magnitude)
    if left is not None:
        tl.store(left + row * d_out + dims, -error, mask=width)
    if MANY:
        tl.debug_barrier()  # what a thread wrote to `parts` another may read
    below, total = n, tl.zeros((BLOCK,), dtype=tl.float32)
    for back in range(n_ends):
        g = n_ends - 1 - back
        if MANY:
            part = tl.load(parts + (row * n_ends + g) * d_out + dims, mask=width, other=0.0)
        total += part
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


@triton.jit
def _add_up(squared, sizes, errors, squared_error, l1, n_rows, n_ends, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the rows of a member, in fp64."""
    g, member, few = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    error, square = tl.zeros((BLOCK,), dtype=tl.float64), tl.zeros((BLOCK,), dtype=tl.float64)
    size = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, n_rows, BLOCK):
        rows, ok = member * n_rows + start + few, start + few < n_rows
        found = tl.load(squared + rows * n_ends + g, mask=ok, other=0.0).to(tl.float64)
        square += found
        error += tl.sqrt(found) if NORM else found
        size += tl.load(sizes + rows, mask=ok, other=0.0).to(tl.float64)
    tl.store(errors + member * n_ends + g, tl.sum(error, axis=0).to(tl.float32))
    if g == n_ends - 1:
        tl.store(squared_error + member, tl.sum(square, axis=0).to(tl.float32))
        tl.store(l1 + member, tl.sum(size, axis=0).to(tl.float32))


class Reconstructed(NamedTuple):
    """Of one step, row by row."""

    parts: Float[Tensor, "M B n_ends d_out"] | None
    """The gradient of each prefix's own error."""
    errors: Float[Tensor, "M n_ends"]
    """Of each prefix's x_hat, summed over rows; the last one's squared, and the codes' sizes:"""
    squared_error: Float[Tensor, " M"]
    l1: Float[Tensor, " M"]
    left: Float[Tensor, "M B d_out"] | None
    """target - x_hat of the whole."""
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
    learns: Tensor,
    norm_error: bool,
    keeps_parts: bool,
    keeps_left: bool,
    keeps_d_f: bool,
) -> Reconstructed:
    """`target` [B d_out] and `weight` [1] of each row's error; or for each member its own, [M B d_out] and [M].

    `learns` [M B n_ends d_out] is written: what the atoms of each prefix learn from.
    """
    n_members, n_rows = entries.count.shape
    d_sae, d_out, n_ends, device = atoms.shape[1], atoms.shape[2], len(ends), atoms.device
    assert atoms.stride()[1:] == (d_out, 1)
    parts = torch.empty(n_members, n_rows, n_ends, d_out, device=device) if keeps_parts or n_ends > 1 else None
    squared = torch.empty(n_members, n_rows, n_ends, device=device)
    sizes = torch.empty(n_members, n_rows, device=device)
    errors = torch.empty(n_members, n_ends, device=device)
    squared_error, l1 = (torch.empty(n_members, device=device) for _ in range(2))
    slope = torch.empty_like(entries.f)
    left = torch.empty(n_members, n_rows, d_out, device=device) if keeps_left else None
    d_f = torch.empty_like(slope) if keeps_d_f else None
    block = triton.next_power_of_2(d_out)
    _reconstruct[(n_members * n_rows,)](
        entries.latent, entries.f, entries.count, entries.first, atoms, bias, target, weight, penalty, ends,
        learns, parts, squared, left, sizes, slope, d_f,
        n_rows, d_sae, d_out, entries.latent.shape[-1], atoms.stride(0), n_ends,
        NORM=norm_error, OWN=len(weight) > 1, MANY=n_ends > 1, BLOCK=block, AT_ONCE=AT_ONCE,
        num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    _add_up[(n_ends, n_members)](
        squared, sizes, errors, squared_error, l1, n_rows, n_ends,
        NORM=norm_error, BLOCK=min(4096, triton.next_power_of_2(n_rows)), num_warps=8,
    )  # fmt: skip
    return Reconstructed(parts, errors, squared_error, l1, left, slope, d_f)

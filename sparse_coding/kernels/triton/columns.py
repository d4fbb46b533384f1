"""Sums over the rows of a matrix: block by block, and then over the blocks, in the same order always."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

ROWS, DIMS = 64, 64
"""Of a block."""


@triton.jit
def _block(x, sums, squares, n_rows, d, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """Of a block of rows: each column's sum, and its squared distances to the block's own mean."""
    block, member = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows, dims = block * ROWS + tl.arange(0, ROWS), tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    ok = (rows < n_rows)[:, None] & (dims < d)[None, :]
    values = tl.load(x + (member * n_rows + rows)[:, None] * d + dims[None, :], mask=ok, other=0.0)
    total, to = tl.sum(values, axis=0), (member * tl.num_programs(0) + block) * d + dims
    tl.store(sums + to, total, mask=dims < d)
    if squares is not None:
        away = tl.where(ok, values - total[None, :] / tl.minimum(ROWS, n_rows - block * ROWS), 0.0)
        tl.store(squares + to, tl.sum(away * away, axis=0), mask=dims < d)


@triton.jit
def _centre(x, bias, out, n_rows, d, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """x - bias of a member, in the dtype of `out`."""
    member = tl.program_id(2).to(tl.int64)
    rows, dims = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    wide = dims < d
    ok, at = (rows < n_rows)[:, None] & wide[None, :], rows.to(tl.int64)[:, None] * d + dims[None, :]
    values = tl.load(x + at, mask=ok, other=0.0) - tl.load(bias + member * d + dims, mask=wide, other=0.0)[None, :]
    tl.store(out + member * n_rows * d + at, values, mask=ok)


@triton.jit
def _spread(sums, squares, out, n_rows, d, n_blocks, ROWS: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr):
    """Squared distances to the mean of all rows, summed over some columns (Chan, Golub and LeVeque 1979)."""
    dims, few = tl.program_id(0) * DIMS + tl.arange(0, DIMS), tl.arange(0, BLOCKS)
    total, spread = tl.zeros((DIMS,), dtype=tl.float32), tl.zeros((DIMS,), dtype=tl.float32)
    for first in range(0, n_blocks, BLOCKS):
        ok = (first + few < n_blocks)[:, None] & (dims < d)[None, :]
        total += tl.sum(tl.load(sums + (first + few)[:, None] * d + dims[None, :], mask=ok, other=0.0), axis=0)
    for first in range(0, n_blocks, BLOCKS):
        ok = (first + few < n_blocks)[:, None] & (dims < d)[None, :]
        at, rows = (first + few)[:, None] * d + dims[None, :], tl.minimum(ROWS, n_rows - (first + few) * ROWS)[:, None]
        away = tl.load(sums + at, mask=ok, other=0.0) / rows - total[None, :] / n_rows
        spread += tl.sum(tl.where(ok, tl.load(squares + at, mask=ok, other=0.0) + rows * away * away, 0.0), axis=0)
    tl.store(out + tl.program_id(0), tl.sum(spread, axis=0))


def sum_of_rows(x: Float[Tensor, "M B d"]) -> Float[Tensor, "M d"]:
    n_members, n_rows, d = x.shape
    sums = torch.empty(n_members, triton.cdiv(n_rows, ROWS), d, device=x.device)
    _block[(sums.shape[1], triton.cdiv(d, DIMS), n_members)](x, sums, None, n_rows, d, ROWS=ROWS, DIMS=DIMS)
    return sums.sum(1)


def centred(x: Float[Tensor, "B d"], bias: Float[Tensor, "M d"], dtype: torch.dtype) -> Float[Tensor, "M B d"]:
    """x - bias."""
    (n_rows, d), n_members = x.shape, len(bias)
    out = torch.empty(n_members, n_rows, d, dtype=dtype, device=x.device)
    _centre[(triton.cdiv(n_rows, 16), triton.cdiv(d, 256), n_members)](x, bias, out, n_rows, d, ROWS=16, DIMS=256)
    return out


def spread(x: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
    """The sum of the rows' squared distances to their mean."""
    n_rows, d = x.shape
    sums, squares = (torch.empty(triton.cdiv(n_rows, ROWS), d, device=x.device) for _ in range(2))
    _block[(len(sums), triton.cdiv(d, DIMS), 1)](x, sums, squares, n_rows, d, ROWS=ROWS, DIMS=DIMS)
    out = torch.empty(triton.cdiv(d, 32), device=x.device)
    _spread[(len(out),)](sums, squares, out, n_rows, d, len(sums), ROWS=ROWS, DIMS=32, BLOCKS=64)
    return out.sum()

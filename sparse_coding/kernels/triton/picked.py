"""Rows of a table by their numbers, in fp32: read and converted in one pass."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor


@triton.jit
def _pick(table, index, out, n_rows, d, stride, ROWS: tl.constexpr, DIMS: tl.constexpr):
    rows, dims = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    ok = (rows < n_rows)[:, None] & (dims < d)[None, :]
    source = tl.load(index + rows, mask=rows < n_rows, other=0).to(tl.int64)
    values = tl.load(table + source[:, None] * stride + dims[None, :], mask=ok, other=0.0)
    tl.store(out + rows.to(tl.int64)[:, None] * d + dims[None, :], values.to(tl.float32), mask=ok)


def pick(table: Float[Tensor, "n d"], index: Int[Tensor, " B"]) -> Float[Tensor, "B d"]:
    (d,), n_rows = table.shape[1:], len(index)
    out = torch.empty(n_rows, d, device=table.device)
    _pick[(triton.cdiv(n_rows, 4), triton.cdiv(d, 1024))](
        table, index, out, n_rows, d, table.stride(0), ROWS=4, DIMS=1024
    )
    return out

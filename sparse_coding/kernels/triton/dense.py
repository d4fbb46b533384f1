"""The dense step of `kernels/dense.py` on a GPU: torch's products, and between them one pass over what they make.

Each pass also sums over rows, block by block, what the gradients of biases and the log need; the blocks are added in
the same order every time. Nothing of size [B d_sae] is in another dtype than that of the products.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from sparse_coding.kernels.dense import DenseProblem, DenseResult

ROWS, LATENTS = 64, 64
"""Of a tile."""


@triton.jit
def above_0(values):
    """0 where not above it; what is no number stays."""
    return tl.where(values <= 0, 0.0, values)


@triton.jit
def _codes(e, bias, b_mag, r_mag, f, codes, gates, active, n_rows, d_sae, GATED: tl.constexpr, ROWS: tl.constexpr,
           LATENTS: tl.constexpr):  # fmt: skip
    """e, the encoder's product, becomes the codes, or where GATED the open gates and f the codes; sums of both."""
    block, member = tl.program_id(1), tl.program_id(2).to(tl.int64)
    latents, rows = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS), block * ROWS + tl.arange(0, ROWS)
    wide, here = latents < d_sae, member * d_sae + latents
    ok = (rows < n_rows)[:, None] & wide[None, :]
    at = (member * n_rows + rows)[:, None] * d_sae + latents[None, :]
    product = tl.load(e + at, mask=ok, other=0.0).to(tl.float32)
    opened = above_0(product + tl.load(bias + here, mask=wide, other=0.0)[None, :])
    opened = tl.where(ok, opened, 0.0).to(e.dtype.element_ty)
    found = opened
    if GATED:
        sizes = product * tl.exp(tl.load(r_mag + here, mask=wide, other=0.0))[None, :]
        sizes = above_0(sizes + tl.load(b_mag + here, mask=wide, other=0.0)[None, :])
        found = tl.where(opened.to(tl.float32) == 0, 0.0, sizes).to(e.dtype.element_ty)
        tl.store(f + at, found, mask=ok)
    tl.store(e + at, opened, mask=ok)
    out = (member * tl.num_programs(1) + block) * d_sae + latents
    tl.store(codes + out, tl.sum(found.to(tl.float32), axis=0), mask=wide)
    tl.store(active + out, tl.sum((found.to(tl.float32) > 0).to(tl.float32), axis=0), mask=wide)
    if GATED:
        tl.store(gates + out, tl.sum(opened.to(tl.float32), axis=0), mask=wide)


@triton.jit
def _errors(x_hat, bias, target, weight, squared, sums, n_rows, d_out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """x_hat without its bias becomes weight * (x_hat - target); squared lengths of the rows, sums over rows."""
    block, member = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, dims = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    wide, ok = dims < d_out, (rows < n_rows)[:, None] & (dims < d_out)[None, :]
    at = (member * n_rows + rows)[:, None] * d_out + dims[None, :]
    error = tl.load(x_hat + at, mask=ok, other=0.0).to(tl.float32)
    error -= tl.load(target + rows.to(tl.int64)[:, None] * d_out + dims[None, :], mask=ok, other=0.0)
    if bias is not None:
        error += tl.load(bias + member * d_out + dims, mask=wide, other=0.0)[None, :]
    error = tl.where(ok, error, 0.0)
    tl.store(squared + member * n_rows + rows, tl.sum(error * error, axis=1), mask=rows < n_rows)
    tl.store(x_hat + at, error * weight, mask=ok)
    out = (member * tl.num_programs(0) + block) * d_out + dims
    tl.store(sums + out, weight * tl.sum(error, axis=0), mask=wide)


@triton.jit
def _slopes(d_gates, gates, d_f, f, penalty, r_mag, to_gates, to_sizes, to_scales, to_inputs, n_rows, d_sae,
            GATED: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr):  # fmt: skip
    """d_gates, the gradient of the open gates (or codes) but for the penalty, becomes that of the encoder's product."""
    block, member = tl.program_id(1), tl.program_id(2).to(tl.int64)
    latents, rows = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS), block * ROWS + tl.arange(0, ROWS)
    wide, here = latents < d_sae, member * d_sae + latents
    ok = (rows < n_rows)[:, None] & wide[None, :]
    at = (member * n_rows + rows)[:, None] * d_sae + latents[None, :]
    out = (member * tl.num_programs(1) + block) * d_sae + latents
    opened = tl.load(gates + at, mask=ok, other=0.0).to(tl.float32) > 0
    slope = tl.load(d_gates + at, mask=ok, other=0.0).to(tl.float32)
    slope = tl.where(opened, slope + tl.load(penalty + here, mask=wide, other=0.0)[None, :], 0.0)
    tl.store(to_gates + out, tl.sum(slope, axis=0), mask=wide)
    if GATED:
        codes = tl.load(f + at, mask=ok, other=0.0).to(tl.float32)
        own = tl.where(codes > 0, tl.load(d_f + at, mask=ok, other=0.0).to(tl.float32), 0.0)
        tl.store(to_sizes + out, tl.sum(own, axis=0), mask=wide)
        tl.store(to_scales + out, tl.sum(own * codes, axis=0), mask=wide)
        slope += own * tl.exp(tl.load(r_mag + here, mask=wide, other=0.0))[None, :]
        tl.store(to_inputs + out, tl.sum(slope, axis=0), mask=wide)
    tl.store(d_gates + at, slope, mask=ok)


def step(problem: DenseProblem, dtype: torch.dtype) -> DenseResult:
    """See `dense.dense_step`."""
    from sparse_coding.kernels.dense import DenseResult

    (n_members, d_sae, d_out), n_rows, device = problem.W_dec.shape, len(problem.x), problem.x.device
    gated = problem.r_mag is not None
    bias = problem.b_dec if problem.subtracts else None
    inputs = (problem.x if bias is None else problem.x - bias.unsqueeze(1)).to(dtype).expand(n_members, -1, -1)
    decoder = problem.W_dec.to(dtype)
    encoder = decoder.mT if problem.W_enc is None else problem.W_enc.to(dtype)
    blocks = triton.cdiv(n_rows, ROWS)
    grid, tile = (triton.cdiv(d_sae, LATENTS), blocks, n_members), {"GATED": gated, "ROWS": ROWS, "LATENTS": LATENTS}

    def partial(count: int, width: int = d_sae) -> list[Tensor]:
        return [torch.empty(n_members, blocks, width, device=device) for _ in range(count)]

    gates = torch.bmm(inputs, encoder)
    f, (codes, opened, active) = torch.empty_like(gates) if gated else gates, partial(3)
    _codes[grid](gates, problem.b_enc, problem.b_mag, problem.r_mag, f, codes, opened, active, n_rows, d_sae, **tile)
    made, learns, squares, sums = [f, gates] if gated else [f], [], [], []
    for one, weight in zip(made, (2 * problem.error_weight / n_rows, 2 / n_rows), strict=False):
        x_hat, squared = torch.bmm(one, decoder), torch.empty(n_members, n_rows, device=device)
        at_once = max(1, min(ROWS, 8192 // triton.next_power_of_2(d_out)))
        summed = torch.empty(n_members, triton.cdiv(n_rows, at_once), d_out, device=device)
        _errors[(summed.shape[1], n_members)](
            x_hat, problem.b_dec, problem.target.contiguous(), weight, squared, summed, n_rows, d_out,
            ROWS=at_once, BLOCK=triton.next_power_of_2(d_out),
        )  # fmt: skip
        learns.append(x_hat)
        squares.append(squared.sum(1) / n_rows)
        sums.append(summed.sum(1))
    trains = 1 if problem.frozen else len(made)  # how many of the errors train the decoder
    d_decoder = added([torch.bmm(one.mT, d) for one, d in zip(made[:trains], learns, strict=False)])

    d_gates = torch.bmm(learns[-1], decoder.mT)
    d_f = torch.bmm(learns[0], decoder.mT) if gated else None
    penalty, (to_gates, to_sizes, to_scales, to_inputs) = (problem.penalty / n_rows).contiguous(), partial(4)
    _slopes[grid](
        d_gates, gates, d_f, f, penalty, problem.r_mag, to_gates, to_sizes, to_scales, to_inputs, n_rows, d_sae, **tile
    )  # fmt: skip
    d_encoder, gradients = torch.bmm(inputs.mT, d_gates), {"b_enc": to_gates.sum(1)}
    if problem.b_mag is not None:  # where a code is above 0, exp(r_mag) e = f - b_mag
        gradients["b_mag"] = to_sizes.sum(1)
        gradients["r_mag"] = to_scales.sum(1) - gradients["b_mag"] * problem.b_mag
    if problem.W_enc is None:
        gradients["W_dec"] = d_decoder.float().add_(d_encoder.mT)
    else:
        gradients["W_enc"], gradients["W_dec"] = d_encoder.float(), d_decoder.float()
    if problem.b_dec is not None:
        gradients["b_dec"] = added(sums[:trains])
        if problem.subtracts:
            slope = to_inputs.sum(1) if gated else gradients["b_enc"]
            columns = problem.W_dec if problem.W_enc is None else problem.W_enc.mT
            gradients["b_dec"] -= torch.bmm(slope.unsqueeze(1), columns).squeeze(1)
    auxiliary = squares[1] if gated else torch.zeros_like(squares[0])
    mean = codes.sum(1) / n_rows
    penalised = opened.sum(1) / n_rows if gated else mean
    return DenseResult(gradients, squares[0], auxiliary, mean, penalised, active.sum(1))


def added(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]

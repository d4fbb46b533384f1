"""The dense step of `kernels/dense.py` on a GPU: torch's products, and between them one pass over what they make.

Each pass also sums over rows, block by block, what the gradients of biases and the log need; the blocks are added in
the same order every time. Nothing of size [B d_sae] is in another dtype than that of the products, and which codes are
above 0 is kept as a bit each, so that their gradient is made without reading them again.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_coding.kernels.triton.dense_rows import learn
from sparse_coding.kernels.triton.step import centred, in_dtype

if TYPE_CHECKING:
    from sparse_coding.kernels.dense import DenseProblem, DenseResult

ROWS = 8
"""Of a tile: as many as a byte has bits."""
BYTES, WARPS = 512, 1
"""Of a row of a tile, at most, and of a program: 16 bytes for each thread, which then sums over rows alone."""
REGISTERS = 128
"""Of a thread, at most: nothing spills, and 16 programs share a multiprocessor. With gates more are needed."""
PASSES, PROGRAMS = 8, 4096
"""Tiles of a program, at most; fewer where there would be fewer programs than that."""
ERRORS = 8192
"""Numbers of a tile of errors, about."""


@triton.jit
def above_0(values):
    """0 where not above it; what is no number stays."""
    return tl.where(values <= 0, 0.0, values)


@triton.jit
def _codes(e, bias, b_mag, r_mag, f, opens, sums, n_rows, d_sae, passes, GATED: tl.constexpr, ROWS: tl.constexpr,
           LATENTS: tl.constexpr):  # fmt: skip
    """e, the encoder's product, becomes the codes, or where GATED the open gates and f the codes.

    opens[tile, i] has bit r where row r of the tile opens latent i. sums: the codes over n_rows, how many are above 0,
    the gates over n_rows.
    """
    block, member = tl.program_id(1), tl.program_id(2).to(tl.int64)
    latents, few = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS), tl.arange(0, ROWS)
    wide, here = latents < d_sae, member * d_sae + latents
    shift, codes = tl.load(bias + here, mask=wide, other=0.0)[None, :], tl.zeros((LATENTS,), dtype=tl.float32)
    active, gates = tl.zeros((LATENTS,), dtype=tl.float32), tl.zeros((LATENTS,), dtype=tl.float32)
    if GATED:
        factor = tl.exp(tl.load(r_mag + here, mask=wide, other=0.0))[None, :]
        own_shift = tl.load(b_mag + here, mask=wide, other=0.0)[None, :]
    for n in range(passes):
        tile = block * passes + n
        rows = tile * ROWS + few
        ok = (rows < n_rows)[:, None] & wide[None, :]
        at = (member * n_rows + rows)[:, None] * d_sae + latents[None, :]
        product = tl.load(e + at, mask=ok, other=0.0).to(tl.float32)
        opened = tl.where(ok, above_0(product + shift), 0.0).to(e.dtype.element_ty)
        tl.store(e + at, opened, mask=ok)
        opened = opened.to(tl.float32)
        bits = tl.sum((opened > 0).to(tl.int32) << few[:, None], axis=0)
        tl.store(opens + (member * tl.num_programs(1) * passes + tile) * d_sae + latents, bits.to(tl.uint8), mask=wide)
        found = opened
        if GATED:
            found = tl.where(opened == 0, 0.0, above_0(product * factor + own_shift)).to(e.dtype.element_ty)
            tl.store(f + at, found, mask=ok)
            found = found.to(tl.float32)
            gates += tl.sum(opened, axis=0)
        codes += tl.sum(found, axis=0)
        active += tl.sum((found > 0).to(tl.float32), axis=0)
    out, part = (member * tl.num_programs(1) + block) * d_sae + latents, tl.num_programs(2).to(tl.int64)
    part *= tl.num_programs(1) * d_sae
    tl.store(sums + out, codes / n_rows, mask=wide)
    tl.store(sums + out + part, active, mask=wide)
    if GATED:
        tl.store(sums + out + 2 * part, gates / n_rows, mask=wide)


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
def _slopes(d_gates, opens, d_f, f, penalty, stride_member, stride_latent, r_mag, sums, n_rows, d_sae, passes,
            GATED: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr):  # fmt: skip
    """d_gates, the gradient of the open gates (or codes) but for the penalty, becomes that of the encoder's product.

    sums: what b_enc learns; where GATED also what b_mag does, the same times codes, and the gradient of the product.
    """
    block, member = tl.program_id(1), tl.program_id(2).to(tl.int64)
    latents, few = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS), tl.arange(0, ROWS)
    wide, here = latents < d_sae, member * d_sae + latents
    more = tl.load(penalty + member * stride_member + latents * stride_latent, mask=wide, other=0.0)[None, :] / n_rows
    to_gates, to_sizes = tl.zeros((LATENTS,), dtype=tl.float32), tl.zeros((LATENTS,), dtype=tl.float32)
    to_scales, to_inputs = tl.zeros((LATENTS,), dtype=tl.float32), tl.zeros((LATENTS,), dtype=tl.float32)
    if GATED:
        factor = tl.exp(tl.load(r_mag + here, mask=wide, other=0.0))[None, :]
    for n in range(passes):
        tile = block * passes + n
        rows = tile * ROWS + few
        ok = (rows < n_rows)[:, None] & wide[None, :]
        at = (member * n_rows + rows)[:, None] * d_sae + latents[None, :]
        byte = opens + (member * tl.num_programs(1) * passes + tile) * d_sae + latents
        bits = tl.load(byte, mask=wide, other=0).to(tl.int32)
        slope = tl.load(d_gates + at, mask=ok, other=0.0).to(tl.float32)
        slope = tl.where((bits[None, :] >> few[:, None] & 1) != 0, slope + more, 0.0)
        to_gates += tl.sum(slope, axis=0)
        if GATED:
            codes = tl.load(f + at, mask=ok, other=0.0).to(tl.float32)
            own = tl.where(codes > 0, tl.load(d_f + at, mask=ok, other=0.0).to(tl.float32), 0.0)
            to_sizes += tl.sum(own, axis=0)
            to_scales += tl.sum(own * codes, axis=0)
            slope += own * factor
            to_inputs += tl.sum(slope, axis=0)
        tl.store(d_gates + at, slope, mask=ok)
    out, part = (member * tl.num_programs(1) + block) * d_sae + latents, tl.num_programs(2).to(tl.int64)
    part *= tl.num_programs(1) * d_sae
    tl.store(sums + out, to_gates, mask=wide)
    if GATED:
        tl.store(sums + out + part, to_sizes, mask=wide)
        tl.store(sums + out + 2 * part, to_scales, mask=wide)
        tl.store(sums + out + 3 * part, to_inputs, mask=wide)


def step(problem: DenseProblem, dtype: torch.dtype) -> DenseResult:
    """See `dense.dense_step`."""
    from sparse_coding.kernels.dense import DenseResult

    (n_members, n_rows, _, _, d_sae), device = problem.sizes, problem.x.device
    gated = problem.r_mag is not None
    inputs, (decoder, encoder) = centred(problem, dtype), in_dtype(problem, dtype)
    latents = min(BYTES // dtype.itemsize, triton.next_power_of_2(d_sae))
    across, tiles = triton.cdiv(d_sae, latents), triton.cdiv(n_rows, ROWS)
    passes = max(1, min(PASSES, across * tiles * n_members // PROGRAMS))
    blocks = triton.cdiv(tiles, passes)
    grid, tile = (across, blocks, n_members), {"GATED": gated, "ROWS": ROWS, "LATENTS": latents}
    tile |= {"num_warps": WARPS, "maxnreg": None if gated else REGISTERS}

    gates = torch.bmm(inputs, encoder)
    f = torch.empty_like(gates) if gated else gates
    opens = torch.empty(n_members, blocks * passes, d_sae, dtype=torch.uint8, device=device)
    sums = torch.empty(3 if gated else 2, n_members, blocks, d_sae, device=device)
    _codes[grid](gates, problem.b_enc, problem.b_mag, problem.r_mag, f, opens, sums, n_rows, d_sae, passes, **tile)
    codes, active, *opened = sums.sum(2)
    penalised = opened[0] if gated else codes

    made, weights = ([f, gates] if gated else [f]), (2 * problem.error_weight / n_rows, 2 / n_rows)
    errors = [errors_of(problem, torch.bmm(one, decoder), weight) for one, weight in zip(made, weights, strict=False)]
    learns, squares, to_bias = zip(*errors, strict=True)
    trains = 1 if problem.frozen else len(made)  # how many of the errors train the decoder
    d_decoder = added([torch.bmm(one.mT, d) for one, d in zip(made[:trains], learns, strict=False)])

    d_gates = torch.bmm(learns[-1], decoder.mT)
    d_f = torch.bmm(learns[0], decoder.mT) if gated else None
    sums = torch.empty(4 if gated else 1, n_members, blocks, d_sae, device=device)
    _slopes[grid](
        d_gates, opens, d_f, f, problem.penalty, *problem.penalty.stride(), problem.r_mag, sums, n_rows, d_sae, passes,
        **tile,
    )  # fmt: skip
    to_gates, *to_own = sums.sum(2)
    gradients = {"b_enc": to_gates}
    if problem.b_mag is not None:  # where a code is above 0, exp(r_mag) e = f - b_mag
        gradients["b_mag"] = to_own[0]
        gradients["r_mag"] = torch.addcmul(to_own[1], to_own[0], problem.b_mag, value=-1)
    if problem.b_dec is not None:
        gradients["b_dec"] = added([one.sum(1) for one in to_bias[:trains]])
        if problem.subtracts:
            slope = to_own[2] if gated else to_gates
            gradients["b_dec"] -= torch.bmm(slope.to(dtype).unsqueeze(1), encoder.mT).squeeze(1)
    d_columns = torch.bmm(d_gates.mT, inputs)  # as W_enc lies in memory
    if problem.learning is not None:  # last: it changes what is read above
        learn(problem, problem.learning, d_decoder, d_columns, penalised)
    elif problem.W_enc is None:
        gradients["W_dec"] = d_decoder.float().add_(d_columns)
    else:
        gradients["W_enc"], gradients["W_dec"] = d_columns.float().mT, d_decoder.float()
    auxiliary = squares[1] if gated else torch.zeros_like(squares[0])
    return DenseResult(gradients, squares[0], auxiliary, codes, penalised, active)


def errors_of(problem: DenseProblem, x_hat: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weight * (x_hat - target) in the place of x_hat, which lacks the bias; mean squared lengths; sums over rows)."""
    n_members, n_rows, d_out = x_hat.shape
    block = triton.next_power_of_2(d_out)
    at_once = max(1, min(64, ERRORS // block))
    squared = torch.empty(n_members, n_rows, device=x_hat.device)
    sums = torch.empty(n_members, triton.cdiv(n_rows, at_once), d_out, device=x_hat.device)
    _errors[(sums.shape[1], n_members)](
        x_hat, problem.b_dec, problem.target.contiguous(), weight, squared, sums, n_rows, d_out, ROWS=at_once,
        BLOCK=block,
    )  # fmt: skip
    return x_hat, squared.mean(1), sums


def added(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]

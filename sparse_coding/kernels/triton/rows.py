"""What each latent learns: sums over the rows on which it fired, latent by latent.

    d W_dec_i = sum of f times what x_hat learns there        d W_enc_i = sum of slope times the input there

Each program owns a latent (or a few) and reads its entries in order, so no two programs add to the same number. Latents
with very many entries would hold theirs up: whole segments of them are summed by programs of their own before.
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

from sparse_coding.kernels.triton.adam import Learning, RowAdam, learn_row, read_row
from sparse_coding.kernels.triton.index import ByLatent

SEGMENT = 64
"""Entries of a segment, at least."""
SEGMENTS = 16_384
"""Segments, about at most."""
PROGRAMS = 2_048
"""That sum segments, at most."""
LATENTS, ENTRIES = 2, 256
"""Of a program that sums what is one number each."""
AT_ONCE = 4
"""Rows in flight, of a latent; most have few."""
OF_SEGMENT = 16
"""Rows in flight, of a segment: there are few segments, so that each must not take long."""


@triton.jit
def _totals(starts, totals, source, f, slope, row, d_f, pre, threshold, window, slope_sum, active, inside_sum, n_inside,
            segment_latent, first_segment, d_sae, n_sources, SEGMENT: tl.constexpr, LATENTS: tl.constexpr,
            ENTRIES: tl.constexpr):  # fmt: skip
    """Sums over each latent's entries that are one number each; and who owns which segment."""
    member, few = tl.program_id(1).to(tl.int64), tl.arange(0, ENTRIES)
    latents = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    ok, place = latents < d_sae, member * d_sae + latents
    begin, count = tl.load(starts + place, mask=ok, other=0), tl.load(totals + place, mask=ok, other=0)
    slopes, fired = tl.zeros((LATENTS,), dtype=tl.float32), tl.zeros((LATENTS,), dtype=tl.float32)
    inner, near = tl.zeros((LATENTS,), dtype=tl.float32), tl.zeros((LATENTS,), dtype=tl.float32)
    for t in range(0, tl.max(count, axis=0), ENTRIES):
        at, mine = begin[:, None] + t + few[None, :], t + few[None, :] < count[:, None]
        slopes += tl.sum(tl.load(slope + at, mask=mine, other=0.0), axis=1)
        own = mine & (tl.load(source + at, mask=mine, other=0) < n_sources)  # without the entries of AuxK
        fired += tl.sum((tl.load(f + at, mask=own, other=0.0) != 0).to(tl.float32), axis=1)
        if window is not None:
            rows = tl.load(row + at, mask=own, other=0).to(tl.int64)
            value = tl.load(pre + rows * d_sae + latents[:, None], mask=own, other=0.0)
            limit = tl.load(threshold + place, mask=ok, other=0.0)[:, None]
            close = own & (tl.abs(value - limit) < tl.load(window + member) / 2)
            inner += tl.sum(tl.load(d_f + at, mask=close, other=0.0), axis=1)
            near += tl.sum(close.to(tl.float32), axis=1)
    tl.store(slope_sum + place, slopes, mask=ok)
    tl.store(active + place, fired, mask=ok)
    if window is not None:
        tl.store(inside_sum + place, inner, mask=ok)
        tl.store(n_inside + place, near, mask=ok)
    segments, first = count // SEGMENT, tl.load(first_segment + place, mask=ok, other=0)
    for s in range(tl.max(segments, axis=0)):
        tl.store(segment_latent + first + s, place.to(tl.int32), mask=ok & (s < segments))


@triton.jit
def _segments(segment_latent, first_segment, n_segments, starts, index, factor, table, sums, width,
              SEGMENT: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """sums[s] = the sum over segment s of factor times a row of the table."""
    for segment in range(tl.program_id(0), tl.load(n_segments), tl.num_programs(0)):
        latent = tl.load(segment_latent + segment)
        begin = tl.load(starts + latent) + (segment - tl.load(first_segment + latent)) * SEGMENT
        dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for t in range(0, SEGMENT, AT_ONCE):
            at = begin + t + tl.arange(0, AT_ONCE)
            rows = tl.load(index + at).to(tl.int64)
            tile = tl.load(table + rows[:, None] * width + dims[None, :], mask=dims[None, :] < width, other=0.0)
            total += tl.sum(tl.load(factor + at)[:, None] * tile.to(tl.float32), axis=0)
        at = (dims.to(tl.int64) * 0 + segment) * width + dims
        tl.store(sums + at, total, mask=dims < width)


@triton.jit
def gathered(begin, count, first, index, factor, table, sums, dims, width, SEGMENT: tl.constexpr,
             AT_ONCE: tl.constexpr):  # fmt: skip
    """The sum over a latent's entries of factor times a row of the table."""
    few, inside, segments = tl.arange(0, AT_ONCE), dims < width, count // SEGMENT
    total = tl.zeros((dims.shape[0],), dtype=tl.float32)
    for s in range(segments):
        total += tl.load(sums + (first + s).to(tl.int64) * width + dims, mask=inside, other=0.0)
    for t in range(segments * SEGMENT, count, AT_ONCE):
        mine = t + few < count
        rows = tl.load(index + begin + t + few, mask=mine, other=0).to(tl.int64)
        factors = tl.load(factor + begin + t + few, mask=mine, other=0.0)
        tile = tl.load(table + rows[:, None] * width + dims[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
        total += tl.sum(factors[:, None] * tile.to(tl.float32), axis=0)
    return total


@triton.jit
def _learn(starts, totals, first_segment, index, factor, table, sums, index2, factor2, table2, sums2, out,
           weights, moments1, moments2, half, rates, roots, counts, beta1, beta2, eps,
           d_sae, width, stride_member, stride_latent, stride_dim, TIED: tl.constexpr, PROJECTS: tl.constexpr,
           UNIT: tl.constexpr, SEGMENT: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The gradient of a latent's row of a matrix, and what it makes of the row."""
    latent, member, dims = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    place, ok = member * d_sae + latent, dims < width
    at = member * stride_member + latent.to(tl.int64) * stride_latent + dims * stride_dim
    if weights is not None:  # asked for before the entries, which take longer to come
        value, moment1, moment2 = read_row(weights, moments1, moments2, at, ok)
    begin, count, first = tl.load(starts + place), tl.load(totals + place), tl.load(first_segment + place)
    gradient = gathered(begin, count, first, index, factor, table, sums, dims, width, SEGMENT, AT_ONCE)
    if TIED:
        gradient += gathered(begin, count, first, index2, factor2, table2, sums2, dims, width, SEGMENT, AT_ONCE)
    if weights is None:
        tl.store(out + at, gradient, mask=ok)
    else:
        learn_row(value, moment1, moment2, gradient, at, latent * width + dims, ok, member, weights, moments1, moments2,
                  half, rates, roots, counts, beta1, beta2, eps, PROJECTS, UNIT)  # fmt: skip


class Window(NamedTuple):
    """Entries count for the gradient of the threshold where their pre-activation is near it."""

    pre: Float[Tensor, "M B d_sae"]
    threshold: Float[Tensor, "M d_sae"]
    width: Float[Tensor, " M"]


class Totals(NamedTuple):
    """Of each latent; and the segments of those with many entries."""

    slope: Float[Tensor, "M d_sae"]
    """The gradient of b_enc."""
    active: Float[Tensor, "M d_sae"]
    inside: Float[Tensor, "M d_sae"] | None
    n_inside: Float[Tensor, "M d_sae"] | None
    segment: int
    """Entries of a segment."""
    first_segment: Int[Tensor, "M d_sae"]
    segment_latent: Int[Tensor, " most"]
    n_segments: Int[Tensor, " 1"]


def latent_totals(entries: ByLatent, n_sources: int, window: Window | None) -> Totals:
    """`n_sources`: the gradients of rows that are not AuxK's."""
    shape, device = entries.totals.shape, entries.totals.device
    size = max(SEGMENT, triton.next_power_of_2(len(entries.row) // SEGMENTS))
    segments = entries.totals.flatten() // size
    ends = segments.cumsum(0, dtype=torch.int32)
    first, most = (ends - segments).view(shape), max(1, len(entries.row) // size)
    owner = torch.empty(most, dtype=torch.int32, device=device)
    slope, active = (torch.empty(shape, device=device) for _ in range(2))
    inside, n_inside = (None if window is None else torch.empty(shape, device=device) for _ in range(2))
    pre, threshold, width = (None, None, None) if window is None else window
    _totals[(triton.cdiv(shape[1], LATENTS), shape[0])](
        entries.starts, entries.totals, entries.source, entries.f, entries.slope, entries.row, entries.extra,
        pre, threshold, width, slope, active, inside, n_inside, owner, first, shape[1], n_sources,
        SEGMENT=size, LATENTS=LATENTS, ENTRIES=ENTRIES,
    )  # fmt: skip
    return Totals(slope, active, inside, n_inside, size, first, owner, ends[-1:])


def segment_sums(
    entries: ByLatent, totals: Totals, index: Int[Tensor, " A"], factor: Float[Tensor, " A"], table: Tensor
) -> Float[Tensor, "most w"]:
    """The sum over each segment of factor times a row of the table [n w]; unwritten beyond the last."""
    width = table.shape[1]
    sums = torch.empty(len(totals.segment_latent), width, device=table.device)
    block = min(triton.next_power_of_2(width), 1024)
    _segments[(min(len(sums), PROGRAMS), triton.cdiv(width, block))](
        totals.segment_latent, totals.first_segment, totals.n_segments, entries.starts, index, factor, table, sums,
        width, SEGMENT=totals.segment, AT_ONCE=OF_SEGMENT, BLOCK=block, num_warps=2 * warps(block),
    )  # fmt: skip
    return sums


def learn_rows(
    entries: ByLatent,
    totals: Totals,
    learns: Float[Tensor, "n d_out"],
    inputs: Float[Tensor, "MB d_in"],
    W_dec: Float[Tensor, "M d_sae d_out"],
    W_enc: Float[Tensor, "M d_in d_sae"] | None,
    learning: RowAdam | None,
    unit: bool,
    projects: bool,
) -> dict[str, Tensor]:
    """The gradients of W_dec and W_enc (None: tied), in their shapes; with `learning` they are not made, but taken.

    unit: atoms are brought back to norm 1. projects: the part of an atom's gradient along the atom is left out.
    """
    n_members, d_sae, _ = W_dec.shape
    by_atom = entries.source, entries.f, learns, segment_sums(entries, totals, entries.source, entries.f, learns)
    by_input = entries.row, entries.slope, inputs, segment_sums(entries, totals, entries.row, entries.slope, inputs)
    if learning:
        learning.begin()
    found = {}
    for name, matrix, own in (("W_dec", W_dec, by_atom), ("W_enc", None if W_enc is None else W_enc.mT, by_input)):
        if matrix is None:
            continue
        update = learning.of(name, learns.dtype) if learning else Learning()
        if not learning:
            found[name] = torch.empty_like(matrix)
        width, decodes = matrix.shape[2], name == "W_dec"
        block = triton.next_power_of_2(width)
        _learn[(d_sae, n_members)](
            entries.starts, entries.totals, totals.first_segment, *own, *by_input, found.get(name), *update,
            d_sae, width, *matrix.stride(), TIED=decodes and W_enc is None, PROJECTS=decodes and projects,
            UNIT=decodes and unit, SEGMENT=totals.segment, AT_ONCE=AT_ONCE, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
    if "W_enc" in found:
        found["W_enc"] = found["W_enc"].mT
    return found


def warps(width: int) -> int:
    """Of a program that holds rows of this width."""
    return max(1, min(8, width // 512))

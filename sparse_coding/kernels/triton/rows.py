"""What each latent learns: sums over the rows on which it fired, latent by latent.

    d W_dec_i = sum of f times what x_hat learns there        d W_enc_i = sum of slope times the input there

Each program owns a few latents and reads their entries in order, so no two programs add to the same number. Latents
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

from sparse_coding.kernels.triton.adam import Learning, RowAdam, adam
from sparse_coding.kernels.triton.index import ByLatent

SEGMENT = 128
"""Entries of a segment, at least."""
SEGMENTS = 16_384
"""Segments, about at most."""
TILE = 4_096
"""Numbers that a program sums at once."""


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
    segment = tl.program_id(0)
    if segment < tl.load(n_segments):
        latent = tl.load(segment_latent + segment)
        begin = tl.load(starts + latent) + (segment - tl.load(first_segment + latent)) * SEGMENT
        dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for t in range(0, SEGMENT, AT_ONCE):
            at = begin + t + tl.arange(0, AT_ONCE)
            rows = tl.load(index + at).to(tl.int64)
            tile = tl.load(table + rows[:, None] * width + dims[None, :], mask=dims[None, :] < width, other=0.0)
            total += tl.sum(tl.load(factor + at)[:, None] * tile.to(tl.float32), axis=0)
        tl.store(sums + segment.to(tl.int64) * width + dims, total, mask=dims < width)


@triton.jit
def gathered(begin, count, first, index, factor, table, sums, dims, width, SEGMENT: tl.constexpr):
    """The sum over each latent's entries of factor times a row of the table: [latents dims]."""
    inside, segments = dims[None, :] < width, count // SEGMENT
    left, begin = count - segments * SEGMENT, begin + segments * SEGMENT
    total = tl.zeros((count.shape[0], dims.shape[0]), dtype=tl.float32)
    for s in range(tl.max(segments, axis=0)):
        mine = (s < segments)[:, None] & inside
        total += tl.load(sums + (first + s).to(tl.int64)[:, None] * width + dims[None, :], mask=mine, other=0.0)
    for t in range(tl.max(left, axis=0)):
        mine = t < left
        rows = tl.load(index + begin + t, mask=mine, other=0).to(tl.int64)
        tile = tl.load(table + rows[:, None] * width + dims[None, :], mask=mine[:, None] & inside, other=0.0)
        total += tl.load(factor + begin + t, mask=mine, other=0.0)[:, None] * tile.to(tl.float32)
    return total


@triton.jit
def _atoms(starts, totals, first_segment, source, f, learns, sums, row, slope, inputs, sums_in, out,
           weights, moments1, moments2, half, rates, roots, beta1, beta2, eps, d_sae, d_out, TIED: tl.constexpr,
           PROJECTS: tl.constexpr, UNIT: tl.constexpr, SEGMENT: tl.constexpr, LATENTS: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    member, dims = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    latents = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    ok, place = latents < d_sae, member * d_sae + latents
    begin, count = tl.load(starts + place, mask=ok, other=0), tl.load(totals + place, mask=ok, other=0)
    first = tl.load(first_segment + place, mask=ok, other=0)
    gradient = gathered(begin, count, first, source, f, learns, sums, dims, d_out, SEGMENT)
    if TIED:
        gradient += gathered(begin, count, first, row, slope, inputs, sums_in, dims, d_out, SEGMENT)
    at, ok = place[:, None] * d_out + dims[None, :], ok[:, None] & (dims[None, :] < d_out)
    if weights is None:
        tl.store(out + at, gradient, mask=ok)
    else:
        atoms = tl.load(weights + at, mask=ok, other=0.0)
        if PROJECTS:
            gradient -= atoms * tl.sum(atoms * gradient, axis=1)[:, None]
        moment1, moment2 = tl.load(moments1 + at, mask=ok, other=0.0), tl.load(moments2 + at, mask=ok, other=0.0)
        rate, root = tl.load(rates + member), tl.load(roots + member)
        atoms, moment1, moment2 = adam(atoms, gradient, moment1, moment2, rate, root, beta1, beta2, eps)
        if UNIT:
            norms = tl.sqrt(tl.sum(tl.where(ok, atoms * atoms, 0.0), axis=1))
            atoms = atoms / tl.maximum(norms, 1.1754944e-38)[:, None]
        tl.store(weights + at, atoms, mask=ok)
        tl.store(moments1 + at, moment1, mask=ok)
        tl.store(moments2 + at, moment2, mask=ok)
        if half is not None:
            tl.store(half + at, atoms, mask=ok)


@triton.jit
def _columns(starts, totals, first_segment, row, slope, inputs, sums, out,
             weights, moments1, moments2, half, rates, roots, beta1, beta2, eps,
             d_sae, d_in, stride_member, stride_in, stride_latent, SEGMENT: tl.constexpr,
             LATENTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    member, dims = tl.program_id(2).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    latents = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    ok, place = latents < d_sae, member * d_sae + latents
    begin, count = tl.load(starts + place, mask=ok, other=0), tl.load(totals + place, mask=ok, other=0)
    first = tl.load(first_segment + place, mask=ok, other=0)
    gradient = gathered(begin, count, first, row, slope, inputs, sums, dims, d_in, SEGMENT)
    at = member * stride_member + dims.to(tl.int64)[None, :] * stride_in + latents[:, None] * stride_latent
    ok = ok[:, None] & (dims[None, :] < d_in)
    if weights is None:
        tl.store(out + at, gradient, mask=ok)
    else:
        moment1, moment2 = tl.load(moments1 + at, mask=ok, other=0.0), tl.load(moments2 + at, mask=ok, other=0.0)
        rate, root = tl.load(rates + member), tl.load(roots + member)
        columns = tl.load(weights + at, mask=ok, other=0.0)
        columns, moment1, moment2 = adam(columns, gradient, moment1, moment2, rate, root, beta1, beta2, eps)
        tl.store(weights + at, columns, mask=ok)
        tl.store(moments1 + at, moment1, mask=ok)
        tl.store(moments2 + at, moment2, mask=ok)
        if half is not None:
            tl.store(half + at, columns, mask=ok)


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
    _totals[(triton.cdiv(shape[1], 16), shape[0])](
        entries.starts, entries.totals, entries.source, entries.f, entries.slope, entries.row, entries.extra,
        pre, threshold, width, slope, active, inside, n_inside, owner, first, shape[1], n_sources,
        SEGMENT=size, LATENTS=16, ENTRIES=32,
    )  # fmt: skip
    return Totals(slope, active, inside, n_inside, size, first, owner, ends[-1:])


def segment_sums(
    entries: ByLatent, totals: Totals, index: Int[Tensor, " A"], factor: Float[Tensor, " A"], table: Tensor
) -> Float[Tensor, "most w"]:
    """The sum over each segment of factor times a row of the table [n w]; unwritten beyond the last."""
    width = table.shape[1]
    sums = torch.empty(len(totals.segment_latent), width, device=table.device)
    block = min(triton.next_power_of_2(width), 1024)
    _segments[(len(sums), triton.cdiv(width, block))](
        totals.segment_latent, totals.first_segment, totals.n_segments, entries.starts, index, factor, table, sums,
        width, SEGMENT=totals.segment, AT_ONCE=8, BLOCK=block,
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
    n_members, d_sae, d_out = W_dec.shape
    sums = segment_sums(entries, totals, entries.source, entries.f, learns)
    sums_in = segment_sums(entries, totals, entries.row, entries.slope, inputs)
    found = {} if learning else {"W_dec": torch.empty_like(W_dec)}
    if learning:
        learning.begin()
    block, latents = atom_tile(d_out)
    _atoms[(triton.cdiv(d_sae, latents), n_members)](
        entries.starts, entries.totals, totals.first_segment, entries.source, entries.f, learns, sums,
        entries.row, entries.slope, inputs, sums_in, found.get("W_dec"),
        *(learning.of("W_dec", learns.dtype) if learning else Learning()), d_sae, d_out,
        TIED=W_enc is None, PROJECTS=projects, UNIT=unit, SEGMENT=totals.segment, LATENTS=latents, BLOCK=block,
    )  # fmt: skip
    if W_enc is not None:
        if not learning:
            found["W_enc"] = torch.empty_like(W_enc)
        d_in = W_enc.shape[1]
        block = min(64, triton.next_power_of_2(d_in))
        _columns[(triton.cdiv(d_sae, 32), triton.cdiv(d_in, block), n_members)](
            entries.starts, entries.totals, totals.first_segment, entries.row, entries.slope, inputs, sums_in,
            found.get("W_enc"), *(learning.of("W_enc", learns.dtype) if learning else Learning()),
            d_sae, d_in, *W_enc.stride(), SEGMENT=totals.segment, LATENTS=32, BLOCK=block,
        )  # fmt: skip
    return found


def atom_tile(d_out: int) -> tuple[int, int]:
    """(dims, latents) of a program that owns whole atoms."""
    block = triton.next_power_of_2(d_out)
    return block, max(1, min(16, TILE // block))

"""Entries in the order of their latents: a counting sort, by histogram and scan.

A block of entries counts its latents into a row of the histogram that no other block touches, so that there are no
atomic adds, hot latents cost nothing, and the order, by row within each latent, is the same every time.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

CHUNK = 256
"""Entries that are compared with one another."""
BLOCKS = 256
"""Rows of the histogram, at most."""


@triton.jit
def _count(latent, rank, histogram, total, length, d_sae, per_block, n_blocks, first_block, CHUNK: tl.constexpr,
           PART: tl.constexpr):  # fmt: skip
    """The rank of each entry among those of its latent in its block, and how many there are in all."""
    member, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    latent, rank = latent + member * length, rank + member * length
    if total is not None:
        length = tl.load(total + member)
        per_block = tl.cdiv(length, tl.num_programs(0) * CHUNK) * CHUNK
    own = histogram + (member * n_blocks + first_block + block) * d_sae
    here, part = tl.arange(0, CHUNK), tl.arange(0, PART)
    for start in range(block * per_block, tl.minimum((block + 1) * per_block, length), CHUNK):
        at = start + here
        ids = tl.load(latent + at, mask=at < length, other=-1)
        if tl.max(ids, axis=0) >= 0:
            before, after = tl.zeros((CHUNK,), dtype=tl.int32), tl.zeros((CHUNK,), dtype=tl.int32)
            for other in range(0, CHUNK, PART):
                place = start + other + part
                same = ids[:, None] == tl.load(latent + place, mask=place < length, other=-1)[None, :]
                before += tl.sum((same & (place[None, :] < at[:, None])).to(tl.int32), axis=1)
                after += tl.sum((same & (place[None, :] > at[:, None])).to(tl.int32), axis=1)
            found = tl.load(own + ids, mask=ids >= 0, other=0) + before
            tl.store(rank + at, found, mask=ids >= 0)
            tl.debug_barrier()  # all have read the counts of the chunks before
            tl.store(own + ids, found + 1, mask=(ids >= 0) & (after == 0))
            tl.debug_barrier()


@triton.jit
def _scan(histogram, totals, d_sae, n_blocks, BLOCK: tl.constexpr):
    """Counts become the number of entries in earlier blocks."""
    member, latents = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok, total = latents < d_sae, tl.zeros((BLOCK,), dtype=tl.int32)
    for block in range(n_blocks):
        place = histogram + (member * n_blocks + block) * d_sae + latents
        count = tl.load(place, mask=ok, other=0)
        tl.store(place, total, mask=ok)
        total += count
    tl.store(totals + member * d_sae + latents, total, mask=ok)


@triton.jit
def _fill(latent, rank, f, slope, extra, histogram, starts, total, sorted_row, sorted_source, sorted_f, sorted_slope,
          sorted_extra, rows_of, length, slots, n_rows, d_sae, per_block, n_blocks, first_block, first_source, n_ends,
          ends, CHUNK: tl.constexpr):  # fmt: skip
    """Each entry, with the row it is of and the gradient it learns from, to its place."""
    member, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    earlier, begin = histogram + (member * n_blocks + first_block + block) * d_sae, member * length
    if total is not None:
        length = tl.load(total + member)
        per_block = tl.cdiv(length, tl.num_programs(0) * CHUNK) * CHUNK
    for start in range(block * per_block, tl.minimum((block + 1) * per_block, length), CHUNK):
        at = start + tl.arange(0, CHUNK)
        ids = tl.load(latent + begin + at, mask=at < length, other=-1)
        ok, entry = ids >= 0, begin + at
        if rows_of is None:
            row = member * n_rows + at // slots
        else:
            row = member * n_rows + tl.load(rows_of + entry, mask=ok, other=0)
        prefix = tl.zeros((CHUNK,), dtype=tl.int32)
        for g in range(n_ends - 1):
            prefix += (ids >= tl.load(ends + g)).to(tl.int32)
        to = tl.load(starts + member * d_sae + ids, mask=ok, other=0)
        to += tl.load(earlier + ids, mask=ok, other=0) + tl.load(rank + entry, mask=ok, other=0)
        tl.store(sorted_row + to, row.to(tl.int32), mask=ok)
        tl.store(sorted_source + to, (first_source + row * n_ends + prefix).to(tl.int32), mask=ok)
        tl.store(sorted_f + to, tl.load(f + entry, mask=ok, other=0.0), mask=ok)
        tl.store(sorted_slope + to, tl.load(slope + entry, mask=ok, other=0.0), mask=ok)
        if extra is not None:
            tl.store(sorted_extra + to, tl.load(extra + entry, mask=ok, other=0.0), mask=ok)


class List(NamedTuple):
    """Entries row by row, and which gradients they learn from."""

    latent: Int[Tensor, "M length"]
    """-1: none."""
    f: Tensor
    slope: Tensor
    n_ends: int
    """Of the gradients of a row, entries of latents from ends[g - 1] on learn from number g."""
    first_source: int
    extra: Tensor | None = None
    """Another number of each entry."""
    rows: Tensor | None = None
    """[M length], the row of each; None: each row has the same number of places."""
    total: Tensor | None = None
    """[M], how many of them there are; None: those that are not -1."""


class ByLatent(NamedTuple):
    """Entries latent by latent: those of latent l of member m begin at starts[m, l], there are totals[m, l]."""

    starts: Int[Tensor, "M d_sae"]
    totals: Int[Tensor, "M d_sae"]
    row: Int[Tensor, " A"]
    """member * B + row."""
    source: Int[Tensor, " A"]
    """Which of the gradients of rows."""
    f: Tensor
    slope: Tensor
    extra: Tensor | None


def by_latent(lists: Sequence[List], ends: Int[Tensor, " n_ends"], n_rows: int, d_sae: int) -> ByLatent:
    """All lists in one order; a latent's entries of the first list come first. Places beyond the last are unwritten."""
    device, n_members = lists[0].latent.device, lists[0].latent.shape[0]
    per_block = [CHUNK * triton.cdiv(one.latent[0].numel(), CHUNK * BLOCKS) for one in lists]
    counts = [triton.cdiv(one.latent[0].numel(), each) for one, each in zip(lists, per_block, strict=True)]
    n_blocks = sum(counts)
    histogram = torch.zeros(n_members, n_blocks, d_sae, dtype=torch.int32, device=device)
    totals = torch.empty(n_members, d_sae, dtype=torch.int32, device=device)
    ranks, first = [torch.empty_like(one.latent) for one in lists], 0
    for one, rank, count, each in zip(lists, ranks, counts, per_block, strict=True):
        length = one.latent[0].numel()
        _count[(count, n_members)](
            one.latent, rank, histogram, one.total, length, d_sae, each, n_blocks, first, CHUNK=CHUNK, PART=16
        )  # fmt: skip
        first += count
    _scan[(triton.cdiv(d_sae, 128), n_members)](histogram, totals, d_sae, n_blocks, BLOCK=128)
    starts = totals.flatten().cumsum(0, dtype=torch.int32).view_as(totals) - totals

    capacity = sum(one.latent.numel() for one in lists)
    row, source = (torch.empty(capacity, dtype=torch.int32, device=device) for _ in range(2))
    f, slope = (torch.empty(capacity, device=device) for _ in range(2))
    extra, first = None if lists[0].extra is None else torch.empty(capacity, device=device), 0
    for one, rank, count, each in zip(lists, ranks, counts, per_block, strict=True):
        length, slots = one.latent[0].numel(), one.latent.shape[-1]
        _fill[(count, n_members)](
            one.latent, rank, one.f, one.slope, one.extra, histogram, starts, one.total, row, source, f, slope, extra,
            one.rows, length, slots, n_rows, d_sae, each, n_blocks, first, one.first_source, one.n_ends, ends,
            CHUNK=CHUNK,
        )  # fmt: skip
        first += count
    return ByLatent(starts, totals, row, source, f, slope, extra)

"""Entries in the order of their latents: a counting sort, by bit masks and a scan.

A latent has one bit for each row, and 32 rows make a word: entry (row, latent) sets its bit, and how many bits lie
before it is its place among the entries of the latent. Setting bits commutes, so that the order, by row within each
latent, is the same every time however the hardware takes turns; nothing is compared or sorted.
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

CHUNK = 1_024
"""Entries of a program at a time."""
PROGRAMS = 2_048
"""For the entries of a member, at most."""
WORD = 32
"""Rows of a word."""


@triton.jit
def ones(word):
    """How many bits are set in an int32."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def row_of(rows_of, place, at, ok, slots):
    """The row of an entry: each has the same number of places, or `rows_of` tells."""
    if rows_of is None:
        row = at // slots
    else:
        row = tl.load(rows_of + place, mask=ok, other=0)
    return row


@triton.jit
def _mark(latent, rows_of, total, words, length, slots, d_sae, n_words, first_word, CHUNK: tl.constexpr,
          WORD: tl.constexpr):  # fmt: skip
    """Set the bit of each entry."""
    member = tl.program_id(1).to(tl.int64)
    used = length if total is None else tl.load(total + member)
    for start in range(tl.program_id(0) * CHUNK, used, tl.num_programs(0) * CHUNK):
        at = start + tl.arange(0, CHUNK)
        ids = tl.load(latent + member * length + at, mask=at < used, other=-1)
        row = row_of(rows_of, member * length + at, at, ids >= 0, slots)
        word = words + (member * n_words + first_word + row // WORD) * d_sae + ids
        tl.atomic_or(word, 1 << (row % WORD), mask=ids >= 0, sem="relaxed")


@triton.jit
def _scan(words, earlier, totals, d_sae, n_words, LATENTS: tl.constexpr, AT_ONCE: tl.constexpr):
    """How many entries of a latent lie before each word, and how many there are in all."""
    member, latents = tl.program_id(1).to(tl.int64), tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    wide, total = latents < d_sae, tl.zeros((LATENTS,), dtype=tl.int32)
    for first in range(0, n_words, AT_ONCE):
        at = first + tl.arange(0, AT_ONCE)
        place, ok = (member * n_words + at)[:, None] * d_sae + latents[None, :], (at < n_words)[:, None] & wide[None, :]
        counts = ones(tl.load(words + place, mask=ok, other=0))
        tl.store(earlier + place, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=ok)
        total += tl.sum(counts, axis=0)
    tl.store(totals + member * d_sae + latents, total, mask=wide)


@triton.jit
def _fill(latent, f, slope, extra, words, earlier, starts, total, sorted_row, sorted_source, sorted_f, sorted_slope,
          sorted_extra, rows_of, length, slots, n_rows, d_sae, n_words, first_word, first_source, n_ends, ends,
          CHUNK: tl.constexpr, WORD: tl.constexpr):  # fmt: skip
    """Each entry, with the row it is of and the gradient it learns from, to its place."""
    member = tl.program_id(1).to(tl.int64)
    used = length if total is None else tl.load(total + member)
    for start in range(tl.program_id(0) * CHUNK, used, tl.num_programs(0) * CHUNK):
        at = start + tl.arange(0, CHUNK)
        entry = member * length + at
        ids = tl.load(latent + entry, mask=at < used, other=-1)
        ok = ids >= 0
        row = row_of(rows_of, entry, at, ok, slots)
        place = (member * n_words + first_word + row // WORD) * d_sae + ids
        before = tl.load(words + place, mask=ok, other=0) & ((1 << (row % WORD)) - 1)
        to = tl.load(starts + member * d_sae + ids, mask=ok, other=0)
        to += tl.load(earlier + place, mask=ok, other=0) + ones(before)
        row = member * n_rows + row
        prefix = tl.zeros((CHUNK,), dtype=tl.int32)
        for g in range(n_ends - 1):
            prefix += (ids >= tl.load(ends + g)).to(tl.int32)
        tl.store(sorted_row + to, row.to(tl.int32), mask=ok)
        tl.store(sorted_source + to, (first_source + row * n_ends + prefix).to(tl.int32), mask=ok)
        tl.store(sorted_f + to, tl.load(f + entry, mask=ok, other=0.0), mask=ok)
        tl.store(sorted_slope + to, tl.load(slope + entry, mask=ok, other=0.0), mask=ok)
        if extra is not None:
            tl.store(sorted_extra + to, tl.load(extra + entry, mask=ok, other=0.0), mask=ok)


class List(NamedTuple):
    """Entries row by row, no latent twice in a row, and which gradients they learn from."""

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
    device, n_members, words_of_list = lists[0].latent.device, lists[0].latent.shape[0], triton.cdiv(n_rows, WORD)
    n_words = words_of_list * len(lists)
    words = torch.zeros(n_members, n_words, d_sae, dtype=torch.int32, device=device)
    earlier, totals = torch.empty_like(words), torch.empty(n_members, d_sae, dtype=torch.int32, device=device)
    lengths = [one.latent[0].numel() for one in lists]
    grids = [(min(PROGRAMS, triton.cdiv(length, CHUNK)), n_members) for length in lengths]
    for number, (one, length, grid) in enumerate(zip(lists, lengths, grids, strict=True)):
        _mark[grid](
            one.latent, one.rows, one.total, words, length, one.latent.shape[-1], d_sae, n_words,
            number * words_of_list, CHUNK=CHUNK, WORD=WORD,
        )  # fmt: skip
    _scan[(triton.cdiv(d_sae, 32), n_members)](words, earlier, totals, d_sae, n_words, LATENTS=32, AT_ONCE=64)
    starts = totals.flatten().cumsum(0, dtype=torch.int32).view_as(totals) - totals

    capacity = sum(one.latent.numel() for one in lists)
    row, source = torch.empty(2, capacity, dtype=torch.int32, device=device)
    f, slope = torch.empty(2, capacity, device=device)
    extra = None if lists[0].extra is None else torch.empty(capacity, device=device)
    for number, (one, length, grid) in enumerate(zip(lists, lengths, grids, strict=True)):
        _fill[grid](
            one.latent, one.f, one.slope, one.extra, words, earlier, starts, one.total, row, source, f, slope, extra,
            one.rows, length, one.latent.shape[-1], n_rows, d_sae, n_words, number * words_of_list,
            one.first_source, one.n_ends, ends, CHUNK=CHUNK, WORD=WORD,
        )  # fmt: skip
    return ByLatent(starts, totals, row, source, f, slope, extra)

"""The exact k largest of each row, from the maxima of its groups of latents (see encode.py).

The k-th largest is found by bisection between bounds that are known, which takes some ten counts in bf16. Of equal
scores the first latents are kept, k in all; of groups with equal maxima too, which loses none of these. Where k groups
would not fit into registers torch.topk does it.
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

from sparse_coding.kernels.triton.encode import GROUP, NOT_A_NUMBER, Encoded, key_of, score_of

WIDEST = 16_384
"""Candidates of a row that are looked at in registers."""
WHOLE = 1_024
"""Rows of at most so many latents are looked at without their groups."""
TILE = 1_024
"""Candidates of all rows of a program, where one row has fewer."""


class Entries(NamedTuple):
    """Active entries of each row, in ascending order of latents where the kernels chose.

    Every row has the same number of places, the last of them free (-1 and 0); or, where `first` is there, the rows of a
    member follow one another.
    """

    latent: Tensor
    """[M B slots], or [M capacity]."""
    f: Tensor
    count: Int[Tensor, "M B"]
    first: Int[Tensor, "M B"] | None = None
    """Place of each row's first entry."""
    rows: Int[Tensor, "M capacity"] | None = None
    """The row of each entry."""
    total: Int[Tensor, " M"] | None = None
    """How many entries there are; later places are unwritten."""


@triton.jit
def kth_largest(keys, k, least, LOWEST: tl.constexpr):
    """The k-th largest of each row of int32 keys, a list [n] of k; `least` where fewer reach that.

    Bits below LOWEST are 0 in all of them.
    """
    keys, low = keys >> LOWEST, least >> LOWEST
    high = tl.maximum(tl.max(keys, axis=1), low)
    while tl.max(high - low, axis=0) > 0:
        middle = low + ((high - low + 1) >> 1)
        enough = tl.sum((keys >= middle[:, None]).to(tl.int32), axis=1) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return low << LOWEST


@triton.jit
def k_kept(keys, k, least, LOWEST: tl.constexpr):
    """(which are the k largest above 0 of each row's keys, their places, the last key); the first of equal ones."""
    bound = kth_largest(keys, k, least, LOWEST)
    above, ties = (keys > bound[:, None]).to(tl.int32), (keys == bound[:, None]).to(tl.int32)
    left = tl.where(bound > 0, k - tl.sum(above, axis=1), 0)[:, None]
    ranks = tl.cumsum(above + (ties << 16), axis=1)  # of both at once
    equal = ranks >> 16
    kept = (above > 0) | ((ties > 0) & (equal <= left))
    return kept, (ranks & 0xFFFF) + tl.minimum(equal, left) - 1, bound


@triton.jit
def _groups(best, k, chosen, bounds, all_rows, n_rows, n_groups, slots, LOWEST: tl.constexpr,
            BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr):  # fmt: skip
    """The groups of each row that hold its k largest, ascending; and the smallest of their maxima."""
    rows, groups = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    ok, place = rows < all_rows, rows.to(tl.int64)[:, None]
    wanted = tl.load(k + rows // n_rows, mask=ok, other=0).to(tl.int32)
    inside = ok[:, None] & (groups[None, :] < n_groups)
    keys = tl.load(best + place * n_groups + groups[None, :], mask=inside, other=-1)
    least = tl.min(tl.where(inside, keys, 0x7FFFFFFF), axis=1)  # there are more groups than k
    kept, position, bound = k_kept(keys, wanted, least, LOWEST)
    ids = groups[None, :] + tl.zeros((BLOCK_ROWS, 1), dtype=tl.int32)
    tl.store(chosen + place * slots + position, ids, mask=kept & inside)
    tl.store(bounds + rows, bound, mask=ok)
    free, count = tl.arange(0, BLOCK_SLOTS)[None, :], tl.sum(kept.to(tl.int32), axis=1)[:, None]
    tl.store(chosen + place * slots + free, free * 0 - 1, mask=ok[:, None] & (free >= count) & (free < slots))


@triton.jit
def _entries(
    pre, norms, k, chosen, bounds, latent_out, f_out, count_out, all_rows, n_rows, d_sae, slots,
    SIGNED: tl.constexpr, LOWEST: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """The k largest of each row among the latents of its chosen groups, or of all where there are none."""
    rows, candidates = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)[None, :]
    ok, place, member = rows < all_rows, rows.to(tl.int64)[:, None], (rows // n_rows)[:, None]
    if chosen is None:
        latent = candidates + tl.zeros((BLOCK_ROWS, 1), dtype=tl.int32)
        least = rows * 0
    else:
        mine = ok[:, None] & (candidates // GROUP < slots)
        group = tl.load(chosen + place * slots + candidates // GROUP, mask=mine, other=-1)
        latent = tl.where(group >= 0, group * GROUP + candidates % GROUP, d_sae)
        least = tl.load(bounds + rows, mask=ok, other=0)  # which k of these reach
    inside = ok[:, None] & (latent < d_sae)
    values = tl.load(pre + place * d_sae + latent, mask=inside, other=0.0).to(tl.float32)
    keys = key_of(score_of(values, norms, member * d_sae + latent, inside, SIGNED))
    wanted = tl.load(k + rows // n_rows, mask=ok, other=0).to(tl.int32)
    kept, position, _ = k_kept(tl.where(inside, keys, -1), wanted, least, LOWEST)
    tl.store(latent_out + place * slots + position, latent, mask=kept)
    tl.store(f_out + place * slots + position, values, mask=kept)
    count, free = tl.sum(kept.to(tl.int32), axis=1), tl.arange(0, BLOCK_SLOTS)[None, :]
    tl.store(count_out + rows, count, mask=ok)
    rest = ok[:, None] & (free >= count[:, None]) & (free < slots)
    tl.store(latent_out + place * slots + free, free * 0 - 1, mask=rest)
    tl.store(f_out + place * slots + free, free * 0.0, mask=rest)


def largest_of_rows(
    encoded: Encoded, k: Int[Tensor, " M"], slots: int, norms: Float[Tensor, "M d_sae"] | None, signed: bool
) -> Entries:
    """The k[m] <= slots largest scores of each row."""
    (n_members, n_rows, d_sae), (pre, best) = encoded.pre.shape, encoded
    n_groups, all_rows, slots = best.shape[2], n_members * n_rows, min(slots, d_sae)
    whole = d_sae <= WHOLE or slots >= n_groups
    block = triton.next_power_of_2(d_sae) if whole else triton.next_power_of_2(slots) * GROUP
    if max(block, 0 if whole else n_groups) > WIDEST:
        return largest_by_torch(pre, k, slots, norms, signed)
    latent = torch.empty(n_members, n_rows, slots, dtype=torch.int32, device=pre.device)
    count = torch.empty(n_members, n_rows, dtype=torch.int32, device=pre.device)
    f, chosen, bounds, block_slots = (
        torch.empty(latent.shape, device=pre.device),
        None,
        None,
        triton.next_power_of_2(slots),
    )
    lowest = lowest_bit(pre, norms)
    if not whole:
        chosen, bounds, block_groups = (
            torch.empty_like(latent),
            torch.empty_like(count),
            triton.next_power_of_2(n_groups),
        )
        at_once = rows_at_once(block_groups, all_rows)
        _groups[(triton.cdiv(all_rows, at_once),)](
            best, k, chosen, bounds, all_rows, n_rows, n_groups, slots,
            LOWEST=lowest, BLOCK_ROWS=at_once, BLOCK=block_groups, BLOCK_SLOTS=block_slots, num_warps=2,
        )  # fmt: skip
    at_once = rows_at_once(block, all_rows)
    _entries[(triton.cdiv(all_rows, at_once),)](
        pre, norms, k, chosen, bounds, latent, f, count, all_rows, n_rows, d_sae, slots,
        SIGNED=signed, LOWEST=lowest, GROUP=GROUP, BLOCK_ROWS=at_once, BLOCK=block, BLOCK_SLOTS=block_slots,
        num_warps=16 if block > 4096 else 4,
    )  # fmt: skip
    return Entries(latent, f, count)


def lowest_bit(pre: Tensor, norms: Tensor | None) -> int:
    """The lowest bit of keys that may be set: bf16 that nothing has multiplied fills the upper half alone."""
    return 16 if pre.dtype == torch.bfloat16 and norms is None else 0


def rows_at_once(block: int, all_rows: int) -> int:
    return min(max(1, TILE // block), triton.next_power_of_2(all_rows))


def largest_by_torch(
    pre: Float[Tensor, "M B d_sae"],
    k: Int[Tensor, " M"],
    slots: int,
    norms: Float[Tensor, "M d_sae"] | None,
    signed: bool,
) -> Entries:
    """The same by torch.topk, each row's entries by falling score."""
    pre = pre.float()
    scores = pre.abs() if signed else pre
    scores = scores if norms is None else scores * norms.unsqueeze(1)
    keys = torch.where(scores.isnan(), NOT_A_NUMBER.value, scores.view(torch.int32).clamp(min=0))
    best = keys.topk(slots, dim=-1)
    kept = (best.values > 0) & (torch.arange(slots, device=k.device) < k.view(-1, 1, 1))
    f = torch.where(kept, pre.gather(-1, best.indices), 0.0)
    return Entries(torch.where(kept, best.indices, -1).int(), f, kept.sum(-1, dtype=torch.int32))

"""The exact k largest of each row, from the maxima of its groups of latents (see encode.py).

Keys are compared bit by bit: 31 counts find the k-th largest. Of equal scores the first latents are kept, k in all; of
groups with equal maxima too, which loses none of these. Where k groups would not fit into registers torch.topk does it.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_coding.kernels.triton.encode import GROUP, key_of, score_of

WIDEST = 16_384
"""Candidates of a row that are looked at in registers."""
WHOLE = 1_024
"""Rows of at most so many latents are looked at without their groups."""
TILE = 2_048
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
def kth_largest(keys, k):
    """The k-th largest of each row of int32 keys >= 0, a list [n] of k; 0 where there are fewer above 0."""
    bound = k * 0
    for bit in range(31):
        trial = bound | (1 << (30 - bit))
        bound = tl.where(tl.sum((keys >= trial[:, None]).to(tl.int32), axis=1) >= k, trial, bound)
    return bound


@triton.jit
def k_kept(keys, k):
    """Which of each row's keys are among its k largest, the first of those that are equal."""
    bound = kth_largest(keys, k)[:, None]
    above, ties = keys > bound, (keys == bound).to(tl.int32)
    left = k - tl.sum(above.to(tl.int32), axis=1)
    return above | ((ties > 0) & (tl.cumsum(ties, axis=1) <= left[:, None]))


@triton.jit
def _groups(best, k, chosen, all_rows, n_rows, n_groups, slots, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
            BLOCK_SLOTS: tl.constexpr):  # fmt: skip
    """The groups of each row that hold its k largest, ascending."""
    rows, groups = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    ok, place = rows < all_rows, rows.to(tl.int64)[:, None]
    wanted = tl.load(k + rows // n_rows, mask=ok, other=0).to(tl.int32)
    inside = ok[:, None] & (groups[None, :] < n_groups)
    kept = inside & k_kept(tl.load(best + place * n_groups + groups[None, :], mask=inside, other=-1), wanted)
    position = tl.cumsum(kept.to(tl.int32), axis=1) - 1
    ids = groups[None, :] + tl.zeros((BLOCK_ROWS, 1), dtype=tl.int32)
    tl.store(chosen + place * slots + position, ids, mask=kept)
    free, count = tl.arange(0, BLOCK_SLOTS)[None, :], tl.sum(kept.to(tl.int32), axis=1)[:, None]
    tl.store(chosen + place * slots + free, free * 0 - 1, mask=ok[:, None] & (free >= count) & (free < slots))


@triton.jit
def _entries(
    pre, norms, dead, k, chosen, latent_out, f_out, count_out, all_rows, n_rows, d_sae, slots,
    SIGNED: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """The k largest of each row among the latents of its chosen groups, or of all where there are none."""
    rows, candidates = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)[None, :]
    ok, place, member = rows < all_rows, rows.to(tl.int64)[:, None], (rows // n_rows)[:, None]
    if chosen is None:
        latent = candidates + tl.zeros((BLOCK_ROWS, 1), dtype=tl.int32)
    else:
        mine = ok[:, None] & (candidates // GROUP < slots)
        group = tl.load(chosen + place * slots + candidates // GROUP, mask=mine, other=-1)
        latent = tl.where(group >= 0, group * GROUP + candidates % GROUP, d_sae)
    inside = ok[:, None] & (latent < d_sae)
    values = tl.load(pre + place * d_sae + latent, mask=inside, other=0.0)
    keys = key_of(score_of(values, norms, member * d_sae + latent, inside, SIGNED))
    if dead is not None:
        keys = tl.where(tl.load(dead + member * d_sae + latent, mask=inside, other=0) != 0, keys, 0)
    keys = tl.where(inside, keys, 0)
    kept = k_kept(keys, tl.load(k + rows // n_rows, mask=ok, other=0).to(tl.int32)) & (keys > 0)
    position = tl.cumsum(kept.to(tl.int32), axis=1) - 1
    tl.store(latent_out + place * slots + position, latent, mask=kept)
    tl.store(f_out + place * slots + position, values, mask=kept)
    count, free = tl.sum(kept.to(tl.int32), axis=1), tl.arange(0, BLOCK_SLOTS)[None, :]
    tl.store(count_out + rows, count, mask=ok)
    rest = ok[:, None] & (free >= count[:, None]) & (free < slots)
    tl.store(latent_out + place * slots + free, free * 0 - 1, mask=rest)
    tl.store(f_out + place * slots + free, free * 0.0, mask=rest)


def largest_of_rows(
    pre: Float[Tensor, "M B d_sae"],
    best: Int[Tensor, "M B n_groups"],
    k: Int[Tensor, " M"],
    slots: int,
    norms: Float[Tensor, "M d_sae"] | None,
    signed: bool,
    dead: Bool[Tensor, "M d_sae"] | None = None,
) -> Entries:
    """The k[m] <= slots largest scores of each row, of dead latents alone where these are given."""
    n_members, n_rows, d_sae = pre.shape
    n_groups, all_rows, slots = best.shape[2], n_members * n_rows, min(slots, d_sae)
    whole = d_sae <= WHOLE or slots >= n_groups
    block = triton.next_power_of_2(d_sae) if whole else triton.next_power_of_2(slots) * GROUP
    if max(block, 0 if whole else n_groups) > WIDEST:
        return largest_by_torch(pre, k, slots, norms, signed, dead)
    latent = torch.empty(n_members, n_rows, slots, dtype=torch.int32, device=pre.device)
    count = torch.empty(n_members, n_rows, dtype=torch.int32, device=pre.device)
    f, chosen, block_slots = torch.empty(latent.shape, device=pre.device), None, triton.next_power_of_2(slots)
    if not whole:
        chosen, block_groups = torch.empty_like(latent), triton.next_power_of_2(n_groups)
        at_once = rows_at_once(block_groups, all_rows)
        _groups[(triton.cdiv(all_rows, at_once),)](
            best, k, chosen, all_rows, n_rows, n_groups, slots,
            BLOCK_ROWS=at_once, BLOCK=block_groups, BLOCK_SLOTS=block_slots,
        )  # fmt: skip
    at_once = rows_at_once(block, all_rows)
    _entries[(triton.cdiv(all_rows, at_once),)](
        pre, norms, None if dead is None else dead.view(torch.uint8), k, chosen, latent, f, count,
        all_rows, n_rows, d_sae, slots,
        SIGNED=signed, GROUP=GROUP, BLOCK_ROWS=at_once, BLOCK=block, BLOCK_SLOTS=block_slots,
        num_warps=16 if block > 4096 else 4,
    )  # fmt: skip
    return Entries(latent, f, count)


def rows_at_once(block: int, all_rows: int) -> int:
    return min(max(1, TILE // block), triton.next_power_of_2(all_rows))


def largest_by_torch(
    pre: Float[Tensor, "M B d_sae"],
    k: Int[Tensor, " M"],
    slots: int,
    norms: Float[Tensor, "M d_sae"] | None,
    signed: bool,
    dead: Bool[Tensor, "M d_sae"] | None,
) -> Entries:
    """The same by torch.topk, each row's entries by falling score."""
    scores = pre.abs() if signed else pre
    scores = scores if norms is None else scores * norms.unsqueeze(1)
    keys = torch.where(scores.isnan(), 0x7FFFFFFF, scores.view(torch.int32).clamp(min=0))
    if dead is not None:
        keys = keys.mul_(dead.unsqueeze(1))
    best = keys.topk(slots, dim=-1)
    kept = (best.values > 0) & (torch.arange(slots, device=k.device) < k.view(-1, 1, 1))
    f = torch.where(kept, pre.gather(-1, best.indices), 0.0)
    return Entries(torch.where(kept, best.indices, -1).int(), f, kept.sum(-1, dtype=torch.int32))

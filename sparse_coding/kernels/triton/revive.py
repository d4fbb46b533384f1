"""AuxK's entries: the k_aux largest scores of each row among the dead latents alone.

These are listed first, so that a step costs what there are of them: where no more than k_aux are dead, all that are
above 0 are taken without a search. Else the k-th largest of a row is found by histograms of eight bits of the keys.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_coding.kernels.triton.choose import Entries, lowest_bit
from sparse_coding.kernels.triton.encode import key_of, score_of

TILE = 1_024
"""Dead latents of a row that are looked at together."""
BINS = 256


@triton.jit
def _dead_list(dead, ids, n_dead, d_sae, BLOCK: tl.constexpr):
    """The dead latents of a member, ascending."""
    member, few = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    n = 0
    for first in range(0, d_sae, BLOCK):
        latents = first + few
        found = (tl.load(dead + member * d_sae + latents, mask=latents < d_sae, other=0) != 0).to(tl.int32)
        tl.store(ids + member * d_sae + n + tl.cumsum(found, axis=0) - 1, latents, mask=found > 0)
        n += tl.sum(found, axis=0)
    tl.store(n_dead + member, n)


@triton.jit
def keys_of_dead(pre, norms, ids, row, member, at, n, d_sae, SIGNED: tl.constexpr):
    """(latents, pre-activations, keys) of some places of the list; keys are -1 beyond its end."""
    inside = at < n
    latents = tl.load(ids + member * d_sae + at, mask=inside, other=0)
    values = tl.load(pre + row * d_sae + latents, mask=inside, other=0.0).to(tl.float32)
    keys = key_of(score_of(values, norms, member * d_sae + latents, inside, SIGNED))
    return latents, values, tl.where(inside, keys, -1)


@triton.jit
def _bounds(pre, norms, ids, n_dead, bound, ties, count, k, n_rows, d_sae, SIGNED: tl.constexpr, LOWEST: tl.constexpr,
            TILE: tl.constexpr, BINS: tl.constexpr):  # fmt: skip
    """How many of a row's keys are kept: those above a bound, and so many of those that equal it."""
    row, few, bins = tl.program_id(0).to(tl.int64), tl.arange(0, TILE), tl.arange(0, 2 * BINS)
    member = row // n_rows
    n, known, left = tl.load(n_dead + member), 0, k
    if n > k:
        for digit in tl.static_range(4 - LOWEST // 8):
            shift = 24 - 8 * digit
            counts = tl.zeros((2 * BINS,), dtype=tl.int32)
            for first in range(0, n, TILE):
                _, _, keys = keys_of_dead(pre, norms, ids, row, member, first + few, n, d_sae, SIGNED)
                same = keys >= 0
                if digit > 0:
                    same &= (keys >> (shift + 8)) == (known >> (shift + 8))
                counts += tl.histogram(tl.where(same, (keys >> shift) & (BINS - 1), BINS), 2 * BINS)
            counts = tl.where(bins < BINS, counts, 0)
            at_least = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
            found = tl.sum(((at_least >= left) & (bins < BINS)).to(tl.int32), axis=0) - 1
            left -= tl.sum(tl.where(bins > found, counts, 0), axis=0)
            known |= found << shift
    if known > 0:
        total = k
    else:
        left, total = 0, 0
        for first in range(0, n, TILE):
            _, _, keys = keys_of_dead(pre, norms, ids, row, member, first + few, n, d_sae, SIGNED)
            total += tl.sum((keys > 0).to(tl.int32), axis=0)
    tl.store(bound + row, known)
    tl.store(ties + row, left)
    tl.store(count + row, total)


@triton.jit
def _revived(pre, norms, ids, n_dead, bound, ties, first_of, latent, f, rows, n_rows, d_sae, capacity,
             SIGNED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Write a row's entries."""
    row, few = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    member = row // n_rows
    n, least, left = tl.load(n_dead + member), tl.load(bound + row), tl.load(ties + row)
    to = member * capacity + tl.load(first_of + row)
    for first in range(0, n, TILE):
        latents, values, keys = keys_of_dead(pre, norms, ids, row, member, first + few, n, d_sae, SIGNED)
        equal = ((keys == least) & (least > 0)).to(tl.int32)
        kept = (keys > least) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= left))
        place = to + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(latent + place, latents, mask=kept)
        tl.store(f + place, values, mask=kept)
        tl.store(rows + place, (row % n_rows).to(tl.int32) + few * 0, mask=kept)
        to += tl.sum(kept.to(tl.int32), axis=0)
        left -= tl.sum(equal, axis=0)


def largest_of_dead(
    pre: Float[Tensor, "M B d_sae"],
    dead: Bool[Tensor, "M d_sae"],
    k: int,
    norms: Float[Tensor, "M d_sae"] | None,
    signed: bool,
) -> Entries:
    """The k largest scores above 0 of each row among the dead latents."""
    (n_members, n_rows, d_sae), device = pre.shape, pre.device
    ids = torch.empty(n_members, d_sae, dtype=torch.int32, device=device)
    n_dead = torch.empty(n_members, dtype=torch.int32, device=device)
    _dead_list[(n_members,)](
        dead.view(torch.uint8), ids, n_dead, d_sae, BLOCK=min(8192, triton.next_power_of_2(d_sae)), num_warps=8
    )  # fmt: skip
    bound, ties, count = torch.empty(3, n_members, n_rows, dtype=torch.int32, device=device)
    tile = min(TILE, triton.next_power_of_2(d_sae))
    _bounds[(n_members * n_rows,)](
        pre, norms, ids, n_dead, bound, ties, count, k, n_rows, d_sae,
        SIGNED=signed, LOWEST=lowest_bit(pre, norms), TILE=tile, BINS=BINS,
    )  # fmt: skip
    capacity, ends = n_rows * min(k, d_sae), count.cumsum(1, dtype=torch.int32)
    first = ends - count
    latent, rows = torch.empty(2, n_members, capacity, dtype=torch.int32, device=device)
    f = torch.empty(n_members, capacity, device=device)
    _revived[(n_members * n_rows,)](
        pre, norms, ids, n_dead, bound, ties, first, latent, f, rows, n_rows, d_sae, capacity, SIGNED=signed, TILE=tile
    )  # fmt: skip
    return Entries(latent, f, count, first, rows, ends[:, -1].contiguous())

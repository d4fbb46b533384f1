"""Entries of rows that differ in how many they have: the k largest of a whole batch, or all above a threshold.

The k-th largest of a batch is found digit by digit: a histogram of the first eight bits of all keys says in which of
256 intervals it lies, the next one cuts that. This is done on the maxima of groups of latents first (see encode.py),
which bounds it from below, and then on the pre-activations of the groups that reach the bound. It is exact; all that
equals the last one kept is kept too.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.kernels.triton.choose import Entries, lowest_bit
from sparse_coding.kernels.triton.encode import GROUP, Encoded, key_of, passes, score_of

TILE = 2_048
"""Latents of a row that are looked at together; those of groups that cannot take part are not read."""
ROWS = 4
"""Rows of a program that counts digits."""
BINS = 256


@triton.jit
def keys_in(pre, norms, threshold, window, best, least, row, member, latents, d_sae, n_groups, ABOVE: tl.constexpr,
            GROUP: tl.constexpr):  # fmt: skip
    """(pre-activations, keys) of some latents of a row. Keys are -1 outside groups >= least, 1 and 0 where ABOVE."""
    inside = latents < d_sae
    inside &= tl.load(best + row * n_groups + latents // GROUP, mask=inside, other=-1) >= least
    values = tl.load(pre + row * d_sae + latents, mask=inside, other=0.0).to(tl.float32)
    place = member * d_sae + latents
    if ABOVE:
        keys = passes(values, threshold, window, member, place, inside).to(tl.int32)
    else:
        keys = key_of(score_of(values, norms, place, inside, False))
    return values, tl.where(inside, keys, -1)


@triton.jit
def _digits(pre, norms, best, bound, prefix, counts, n_rows, d_sae, n_groups, shift, top,
            GROUPS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
            BINS: tl.constexpr):  # fmt: skip
    """How many keys that begin like `prefix` have each next digit: of groups' maxima, or of all in groups >= bound."""
    block, member = tl.program_id(0), tl.program_id(1).to(tl.int64)
    known, least = tl.load(prefix + member) >> top, tl.load(bound + member)
    total = tl.zeros((2 * BINS,), dtype=tl.int32)
    for row in range(block * ROWS, tl.minimum(block * ROWS + ROWS, n_rows)):
        place = member * n_rows + row
        for start in range(0, n_groups if GROUPS else d_sae, TILE):
            at = start + tl.arange(0, TILE)
            if GROUPS:
                keys = tl.load(best + place * n_groups + at, mask=at < n_groups, other=-1)
            else:
                _, keys = keys_in(pre, norms, None, None, best, least, place, member, at, d_sae, n_groups, False, GROUP)
            bins = tl.where((keys >= 0) & (keys >> top == known), keys >> shift & (BINS - 1), BINS)
            total += tl.histogram(bins, 2 * BINS)
    tl.store(counts + (member * tl.num_programs(0) + block) * 2 * BINS + tl.arange(0, 2 * BINS), total)


@triton.jit
def _list(pre, norms, threshold, window, best, bound, first, count, least_kept, latent, f, rows, n_rows, d_sae,
          n_groups, capacity, ABOVE: tl.constexpr, WRITES: tl.constexpr, GROUP: tl.constexpr,
          TILE: tl.constexpr):  # fmt: skip
    """Count the entries of a row, or write them."""
    place = tl.program_id(0).to(tl.int64)
    member, row = place // n_rows, (place % n_rows).to(tl.int32)
    least, n, smallest = tl.maximum(tl.load(bound + member), 1), 0, 0x7F800000
    if WRITES:
        n = tl.load(first + place)
    for start in range(0, d_sae, TILE):
        at = start + tl.arange(0, TILE)
        values, keys = keys_in(pre, norms, threshold, window, best, least, place, member, at, d_sae, n_groups, ABOVE,
                               GROUP)  # fmt: skip
        kept = keys >= least
        if WRITES:
            to = n + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            mine, to = kept & (to < capacity), member * capacity + to
            if ABOVE and threshold is not None:
                limit = tl.load(threshold + member * d_sae + at, mask=at < d_sae, other=0.0)
                values = tl.where(values > limit, values, 0.0)
            tl.store(latent + to, at, mask=mine)
            tl.store(f + to, values, mask=mine)
            tl.store(rows + to, row + at * 0, mask=mine)
        else:
            smallest = tl.minimum(smallest, tl.min(tl.where(kept, keys, 0x7F800000), axis=0))
        n += tl.sum(kept.to(tl.int32), axis=0)
    if not WRITES:
        tl.store(count + place, n)
        tl.store(least_kept + place, smallest)


def largest_of_batch(
    encoded: Encoded, k: Int[Tensor, " M"], most: int, norms: Float[Tensor, "M d_sae"] | None
) -> tuple[Entries, Float[Tensor, " M"]]:
    """The k[m] <= most largest scores of each member's batch; and the smallest of them, infinity where none is above 0.

    Of entries that equal the last one there is room for one of every row beyond `most`.
    """
    n_members, n_rows, _ = encoded.pre.shape
    nothing = torch.zeros(n_members, dtype=torch.int32, device=k.device)
    bound = kth_largest(encoded, k, norms, nothing, groups=True)
    bound = kth_largest(encoded, k, norms, bound, groups=False)
    return listed(encoded, bound, most + n_rows, norms)


def kth_largest(
    encoded: Encoded, k: Int[Tensor, " M"], norms: Tensor | None, bound: Int[Tensor, " M"], groups: bool
) -> Int[Tensor, " M"]:
    """The key of the k-th largest of each member: of the groups' maxima, or of all in groups that reach the bound."""
    n_members, n_rows, d_sae = encoded.pre.shape
    blocks, found, left = triton.cdiv(n_rows, ROWS), torch.zeros_like(bound), k.clone()
    counts = torch.empty(n_members, blocks, 2 * BINS, dtype=torch.int32, device=k.device)
    for top, shift in ((31, 24), (24, 16), (16, 8), (8, 0)):
        if shift < lowest_bit(encoded.pre, norms):
            break
        _digits[(blocks, n_members)](
            encoded.pre, norms, encoded.best, bound, found, counts, n_rows, d_sae, encoded.best.shape[2], shift, top,
            GROUPS=groups, GROUP=GROUP, TILE=tile(d_sae), ROWS=ROWS, BINS=BINS,
        )  # fmt: skip
        at_least = counts[:, :, :BINS].sum(1).flip(1).cumsum(1).flip(1)
        digit = (at_least >= left.unsqueeze(1)).sum(1, keepdim=True).sub(1).clamp(min=0)
        more = torch.nn.functional.pad(at_least, (0, 1)).gather(1, digit + 1)
        left, found = left - more.squeeze(1), found | (digit.squeeze(1) << shift).int()
    return found


def all_above(
    encoded: Encoded, threshold: Float[Tensor, "M d_sae"] | None, window: Float[Tensor, " M"] | None
) -> Entries:
    """What is above 0, or its threshold, or in the window around it; there is room for all."""
    n_members, n_rows, d_sae = encoded.pre.shape
    bound = torch.ones(n_members, dtype=torch.int32, device=encoded.pre.device)
    return listed(encoded, bound, n_rows * d_sae, None, True, threshold, window)[0]


def listed(
    encoded: Encoded,
    bound: Int[Tensor, " M"],
    capacity: int,
    norms: Float[Tensor, "M d_sae"] | None,
    above: bool = False,
    threshold: Float[Tensor, "M d_sae"] | None = None,
    window: Float[Tensor, " M"] | None = None,
) -> tuple[Entries, Float[Tensor, " M"]]:
    """The first `capacity` entries of each member whose key reaches the bound (and 1); the smallest score of all."""
    (n_members, n_rows, d_sae), device = encoded.pre.shape, bound.device
    count, least = (torch.empty(n_members, n_rows, dtype=torch.int32, device=device) for _ in range(2))
    latent, rows = (torch.empty(n_members, capacity, dtype=torch.int32, device=device) for _ in range(2))
    f, first = torch.empty(n_members, capacity, device=device), None
    for writes in (False, True):
        _list[(n_members * n_rows,)](
            encoded.pre, norms, threshold, window, encoded.best, bound, first, count, least, latent, f, rows,
            n_rows, d_sae, encoded.best.shape[2], capacity, ABOVE=above, WRITES=writes, GROUP=GROUP, TILE=tile(d_sae),
        )  # fmt: skip
        if first is None:
            ends = count.cumsum(1, dtype=torch.int32)
            first = (ends - count).clamp(max=capacity)
            ends = ends.clamp(max=capacity)
            count = ends - first
    return Entries(latent, f, count, first, rows, ends[:, -1].contiguous()), least.amin(1).view(torch.float32)


def tile(d_sae: int) -> int:
    return min(TILE, max(GROUP, triton.next_power_of_2(d_sae)))

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries.selection import (
    group_ends,
    largest_of_batch,
    largest_per_group,
    largest_per_row,
    random_ends,
    smallest_kept,
    warmed_up,
)
from sparse_coding.errors import UserError


def scores(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_per_row_against_sorting():
    values, ks = scores(3, 5, 9), [1, 4, 9]
    mask = largest_per_row(values, torch.tensor(ks).float(), 9)
    for member, k in enumerate(ks):
        for row in range(5):
            best = sorted(range(9), key=lambda latent: -float(values[member, row, latent]))[:k]
            assert set(mask[member, row].nonzero().flatten().tolist()) == set(best)


def test_per_batch_against_sorting():
    values, ks = scores(3, 5, 9), [1.0, 2.7, 9.0]
    mask = largest_of_batch(values, torch.tensor(ks), 9.0)
    for member, k in enumerate(ks):
        best = values[member].flatten().sort(descending=True).values[: int(5 * k)]
        assert_close(values[member][mask[member]].sort(descending=True).values, best)


def test_at_least_one_of_a_batch_is_kept():
    assert int(largest_of_batch(scores(1, 9), torch.tensor(0.01), 1.0).sum()) == 1


def runs(d_sae, k):
    """Lengths of the groups, read off the masks of rows in which the values fall, then rise."""
    falling = largest_per_group(torch.arange(d_sae, 0, -1.0).unsqueeze(0), torch.tensor(float(k)), k)[0]
    rising = largest_per_group(torch.arange(1.0, d_sae + 1).unsqueeze(0), torch.tensor(float(k)), k)[0]
    firsts, lasts = falling.nonzero().flatten().tolist(), rising.nonzero().flatten().tolist()
    return [last - first + 1 for first, last in zip(firsts, lasts, strict=True)]


def test_groups_differ_by_one_latent_at_most_where_k_does_not_divide():
    assert runs(12, 4) == [3, 3, 3, 3]
    assert runs(10, 3) == [4, 3, 3]
    assert runs(10, 4) == [3, 2, 3, 2]
    assert runs(7, 7) == [1] * 7
    assert runs(7, 1) == [7]
    for d_sae in range(1, 40):
        for k in range(1, d_sae + 1):
            lengths = runs(d_sae, k)
            assert len(lengths) == k
            assert sum(lengths) == d_sae
            assert max(lengths) - min(lengths) <= 1


def test_groups_of_members_with_different_k():
    values = scores(2, 4, 10)
    together = largest_per_group(values, torch.tensor([3.0, 4.0]), 4)
    for member, k in enumerate((3, 4)):
        assert torch.equal(together[member], largest_per_group(values[member], torch.tensor(float(k)), k))


def test_k_on_its_way():
    k = torch.tensor([2.0, 30.0, 64.0])
    assert_close(warmed_up(k, 0.0, d_in=4, d_sae=64), torch.tensor([40.0, 40.0, 64.0]))  # 10 d_in; never up
    assert_close(warmed_up(k, 0.0, d_in=100, d_sae=64), torch.tensor([64.0, 64.0, 64.0]))
    assert_close(warmed_up(k, 0.75, d_in=4, d_sae=64), torch.tensor([2 + 38 / 4, 30 + 10 / 4, 64.0]))
    assert torch.equal(warmed_up(k, 1.0, 4, 64), k)


def test_the_smallest_code():
    f = torch.tensor([[[0.0, 2.0], [0.5, -1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert_close(smallest_kept(f), torch.tensor([0.5, torch.inf]))


def test_ends_of_groups():
    assert group_ends((0.25, 0.25, 0.5), 8) == [2, 4, 8]
    assert group_ends((1.0,), 5) == [5]
    assert group_ends((0.1,) * 10, 30) == list(range(3, 31, 3))  # ten tenths do not quite add up to 1
    assert group_ends((1 / 3, 1 / 3, 1 / 3), 10) == [3, 7, 10]


@pytest.mark.parametrize("fractions", [(), (0.5,), (0.5, 0.6), (0.5, 0.5, 0.0), (1.5, -0.5)])
def test_fractions_that_are_no_shares_are_refused(fractions):
    with pytest.raises(UserError, match=r"group fractions .* must sum to 1"):
        group_ends(fractions, 8)


@pytest.mark.parametrize(("fractions", "d_sae"), [((0.01, 0.99), 10), ((0.5, 0.01, 0.49), 10), ((0.99, 0.01), 10)])
def test_empty_groups_are_refused(fractions, d_sae):
    with pytest.raises(UserError, match="leave some group empty"):
        group_ends(fractions, d_sae)


def test_random_ends_prefer_short_prefixes_as_stated():
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([random_ends(2, 5, 0.5, generator)[0] for _ in range(4000)])
    weights = torch.arange(1.0, 5) ** -1.5
    shares = torch.bincount(draws, minlength=5)[1:] / len(draws)
    assert_close(shares, weights / weights.sum(), atol=0.03, rtol=0)

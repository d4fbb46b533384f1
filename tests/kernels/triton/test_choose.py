"""The choice of the k largest: exact, whatever is equal to what, by every way it is made."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_coding.kernels.triton import choose
from sparse_coding.kernels.triton.encode import GROUP, NOT_A_NUMBER, Encoded, encode


def chosen(scores: torch.Tensor, k: list[int], slots: int, **more) -> choose.Entries:
    """Of pre-activations [M B d_sae] that are given as they are: rows are one-hot, weights hold the values."""
    n_members, n_rows, d_sae = scores.shape
    inputs = torch.eye(n_rows, device=scores.device).expand(n_members, -1, -1)
    encoded = encode(inputs, scores, scores.new_zeros(n_members, d_sae), None, more.get("signed", False))
    assert torch.equal(encoded.pre, scores)
    return choose.largest_of_rows(
        encoded, torch.tensor(k, device=scores.device), slots, None, more.get("signed", False)
    )


def first_largest(row: torch.Tensor, k: int) -> list[int]:
    """The k largest above 0, of equal ones the first, by a stable sort."""
    best = row.sort(descending=True, stable=True).indices[:k]
    return sorted(i for i in best.tolist() if row[i] > 0)


@pytest.mark.parametrize("d_sae", [5, 3 * GROUP + 7])
@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("whole", [True, False])
def test_the_first_of_the_largest_are_kept_in_order(d_sae, levels, whole, device, generator, monkeypatch):
    """Few levels: nearly all scores tie, in the same group and in others."""
    monkeypatch.setattr(choose, "WHOLE", 1024 if whole else 0)
    scores = (torch.rand(2, 5, d_sae, generator=generator) * levels).floor() - levels // 3
    scores[:, 0] = 1.0
    scores[0, 1] = -1.0
    entries = chosen(scores.to(device), [1, 3], 3)
    for member, k in enumerate((1, 3)):
        for row in range(5):
            expected = first_largest(scores[member, row], k)
            n = int(entries.count[member, row])
            assert entries.latent[member, row, :n].tolist() == expected
            assert entries.latent[member, row, n:].tolist() == [-1] * (3 - n)
            assert entries.f[member, row].tolist() == scores[member, row, expected].tolist() + [0.0] * (3 - n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_no_number_or_infinite_comes_first(dtype, whole, device, monkeypatch):
    monkeypatch.setattr(choose, "WHOLE", 1024 if whole else 0)
    scores = torch.ones(1, 3, 5 * GROUP, device=device, dtype=dtype)
    scores[0, 0, 40], scores[0, 0, 50], scores[0, 0, 60] = torch.nan, torch.inf, -torch.nan
    scores[0, 2] = torch.nan  # no more of these than k
    entries = chosen_raw(scores, 3)
    assert entries.latent[0, 0].tolist() == [40, 50, 60]
    assert entries.latent[0, 1].tolist() == entries.latent[0, 2].tolist() == [0, 1, 2]


@pytest.mark.parametrize("whole", [True, False])
def test_scores_in_bf16_of_which_many_are_equal(whole, device, generator, monkeypatch):
    monkeypatch.setattr(choose, "WHOLE", 1024 if whole else 0)
    scores = torch.randn(1, 4, 8 * GROUP, generator=generator).bfloat16()
    entries = chosen_raw(scores.to(device), 5)
    for row in range(4):
        assert entries.latent[0, row].tolist() == first_largest(scores[0, row], 5)
        assert entries.f[0, row].tolist() == scores[0, row, entries.latent[0, row].long().cpu()].tolist()


def chosen_raw(pre: torch.Tensor, k: int, signed: bool = False) -> choose.Entries:
    """Without a product, in which a NaN would spread."""
    keys = torch.where(pre.isnan(), NOT_A_NUMBER.value, pre.float().view(torch.int32).clamp(min=0))
    encoded = Encoded(pre, keys.unflatten(-1, (-1, GROUP)).amax(-1).int())
    return choose.largest_of_rows(encoded, torch.full(pre.shape[:1], k, device=pre.device), k, None, signed)


@pytest.mark.parametrize("signed", [False, True])
def test_where_too_many_would_be_candidates_torch_chooses_the_same(signed, device, generator, monkeypatch):
    scores = torch.randn(2, 3, 70, generator=generator).to(device)
    ours = chosen(scores, [4, 6], 6, signed=signed)
    monkeypatch.setattr(choose, "WIDEST", 8)
    theirs = chosen(scores, [4, 6], 6, signed=signed)
    assert torch.equal(ours.count, theirs.count)
    assert torch.equal(ours.latent.sort(-1).values, theirs.latent.sort(-1).values)
    assert torch.equal(ours.f.sort(-1).values, theirs.f.sort(-1).values)
    for member, k in enumerate((4, 6)):
        row = scores[member, 1].abs() if signed else scores[member, 1]
        assert ours.latent[member, 1, :k].tolist() == first_largest(row.cpu(), k)

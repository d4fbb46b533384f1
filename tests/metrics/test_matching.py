from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.metrics import fraction_above, max_cosines, mcc, mmcs, mmcs_with_larger, uniqueness


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine_table(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """All cosines one by one, in Python floats."""

    def cosine(u: list[float], v: list[float]) -> float:
        return sum(p * q for p, q in zip(u, v, strict=True)) / math.hypot(*u) / math.hypot(*v)

    return np.array([[cosine(u, v) for v in b.tolist()] for u in a.tolist()])


def test_the_maximum_is_taken_over_atoms_for_each_reference_row_and_is_signed():
    reference = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
    atoms = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(max_cosines(reference, atoms), torch.tensor([1.0, 0.5**0.5, -(0.5**0.5)]))
    torch.testing.assert_close(max_cosines(reference, atoms, absolute=True), torch.tensor([1.0, 0.5**0.5, 1.0]))
    assert mmcs(reference, atoms) == pytest.approx(1 / 3)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
def test_max_cosines_equal_brute_force_whatever_the_chunk(chunk):
    reference, atoms = gaussian(7, 5), gaussian(11, 5, seed=1)
    table = cosine_table(reference, atoms)
    np.testing.assert_allclose(max_cosines(reference, atoms, chunk), table.max(1), rtol=1e-5)
    np.testing.assert_allclose(max_cosines(reference, atoms, chunk, absolute=True), np.abs(table).max(1), rtol=1e-5)
    assert mmcs(atoms, reference, chunk) == pytest.approx(table.max(0).mean(), rel=1e-5)


def test_a_table_of_cosines_is_never_larger_than_the_chunk_allows(monkeypatch):
    largest = 0
    product = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        out = product(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    mmcs(gaussian(100, 4), gaussian(50, 4, seed=1), chunk=8)
    assert largest == 8 * 50


def test_lengths_of_atoms_and_features_do_not_matter():
    reference, atoms = gaussian(6, 8), gaussian(9, 8, seed=1)
    lengths = torch.logspace(-12, 12, 9)[:, None]
    assert mmcs(reference * 7, atoms * lengths) == pytest.approx(mmcs(reference, atoms), rel=1e-5)
    assert mcc(reference * 7, atoms * lengths) == pytest.approx(mcc(reference, atoms), rel=1e-5)


@pytest.mark.parametrize("dead", [0.0, math.nan, math.inf])
def test_a_dead_or_diverged_atom_matches_nothing(dead):
    reference = torch.tensor([[1.0, 0.0]])
    atoms = torch.tensor([[-1.0, 0.0], [dead, dead]])
    assert max_cosines(reference, atoms).tolist() == [-1.0]  # not the 0 a zero vector would give
    assert max_cosines(reference, atoms[1:]).tolist() == [0.0]
    assert mcc(torch.eye(2), atoms) == pytest.approx(0.5)  # |P| stays 2
    assert uniqueness(torch.eye(2), atoms) == 0.5
    assert uniqueness(torch.eye(2), atoms[1:]) == 0.0
    assert uniqueness(atoms[1:], torch.eye(2)) == 0.0


def test_a_dead_reference_atom_counts_as_zero_in_the_mean():
    small = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert mmcs_with_larger(small, torch.eye(2)) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "published"), [(64, 0.145), (512, 0.188), (4096, 0.225)])
def test_random_atoms_reach_the_measured_chance_level(n, published):
    assert mmcs(gaussian(512, 256), gaussian(n, 256, seed=1)) == pytest.approx(published, abs=0.003)


def test_half_of_the_truth_found_gives_the_ceiling_of_a_small_dictionary():
    truth = gaussian(512, 256)
    assert mmcs(truth, truth[:256]) == pytest.approx(0.59, abs=0.005)  # .5 + .5 * chance(256)
    assert fraction_above(max_cosines(truth, truth[:256])) == 0.5
    assert mmcs(truth[:256], truth) == pytest.approx(1.0, abs=1e-6)  # the other direction does not see the lack


def test_the_fraction_above_a_threshold_is_a_fraction_and_strict():
    cosines = torch.tensor([0.95, 0.5, 0.91, -1.0])
    assert fraction_above(cosines) == 0.5
    assert fraction_above(cosines, 0.5) == 0.5
    assert fraction_above(cosines, 0.4) == 0.75


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize(("features", "atoms"), [(4, 4), (3, 5), (5, 3)])
def test_mcc_equals_the_best_of_all_matchings(features, atoms, absolute):
    a, b = gaussian(features, 6), gaussian(atoms, 6, seed=1)
    table = cosine_table(a, b)
    table = np.abs(table) if absolute else table
    table = table if features <= atoms else table.T
    pairs = np.arange(table.shape[0])
    choices = itertools.permutations(range(table.shape[1]), len(pairs))
    best = max(table[pairs, list(chosen)].mean() for chosen in choices)
    assert mcc(a, b, absolute) == pytest.approx(best, rel=1e-5)


def test_mcc_of_a_shuffled_scaled_and_flipped_truth_is_one():
    truth = gaussian(20, 12)
    flipped = -3 * truth[torch.randperm(20, generator=torch.Generator().manual_seed(2))]
    assert mcc(truth, flipped) == pytest.approx(1.0, abs=1e-6)
    assert mcc(truth, flipped, absolute=False) < 0.9


def test_mcc_pays_nothing_for_a_second_copy_and_mmcs_from_the_atoms_does():
    truth = torch.eye(4)
    copies = truth[[0, 0, 1, 1]]
    assert mmcs(copies, truth) == pytest.approx(1.0)
    assert mcc(truth, copies) == pytest.approx(0.5)
    assert uniqueness(truth, copies) == 0.5


def test_the_comparison_with_a_larger_dictionary_averages_over_the_smaller_one():
    small = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    large = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 4.0]])
    assert mmcs_with_larger(small, large) == pytest.approx((1 + 0.6) / 2)
    assert mmcs_with_larger(large[:2], large) == pytest.approx(1.0)
    with pytest.raises(UserError, match="swap"):
        mmcs_with_larger(large, small)


def test_uniqueness_counts_distinct_best_features():
    truth, atoms = gaussian(6, 4), gaussian(9, 4, seed=1)
    table = cosine_table(truth, atoms)
    assert uniqueness(truth, atoms) == len(set(np.abs(table).argmax(0))) / 9
    assert uniqueness(truth, atoms, absolute=False) == len(set(table.argmax(0))) / 9


def test_half_precision_is_raised_and_double_precision_is_kept():
    reference, atoms = gaussian(4, 16), gaussian(6, 16, seed=1)
    rounded = max_cosines(reference.bfloat16(), atoms.bfloat16())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, max_cosines(reference.bfloat16().float(), atoms.bfloat16().float()))
    same = max_cosines(reference.double(), reference)
    assert same.dtype == torch.float64
    torch.testing.assert_close(same, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_dictionary_without_atoms_is_refused():
    with pytest.raises(UserError, match="one atom or more"):
        mmcs(torch.eye(3), torch.zeros(0, 3))

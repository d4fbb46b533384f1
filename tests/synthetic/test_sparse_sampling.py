"""Exact draws: positions never share a seed, probabilities meet their sum, sparse cells are independent Bernoulli."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparse_coding.synthetic.sampling import bernoulli_cells, fill_empty, generator, with_sum


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(samples, features, shape) -> torch.Tensor:
    cells = torch.zeros(shape)
    cells[samples, features] += 1
    return cells


def test_no_two_positions_of_a_world_share_a_seed():
    # 300,000 seeds drawn at random from 32 bits would collide about ten times.
    seeds = [
        generator(11, split, step).initial_seed() for split in ("world", "train", "held-out") for step in range(100_000)
    ]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**32  # all that PyTorch's CPU generator reads


def test_the_seed_of_the_world_reaches_the_draws_with_all_of_its_64_bits():
    first = {torch.rand(1, generator=generator(seed, "train", 0)).item() for seed in (0, 1, 2**31, 2**32, 2**63)}
    assert len(first) == 5


def test_positions_next_to_each_other_draw_unrelated_numbers():
    draws = torch.stack([torch.randn(64, generator=generator(0, "train", step)) for step in range(2000)])
    neighbours = (draws[1:] * draws[:-1]).mean()  # sd 1 / sqrt(2000·64) = .0028
    assert abs(neighbours) < 0.012
    assert abs(draws.mean()) < 0.012


@pytest.mark.parametrize("total", [0.5, 5.0, 30.0, 39.0, 40.0])
def test_probabilities_sum_to_the_target_with_one_common_scale_below_the_clamp(total):
    weights = torch.rand(7, 40, generator=gen()) ** 6 + 1e-4
    p = with_sum(weights, total)
    assert torch.allclose(p.sum(-1), torch.full((7,), total), rtol=1e-4)
    assert float(p.max()) <= 1
    for row, w in zip(p, weights, strict=True):
        below = row < 1
        scales = (row / w)[below]
        if len(scales):
            assert torch.allclose(scales, scales[0].expand_as(scales), rtol=1e-4)
            assert bool((w[~below] * scales[0] >= 1 - 1e-4).all())  # what is clamped would have exceeded 1


def test_clamped_probabilities_equal_a_bisection_on_the_scale():
    weights = torch.rand(50, generator=gen(1), dtype=torch.float64) ** 8
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (weights * middle).clamp(max=1).sum() < 12 else (low, middle)
    assert torch.allclose(with_sum(weights, 12.0), (weights * low).clamp(max=1), atol=1e-9)


def test_weights_that_are_zero_leave_the_sum_below_the_target():
    assert with_sum(torch.tensor([0.5, 0.25, 0.0, 0.0]), 3.0).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("per_sample", [False, True])
def test_all_sixteen_patterns_of_four_cells_have_the_frequency_of_independent_bernoullis(per_sample):
    p, rows = torch.tensor([0.02, 0.3, 0.6, 0.95]), 60_000
    table_of_p = p.expand(rows, 4) if per_sample else p
    cells = table(*bernoulli_cells(table_of_p, rows, gen(2)), (rows, 4))
    seen = torch.bincount((cells @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long(), minlength=16)
    expected = rows * torch.tensor(
        [torch.where(torch.tensor(bits) == 1, p, 1 - p).prod().item() for bits in itertools.product((0, 1), repeat=4)]
    )
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert chi_square < 45  # 15 degrees of freedom: exceeded once in 10,000


def test_rows_are_independent_of_the_rows_before_them():
    p, rows = torch.tensor([0.1, 0.4, 0.8]), 60_000
    cells = table(*bernoulli_cells(p, rows, gen(3)), (rows, 3)) - p
    for lag in (1, 2, 7):
        covariance = cells[lag:].T @ cells[:-lag] / (rows - lag)
        sd = (p * (1 - p)).sqrt()
        assert float((covariance / (sd[:, None] * sd)).abs().max()) < 4.5 / rows**0.5


def test_every_feature_fires_as_often_as_its_probability_says():
    p, rows = 0.3 * 0.97 ** torch.arange(200), 20_000
    counts = torch.bincount(bernoulli_cells(p, rows, gen(4))[1], minlength=200)
    z = (counts - rows * p) / (rows * p * (1 - p)).sqrt()
    assert 130 < float((z**2).sum()) < 290  # chi-square, 200 degrees of freedom, sd 20
    assert float(z.abs().max()) < 4.5


def test_the_number_of_active_cells_in_a_batch_varies_as_that_of_independent_cells():
    p, rows, draws = torch.tensor([0.1, 0.2, 0.5]), 6, gen(10)
    counts = torch.tensor([float(len(bernoulli_cells(p, rows, draws)[0])) for _ in range(8000)])
    variance = rows * float((p * (1 - p)).sum())
    assert float(counts.mean()) == pytest.approx(rows * 0.8, abs=4 * (variance / 8000) ** 0.5)
    assert float(counts.var()) == pytest.approx(variance, rel=4 * (2 / 8000) ** 0.5)


@pytest.mark.parametrize("rows", [1, 3, 256, 1000])
def test_certain_cells_always_fire_impossible_cells_never(rows):
    samples, features = bernoulli_cells(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]), rows, gen(5))
    assert samples.tolist() == [row for row in range(rows) for _ in range(2)]
    assert features.tolist() == [1, 3] * rows


def test_cells_come_once_each_in_row_major_order():
    samples, features = bernoulli_cells(torch.full((30,), 0.7), 100, gen(6))
    keys = samples * 30 + features
    assert bool((keys[1:] > keys[:-1]).all())
    assert int(samples.max()) == 99
    assert int(features.max()) == 29


def test_a_probability_of_nothing_gives_no_cells():
    samples, features = bernoulli_cells(torch.zeros(9), 10, gen(7))
    assert len(samples) == len(features) == 0


def test_the_filler_goes_to_empty_samples_only_and_leaves_the_rest_in_place():
    samples, features = torch.tensor([1, 1, 3]), torch.tensor([4, 7, 0])
    all_samples, all_features, is_filler = fill_empty(samples, features, 5, 8, gen(8))
    assert all_samples.tolist() == [0, 1, 1, 2, 3, 4]
    assert is_filler.tolist() == [True, False, False, True, False, True]
    assert all_features[~is_filler].tolist() == [4, 7, 0]


def test_the_filler_feature_is_uniform():
    nothing = torch.empty(0, dtype=torch.long)
    counts = torch.bincount(fill_empty(nothing, nothing, 16_000, 16, gen(9))[1], minlength=16)
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 45

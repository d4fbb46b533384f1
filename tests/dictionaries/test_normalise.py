from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries.normalise import RIDGE, Affine, joined, row_statistics, scaling, whitening


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n, d, seed=0):
    return gaussian(n, d, seed=seed) @ gaussian(d, d, seed=seed + 1) + torch.arange(d)


def diagonal():
    factor = torch.tensor([2.0, -0.5, 4.0])
    return Affine(factor, 1 / factor, torch.tensor([1.0, 0.0, -3.0]))


MAPS = {"scaling": scaling(2.5, 3), "diagonal": diagonal(), "whitening": whitening(correlated(50, 3))}
every_map = pytest.mark.parametrize("mapped", MAPS.values(), ids=MAPS)


def test_maps_by_hand():
    assert_close(scaling(2.0, 2)(torch.tensor([[1.0, -3.0]])), torch.tensor([[2.0, -6.0]]))
    assert_close(diagonal()(torch.tensor([[2.0, 4.0, -2.0]])), torch.tensor([[2.0, -2.0, 4.0]]))
    full = Affine(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.5, 0.0]]), torch.ones(2))
    # (x - 1) T with x - 1 = (3, 5): (5 * 1, 3 * 2)
    assert_close(full(torch.tensor([[4.0, 6.0]])), torch.tensor([[5.0, 6.0]]))
    assert_close(full.undo(torch.tensor([[5.0, 6.0]])), torch.tensor([[4.0, 6.0]]))


@every_map
def test_undo_is_the_inverse_both_ways(mapped):
    x = correlated(20, 3, seed=7)
    assert_close(mapped.undo(mapped(x)), x, rtol=1e-4, atol=1e-4)
    assert_close(mapped(mapped.undo(x)), x, rtol=1e-4, atol=1e-4)
    stacked = torch.stack([x, x + 1])
    assert_close(mapped(stacked)[1], mapped(x + 1))


@every_map
def test_before_takes_raw_rows_where_the_weight_took_transformed_ones(mapped):
    x, weight = correlated(20, 3), gaussian(2, 3, 5)  # two members
    assert_close((x - mapped.shift) @ mapped.before(weight), mapped(x) @ weight, rtol=1e-4, atol=1e-4)


@every_map
def test_after_gives_raw_rows_where_the_weight_gave_transformed_ones(mapped):
    f, weight = gaussian(20, 5), gaussian(2, 5, 3)
    assert_close(f @ mapped.after(weight) + mapped.shift, mapped.undo(f @ weight), rtol=1e-4, atol=1e-4)


@every_map
def test_undo_is_differentiable(mapped):
    x = gaussian(2, 3).requires_grad_()
    mapped.undo(x).sum().backward()
    factor = mapped.inverse if mapped.inverse.ndim == 2 else mapped.inverse.diag()
    assert_close(x.grad, factor.sum(1).expand(2, 3))


@every_map
def test_a_map_follows_the_dtype_of_its_rows(mapped):
    assert mapped(gaussian(2, 3).double()).dtype == torch.float64
    assert mapped.undo(gaussian(2, 3).double()).dtype == torch.float64


def test_whitening_gives_zero_mean_and_unit_covariance_but_for_the_ridge():
    x = correlated(400, 5)
    white = whitening(x)(x).double()
    assert_close(white.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-5, rtol=0)
    covariance = white.T @ white / len(x)
    variances = torch.linalg.eigvalsh((x - x.mean(0)).double().T @ (x - x.mean(0)).double() / len(x))
    expected = variances / (variances + RIDGE * variances.mean())
    assert_close(covariance, expected.diag(), atol=1e-4, rtol=0)
    assert covariance.diagonal().min() > 0.8
    assert_close(covariance.diagonal()[-1], torch.tensor(1.0, dtype=torch.float64), atol=1e-3, rtol=0)


def test_a_direction_without_variance_is_not_blown_up():
    x = correlated(100, 4)
    x[:, 2] = 7.0
    mapped = whitening(x)
    assert mapped.factor.isfinite().all()
    assert mapped(x).abs().max() < 100
    limit = (RIDGE * x.var(0, correction=0).mean()) ** -0.5
    assert torch.linalg.matrix_norm(mapped.factor, 2) <= limit * 1.001
    assert_close(mapped.undo(mapped(x)), x, rtol=1e-3, atol=1e-3)


def test_whitening_by_hand():
    x = torch.tensor([[1.0, 3.0], [1.0, -3.0], [-1.0, 3.0], [-1.0, -3.0]]) + 2
    # variances 1 and 9 along the axes, mean variance 5
    mapped = whitening(x)
    assert_close(mapped.shift, torch.tensor([2.0, 2.0]))
    expected = torch.tensor([(1 + 0.005) ** -0.5, (9 + 0.005) ** -0.5])
    assert_close(mapped.factor.abs(), expected.diag())


def test_joined_maps_act_each_on_its_own_site():
    a, b = correlated(50, 3), gaussian(10, 2)
    for first in MAPS.values():
        both = joined([first, scaling(0.5, 2)])
        x = torch.cat([a[:10], b], dim=-1)
        assert_close(both(x), torch.cat([first(a[:10]), 0.5 * b], dim=-1), rtol=1e-4, atol=1e-4)
        assert_close(both.undo(both(x)), x, rtol=1e-4, atol=1e-4)
        assert both.factor.ndim == first.factor.ndim
        assert both.shift.shape == (5,)


@pytest.mark.parametrize("parts", [(), (4,)])
def test_statistics_of_rows_by_hand(parts):
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 4.0]])
    shift, scale = row_statistics(x, "layer-norm", parts)
    # deviations (-2, -1, 0, 3): 14 / 3; (-1, -1, -1, 3): 12 / 3 (unbiased)
    assert_close(shift, torch.tensor([[3.0] * 4, [1.0] * 4]))
    assert_close(scale, torch.tensor([[(14 / 3) ** 0.5 + 1e-5] * 4, [2 + 1e-5] * 4]))
    shift, scale = row_statistics(x, "unit-norm", parts)
    assert not shift.any()
    assert_close(scale, torch.tensor([[50**0.5 / 2] * 4, [4.0 / 2] * 4]))
    assert_close((x / scale).norm(dim=1), torch.tensor([2.0, 2.0]))  # sqrt(d)


def test_sites_side_by_side_are_normalised_each_alone():
    x = correlated(6, 5)
    for kind in ("layer-norm", "unit-norm"):
        shift, scale = row_statistics(x, kind, (2, 3))
        for columns in (slice(0, 2), slice(2, 5)):
            alone = row_statistics(x[:, columns], kind)
            assert_close((shift[:, columns], scale[:, columns]), alone)


@pytest.mark.parametrize("kind", ["layer-norm", "unit-norm"])
def test_constant_rows_stay_finite(kind):
    x = torch.zeros(2, 4)
    shift, scale = row_statistics(x, kind)
    assert_close((x - shift) / scale, torch.zeros(2, 4))

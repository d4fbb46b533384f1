from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from sparse_coding.dictionaries.geometric_median import geometric_median

TRIANGLE = [[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]]
SKEWED = [[0.0, 0.0, 0.0], [1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [2.0, 1.0, -1.0], [30.0, 20.0, 10.0]]
MANY = [[((7 * i * j + 3 * i * i + j) % 11) / 2 for j in range(1, 5)] for i in range(20)]


def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_distance(rows, point):
    return float((rows - point).norm(dim=1).mean())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (TRIANGLE, [1.30216950204, 1.04674581779]),
        (SKEWED, [1.15662768431, 1.13921505325, 0.589960011506]),
        (MANY, [2.43997740501, 3.01950514918, 2.01886922001, 2.57214398237]),
    ],
)
def test_against_the_library_geom_median(rows, expected):
    """Values of geom-median 0.1.0, which the project does not depend on: compute_geometric_median(rows, ones,
    eps=1e-12, maxiter=5000, ftol=0) of geom_median.torch in float64. It stops by the value of the sum, which is flat at
    the median, so its points are good to about 1e-7."""
    found = geometric_median(torch.tensor(rows, dtype=torch.float64))
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(3, 1), (5, 2), (10, 3), (50, 8), (7, 20)])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_minimiser(n, d, seed):
    rows = gaussian(n, d, seed) * torch.arange(1.0, d + 1).double() + 3
    rows[0] += 100  # an outlier, which a mean would follow
    x = rows.numpy()

    def total(point):
        return np.linalg.norm(x - point, axis=1).sum()

    starts = [x.mean(0), np.median(x, axis=0), x[1] + 0.1]
    best = min(minimize(total, start, method="Nelder-Mead" if d < 3 else "BFGS", tol=1e-12).fun for start in starts)
    found = geometric_median(rows)
    assert found.dtype == torch.float64
    assert total(found.numpy()) <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_in_one_dimension_it_is_the_median(seed):
    rows = gaussian(31, 1, seed) ** 3
    assert_close(geometric_median(rows), rows.median(0).values, rtol=0, atol=1e-6)


def test_symmetric_points_have_it_in_the_middle():
    """The mean is the median, and the pull of all rows cancels from the start."""
    rows = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) + 5
    assert_close(geometric_median(rows), torch.tensor([5.0, 5.0], dtype=torch.float64))


def test_a_row_that_is_the_mean_but_not_the_median_is_left_again():
    """Plain Weiszfeld divides by zero there. The fourth row lies at the mean of the first three and of all."""
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [5.0, 1.0], [5.0, -1.0], [0.0, 9.0]], dtype=torch.float64)
    rows = torch.cat([corners, corners.mean(0, keepdim=True)])
    found = geometric_median(rows)
    assert mean_distance(rows, found) < mean_distance(rows, rows.mean(0)) - 1e-3
    around = [mean_distance(rows, found + 1e-4 * step) for step in gaussian(50, 2)]
    assert mean_distance(rows, found) <= min(around)


@pytest.mark.parametrize("others", [2, 4])
def test_a_point_that_holds_the_majority_is_the_median(others):
    here = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rows = torch.cat([here.repeat(5, 1), 7 * gaussian(others, 3)])
    assert_close(geometric_median(rows), here, rtol=0, atol=1e-7)


def test_a_single_row_may_be_the_median():
    """The pull of the others on the middle one, 0, is less than its own weight of 1."""
    rows = torch.tensor([[0.0, 0.0], [3.0, 0.0], [-3.0, 0.1], [0.0, 3.0], [0.1, -3.0]], dtype=torch.float64)
    assert_close(geometric_median(rows), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-7)


def test_a_start_on_the_median_stays_there():
    """The mean of these rows is one of them, and the pull of the others, 1 - sqrt(2), is less than its weight."""
    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert torch.equal(geometric_median(rows, most_iterations=1), torch.zeros(2, dtype=torch.float64))


def test_a_start_on_another_row_leaves_with_a_shortened_step():
    """The pull of the others, 4 (1 - sqrt(2)), is taken less the weight of the row: by hand after one step."""
    rows = torch.tensor([[0.0, 0.0], *[[2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]] * 4], dtype=torch.float64)
    pull, weights = 4 * (1 - 2**0.5), 4 * (1 / 2 + 2 / 2**0.5)
    step = pull / weights * (1 - 1 / abs(pull))
    assert_close(geometric_median(rows, most_iterations=1), torch.tensor([step, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 6])
def test_rows_all_at_one_point(n):
    assert_close(geometric_median(torch.full((n, 3), 0.1)), torch.full((3,), 0.1, dtype=torch.float32).double())


def test_it_moves_and_turns_with_the_rows():
    rows, shift = gaussian(40, 5), gaussian(1, 5, seed=1)[0] * 10
    rotation = torch.linalg.qr(gaussian(5, 5, seed=2)).Q
    moved = geometric_median(3 * rows @ rotation + shift)
    assert_close(moved, 3 * geometric_median(rows) @ rotation + shift, rtol=0, atol=1e-7)


def test_the_order_of_rows_does_not_matter_and_repeats_are_weights():
    rows = gaussian(9, 3)
    found = geometric_median(rows)
    assert_close(geometric_median(rows.flip(0)), found, rtol=0, atol=1e-8)
    assert_close(geometric_median(rows.repeat(3, 1)), found, rtol=0, atol=1e-8)


def test_the_stated_tolerance_is_met_and_a_loose_one_stops_sooner():
    rows = gaussian(100, 6)
    exact, loose = geometric_median(rows, tolerance=1e-13), geometric_median(rows, tolerance=1e-3)
    scale = mean_distance(rows, exact)
    assert float((geometric_median(rows) - exact).norm()) < 1e-8 * scale
    assert 1e-6 * scale < float((loose - exact).norm()) < 1e-2 * scale
    assert_close(geometric_median(rows, most_iterations=0), rows.mean(0))

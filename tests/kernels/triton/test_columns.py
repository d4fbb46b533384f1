"""Sums of columns, and what FVU divides by, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_coding.kernels.spread import spread
from sparse_coding.kernels.triton import columns


@pytest.mark.parametrize(("n_rows", "d"), [(1, 1), (5, 3), (64, 64), (129, 70), (4200, 2)])
def test_spread_and_sums(n_rows, d, device, generator):
    """A mean far from 0 takes no digits."""
    x = torch.randn(n_rows, d, generator=generator) + 100
    expected = (x.double() - x.double().mean(0)).square().sum().item()
    assert spread(x.to(device)).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    two = torch.stack([x, x - 3]).to(device)
    torch.testing.assert_close(columns.sum_of_rows(two).double(), two.double().sum(1), rtol=1e-5, atol=0)


def test_what_is_no_number_shows(device):
    x = torch.ones(70, 3, device=device)
    x[66, 1] = torch.inf
    assert not spread(x).isfinite()

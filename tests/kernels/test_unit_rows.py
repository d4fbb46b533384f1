"""Unit rows in C++ beside torch's operators."""

from __future__ import annotations

import pytest
import torch

from sparse_coding.kernels import unit_rows


@pytest.fixture
def native() -> None:
    if unit_rows.loaded() is None:
        pytest.skip("no C++ compiler here")


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 5), (2, 300, 64), (3, 1, 20_000)])
def test_both_equal_torch(shape, native, monkeypatch):
    found = []
    for library in (unit_rows.loaded(), None):
        monkeypatch.setattr(unit_rows, "loaded", lambda library=library: library)
        atoms, gradient = rows(*shape), rows(*shape, seed=1)
        unit_rows.normalise_(atoms)
        unit_rows.project_(gradient, atoms)
        found.append((atoms, gradient))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_norms_are_one_and_nothing_is_left_along_the_atoms(native):
    atoms, gradient = rows(2, 100, 48), rows(2, 100, 48, seed=1)
    atoms[0, 3] = 0
    unit_rows.normalise_(atoms)
    unit_rows.project_(gradient, atoms)
    expected = torch.ones(2, 100)
    expected[0, 3] = 0
    torch.testing.assert_close(atoms.norm(dim=-1), expected)
    assert (atoms * gradient).sum(-1).abs().max() < 1e-5


def test_a_member_gets_the_bits_that_it_gets_alone_whatever_the_threads(native):
    together, alone = rows(5, 700, 48), rows(5, 700, 48)[3].clone()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        unit_rows.normalise_(together)
        torch.set_num_threads(1)
        unit_rows.normalise_(alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together[3], alone)


def test_a_view_that_is_not_contiguous_is_left_to_torch(native):
    values = rows(64, 40).T
    unit_rows.normalise_(values)
    torch.testing.assert_close(values.norm(dim=-1), torch.ones(40))

"""Members of one stack that take different paths: what one leaves, another takes, and all equal autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_coding.dictionaries import Moment
from sparse_coding.kernels import sparse, sparse_native
from sparse_coding.kernels.result import runs
from sparse_coding.training import stack as stack_module
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.stack import Stack, gradients_by_autograd
from sparse_coding.training.sweep import grid

D_IN, D_SAE, ROWS = 16, 128, 192
DENSE = {  # what makes members 1 and 2 of four too dense for the sparse step
    "topk": ({"k": [3, 60, 61, 5]}, {}),
    "relu": ({"l1_coefficient": [0.1, 0.2, 0.3, 0.4]}, {}),
    "jumprelu": ({"l0_coefficient": [0.1, 0.2, 0.3, 0.4]}, {"initial_threshold": 2.5}),
}


@pytest.fixture(params=["native", "operators"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "DENSEST", {"native": 3 / 16, "operators": 3 / 16})
    if request.param == "operators":
        monkeypatch.setattr(sparse_native, "loaded", lambda: None)
    elif sparse_native.loaded() is None:
        pytest.skip("no C++ compiler here")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def rows() -> torch.Tensor:
    return torch.randn(ROWS, D_IN, generator=seeded())


def made(name: str, varied: dict[str, list[float]], **fixed: Any) -> Stack:
    members = grid(name, {"synthetic": D_IN}, [D_SAE / D_IN], varied=varied, **fixed)
    return Stack(members, OptimizerSettings(), "cpu", torch.float32)


@torch.no_grad()
def opened(stack: Stack, name: str) -> Stack:
    """Most latents of members 0 and 3 closed, of members 1 and 2 open."""
    if name != "topk":
        stack.dictionary.b_enc[:] = torch.tensor([-2.0, 4.0, 4.0, -2.0]).unsqueeze(1)
    return stack


@pytest.mark.parametrize("name", list(DENSE))
def test_each_member_takes_the_path_that_suits_it(name: str, path: None):
    varied, fixed = DENSE[name]
    stack, x = opened(made(name, varied, **fixed), name), rows()
    first = stack.dictionary.fused_gradients(x, None, Moment(), torch.float32)
    assert first is not None
    assert list(first.left) == ([] if name == "relu" else [1, 2])  # relu has a dense step for them
    found, expected = stack._gradients(x, None, Moment()), gradients_by_autograd(stack.dictionary, x)
    assert not found.left
    for field in ("loss", "squared_error", "l1", "active"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-4, atol=1e-5)
    assert found.terms.keys() == expected.terms.keys()
    for key, value in {**expected.gradients, **expected.terms}.items():
        torch.testing.assert_close({**found.gradients, **found.terms}[key], value, rtol=1e-4, atol=1e-5)


def test_autograd_in_tiles_is_autograd_at_once(monkeypatch: pytest.MonkeyPatch):
    """With AuxK, where each member has dead latents of its own, and a state that the step changes."""
    stack = made("batchtopk", {"k": [2, 3, 4, 5, 6]}, dead_latents="auxk")
    x, moment = rows(), Moment(dead=torch.rand(5, D_SAE, generator=seeded()) < 0.3)
    expected = gradients_by_autograd(stack.dictionary, x, None, moment)
    monkeypatch.setattr(type(stack.dictionary), "fused_gradients", lambda *_: None)
    monkeypatch.setattr(stack_module, "members_within", lambda *_: 2)
    found = stack._gradients(x, None, moment)
    for part in ("gradients", "terms", "state"):
        assert getattr(found, part).keys() == getattr(expected, part).keys()
        for key, value in getattr(expected, part).items():
            torch.testing.assert_close(getattr(found, part)[key], value)
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(found.active, expected.active)


def test_runs_of_neighbours():
    assert list(runs([0, 1, 2, 5, 7, 8], 2)) == [slice(0, 2), slice(2, 3), slice(5, 6), slice(7, 9)]
    assert list(runs(range(3), 8)) == [slice(0, 3)]
    assert list(runs([], 8)) == []

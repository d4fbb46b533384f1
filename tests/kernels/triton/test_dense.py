"""The dense step in Triton against autograd of the loss: the cases of tests/kernels/test_dense.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from sparse_coding.dictionaries import architecture
from sparse_coding.dictionaries.base import Moment
from sparse_coding.kernels.dense import dense_step
from sparse_coding.kernels.triton import dense as on_gpu
from sparse_coding.training.stack import gradients_by_autograd
from tests.kernels.test_dense import NAMES, assert_near, made, small

BF16 = 0.05
"""Distance of bf16 gradients from those in fp32, over the latters' norm; that of torch's operators is the same."""


@pytest.fixture(autouse=True)
def dense_alone(monkeypatch):
    """ReLU takes the dense step however few latents are active."""
    kind = architecture("relu")
    monkeypatch.setattr(kind, "fused_gradients", kind._dense)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_gated_step_by_hand(device):
    """g = (2, 0), f = (relu(.5 * 2 + .25), 0): x_hat = 1.25, error .25; the gates' own x_hat = 2, error 1."""
    own = {"b_mag": torch.full((1, 2), 0.25), "r_mag": torch.full((1, 2), 0.5).log()}
    problem = small(**own)
    moved = {name: value.to(device) for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    result = dense_step(replace(problem, **moved), torch.float32)
    expected = {"squared_error": [0.0625], "auxiliary": [1.0], "gates": [[2.0, 0.0]], "codes": [[1.25, 0.0]]}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(result, name).cpu(), torch.tensor(value))
    gradients = {"b_enc": [[2.5, 0]], "b_mag": [[0.5, 0]], "r_mag": [[0.5, 0]], "W_enc": [[[2.75, 0]]]}
    for name, value in gradients.items():
        torch.testing.assert_close(result.gradients[name].cpu(), torch.tensor(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tied": True, "decoder": "free", "subtract_b_dec": True},
        {"decoder": "free", "parts": (8, 12)},
        {"decoder_bias": False},
        {"d_out": 9},
        {"frozen_auxiliary": False, "tied": True},
    ],
    ids=str,
)
def test_loss_and_gradients_equal_those_of_the_definition(name, settings, dtype, device, generator, monkeypatch):
    if "frozen_auxiliary" in settings and name != "gated":
        pytest.skip("a setting of gated alone")
    monkeypatch.setattr(on_gpu, "PROGRAMS", 1)  # so that programs take several tiles, the last of them fewer
    stack = made(name, members=2, **settings).to(device)
    x = torch.randn(131, 20, generator=generator).to(device)
    target = torch.randn(131, 9, generator=generator).to(device) if "d_out" in settings else None
    moment = Moment(sparsity=0.5)
    fast, slow = stack.fused_gradients(x, target, moment, dtype), gradients_by_autograd(stack, x, target, moment)
    assert_near(fast, slow, 3e-6 if dtype == torch.float32 else BF16)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_shows_in_the_loss_and_one_row_is_enough(name, device, generator):
    stack = made(name, members=3, d_in=5, d_sae=7)
    with torch.no_grad():
        stack.W_enc[2, 3, 4] = torch.nan
    stack, x = stack.to(device), torch.randn(1, 5, generator=generator).to(device)
    result = stack.fused_gradients(x, None, Moment(), torch.float32)
    assert result.loss.isnan().tolist() == [False, False, True]

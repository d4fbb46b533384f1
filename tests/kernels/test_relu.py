from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import ReLU, ReLUSettings
from sparse_coding.dictionaries.base import SETTLED
from sparse_coding.kernels.relu import column_sums, relu_l1_step
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.stack import Stack, gradients_by_autograd
from sparse_coding.training.sweep import grid


def test_a_step_by_hand():
    """One row, one dim, two latents: z = (2, -1), f = (2, 0), x_hat = 2, error = 1; penalty .5 on the active latent."""
    result = relu_l1_step(
        x=torch.tensor([[1.0]]),
        W_enc=torch.tensor([[[2.0, -1.0]]]),
        b_enc=torch.zeros(1, 2),
        W_dec=torch.tensor([[[1.0], [1.0]]]),
        b_dec=None,
        error_weight=1.0,
        l1_weight=torch.tensor([0.5]),
        dtype=torch.float32,
    )
    assert_close(result.squared_error, torch.tensor([1.0]))
    assert_close(result.loss, torch.tensor([1.0 + 0.5 * 2.0]))
    assert_close(result.active, torch.tensor([[1.0, 0.0]]))
    assert_close(result.gradients["W_dec"], torch.tensor([[[4.0], [0.0]]]))  # f * 2 * error
    assert_close(result.gradients["W_enc"], torch.tensor([[[2.5, 0.0]]]))  # x * (2 * error * W_dec + .5)
    assert_close(result.gradients["b_enc"], torch.tensor([[2.5, 0.0]]))


@pytest.mark.parametrize("n_rows", [128, 384, 100])
def test_column_sums_of_bf16_are_exact_for_counts_and_close_for_values(n_rows, generator):
    values = torch.rand(2, n_rows, 5, generator=generator).bfloat16()
    ones = (values > 0.5).bfloat16()
    assert torch.equal(column_sums(ones), ones.double().sum(1).float())
    assert_close(column_sums(values), values.double().sum(1).float(), rtol=5e-3, atol=0)
    assert column_sums(values).dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_after_twenty_steps_equal_those_of_the_definition(tied, dtype, generator, monkeypatch):
    members = grid("relu", {"synthetic": 16}, [2], varied={"l1_coefficient": [0.1, 1.0]}, tied=tied)
    batches = torch.randn(20, 128, 16, generator=generator)
    fast = Stack(members, OptimizerSettings(), "cpu", dtype)
    slow = Stack(members, OptimizerSettings(), "cpu", torch.float32)
    for x in batches:
        fast.step({"synthetic": x}, 1.0)
    monkeypatch.setattr(ReLU, "fused_gradients", lambda *_: None)
    for x in batches:
        slow.step({"synthetic": x}, 1.0)
    # Adam moves each weight by at most 20 * lr = .02; bf16 may turn the sign of gradients near zero
    tolerance = 1e-5 if dtype == torch.float32 else 6e-3
    for name, value in slow.dictionary.tensors().items():
        assert_close(fast.dictionary.tensors()[name], value, atol=tolerance, rtol=0)
        drift = (fast.dictionary.tensors()[name] - value).norm() / value.norm()
        assert drift < (1e-5 if dtype == torch.float32 else 0.02)


def test_a_batch_of_one_row_and_a_stack_of_one_member_work(generator):
    stack = ReLU.init([ReLUSettings(5, 7)], [generator])
    x = torch.randn(1, 5, generator=generator)
    fast, slow = stack.fused_gradients(x, None, SETTLED, torch.float32), gradients_by_autograd(stack, x)
    for name, value in slow.gradients.items():
        assert_close(fast.gradients[name], value)

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.errors import UserError
from sparse_coding.training.optimizer import OptimizerSettings, StackedAdam


def test_every_member_is_torchs_own_adam_with_its_own_rate(generator):
    lrs = [1e-3, 1e-2, 1e-3]
    start = {"W": torch.randn(3, 5, 4, generator=generator), "b": torch.randn(3, 4, generator=generator)}
    stacked = {name: value.clone() for name, value in start.items()}
    ours = StackedAdam(stacked, lrs, OptimizerSettings())
    alone = [[torch.nn.Parameter(value[index].clone()) for value in start.values()] for index in range(3)]
    theirs = [torch.optim.Adam(parameters, lr=lr) for parameters, lr in zip(alone, lrs, strict=True)]
    for step in range(5):
        gradients = {name: torch.randn(value.shape, generator=generator) for name, value in start.items()}
        scale = 0.5 if step > 2 else 1.0
        ours.step(gradients, scale)
        for index, optimizer in enumerate(theirs):
            for parameter, gradient in zip(alone[index], gradients.values(), strict=True):
                parameter.grad = gradient[index].clone()
            optimizer.param_groups[0]["lr"] = lrs[index] * scale
            optimizer.step()
    for index, parameters in enumerate(alone):
        for parameter, value in zip(parameters, stacked.values(), strict=True):
            assert_close(value[index], parameter.detach())


def test_the_first_step_moves_by_the_learning_rate_against_the_sign():
    weights = {"w": torch.zeros(1, 3)}
    StackedAdam(weights, [0.1], OptimizerSettings()).step({"w": torch.tensor([[2.0, -3.0, 1e-3]])}, 1.0)
    assert_close(weights["w"], torch.tensor([[-0.1, 0.1, -0.1]]), atol=1e-4, rtol=0)


def test_schedules_by_hand():
    warm = OptimizerSettings(warmup_steps=4)
    assert [warm.scale(step, 10) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    linear = OptimizerSettings(decay="linear", decay_fraction=0.4)
    assert [linear.scale(step, 10) for step in range(5, 10)] == pytest.approx([1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])
    cosine = OptimizerSettings(decay="cosine", decay_fraction=1.0)
    expected = [0.5 * (1 - math.cos(math.pi * (10 - step) / 11)) for step in range(10)]
    assert [cosine.scale(step, 10) for step in range(10)] == pytest.approx(expected)
    assert OptimizerSettings().scale(9, 10) == 1


def test_schedules_never_rise_after_the_warm_up():
    for decay in ("none", "linear", "cosine"):
        scales = [OptimizerSettings(warmup_steps=10, decay=decay).scale(step, 100) for step in range(100)]
        assert all(a <= b for a, b in itertools.pairwise(scales[:10]))
        assert all(a >= b for a, b in itertools.pairwise(scales[10:]))
        assert min(scales) > 0


@pytest.mark.parametrize("wrong", [{"decay": "quick"}, {"warmup_steps": -1}, {"decay_fraction": 1.5}])
def test_wrong_schedules_are_refused(wrong):
    with pytest.raises(UserError):
        OptimizerSettings(**wrong)

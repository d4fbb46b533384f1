from __future__ import annotations

import torch
from torch.testing import assert_close

from sparse_coding.training.loss_scale import FIRST_SCALE, GROWTH_INTERVAL, LossScale
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.stack import Stack
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

X = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))


def test_gradients_are_divided_by_the_scale_of_their_member():
    scale = LossScale(2, "cpu")
    scale.scale = torch.tensor([2.0, 4.0])
    gradients = {"a": torch.ones(2, 3), "b": torch.tensor([[[1.0]], [[float("inf")]]])}
    assert scale.unscale_(gradients).tolist() == [True, False]
    assert_close(gradients["a"], torch.tensor([[0.5] * 3, [0.25] * 3]))


def test_the_scale_halves_on_overflow_and_doubles_after_the_interval():
    scale = LossScale(2, "cpu")
    scale.update(torch.tensor([True, False]))
    assert scale.scale.tolist() == [FIRST_SCALE, FIRST_SCALE / 2]
    scale.good_steps[:] = GROWTH_INTERVAL - 1
    scale.update(torch.tensor([True, True]))
    assert scale.scale.tolist() == [2 * FIRST_SCALE, FIRST_SCALE]
    assert scale.good_steps.tolist() == [0, 0]


def test_a_member_that_overflows_skips_the_update_and_the_others_do_not():
    chosen = grid("topk", {"x": 16}, [2], varied={"k": [2, 4]})
    stack = Stack(chosen, OptimizerSettings(), "cpu", torch.float16)
    stack.loss_scale.scale[0] = 1e30
    before = {name: value.clone() for name, value in stack.state().items()}
    stack.step({"x": X}, 1.0)
    for name, value in stack.state().items():
        if name.startswith(chosen[0].name) and not any(part in name for part in ("sums", "clocks", "loss_scale")):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(stack.dictionary.W_dec[1], before[f"{chosen[1].name}/weights/W_dec"])
    assert stack.loss_scale.scale[0] == 5e29


def test_fp16_products_train_as_fp32_does():
    chosen = grid("topk", {"x": 16}, [2], varied={"k": [4]})
    ends = {}
    for precision in ("fp32", "fp16", "bf16"):
        seen = []
        Trainer(
            chosen, TensorStream({"x": X}, 64), TrainingSettings(100, precision=precision), loggers=[seen.append]
        ).fit()
        ends[precision] = seen[-1]["fvu"][0]
    assert ends["fp16"] < 0.6
    assert abs(ends["fp16"] / ends["fp32"] - 1) < 0.02
    assert abs(ends["bf16"] / ends["fp32"] - 1) < 0.02

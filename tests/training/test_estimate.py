from __future__ import annotations

import pytest
import torch

from sparse_coding.training.estimate import estimate
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import TrainingSettings

STREAM = TensorStream({"synthetic": torch.randn(64, 8, generator=torch.Generator().manual_seed(0))}, 16)


def test_flop_and_memory_are_counted_by_hand():
    members = grid("relu", {"synthetic": 8}, [1, 2], varied={"l1_coefficient": [0.1, 1.0]})
    plan = estimate(members, STREAM, TrainingSettings(100, precision="fp32"), "cpu")
    weights = 2 * (8 * 8 + 8 * 16)
    assert plan.members == 4
    assert plan.flop == pytest.approx(10 * 16 * weights * 100)
    assert plan.memory_bytes == weights * 2 * 4 * 3
    halved = TrainingSettings(100, OptimizerSettings(moments="bf16"), "fp32")
    assert estimate(members, STREAM, halved, "cpu").memory_bytes == weights * 2 * (4 + 2 * 2)
    assert plan.seconds > 0
    assert "4 dictionaries" in str(plan)


def test_time_grows_with_the_steps_and_with_what_the_stream_hides():
    members = grid("relu", {"synthetic": 8}, [1])
    plans = [estimate(members, STREAM, TrainingSettings(steps, precision="fp32"), "cpu", 1.0) for steps in (10, 20)]
    assert plans[0].seconds >= 10
    assert plans[1].seconds >= 20


def test_estimating_does_not_touch_what_will_be_trained():
    member = grid("relu", {"synthetic": 8}, [1])[0]
    before = member.generator().get_state()
    estimate([member], STREAM, TrainingSettings(10, precision="fp32"), "cpu")
    assert torch.equal(member.generator().get_state(), before)

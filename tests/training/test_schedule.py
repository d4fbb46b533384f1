from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest

from sparse_coding.errors import UserError
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.schedule import Schedule


def factors(settings: OptimizerSettings, steps: int) -> list[float]:
    return [settings.scale(step, steps) for step in range(steps)]


def test_constant_and_linear_and_cosine_by_hand():
    assert factors(OptimizerSettings(), 10) == [1] * 10
    for schedule in ("constant", "constantwithwarmup"):
        warm = OptimizerSettings(schedule=schedule, warmup_steps=4)
        assert factors(warm, 10) == [0.25, 0.5, 0.75, *[1] * 7]
    linear = OptimizerSettings(schedule="linear", decay_fraction=0.4)
    assert factors(linear, 10)[5:] == pytest.approx([1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])
    cosine = OptimizerSettings(schedule="cosine", decay_fraction=1.0)
    expected = [0.5 * (1 - math.cos(math.pi * (10 - step) / 11)) for step in range(10)]
    assert factors(cosine, 10) == pytest.approx(expected)


def test_restarts_by_hand():
    half = math.sqrt(0.5)
    cycle = [1, 0.5 * (1 + half), 0.5, 0.5 * (1 - half)]  # cosines of 0, 45, 90 and 135 degrees
    assert factors(OptimizerSettings(schedule="restarts", restarts=3), 12) == pytest.approx(cycle * 3)
    warm = OptimizerSettings(schedule="restarts", restarts=2, warmup_steps=2)
    assert factors(warm, 10) == pytest.approx([0.5, 1, *cycle * 2])


def test_restarts_rise_as_often_as_said_even_where_the_cycles_are_no_whole_steps():
    values = factors(OptimizerSettings(schedule="restarts", restarts=3), 100)
    assert sum(a < b for a, b in itertools.pairwise(values)) == 2
    assert max(values) == values[0] == 1
    assert min(values) > 0


def test_a_warm_up_longer_than_the_run_is_all_there_is():
    for schedule in get_args(Schedule):
        settings = OptimizerSettings(schedule=schedule, warmup_steps=20, decay_fraction=0.0)
        assert factors(settings, 10) == [(step + 1) / 20 for step in range(10)]


def test_the_rate_rises_again_after_a_resampling():
    settings = OptimizerSettings(resample_warmup_steps=4)
    assert settings.scale(50, 100) == 1
    assert [settings.scale(50, 100, since) for since in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    falling = OptimizerSettings(schedule="linear", decay_fraction=1.0, resample_warmup_steps=4)
    assert falling.scale(50, 99, 1) == pytest.approx(0.5 * 49 / 100)
    assert OptimizerSettings().scale(50, 100, 0) == 1  # no warm-up was asked for


def test_what_falls_never_rises_after_the_warm_up():
    for schedule in ("constant", "linear", "cosine"):
        values = factors(OptimizerSettings(warmup_steps=10, schedule=schedule), 100)
        assert all(a <= b for a, b in itertools.pairwise(values[:10]))
        assert all(a >= b for a, b in itertools.pairwise(values[10:]))
        assert min(values) > 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"schedule": "cosin"}, "schedule is 'cosin': allowed are constant, .*did you mean 'cosine'"),
        ({"schedule": "constantwithwarmup"}, "--warmup-steps"),
        ({"warmup_steps": -1}, "warmup_steps is -1: it must be at least 0"),
        ({"decay_fraction": 1.5}, "decay_fraction is 1.5: it must be between 0 and 1"),
        ({"restarts": 0}, "restarts is 0: it must be at least 1"),
        ({"resample_warmup_steps": -5}, "resample_warmup_steps is -5"),
    ],
)
def test_wrong_schedules_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        OptimizerSettings(**wrong)

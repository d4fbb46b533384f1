from __future__ import annotations

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.training.dead import Clocks, DeadSettings


def fired(*latents, size=3):
    active = torch.zeros(1, size)
    active[0, list(latents)] = 1.0
    return active


def test_the_window_counts_rows_not_steps():
    for rows, steps in ((10, 3), (30, 1)):
        clocks = Clocks((1, 3), DeadSettings(window=30), "cpu")
        for step in range(steps):
            assert not clocks.dead().any()
            clocks.count(fired(0), rows, step)
        assert clocks.dead().tolist() == [[False, True, True]]
    clocks.count(fired(1), 30, 1)
    assert clocks.dead().tolist() == [[True, False, True]]


def test_the_threshold_is_a_share_of_the_rows_of_a_sampling_window():
    clocks = Clocks((1, 3), DeadSettings(window=10_000, threshold=0.1, sampling_window=20), "cpu")
    clocks.count(torch.tensor([[3.0, 1.0, 0.0]]), 10, 0)
    assert not clocks.dead().any()  # the first window is not over
    clocks.count(torch.tensor([[0.0, 0.0, 0.0]]), 10, 1)
    assert clocks.dead().tolist() == [[False, True, True]]  # 3/20 against 1/20 and 0
    clocks.count(torch.tensor([[0.0, 5.0, 0.0]]), 10, 2)
    clocks.count(torch.tensor([[0.0, 0.0, 0.0]]), 10, 3)
    assert clocks.dead().tolist() == [[True, False, True]]  # each window by itself


def test_a_restarted_latent_lives_again():
    clocks = Clocks((2, 3), DeadSettings(window=5, threshold=0.5, sampling_window=10), "cpu")
    clocks.count(torch.zeros(2, 3), 10, 0)
    assert clocks.dead().all()
    clocks.restart_(1, torch.tensor([0, 2]))
    assert clocks.dead().tolist() == [[True, True, True], [False, True, False]]


def test_when_resampling_happens_and_how_long_ago_it_was():
    settings = DeadSettings(resample_every=10, resample_times=2)
    assert [step for step in range(60) if settings.resamples_after(step)] == [10, 20]
    assert [settings.since_resampling(step) for step in (0, 9, 10, 13, 20, 45)] == [None, None, 0, 3, 0, 25]
    assert not any(DeadSettings().resamples_after(step) for step in range(60))
    assert DeadSettings().since_resampling(50) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "dead_feature_window is 0"),
        ({"sampling_window": 0}, "feature_sampling_window is 0"),
        ({"threshold": 1.0}, "dead_feature_threshold is 1.0"),
        ({"resample_every": -1}, "resample_every is -1"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DeadSettings(**changes)


def test_a_method_with_nothing_to_revive_is_refused():
    with pytest.raises(UserError, match=r"auxk: there would be nothing to revive.*1,000,000 rows.*only 1,000 rows"):
        DeadSettings(window=1_000_000).check(100, 10, "auxk")
    with pytest.raises(UserError, match=r"resample.*nothing to revive"):
        DeadSettings(window=500, resample_every=10, resample_times=1).check(100, 10)
    with pytest.raises(UserError, match="no resampling"):
        DeadSettings(window=10, resample_every=100).check(100, 10)
    DeadSettings(window=500).check(100, 10, "ghost")
    DeadSettings(window=10**9, threshold=1e-6).check(100, 10, "auxk")
    DeadSettings(window=10**9).check(100, 10)


def test_a_restarted_latent_is_not_judged_by_a_window_that_began_before():
    clocks = Clocks((1, 2), DeadSettings(window=10_000, threshold=0.5, sampling_window=100), "cpu")
    for step in range(9):
        clocks.count(torch.zeros(1, 2), 10, step)
    clocks.restart_(0, torch.tensor([0]))
    clocks.count(torch.tensor([[10.0, 10.0]]), 10, 9)
    assert clocks.dead().tolist() == [[False, True]]

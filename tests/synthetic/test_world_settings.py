"""Settings of a toy world: what is refused, in which words, and what the named worlds are."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict

import pytest

from sparse_coding.errors import UserError
from sparse_coding.synthetic import PRESETS, WorldSettings, preset


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"decay": "geometirc"}, "did you mean 'geometric'"),
        ({"covariance": "wishard"}, "did you mean 'wishart'"),
        ({"probability_draw": "per_batches"}, "did you mean 'per_batch'"),
        ({"magnitude": "double"}, "did you mean 'double_uniform'"),
        ({"n_features": 0}, "n_features = 0"),
        ({"n_features": 2.5}, "whole number"),
        ({"d_in": 0}, "d_in = 0"),
        ({"mean_active": 513}, "at most n_features = 512"),
        ({"mean_active": 0}, "mean_active = 0"),
        ({"mean_active": float("nan")}, "mean_active = nan"),
        ({"noise": -0.1}, "noise = -0.1"),
        ({"seed": -1}, "seed = -1"),
        ({"decay_rate": 1.01}, "at most 1"),
        ({"decay_rate": 0.0}, "above 0"),
        ({"decay": "power", "decay_rate": 0.0}, "above 0"),
        ({"decay": "zipf", "decay_rate": -1.0}, "at least 0"),
        ({"decay": "power", "covariance": "uncorrelated"}, "no random u"),
    ],
)
def test_a_wrong_setting_is_refused_and_says_what_is_allowed(wrong, words):
    with pytest.raises(UserError, match=words):
        WorldSettings(**wrong)


def test_the_decay_rate_has_the_range_of_its_decay():
    assert WorldSettings(decay="zipf", decay_rate=1.2).decay_rate == 1.2
    assert WorldSettings(decay="power", decay_rate=2.0).decay_rate == 2.0


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        WorldSettings().seed = 1  # type: ignore[misc]


def test_an_unknown_preset_and_an_unknown_setting_name_the_near_one():
    with pytest.raises(UserError, match="did you mean 'quick'"):
        preset("quik")
    with pytest.raises(UserError, match="did you mean 'n_features'"):
        preset("quick", n_feature=3)


def test_a_preset_can_be_changed_without_changing_the_preset():
    assert preset("quick", seed=3).seed == 3
    assert PRESETS["quick"].seed == 0


def test_the_worlds_of_june_and_july_2023_differ_in_the_second_uniform_only():
    june, july = asdict(preset("hoagy-2023-06")), asdict(preset("hoagy-2023-07"))
    assert {key for key in june if june[key] != july[key]} == {"magnitude"}
    assert june == {
        "n_features": 512,
        "d_in": 256,
        "mean_active": 5.0,
        "decay": "geometric",
        "decay_rate": 0.99,
        "covariance": "shifted_uniform",
        "probability_draw": "per_batch",
        "magnitude": "double_uniform",
        "filler": True,
        "noise": 0.0,
        "seed": 0,
    }


def test_the_world_of_2022_draws_per_sample_without_filler():
    report, july = asdict(preset("post-2022")), asdict(preset("hoagy-2023-07"))
    assert {key: report[key] for key in report if report[key] != july[key]} == {
        "probability_draw": "per_sample",
        "filler": False,
    }

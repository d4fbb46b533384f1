"""Chance levels, ceilings and floors, against exact cases, simulation and the numbers measured in 2023's setting."""

from __future__ import annotations

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.synthetic import World, chance_mmcs, collapse_l1, expected_dead, mmcs_ceiling, preset

CHANCE_AT_256 = {64: 0.145, 128: 0.160, 256: 0.177, 512: 0.188, 1024: 0.202} | {
    2048: 0.215,
    4096: 0.225,
    8192: 0.235,
    16384: 0.244,
}


@pytest.mark.parametrize(("n_atoms", "measured"), CHANCE_AT_256.items())
def test_chance_matches_what_was_measured_at_width_256(n_atoms, measured):
    assert chance_mmcs(n_atoms, 256) == pytest.approx(measured, abs=0.002)


@pytest.mark.parametrize("n_atoms", [1, 2, 10, 1000])
def test_chance_is_exact_in_three_dimensions(n_atoms):
    # Cosines are uniform on (-1, 1) there, and the largest of n uniforms has mean n/(n+1).
    assert chance_mmcs(n_atoms, 3) == pytest.approx((n_atoms - 1) / (n_atoms + 1), abs=1e-5)


def test_chance_agrees_with_a_simulation_in_a_narrow_space():
    gen = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(20_000, 12, 5, generator=gen), dim=-1)
    largest = atoms[..., 0].amax(-1)  # cosine with the first axis
    assert chance_mmcs(12, 5) == pytest.approx(float(largest.mean()), abs=4 * float(largest.std()) / 20_000**0.5)


def test_chance_refuses_a_width_or_a_count_it_is_not_defined_for():
    with pytest.raises(UserError, match="at least 1 atom"):
        chance_mmcs(0, 256)
    with pytest.raises(UserError, match="width of at least 2"):
        chance_mmcs(5, 1)


def test_the_ceiling_of_a_small_dictionary_counts_one_feature_per_atom():
    chances = {0.125: CHANCE_AT_256[64], 0.25: CHANCE_AT_256[128], 0.5: CHANCE_AT_256[256]}
    ceilings = [mmcs_ceiling(ratio, chance) for ratio, chance in chances.items()]
    assert ceilings == pytest.approx([0.25, 0.37, 0.59], abs=0.005)
    assert mmcs_ceiling(1.0, 0.2) == mmcs_ceiling(8.0, 0.2) == 1.0


def test_the_largest_coefficient_survives_just_below_the_collapse_and_not_above():
    d_in, d_sae, f = 16, 40, torch.linspace(0, 1, 100_001, dtype=torch.float64)
    collapse = collapse_l1(ratio=2.0, d_in=d_in, n_features=20)
    for l1, alive in ((0.99 * collapse, True), (1.01 * collapse, False)):
        loss = (1 - f) ** 2 / d_in + l1 * f / d_sae  # one feature with coefficient 1, its own atom, code f
        assert bool(f[loss.argmin()] > 0) == alive
    assert collapse_l1(ratio=1.0, d_in=256, n_features=512) == 4.0


@pytest.mark.parametrize(("draw", "dead"), [("per_sample", 33), ("per_batch", 37)])
def test_features_never_seen_in_2560_samples_match_what_was_measured(draw, dead):
    # One measurement of a sum of 512 rare events: its own standard deviation is about 4.
    world = World(preset("hoagy-2023-07", probability_draw=draw))
    assert expected_dead(world, 2560) == pytest.approx(dead, abs=3)


def test_every_feature_is_seen_in_a_hundred_thousand_samples():
    assert expected_dead(World(preset("hoagy-2023-07")), 100_000) < 0.01


def test_one_sample_leaves_all_but_its_active_features_unseen():
    world = World(preset("quick", filler=False))
    assert expected_dead(world, 1, batch_size=256) == pytest.approx(128 - 3, abs=1e-3)


@pytest.mark.parametrize("filler", [True, False])
@pytest.mark.parametrize("draw", ["per_sample", "per_batch", "fixed"])
def test_expected_dead_agrees_with_a_simulation(draw, filler):
    settings = {"n_features": 40, "d_in": 4, "mean_active": 1.5, "decay_rate": 0.9}
    world = World(preset("quick", probability_draw=draw, filler=filler, **settings))
    dead, sizes = [], (16, 16, 16, 8)  # 56 samples: three batches of 16 and half a batch
    for trial in range(300):
        seen = torch.cat([world.batch(4 * trial + i, size).features for i, size in enumerate(sizes)])
        dead.append(40 - len(seen.unique()))
    simulated = torch.tensor(dead, dtype=torch.float64)
    tolerance = 4.5 * float(simulated.std()) / 300**0.5
    assert expected_dead(world, 56, batch_size=16) == pytest.approx(float(simulated.mean()), abs=tolerance)

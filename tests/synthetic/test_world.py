"""Toy worlds: batches that are pure functions of their position, and the statistics of the 2023 toy data.

The golden numbers are those measured on the recipe of 2023 (G 512, d_in 256, k 5, decay .99). Tolerances are four
standard errors of our sample or the last digit given, whichever is larger.
"""

from __future__ import annotations

import math

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.synthetic import World, WorldBatch, covariance_matrix, preset
from sparse_coding.synthetic.settings import COVARIANCES

SMALL = {"n_features": 24, "d_in": 8, "mean_active": 3.0, "decay_rate": 0.93}


def small(**changes) -> World:
    return World(preset("hoagy-2023-07", **{**SMALL, **changes}))


def batches(world: World, count: int, batch_size: int = 256, **options) -> list[WorldBatch]:
    return [world.batch(step, batch_size, **options) for step in range(count)]


def same(a: WorldBatch, b: WorldBatch) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


# --- a batch is a pure function of its position


@pytest.mark.parametrize("draw", ["per_sample", "per_batch", "fixed"])
def test_a_batch_does_not_depend_on_the_batches_asked_for_before(draw):
    settings = {"probability_draw": draw, "magnitude": "double_uniform", "noise": 0.1}
    in_order, at_once = small(**settings), small(**settings)
    late = at_once.batch(7000, 32)
    first = [in_order.batch(step, 32) for step in range(5)]
    assert same(in_order.batch(7000, 32), late)
    assert same(at_once.batch(3, 32), first[3])


def test_the_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = small(noise=0.1).batch(0, 16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(one, small(noise=0.1).batch(0, 16))


def test_steps_splits_and_seeds_give_different_rows():
    world = small()
    rows = [
        world.batch(0, 16).x,
        world.batch(1, 16).x,
        world.batch(0, 16, split="held-out").x,
        small(seed=1).batch(0, 16).x,
    ]
    for i, a in enumerate(rows):
        for b in rows[i + 1 :]:
            assert float((a[:, None] - b[None]).norm(dim=-1).min()) > 1e-4  # no row in common


def test_splits_of_a_world_share_its_directions_and_seeds_do_not():
    world = small()
    assert torch.equal(world.batch(0, 4).directions, world.batch(0, 4, split="held-out").directions)
    assert not torch.allclose(world.directions, small(seed=1).directions)


@pytest.mark.parametrize(
    ("position", "words"),
    [
        ((0, 8, "heldout"), "did you mean 'held-out'"),
        ((0, 8, "world"), "split 'world' is unknown"),
        ((-1, 8, "train"), "step = -1"),
        ((2**30, 8, "train"), "below 2"),
        ((0, 0, "train"), "batch_size = 0"),
    ],
)
def test_a_position_that_does_not_exist_is_refused(position, words):
    with pytest.raises(UserError, match=words):
        small().batch(*position)


# --- what a batch holds


@pytest.mark.parametrize("filler", [True, False])
@pytest.mark.parametrize("magnitude", ["uniform", "double_uniform"])
@pytest.mark.parametrize("draw", ["per_sample", "per_batch"])
def test_activations_are_the_sums_a_loop_makes_of_the_returned_entries(draw, magnitude, filler):
    world = small(probability_draw=draw, magnitude=magnitude, filler=filler, mean_active=1.0)
    batch = world.batch(3, 40)
    x, codes = torch.zeros(40, 8, dtype=torch.float64), torch.zeros(40, 24)
    for b, i, a in zip(batch.samples.tolist(), batch.features.tolist(), batch.values.tolist(), strict=True):
        x[b] += a * world.directions[i].double()
        codes[b, i] += a
    assert torch.allclose(batch.x.double(), x, atol=1e-6)
    assert torch.equal(batch.codes, codes)
    assert torch.allclose(batch.codes @ batch.directions, batch.x, atol=1e-6)


def test_samples_may_be_empty_without_the_filler_and_are_then_zero():
    batch = small(filler=False, mean_active=0.2).batch(0, 200)
    empty = batch.codes.sum(1) == 0
    assert 120 < int(empty.sum()) < 195
    assert bool((batch.x[empty] == 0).all())


def test_the_filler_has_coefficient_one_and_a_uniform_feature():
    batch = small(mean_active=1e-4).batch(0, 24_000)
    assert len(batch.samples) == 24_000
    assert float((batch.values == 1).float().mean()) > 0.999
    counts = torch.bincount(batch.features, minlength=24)
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 60  # 23 degrees of freedom


def test_the_filler_takes_the_second_uniform_of_the_published_runs():
    values = small(mean_active=1e-4, magnitude="double_uniform").batch(0, 20_000).values
    assert abs(float(values.mean()) - 0.5) < 0.01
    assert abs(float(values.std()) - 12**-0.5) < 0.01


def test_noise_has_its_standard_deviation_and_leaves_the_codes_alone():
    noisy, clean = small(noise=0.3).batch(0, 2000), small(noise=0.3).batch(0, 2000, noisy=False)
    assert abs(float((noisy.x - noisy.codes @ noisy.directions).std()) - 0.3) < 0.01
    assert torch.equal(noisy.codes, clean.codes)
    assert torch.equal(clean.x, small().batch(0, 2000).x)


def test_probabilities_are_those_the_batch_is_drawn_with():
    world = small(filler=False)
    p, batch = world.probabilities(5, 4000), world.batch(5, 4000)
    z = (torch.bincount(batch.features, minlength=24) - 4000 * p) / (4000 * p * (1 - p)).sqrt().clamp(min=1e-3)
    assert float(z.abs().max()) < 4.5
    assert not torch.allclose(p, world.probabilities(6, 4000))
    assert small(probability_draw="per_sample").probabilities(0, 10).shape == (10, 24)


def test_fixed_probabilities_are_the_same_in_every_batch_and_split():
    world = small(probability_draw="fixed")
    assert torch.equal(world.probabilities(0, 8), world.probabilities(9, 16, split="held-out"))
    assert not torch.allclose(world.probabilities(0, 8), small(probability_draw="fixed", seed=1).probabilities(0, 8))


# --- laws


LAWS = [
    (covariance, decay, rate)
    for covariance in COVARIANCES
    for decay, rate in {"geometric": 0.9, "power": 1.0, "zipf": 1.1, "none": 1.0}.items()
    if (covariance, decay) != ("uncorrelated", "power")  # refused by the settings
]


@pytest.mark.parametrize(("covariance", "decay", "rate"), LAWS)
def test_the_mean_number_of_active_features_is_met_by_every_law(covariance, decay, rate):
    world = small(covariance=covariance, decay=decay, decay_rate=rate, filler=False)
    assert torch.allclose(world.probability_draws(50).sum(-1), torch.tensor(3.0), rtol=1e-5)
    counts = torch.tensor([len(batch.samples) / 64 for batch in batches(world, 60, 64)])
    assert abs(float(counts.mean()) - 3) < 4 * (3 / (60 * 64)) ** 0.5


def test_the_uncorrelated_world_meets_the_target_the_original_missed():
    world = World(preset("hoagy-2023-06", covariance="uncorrelated", filler=False))
    p = world.probabilities(0, 256)
    assert float(p.sum()) == pytest.approx(5, rel=1e-5)  # (k/G)·Σλ^i, as it was, is .971
    assert torch.allclose(p[1:] / p[:-1], torch.tensor(0.99), rtol=1e-4)


def test_a_probability_that_would_exceed_one_is_clamped_and_the_mean_still_met():
    p = World(preset("hoagy-2023-07", covariance="unit_diagonal", decay="power")).probability_draws(500)
    assert float(p.max()) == 1  # feature 0 often takes more than its share under this reading
    assert torch.allclose(p.sum(-1), torch.tensor(5.0), rtol=1e-4)


def test_all_features_are_active_when_the_target_says_so():
    batch = small(mean_active=24).batch(0, 50)
    assert len(batch.samples) == 50 * 24


def test_decays_weigh_the_features_as_their_formulas_say():
    def ratio(**settings) -> torch.Tensor:
        p = small(covariance="uncorrelated", mean_active=0.5, **settings).probabilities(0, 1)
        return p / p[0]

    index = torch.arange(24)
    assert torch.allclose(ratio(decay="geometric", decay_rate=0.8), 0.8**index, rtol=1e-4)
    assert torch.allclose(ratio(decay="zipf", decay_rate=1.5), (index + 1.0) ** -1.5, rtol=1e-4)
    assert torch.allclose(ratio(decay="none"), torch.ones(24))
    power = small(covariance="identity", mean_active=0.5, decay="power", decay_rate=0.3).probability_draws(20_000)
    by_hand = 1 / (0.3 * index + 1)  # the mean of u^(λi) over a uniform u
    assert torch.allclose((power / power[:, :1]).mean(0), by_hand, rtol=0.05)


def statistics(world: World, count: int) -> torch.Tensor:
    """Per batch: frequency of each feature and of each pair, and how often n features are active; [count, stats]."""
    rows = []
    first, second = torch.triu_indices(24, 24)
    for batch in batches(world, count, 16):
        on = (batch.codes > 0).float()
        pairs = (on.T @ on / 16)[first, second]
        sizes = torch.bincount(on.sum(1).long(), minlength=25)[:8] / 16
        rows.append(torch.cat([pairs, sizes, batch.x.pow(2).mean()[None]]))
    return torch.stack(rows)


def test_one_sample_has_the_same_law_whether_probabilities_are_drawn_per_batch_or_per_sample():
    per_batch, per_sample = statistics(small(), 3000), statistics(small(probability_draw="per_sample"), 3000)
    se = ((per_batch.var(0) + per_sample.var(0)) / 3000).sqrt().clamp(min=2e-4)  # batches are independent
    z = (per_batch.mean(0) - per_sample.mean(0)) / se
    assert float(z.abs().max()) < 5
    assert float(z.pow(2).mean()) < 1.3
    # Only the dependence inside a batch differs: a feature is off or on for a whole batch.
    single = [0, *torch.arange(24, 1, -1).cumsum(0).tolist()]  # positions of the pairs (i, i)
    assert float((per_batch.var(0) / per_sample.var(0))[single].mean()) > 1.5
    fixed = statistics(small(probability_draw="fixed"), 300)
    far = (fixed.mean(0) - per_sample.mean(0)) / ((fixed.var(0) / 300 + per_sample.var(0) / 3000).sqrt() + 2e-4)
    assert float(far.abs().max()) > 20  # another population


# --- golden statistics of the 2023 recipe


@pytest.fixture(scope="module")
def july() -> World:
    return World(preset("hoagy-2023-07"))


@pytest.fixture(scope="module")
def july_p(july) -> torch.Tensor:
    return july.probability_draws(4000)


def off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def test_golden_the_shifted_uniform_matrix():
    C = covariance_matrix(preset("hoagy-2023-07"))
    eigenvalues, diagonal = torch.linalg.eigvalsh(C), C.diagonal()
    shift = float(diagonal.mean()) - 0.5  # the diagonal of S is uniform with mean .5
    assert shift == pytest.approx(9.12, abs=0.15)  # 1.001·9.11
    assert float(eigenvalues[0]) == pytest.approx(0.001 / 1.001 * shift, rel=0.01)
    assert float(eigenvalues[-1]) - shift == pytest.approx(256, abs=1.5)
    assert float(diagonal.max() - diagonal.min()) == pytest.approx(1, abs=0.02)
    correlation = off_diagonal(C / (diagonal[:, None] * diagonal).sqrt())
    assert float(correlation.mean()) == pytest.approx(0.052, abs=0.001)
    assert float(correlation.std()) == pytest.approx(0.021, abs=0.001)
    assert float(correlation.min()) > 0
    assert float(correlation.max()) == pytest.approx(0.11, abs=0.005)


def test_the_unit_diagonal_matrix_is_the_same_one_as_a_correlation_matrix():
    shifted, unit = (
        covariance_matrix(preset("hoagy-2023-07", covariance=name, **SMALL))
        for name in ("shifted_uniform", "unit_diagonal")
    )
    scale = shifted.diagonal().sqrt()
    assert torch.allclose(unit * scale * scale[:, None], shifted)
    assert torch.allclose(unit.diagonal(), torch.ones(24, dtype=torch.float64))


def test_a_wishart_matrix_is_positive_definite_with_a_diagonal_near_its_size():
    C = covariance_matrix(preset("hoagy-2023-07", covariance="wishart"))
    assert float(torch.linalg.eigvalsh(C)[0]) > 0
    assert float(C.diagonal().mean()) == pytest.approx(512, rel=0.02)


@pytest.mark.parametrize("covariance", ["shifted_uniform", "unit_diagonal", "wishart"])
def test_z_has_the_covariance_of_the_world(covariance):
    world = small(covariance=covariance)
    assert world._factor is not None
    C = covariance_matrix(world.settings)
    factor = world._factor.double()
    assert torch.allclose(factor @ factor.T, C, rtol=1e-5, atol=1e-5 * float(C.max()))


def test_golden_half_of_the_uniforms_are_near_zero_or_one(july):
    z = torch.randn(4000, 512, generator=torch.Generator().manual_seed(0)) @ july._factor.T
    u = torch.special.ndtr(z)
    assert float((u < 0.05).float().mean()) == pytest.approx(0.30, abs=0.015)
    assert float((u > 0.95).float().mean()) == pytest.approx(0.30, abs=0.015)


def test_golden_probabilities(july_p):
    assert torch.allclose(july_p.sum(-1), torch.tensor(5.0), rtol=1e-5)
    mean = july_p.mean(0)
    for index, expected in ((0, 0.050), (100, 0.018), (255, 0.0038), (511, 0.000295)):
        assert float(mean[index]) == pytest.approx(expected, rel=0.07)
    assert float(july_p.amax(-1).mean()) == pytest.approx(0.101, abs=0.002)
    assert float(july_p.max()) < 0.4
    assert int((mean < 0.01).sum()) == pytest.approx(350, abs=8)
    assert int((mean < 0.001).sum()) == pytest.approx(121, abs=8)
    assert float((25 / july_p.pow(2).sum(-1)).mean()) == pytest.approx(115, abs=2)
    mass = july_p.sort(-1, descending=True).values.cumsum(-1)
    assert float((mass < 4.5).sum(-1).float().mean() + 1) == pytest.approx(146, abs=2)


@pytest.mark.parametrize(
    ("settings", "largest", "participation", "ninety"),
    [
        ({"covariance": "unit_diagonal"}, 0.090, 149, 198),
        ({"covariance": "wishart"}, 0.100, 100, 117),
        ({"decay": "power"}, 0.056, 113, 97),
        ({"covariance": "wishart", "decay": "power"}, 0.022, 234, 209),
    ],
)
def test_golden_other_readings_of_the_same_text(settings, largest, participation, ninety):
    p = World(preset("hoagy-2023-07", **settings)).probability_draws(2000)
    assert float(p.amax(-1).mean()) == pytest.approx(largest, abs=0.0015)
    assert float((25 / p.pow(2).sum(-1)).mean()) == pytest.approx(participation, rel=0.04)
    mass = p.sort(-1, descending=True).values.cumsum(-1)
    assert float((mass < 4.5).sum(-1).float().mean() + 1) == pytest.approx(ninety, abs=5)


def test_golden_active_features_per_sample():
    world = World(preset("hoagy-2023-07", filler=False))
    counts = torch.cat([torch.bincount(b.samples, minlength=256) for b in batches(world, 100)]).float()
    assert float(counts.mean()) == pytest.approx(5.0, abs=0.06)
    assert float(counts.std()) == pytest.approx(2.2, abs=0.05)
    # Π(1 - p) is at most e^-Σp = .67%, so the .77% once measured was a small sample's; its mean is about .60%.
    empty = float((1 - world.probability_draws(4000)).prod(-1).mean())
    assert 0.0055 < empty < math.exp(-5)
    assert float((counts == 0).float().mean()) == pytest.approx(empty, abs=0.002)


@pytest.mark.parametrize(
    ("name", "norm", "mean_square", "variance"),
    [("hoagy-2023-07", 1.23, 0.00658, 0.00647), ("hoagy-2023-06", 0.67, 0.00213, 0.00211)],
)
def test_golden_activations(name, norm, mean_square, variance):
    x = torch.cat([batch.x for batch in batches(World(preset(name)), 100)])
    assert float(x.norm(dim=1).mean()) == pytest.approx(norm, rel=0.025)
    assert float(x.pow(2).mean()) == pytest.approx(mean_square, rel=0.035)
    assert float(x.var(0).mean()) == pytest.approx(variance, rel=0.035)


def test_golden_coefficients_of_the_published_runs():
    world = World(preset("hoagy-2023-06", filler=False))
    a = torch.cat([batch.values for batch in batches(world, 60)])
    assert float(a.mean()) == pytest.approx(0.25, abs=0.005)
    assert float(a.std()) == pytest.approx(0.221, abs=0.004)
    assert float(a.median()) == pytest.approx(0.1867, abs=0.006)  # m·(1 - ln m) = 1/2
    assert float((a < 0.1).float().mean()) == pytest.approx(0.33, abs=0.01)


def test_golden_directions_are_unit_rows_with_the_cosines_of_random_vectors(july):
    assert torch.allclose(july.directions.norm(dim=1), torch.ones(512))
    cosines = july.directions @ july.directions.T - 2 * torch.eye(512)
    assert float(cosines.amax(1).mean()) == pytest.approx(0.186, abs=0.006)
    assert float(cosines.max()) < 0.36


def test_golden_the_correlated_world_is_for_practical_purposes_uncorrelated():
    world = World(preset("post-2022"))
    on = torch.cat([batch.codes[:, :60] > 0 for batch in batches(world, 16)]).float()
    phi = off_diagonal(torch.corrcoef(on.T))
    assert abs(float(phi.mean())) < 0.002
    assert float(phi.std()) == pytest.approx(len(on) ** -0.5, rel=0.1)  # the sampling noise of independent features

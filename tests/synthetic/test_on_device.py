from __future__ import annotations

import pytest
import torch

from sparse_coding.synthetic import World, WorldStream, preset
from sparse_coding.synthetic.on_device import DeviceWorldStream
from sparse_coding.synthetic.world import probabilities_from

WORLD = {"n_features": 24, "d_in": 8, "mean_active": 3.0, "decay_rate": 0.93}
KINDS = [
    {},
    {"probability_draw": "per_sample", "filler": False},
    {"probability_draw": "fixed", "magnitude": "double_uniform"},
    {"covariance": "uncorrelated"},
    {"covariance": "unit_diagonal", "mean_active": 20.0, "decay": "none"},
    {"decay": "power", "decay_rate": 0.1, "noise": 0.1, "mean_active": 0.5},
]


def world(**changes):
    return World(preset("hoagy-2023-07", **{**WORLD, **changes}))


@pytest.mark.parametrize("changes", KINDS)
def test_the_law_is_that_of_the_world(changes):
    rows, steps = 256, 80
    made = world(**changes)
    sums = []
    for stream in (DeviceWorldStream(made, rows), WorldStream(made, rows)):
        codes = torch.stack([stream.batch_with_truth(step).codes for step in range(steps)])
        active = (codes > 0).float()
        alone = (active.sum(2) == 1).float().mean(1, keepdim=True).expand(-1, 24)  # more often with the filler
        per_batch = torch.stack([active.mean(1), codes.mean(1), alone])
        sums.append((per_batch.mean(1), per_batch.std(1) / steps**0.5))
    (ours, ours_error), (theirs, their_error) = sums
    assert ((ours - theirs).abs() < 5 * (ours_error.square() + their_error.square()).sqrt() + 1e-3).all()


@pytest.mark.parametrize("changes", KINDS)
def test_a_batch_is_a_function_of_its_position(changes):
    one, other = (DeviceWorldStream(world(**changes), 16) for _ in range(2))
    late = one.batch(7000)["synthetic"]
    one.batch(3)
    assert torch.equal(one.batch(7000)["synthetic"], late)
    assert torch.equal(other.batch_with_truth(7000).x, late)
    assert not torch.equal(other.batch(7001)["synthetic"], late)
    assert not torch.equal(DeviceWorldStream(world(**changes), 16, split="held-out").batch(7000)["synthetic"], late)


def test_rows_are_the_codes_times_the_directions_and_noise_when_asked_for():
    made = world(noise=0.5)
    clean = DeviceWorldStream(made, 400, noisy=False).batch_with_truth(0)
    torch.testing.assert_close(clean.x, clean.codes @ made.directions)
    noisy = DeviceWorldStream(made, 400).batch(0)["synthetic"]
    assert 0.45 < (noisy - clean.x).std() < 0.55


def test_the_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = DeviceWorldStream(world(noise=0.1), 16).batch(0)["synthetic"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(one, DeviceWorldStream(world(noise=0.1), 16).batch(0)["synthetic"])


@pytest.mark.parametrize("changes", KINDS)
def test_probabilities_ask_a_device_for_no_value(changes):
    """The device "meta" has none."""
    made = world(**changes)
    normal, decay = torch.empty(5, 24, device="meta"), torch.empty(24, device="meta")
    factor = None if made._factor is None else torch.empty(24, 24, device="meta")
    assert probabilities_from(made.settings, normal, factor, decay).shape == (5, 24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph")
@pytest.mark.parametrize("changes", KINDS)
def test_a_recorded_batch_is_the_batch(changes):
    stream = DeviceWorldStream(World(preset("hoagy-2023-07", **{**WORLD, **changes}), "cuda"), 64)
    batches = [stream.batch(step)["synthetic"] for step in (5, 0, 7, 5)]
    for step, batch in zip((5, 0, 7, 5), batches, strict=True):
        assert torch.equal(batch, stream.batch_with_truth(step).x)
    assert not torch.equal(batches[0], batches[1])

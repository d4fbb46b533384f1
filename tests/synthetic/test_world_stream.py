"""A toy world as a stream of batches."""

from __future__ import annotations

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.synthetic import World, WorldStream, preset


@pytest.fixture
def world() -> World:
    return World(preset("quick", noise=0.1))


def test_a_stream_names_its_site_and_width_and_gives_rows_of_that_width(world):
    stream = WorldStream(world, batch_size=32)
    batch = stream.batch(4)
    assert dict(stream.widths) == {"synthetic": 64}
    assert list(batch) == ["synthetic"]
    assert batch["synthetic"].shape == (stream.batch_size, 64)
    assert batch["synthetic"].dtype == torch.float32


def test_a_stream_needs_no_state_to_go_on_from_any_step(world):
    stream = WorldStream(world, batch_size=32)
    rows = [stream.batch(step)["synthetic"] for step in range(4)]
    again = WorldStream(World(world.settings), batch_size=32)
    assert torch.equal(again.batch(3)["synthetic"], rows[3])
    assert torch.equal(again.batch(0)["synthetic"], rows[0])
    assert not torch.equal(rows[0], rows[1])


def test_held_out_rows_are_other_rows(world):
    train, held_out = WorldStream(world, 64), WorldStream(world, 64, split="held-out")
    assert float(torch.cdist(train.batch(0)["synthetic"], held_out.batch(0)["synthetic"]).min()) > 1e-3


def test_a_stream_gives_the_truth_behind_the_same_rows_and_can_leave_the_noise_out(world):
    stream = WorldStream(world, 64, split="held-out")
    assert torch.equal(stream.batch_with_truth(2).x, stream.batch(2)["synthetic"])
    clean = WorldStream(world, 64, split="held-out", noisy=False).batch_with_truth(2)
    assert torch.allclose(clean.codes @ clean.directions, clean.x, atol=1e-6)
    assert torch.equal(clean.codes, stream.batch_with_truth(2).codes)
    assert not torch.allclose(clean.x, stream.batch(2)["synthetic"], atol=1e-2)


def test_a_stream_that_cannot_be_is_refused_when_it_is_made(world):
    with pytest.raises(UserError, match="did you mean 'train'"):
        WorldStream(world, 64, split="trian")
    with pytest.raises(UserError, match="batch_size = 0"):
        WorldStream(world, 0)

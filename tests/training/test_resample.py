from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import Moment
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OPTIMIZERS, OptimizerSettings
from sparse_coding.training.resample import _Draw, resample
from sparse_coding.training.stack import Stack
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import Member, grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

X = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))


def trained_stack(name="relu", optimizer="adam", **shared):
    chosen = grid(name, {"x": 8}, [2], seeds=[0, 1], **shared)
    stack = Stack(chosen, OptimizerSettings(name=optimizer), "cpu", torch.float32, DeadSettings(window=64))
    with torch.no_grad():  # latents 3 and 5 of the second member never fire
        for bias in ("b_enc", "b_gate"):
            if hasattr(stack.dictionary, bias):
                getattr(stack.dictionary, bias)[1, [3, 5]] = -100.0
                silenced = torch.zeros(2, 16, dtype=torch.bool)
                silenced[1, [3, 5]] = True
                stack.optimizer.forget_({bias: silenced})
    for start in range(0, 128, 32):
        stack.step({"x": X[start : start + 32]}, 1.0)
    return stack


@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu", "relu-april"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_dead_latents_point_at_inputs_and_their_memory_is_wiped(name, optimizer):
    stack = trained_stack(name, optimizer)
    dead = stack.clocks.dead()
    assert dead[1, [3, 5]].all()
    before = {key: value.clone() for key, value in stack.dictionary.tensors().items()}
    resample([stack], [{"x": X}], Moment(4, 10))
    after = stack.dictionary.tensors()
    alive = ~dead
    for key, axis in stack.dictionary.latent_axes.items():
        old, new = before[key].movedim(axis, 1), after[key].movedim(axis, 1)
        assert torch.equal(old[alive], new[alive]), key
    W_dec, W_enc = after["W_dec"], after["W_enc"]
    directions = torch.nn.functional.normalize(X, dim=1)
    for member, latent in dead.nonzero().tolist():
        atom = torch.nn.functional.normalize(W_dec[member, latent], dim=0)
        assert (directions @ atom).max() > 0.9999
        column = W_enc[member, :, latent]
        assert_close(column.norm(), 0.2 * before["W_enc"][member][:, alive[member]].norm(dim=0).mean())
        assert_close(torch.nn.functional.normalize(column, dim=0), atom)
        for bias in ("b_enc", "b_gate", "b_mag", "r_mag"):
            if bias in after:
                assert after[bias][member, latent] == 0
    if "threshold" in after:
        assert after["threshold"][1, 3] == stack.members[0].settings.initial_threshold
    for part, tensors in stack.optimizer.state().items():
        for key, value in tensors.items():
            if key in stack.dictionary.latent_axes and value.shape == before[key].shape:
                held = value.movedim(stack.dictionary.latent_axes[key], 1)
                reset = after[key].movedim(stack.dictionary.latent_axes[key], 1) if optimizer == "schedule-free" else 0
                same = held[dead] == (reset[dead] if torch.is_tensor(reset) else 0)
                zero = held[dead] == 0
                assert (same | zero).all(), (part, key)
    assert not stack.clocks.dead()[dead].any()


def test_the_living_are_left_alone_when_nothing_is_dead():
    stack = Stack(grid("relu", {"x": 8}, [1]), OptimizerSettings(), "cpu", torch.float32)
    before = {key: value.clone() for key, value in stack.dictionary.tensors().items()}
    assert resample([stack], iter(()), Moment()) == [0]
    assert all(torch.equal(value, before[key]) for key, value in stack.dictionary.tensors().items())


def test_inputs_are_drawn_with_probability_proportional_to_the_squared_loss():
    losses = torch.tensor([1.0, 2.0, 3.0, 0.0])
    counts = torch.zeros(4)
    for seed in range(3000):
        draw = _Draw(Member("relu", grid("relu", {"x": 1}, [1])[0].settings, seed=seed), 7, 1)
        draw.offer(losses[:2], torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1))  # in two pieces
        draw.offer(losses[2:], torch.tensor([[2.0], [3.0]]), torch.zeros(2, 1))
        counts[int(draw.x[0, 0])] += 1
    expected = losses.square() / losses.square().sum()
    assert_close(counts / 3000, expected, atol=0.03, rtol=0)
    assert counts[3] == 0


def test_inputs_are_drawn_without_replacement():
    draw = _Draw(grid("relu", {"x": 1}, [1])[0], 0, 3)
    draw.offer(torch.tensor([5.0, 1e-3, 1e-3]), torch.arange(3.0)[:, None], torch.zeros(3, 1))
    assert sorted(draw.x.flatten().tolist()) == [0.0, 1.0, 2.0]


def test_resampling_in_a_run_revives_latents_and_does_not_depend_on_the_company():
    chosen = grid("relu", {"x": 8}, [8], lrs=[2e-2], seeds=[0, 1], varied={"l1_coefficient": [3.0]})
    stream = TensorStream({"x": X}, 32)
    how = {"log_every": 20, "precision": "fp32"}
    dead = DeadSettings(window=320)
    again = DeadSettings(window=320, resample_every=60, resample_times=1, resample_rows=256)
    without = Trainer(chosen, stream, TrainingSettings(100, OptimizerSettings(), dead=dead, **how))
    without.fit()
    warmed = OptimizerSettings(resample_warmup_steps=10)
    both = Trainer(chosen, stream, TrainingSettings(100, warmed, dead=again, **how))
    both.fit()
    alone = Trainer(chosen[1:], stream, TrainingSettings(100, warmed, dead=again, **how))
    alone.fit()
    n_dead = [trainer.stacks[0].clocks.dead().sum().item() for trainer in (without, both)]
    assert n_dead[0] > 10
    assert n_dead[1] < 0.7 * n_dead[0]
    assert_close(both.dictionary(1).atoms, alone.dictionary(0).atoms, atol=1e-5, rtol=1e-4)


def test_the_rows_are_read_once_for_all_stacks():
    stacks, reads = [trained_stack(), trained_stack("gated")], []
    resample(stacks, (reads.append(i) or {"x": X[i * 64 : (i + 1) * 64]} for i in range(4)), Moment(4, 10))
    assert reads == [0, 1, 2, 3]
    assert not any(stack.clocks.dead()[1, [3, 5]].any() for stack in stacks)

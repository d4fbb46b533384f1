"""What holds for every architecture and optimiser: a sweep equals its members, a resumed run one never stopped."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import ARCHITECTURES
from sparse_coding.errors import Interrupted
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OPTIMIZERS, OptimizerSettings
from sparse_coding.training.run_folder import RunFolder
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

X = torch.randn(512, 12, generator=torch.Generator().manual_seed(1))
Y = torch.randn(512, 8, generator=torch.Generator().manual_seed(2)) + X[:, :8]
VARIED = {
    "relu": {"l1_coefficient": [0.1, 1.0]},
    "relu-april": {"l1_coefficient": [0.1, 1.0]},
    "lp": {"l1_coefficient": [0.1, 0.5]},
    "gated": {"l1_coefficient": [0.1, 1.0]},
    "topk": {"k": [2, 5], "auxk_coefficient": [0.03, 0.3]},
    "batchtopk": {"k": [2, 4.5]},
    "matryoshka": {"k": [2, 5]},
    "jumprelu": {"l0_coefficient": [0.1, 0.5], "target_l0": [0.0, 4.0], "bandwidth": [0.1, 0.3]},
    "matching-pursuit": {"k": [2, 4]},
}
SHARED = {"matryoshka": {"group_fractions": (0.25, 0.25, 0.5)}, "gated": {"dead_latents": "ghost"}}


class Stream(TensorStream):
    """Rows, and targets of another width; asks for a stop when it reaches a step."""

    stop_at = -1

    def batch(self, step):
        if step == self.stop_at:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(step)


def stream():
    return Stream({"x": X, "y": Y}, batch_size=32)


def members(name, **changes):
    arguments = {"varied": VARIED[name], "seeds": [0, 1], **SHARED.get(name, {}), **changes}
    return grid(name, {"x": 12, "y": 8}, [2], targets=arguments.pop("targets", None), **arguments)[:]


def only_x(found):
    return [member for member in found if member.site == "x"]


def settings(steps=60, **changes):
    optimizer = changes.pop("optimizer", OptimizerSettings(warmup_steps=5, schedule="linear"))
    return TrainingSettings(
        steps, optimizer, "fp32", 20, sparsity_warmup_steps=10, dead=changes.pop("dead", DeadSettings(window=320))
    )


def values(trainer):
    return [{**d.tensors(), **d.state()} for d in (trainer.dictionary(i) for i in range(len(trainer.members)))]


def assert_same(first, second, **tolerance):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_member_of_a_sweep_equals_the_member_alone(name):
    chosen = only_x(members(name))
    sweep = Trainer(chosen, stream(), settings())
    assert max(len(group) for group in sweep.groups) == len(chosen), "what may differ inside a stack split it"
    sweep.fit()
    for index in (0, len(chosen) - 1):
        alone = Trainer([chosen[index]], stream(), settings())
        alone.fit()
        assert_same([values(sweep)[index]], values(alone), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_training_lowers_the_error(name):
    chosen = only_x(members(name))[:1]
    seen = []
    trainer = Trainer(chosen, stream(), settings(200), loggers=[seen.append])
    trainer.fit()
    assert seen[-1]["fvu"][0] < 0.9 * seen[0]["fvu"][0]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "matching-pursuit"])
@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_learn_to_predict_another_site(name, skip):
    chosen = members(name, targets={"x": "y"}, skip=skip, lrs=[3e-3])[:2]
    assert {(member.site, member.target, member.settings.target_width) for member in chosen} == {("x", "y", 8)}
    seen = []
    trainer = Trainer(chosen, stream(), settings(300), loggers=[seen.append])
    trainer.fit()
    assert seen[-1]["fvu"][0] < min(0.9, 0.9 * seen[0]["fvu"][0])
    assert trainer.dictionary(0)(X).shape == (512, 8)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize("stop_at", [13, 41])
def test_a_resumed_run_equals_one_never_stopped_bit_for_bit(name, stop_at, tmp_path):
    resample = DeadSettings(window=160, resample_every=25, resample_times=2, resample_rows=64)
    how = settings(dead=resample, optimizer=OptimizerSettings(resample_warmup_steps=5))
    chosen = only_x(members(name, seeds=[0]))
    whole = Trainer(chosen, stream(), how)
    whole.fit()
    stopping = stream()
    stopping.stop_at = stop_at
    with RunFolder(tmp_path / "run", {}) as folder, pytest.raises(Interrupted):
        Trainer(chosen, stopping, how, folder=folder).fit()
    with RunFolder(tmp_path / "run", {}) as folder:
        resumed = Trainer(chosen, stream(), how, folder=folder)
        assert resumed.step == stop_at
        resumed.fit()
    assert_same(values(whole), values(resumed), atol=0, rtol=0)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_optimiser_trains_and_resumes_bit_for_bit(optimizer, tmp_path):
    how = settings(optimizer=OptimizerSettings(name=optimizer, warmup_steps=5, weight_decay=0.01, clip_norm=1.0))
    chosen = only_x(members("topk", lrs=[1e-3, 3e-3], seeds=[0]))
    seen = []
    whole = Trainer(chosen, stream(), how, loggers=[seen.append])
    whole.fit()
    assert seen[-1]["fvu"][0] < seen[0]["fvu"][0]
    stopping = stream()
    stopping.stop_at = 17
    with RunFolder(tmp_path / "run", {}) as folder, pytest.raises(Interrupted):
        Trainer(chosen, stopping, how, folder=folder).fit()
    with RunFolder(tmp_path / "run", {}) as folder:
        resumed = Trainer(chosen, stream(), how, folder=folder)
        resumed.fit()
    assert_same(values(whole), values(resumed), atol=0, rtol=0)
    norms = whole.dictionary(0).atoms.norm(dim=1)
    assert_close(norms, torch.ones_like(norms), atol=1e-5, rtol=0)  # the averaged weights of schedule-free too


def test_dictionaries_of_several_sites_lie_side_by_side_in_a_crosscoder():
    both = torch.cat([X, Y], dim=1)
    chosen = grid("relu-april", {"x+y": 20}, [2], parts={"x+y": [12, 8]}, varied={"l1_coefficient": [0.5]})
    assert chosen[0].settings.parts == (12, 8)
    trainer = Trainer(chosen, TensorStream({"x+y": both}, 32), settings())
    trainer.fit()
    norms = trainer.dictionary(0).norms
    W_dec = trainer.dictionary(0).atoms
    assert_close(norms, W_dec[:, :12].norm(dim=1) + W_dec[:, 12:].norm(dim=1))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_initial_values_may_come_from_the_data(name):
    chosen = only_x(members(name, seeds=[0], init="data", b_dec_init="geometric-median"))[:1]
    trainer = Trainer(chosen, stream(), settings(1, optimizer=OptimizerSettings()))
    start = trainer.dictionary(0)
    assert start.tensors()["b_dec"].norm() > 0
    directions = torch.nn.functional.normalize(X - start.tensors()["b_dec"], dim=1)
    nearest = (torch.nn.functional.normalize(start.atoms, dim=1) @ directions.T).max(1).values
    assert nearest.min() > 0.999


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "schedule-free"])
def test_a_member_that_skips_updates_in_fp16_does_not_touch_the_others(optimizer):
    """An L1 weight of a million overflows in fp16: that member skips updates, whichever place it has in the stack."""
    how = TrainingSettings(25, OptimizerSettings(name=optimizer), "fp16", 25)
    chosen = grid("relu", {"x": 12}, [2], varied={"l1_coefficient": [1e6, 0.1, 1.0]})
    sweep = Trainer(chosen, TensorStream({"x": X}, 32), how)
    sweep.fit()
    for index in (1, 2):
        alone = Trainer([chosen[index]], TensorStream({"x": X}, 32), how)
        alone.fit()
        assert_same([values(sweep)[index]], values(alone), atol=1e-5, rtol=1e-4)


def test_nothing_is_resampled_after_the_last_update():
    dead = DeadSettings(window=32, resample_every=20, resample_times=2, resample_rows=64)
    trainer = Trainer(only_x(members("topk", seeds=[0])), stream(), TrainingSettings(40, precision="fp32", dead=dead))
    trainer.fit()
    assert (trainer.stacks[0].clocks.rows_since_fired >= 32).any()  # the dead of the end stay as they were


def test_terms_of_the_loss_are_logged_from_when_they_enter(tmp_path):
    from sparse_coding.training.run_folder import read_lines

    chosen = only_x(members("topk", seeds=[0])) + only_x(members("relu", seeds=[0]))
    how = TrainingSettings(40, precision="fp32", log_every=10, dead=DeadSettings(window=320))
    with RunFolder(tmp_path / "whole", {}) as folder:
        Trainer(chosen, stream(), how, folder=folder).fit()
    lines = read_lines(tmp_path / "whole" / "log.jsonl")
    assert "auxk" not in lines[0]
    assert lines[-1]["auxk"][0] is not None
    assert lines[-1]["auxk"][-1] is None  # relu has none
    stopping = stream()
    stopping.stop_at = 25
    with RunFolder(tmp_path / "cut", {}) as folder, pytest.raises(Interrupted):
        Trainer(chosen, stopping, how, folder=folder).fit()
    with RunFolder(tmp_path / "cut", {}) as folder:
        Trainer(chosen, stream(), how, folder=folder).fit()
    again = read_lines(tmp_path / "cut" / "log.jsonl")
    assert [line.get("auxk") for line in again] == [line.get("auxk") for line in lines]

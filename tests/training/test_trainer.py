from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import ReLU
from sparse_coding.errors import Interrupted, UserError
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.run_folder import RunFolder, read_lines
from sparse_coding.training.stream import NormalisedStream, TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

ROWS = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))


def stream():
    return TensorStream({"synthetic": ROWS}, batch_size=32)


def members(**changes):
    arguments = {"ratios": [1, 2], "lrs": [1e-3, 3e-3], "seeds": [0, 1], "varied": {"l1_coefficient": [0.1, 1.0]}}
    return grid("relu", {"synthetic": 16}, **{**arguments, **changes})


def settings(steps=40, **changes):
    return TrainingSettings(steps=steps, log_every=10, **changes)


def weights(trainer):
    return [trainer.dictionary(index).tensors() for index in range(len(trainer.members))]


def assert_same(first, second, **tolerance):
    for a, b in zip(first, second, strict=True):
        for name in a:
            assert_close(a[name], b[name], **tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_member_trained_in_a_sweep_equals_the_member_trained_alone(precision):
    chosen = members()
    sweep = Trainer(chosen, stream(), settings(precision=precision))
    sweep.fit()
    assert max(len(group) for group in sweep.groups) > 1
    for index in (0, 3, 9, 15):
        alone = Trainer([chosen[index]], stream(), settings(precision=precision))
        alone.fit()
        # bf16 products may be rounded another way when batched; after 40 Adam steps that stays below half a step
        tolerance = {"atol": 1e-6, "rtol": 1e-5} if precision == "fp32" else {"atol": 5e-4, "rtol": 0}
        assert_same([sweep.dictionary(index).tensors()], [alone.dictionary(0).tensors()], **tolerance)


def test_the_trainer_equals_a_plain_loop_over_torchs_own_adam():
    chosen = members(ratios=[2], lrs=[2e-3], seeds=[5], varied={"l1_coefficient": [0.3]})
    trainer = Trainer(chosen, stream(), settings(steps=20, precision="fp32"))
    trainer.fit()
    dictionary = ReLU.single(chosen[0].settings, ReLU.initial(chosen[0].settings, torch.Generator().manual_seed(5)))
    optimizer, data = torch.optim.Adam(dictionary.parameters(), lr=2e-3), stream()
    for step in range(20):
        optimizer.zero_grad()
        dictionary.loss(data.batch(step)["synthetic"]).total.backward()
        gradient, atoms = dictionary.W_dec.grad, dictionary.W_dec.detach()
        gradient -= (gradient * atoms).sum(1, keepdim=True) * atoms
        optimizer.step()
        with torch.no_grad():
            dictionary.W_dec /= dictionary.W_dec.norm(dim=1, keepdim=True)
    assert_same([trainer.dictionary(0).tensors()], [dictionary.tensors()], atol=1e-5, rtol=1e-4)


def test_training_without_a_fast_step_follows_the_definition(monkeypatch):
    fast = Trainer(members(), stream(), settings(precision="fp32"))
    fast.fit()
    monkeypatch.setattr(ReLU, "fused_gradients", lambda *_: None)
    slow = Trainer(members(), stream(), settings(precision="fp32"))
    slow.fit()
    assert_same(weights(fast), weights(slow), atol=1e-5, rtol=1e-4)


def test_logging_more_often_changes_nothing():
    quiet = Trainer(members(), stream(), TrainingSettings(steps=30, log_every=30))
    chatty = Trainer(members(), stream(), TrainingSettings(steps=30, log_every=1))
    quiet.fit()
    chatty.fit()
    assert_same(weights(quiet), weights(chatty), atol=0, rtol=0)


def test_the_log_says_what_a_recomputation_says(tmp_path):
    chosen = members(lrs=[1e-3], seeds=[0])
    with RunFolder(tmp_path / "run", {}) as folder:
        trainer = Trainer(chosen, stream(), TrainingSettings(steps=1, log_every=1, precision="fp32"), folder=folder)
        before = weights(trainer)
        trainer.fit()
        record = read_lines(tmp_path / "run" / "log.jsonl")[0]
    x = stream().batch(0)["synthetic"]
    for index, member in enumerate(chosen):
        losses = ReLU.single(member.settings, before[index]).loss(x)
        assert record["loss"][index] == pytest.approx(losses.total.item(), rel=1e-5)
        assert record["mse"][index] == pytest.approx((losses.x_hat - x).square().mean().item(), rel=1e-5)
        fvu = (losses.x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
        assert record["fvu"][index] == pytest.approx(fvu.item(), rel=1e-5)
        assert record["l0"][index] == pytest.approx((losses.f > 0).sum(1).float().mean().item())
        assert record["l1"][index] == pytest.approx(losses.f.sum(1).mean().item(), rel=1e-5)


def test_dead_latents_are_those_silent_for_the_window():
    trainer = Trainer(
        members(lrs=[1e-3], seeds=[0]), stream(), TrainingSettings(steps=4, log_every=4, dead=DeadSettings(64))
    )
    stack = trainer.stacks[0]
    with torch.no_grad():
        stack.dictionary.b_enc[:, 0] = -1e6  # never fires
    for step in range(3):
        stack.step(stream().batch(step), 1.0)
        assert stack.averages()["dead"][0] == (1 if step >= 1 else 0)


@pytest.mark.parametrize("stop_at", [1, 17, 39])
def test_a_run_stopped_at_any_step_and_resumed_equals_one_never_stopped(tmp_path, stop_at):
    whole = Trainer(members(), stream(), settings())
    whole.fit()

    class StopsHere(TensorStream):
        def batch(self, step):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step)

    path = tmp_path / "run"
    with RunFolder(path, {"a": 1}) as folder:
        stopped = Trainer(members(), StopsHere({"synthetic": ROWS}, 32), settings(), folder=folder)
        with pytest.raises(Interrupted, match="SIGTERM"):
            stopped.fit()
        assert stopped.step == stop_at  # reading is given up at once
    with RunFolder(path, {"a": 1}) as folder:
        resumed = Trainer(members(), stream(), settings(), folder=folder)
        assert resumed.step == stop_at
        resumed.fit()
    assert_same(weights(whole), weights(resumed), atol=0, rtol=0)


def test_the_log_of_a_resumed_run_equals_that_of_a_run_never_stopped(tmp_path):
    def lines(name):
        timeless = [
            {k: v for k, v in line.items() if k != "seconds"} for line in read_lines(tmp_path / name / "log.jsonl")
        ]
        return json.dumps(timeless)

    with RunFolder(tmp_path / "whole", {}) as folder:
        Trainer(members(), stream(), settings(), folder=folder).fit()
    with RunFolder(tmp_path / "cut", {}) as folder:
        cut = Trainer(members(), stream(), settings(), folder=folder)
        for step in range(14):
            assert cut.step == step
            cut.advance()
            if cut.step == 10:
                cut._log(1.0)
        cut.save()
        folder.append("log.jsonl", {"step": 20, "loss": "written after the checkpoint, before the kill"})
    with RunFolder(tmp_path / "cut", {}) as folder:
        Trainer(members(), stream(), settings(), folder=folder).fit()
    assert lines("whole") == lines("cut")


def test_one_diverging_member_does_not_stop_the_others():
    chosen = members(ratios=[1], lrs=[1e-3], seeds=[0], varied={"l1_coefficient": [0.1, 1e38]})
    trainer = Trainer(chosen, stream(), settings(precision="fp32"))
    with torch.no_grad():
        trainer.stacks[0].dictionary.W_enc[1, 0, 0] = float("nan")
    seen = []
    trainer.loggers = [seen.append]
    trainer.fit()
    assert seen[-1]["loss"][0] is not None
    assert seen[-1]["loss"][1] is None


def test_a_sweep_in_which_every_member_diverged_says_so():
    trainer = Trainer(members(), TensorStream({"synthetic": ROWS * float("nan")}, 32), settings())
    with pytest.raises(UserError, match="update 1 of 40: the batch holds NaN or infinity"):
        trainer.fit()


def test_warm_up_and_decay_reach_the_optimiser():
    schedule = OptimizerSettings(warmup_steps=5, schedule="linear", decay_fraction=0.5)
    seen = []
    trainer = Trainer(members(), stream(), TrainingSettings(20, schedule, log_every=1), loggers=[seen.append])
    trainer.fit()
    assert [record["lr_scale"] for record in seen] == [schedule.scale(step, 20) for step in range(20)]
    constant = Trainer(members(), stream(), TrainingSettings(20, log_every=1))
    constant.fit()
    assert not torch.equal(constant.dictionary(0).atoms, trainer.dictionary(0).atoms)


def test_a_scaled_stream_has_rows_of_mean_norm_sqrt_d_and_the_same_order():
    scaled = NormalisedStream(stream(), "mean-norm")
    x = scaled.batch(0)["synthetic"]
    assert x.norm(dim=1).mean().item() == pytest.approx(4.0)
    assert_close(scaled.batch(3)["synthetic"] / scaled.maps["synthetic"].factor[0], stream().batch(3)["synthetic"])


def test_several_sites_train_side_by_side_as_they_would_apart():
    both = {"a": ROWS, "b": ROWS.flip(1) * 2}
    chosen = grid("relu", {"a": 16, "b": 16}, [1], varied={"l1_coefficient": [0.1]})
    together = Trainer(chosen, TensorStream(both, 32), settings(precision="fp32"))
    together.fit()
    for index, site in enumerate("ab"):
        apart = Trainer([chosen[index]], TensorStream({site: both[site]}, 32), settings(precision="fp32"))
        apart.fit()
        assert_same([together.dictionary(index).tensors()], [apart.dictionary(0).tensors()], atol=0, rtol=0)

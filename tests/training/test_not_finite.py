"""NaN and infinity in batches and losses: the run stops with the state from before, or leaves the batch out."""

from __future__ import annotations

import json

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.training import trainer as trainer_module
from sparse_coding.training.run_folder import RunFolder, read_lines
from sparse_coding.training.safety import Safety
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

ROWS = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
STEPS = 40


class Damaged(TensorStream):
    """Some of its batches hold what is no number in one row, or so much that every square overflows."""

    def __init__(self, bad, value=float("nan")):
        super().__init__({"synthetic": ROWS}, 32)
        self.bad, self.value = set(bad), value

    def batch(self, step):
        batch = super().batch(step)
        if step in self.bad:
            batch["synthetic"][5, 3] = self.value
        return batch


def members(**changes):
    return grid("relu", {"synthetic": 16}, **{"ratios": [1, 2], "varied": {"l1_coefficient": [0.1, 1.0]}, **changes})


def settings(**changes):
    return TrainingSettings(steps=STEPS, log_every=10, **changes)


def weights(trainer):
    return [trainer.dictionary(index).tensors() for index in range(len(trainer.members))]


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def without(bad):
    """The trainer after a run whose updates `bad` were left out, stepped by hand."""
    trainer = Trainer(members(), TensorStream({"synthetic": ROWS}, 32), settings())
    for step in range(STEPS):
        if step not in bad:
            trainer.advance()
        else:
            trainer.step += 1
    return trainer


@pytest.fixture(params=["at once", "late"])
def looked_for(request, monkeypatch):
    """As on a CPU, which sees a batch before it is used, or as on a GPU, at the next line of the log."""
    if request.param == "late":
        real = Trainer.__init__

        def late(self, *args, **kwargs):
            real(self, *args, **kwargs)
            self.careful = False

        monkeypatch.setattr(Trainer, "__init__", late)
    return request.param


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("saves", [1e6, 0.0])
def test_the_state_saved_is_from_before_the_bad_step(tmp_path, looked_for, value, saves):
    clean = Trainer(members(), TensorStream({"synthetic": ROWS}, 32), TrainingSettings(steps=17, log_every=10))
    clean.fit()
    often = Safety(checkpoint_share=1.0)
    with RunFolder(tmp_path / "run", {}) as folder:
        trainer = Trainer(members(), Damaged([17], value), settings(), "cpu", folder, saves, safety=often)
        with pytest.raises(
            UserError, match=r"update 18 of 40: the batch holds NaN or infinity.*before it is saved.*--nan"
        ):
            trainer.fit()
        assert trainer.step == 17
    with RunFolder(tmp_path / "run", {}) as folder:
        resumed = Trainer(members(), Damaged([]), settings(), folder=folder)
        assert resumed.step == 17
        for a, b in zip(weights(clean), weights(resumed), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
        assert [line["step"] for line in read_lines(folder.path / "log.jsonl")] == [10]
        resumed.fit()  # mended activations: the run that never met any
    whole = Trainer(members(), TensorStream({"synthetic": ROWS}, 32), settings())
    whole.fit()
    assert_same(weights(whole), weights(resumed))


@pytest.mark.parametrize("bad", [[0], [17], [10, 11, 19, 20], [39], range(10, 20)])
@pytest.mark.parametrize("saves", [1e6, 0.0])
def test_skipping_leaves_the_batch_out_and_counts_it(tmp_path, looked_for, bad, saves):
    skip = Safety(checkpoint_share=1.0, nan="skip")
    with RunFolder(tmp_path / "run", {}) as folder:
        trainer = Trainer(members(), Damaged(bad), settings(), "cpu", folder, saves, safety=skip)
        trainer.fit()
        log = read_lines(folder.path / "log.jsonl")
    assert_same(weights(trainer), weights(without(bad)))
    assert [line["step"] for line in log] == [10, 20, 30, 40]
    assert [line.get("skipped_batches", 0) for line in log] == [sum(b < at for b in bad) for at in (10, 20, 30, 40)]
    known = json.loads((tmp_path / "run" / "settings.json").read_text())["skipped_batches"]
    assert known == {"count": len(bad), "updates": list(bad)}
    if list(bad) == list(range(10, 20)):
        assert log[1]["loss"] == [None] * 4  # nothing was trained in between
    else:
        assert all(value is not None for line in log for value in line["loss"])


def test_a_stopped_run_goes_on_with_skip(tmp_path, looked_for):
    with RunFolder(tmp_path / "run", {}) as folder, pytest.raises(UserError):
        Trainer(members(), Damaged([13, 25]), settings(), folder=folder).fit()
    with RunFolder(tmp_path / "run", {}) as folder:
        trainer = Trainer(members(), Damaged([13, 25]), settings(), folder=folder, safety=Safety(nan="skip"))
        trainer.fit()
    assert_same(weights(trainer), weights(without([13, 25])))


def test_a_run_that_skipped_and_was_killed_equals_one_that_was_not(tmp_path, looked_for):
    skip, bad = Safety(nan="skip"), [3, 13, 25]
    with RunFolder(tmp_path / "run", {}) as folder:
        first = Trainer(members(), Damaged(bad), TrainingSettings(steps=20, log_every=10), folder=folder, safety=skip)
        first.fit()
    with RunFolder(tmp_path / "run", {}) as folder:
        second = Trainer(members(), Damaged(bad), settings(), folder=folder, safety=skip)
        assert second.skipped == [3, 13]
        second.fit()
        assert read_lines(folder.path / "log.jsonl")[-1]["skipped_batches"] == 3
    assert_same(weights(second), weights(without(bad)))


@pytest.mark.parametrize("nan", ["stop", "skip"])
@pytest.mark.parametrize("saves", [1e6, 0.0])
def test_a_loss_that_is_no_number_on_a_sound_batch(tmp_path, monkeypatch, nan, saves):
    """The rows are fine, but from update 23 on every loss is not, until the state is set back."""
    real = trainer_module.Stack.step

    def breaks(stack, batch, scale, moment):
        real(stack, batch, scale, moment)
        if moment.step == 23:
            stack.sums["loss"] += float("nan")
            with torch.no_grad():
                stack.dictionary.W_dec += float("nan")

    monkeypatch.setattr(trainer_module.Stack, "step", breaks)
    safety = Safety(checkpoint_share=1.0, nan=nan)
    with RunFolder(tmp_path / "run", {}) as folder:
        trainer = Trainer(members(), Damaged([]), settings(), "cpu", folder, saves, safety=safety)
        if nan == "stop":
            with pytest.raises(UserError, match="update 24 of 40: the loss of every dictionary is NaN"):
                trainer.fit()
            monkeypatch.undo()
            resumed = Trainer(members(), Damaged([]), settings(), folder=folder)
            assert resumed.step == 23
            resumed.fit()
            whole = Trainer(members(), Damaged([]), settings())
            whole.fit()
            assert_same(weights(whole), weights(resumed))
        else:
            trainer.fit()
            monkeypatch.undo()
            assert_same(weights(trainer), weights(without([23])))


def test_no_damaged_weights_are_ever_saved(tmp_path, monkeypatch, looked_for):
    from sparse_coding.training import checkpoint

    real = checkpoint.save

    def checked(folder, step, tensors, *rest):
        assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point()), step
        return real(folder, step, tensors, *rest)

    monkeypatch.setattr(checkpoint, "save", checked)
    safety = Safety(checkpoint_share=1.0, nan="skip")
    with RunFolder(tmp_path / "run", {}) as folder:
        Trainer(members(), Damaged([4, 17, 39]), settings(), "cpu", folder, 0.0, safety=safety).fit()


def test_batch_after_batch_of_them_stops(tmp_path, looked_for):
    with RunFolder(tmp_path / "run", {}) as folder, pytest.raises(UserError, match="as did the 19 before it"):
        Trainer(members(), Damaged(range(5, 40)), settings(), folder=folder, safety=Safety(nan="skip")).fit()


def test_without_a_folder_it_starts_again_from_the_beginning(looked_for):
    trainer = Trainer(members(), Damaged([13]), settings(), safety=Safety(nan="skip"))
    trainer.fit()
    assert_same(weights(trainer), weights(without([13])))


def test_a_member_that_diverges_is_named_and_the_others_go_on(capsys):
    trainer = Trainer(members(), Damaged([]), settings(precision="fp32"))
    with torch.no_grad():
        trainer.stacks[0].dictionary.W_enc[1, 0, 0] = float("nan")
    trainer.fit()
    told = [line for line in capsys.readouterr().err.splitlines() if "diverged" in line]
    assert len(told) == 1
    assert trainer.members[1].name in told[0]


def test_the_hot_path_waits_for_nothing(monkeypatch):
    """Between two lines of the log nothing asks a GPU for a value: `careful` off, no tensor becomes a number."""
    trainer = Trainer(members(), Damaged([]), settings(precision="fp32"))
    trainer.careful = False
    for name in ("__bool__", "item", "tolist", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waits for the device"))
    for _ in range(9):
        trainer.advance()

"""Out of memory: what the message names, and batches taken in pieces."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import ARCHITECTURES
from sparse_coding.errors import UserError, is_out_of_memory, reported
from sparse_coding.training import stack as stack_module
from sparse_coding.training.estimate import estimate
from sparse_coding.training.micro_batches import in_pieces, plan_without_memory
from sparse_coding.training.run_folder import RunFolder
from sparse_coding.training.safety import Safety
from sparse_coding.training.stack import Stack
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

ROWS = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
AUTO = Safety(auto_batch=True)
WHOLE = {"batchtopk", "matryoshka", "lp"}  # lp keeps running values of its batches


def stream(batch_size=32):
    return TensorStream({"synthetic": ROWS}, batch_size=batch_size)


def members(name="relu", **changes):
    return grid(name, {"synthetic": 16}, **{"ratios": [2], **changes})


def settings(steps=20):
    return TrainingSettings(steps=steps, log_every=5, precision="fp32")


@pytest.fixture
def small(monkeypatch):
    """A machine whose memory holds the step of so many rows."""

    def limit(rows):
        seen = []
        real = Stack._gradients

        def limited(self, x, target, moment):
            seen.append(len(x))
            if len(x) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return real(self, x, target, moment)

        monkeypatch.setattr(Stack, "_gradients", limited)
        return seen

    return limit


def fitted(**arguments):
    trainer = Trainer(
        members(**arguments.pop("members", {})), stream(arguments.pop("batch", 32)), settings(), **arguments
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize(("batch", "holds", "pieces"), [(32, 8, 4), (32, 31, 2), (30, 8, 4), (31, 1, 31)])
def test_pieces_equal_the_whole_batch(small, capsys, batch, holds, pieces):
    whole = fitted(batch=batch)
    seen = small(holds)
    split = fitted(batch=batch, safety=AUTO)
    assert split.stacks[0].micro.pieces == pieces
    assert max(seen[10:]) <= holds
    for name, value in whole.dictionary(0).tensors().items():
        assert_close(split.dictionary(0).tensors()[name], value, atol=2e-6, rtol=2e-5)
    assert f"now taken in {pieces} pieces" in capsys.readouterr().err


def test_the_log_of_pieces_is_that_of_the_whole(small):
    lines, split = [], []
    fitted(loggers=[lines.append])
    small(8)
    fitted(loggers=[split.append], safety=AUTO)
    for a, b in zip(lines, split, strict=True):
        for key in ("loss", "mse", "fvu", "l1", "l0", "dead"):
            assert b[key] == pytest.approx(a[key], rel=1e-5)


def test_without_it_the_message_names_what_to_lower(small):
    small(8)
    with pytest.raises(UserError, match=r"step of 32 rows: lower --batch-size or --ratios.*or give --auto-batch"):
        fitted()


def test_memory_that_holds_no_row_is_an_error_and_no_endless_loop(small):
    small(0)
    with pytest.raises(UserError, match="step of a single row"):
        fitted(safety=AUTO)


def test_a_resumed_run_takes_the_same_pieces_from_the_start(small, tmp_path):
    small(8)
    with RunFolder(tmp_path / "run", {}) as folder:
        Trainer(members(), stream(), settings(10), folder=folder, safety=AUTO).fit()
    with RunFolder(tmp_path / "run", {}) as folder:
        resumed = Trainer(members(), stream(), settings(), folder=folder, safety=AUTO)
        assert resumed.stacks[0].micro.pieces == 4
        resumed.fit()
    once = fitted(safety=AUTO)
    for name, value in once.dictionary(0).tensors().items():
        assert torch.equal(resumed.dictionary(0).tensors()[name], value)


def test_losses_over_the_whole_batch_are_told_from_means_over_rows():
    for name in ARCHITECTURES:
        trainer = Trainer(members(name, seeds=[0]), stream(), settings(), safety=AUTO)
        told = {stack.micro.whole for stack in trainer.stacks}
        assert told == {name in WHOLE}, name


@pytest.mark.parametrize(
    "changes",
    [{"error": "fvu"}, {"dead_latents": "ghost"}, {"name": "jumprelu", "varied": {"target_l0": [4.0]}}],
)
def test_so_are_settings_that_look_at_the_whole_batch(changes):
    (stack,) = Trainer(members(**changes), stream(), settings(), safety=AUTO).stacks
    assert stack.micro.whole


@pytest.mark.parametrize("changes", [{"name": "batchtopk"}, {"error": "fvu"}])
def test_they_are_refused_and_not_trained_otherwise(small, changes):
    small(8)
    with pytest.raises(UserError, match=r"--auto-batch cannot split it: the loss of .* looks at the whole batch"):
        fitted(members=changes, safety=AUTO)


def test_auxk_may_be_split_where_latents_are_dead():
    chosen = members("topk", varied={"k": [4]}, seeds=[0])
    (stack,) = Trainer(chosen, stream(), settings(), safety=AUTO).stacks
    assert not stack.micro.whole
    x = ROWS[:30]
    dead = torch.zeros(1, 32, dtype=torch.bool)
    dead[0, ::3] = True
    moment = stack_module.Moment(dead=dead)
    whole, split = (in_pieces(stack._gradients, x, None, moment, pieces) for pieces in (1, 4))
    for name, gradient in whole.gradients.items():
        assert_close(split.gradients[name], gradient, atol=1e-6, rtol=1e-4)
    assert_close(split.active, whole.active)


def test_reading_activations_names_the_buffer(tmp_path):
    class Large(TensorStream):
        def batch(self, step):
            if step == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().batch(step)

    with RunFolder(tmp_path / "run", {}) as folder:
        trainer = Trainer(members(), Large({"synthetic": ROWS}, 32), settings(), folder=folder)
        with pytest.raises(UserError, match="while reading activations: lower --buffer-rows or --batch-size"):
            trainer.fit()
        assert (folder.path / "checkpoints" / "step-000000003").exists()


def test_making_the_dictionaries_names_the_ratios(monkeypatch):
    monkeypatch.setattr("sparse_coding.training.trainer.build_stacks", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match="while making the dictionaries: lower --ratios"):
        Trainer(members(), stream(), settings())


def test_updating_the_weights_names_the_ratios(monkeypatch):
    def no_memory(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(Stack, "_update", no_memory)
    with pytest.raises(UserError, match="while updating the weights: lower --ratios"):
        fitted()


def test_a_plan_without_memory_is_no_obstacle_to_pieces(small, capsys):
    small(8)
    with plan_without_memory(AUTO):
        estimate(members(), stream(), settings(), "cpu")
    assert "--auto-batch will take it in pieces" in capsys.readouterr().out
    with pytest.raises(UserError, match="out of memory"), plan_without_memory(Safety()):
        estimate(members(), stream(), settings(), "cpu")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("MPS backend out of memory")],
)
def test_anywhere_else_it_is_one_line_too(error, capsys):
    assert is_out_of_memory(error)
    with pytest.raises(SystemExit) as stop, reported():
        raise error
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "--batch-size, --buffer-rows or --ratios" in told
    assert len(told.splitlines()) == 1


def test_other_errors_of_the_runtime_are_shown_as_they_are():
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"), reported():
        raise RuntimeError("shapes do not match")

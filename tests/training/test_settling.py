"""Members that settle stop early, with what they hold at that update, whatever else happens to the run."""

from __future__ import annotations

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.synthetic import World, WorldStream, preset
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.run_folder import RunFolder, read_lines
from sparse_coding.training.settling import Settling, SettlingSettings
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

STEPS = 240
SETTLING = SettlingSettings(every=20, tolerance=0.02, patience=2)
SCHEDULE = OptimizerSettings(schedule="linear", decay_fraction=0.5)
STREAM = WorldStream(World(preset("quick", n_features=32, d_in=16, mean_active=2.0)), 64)


def members(l1=(0.1, 3.0, 10.0, 30.0)):
    """Two sizes; from the second L1 value on their latents die, later and sooner."""
    return grid(
        "relu", {"synthetic": 16}, [1, 2], lrs=[1e-2], varied={"l1_coefficient": l1}, l1_scaling="toy-2023",
        init="toy-2023", decoder_bias=False, remove_parallel_gradient=False,
    )  # fmt: skip


def trainer(folder=None, settling=SETTLING, steps=STEPS, optimizer=SCHEDULE, **changes):
    settings = TrainingSettings(steps, optimizer, log_every=30, settling=settling)
    return Trainer(members(**changes), STREAM, settings, folder=folder, checkpoint_seconds=1e9)


def weights(one):
    return [one.dictionary(index).tensors() for index in range(len(one.members))]


def assert_same(first, second):
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        assert all(torch.equal(a[name], b[name]) for name in a), index


@pytest.fixture(scope="module")
def settled():
    found = trainer()
    found.fit()
    return found


def test_the_dead_stop_and_the_living_go_on(settled):
    updates = [settled.updates(index) for index in range(8)]
    assert [updates[0], updates[4]] == [STEPS, STEPS]  # L1 0.1
    assert all(one < STEPS for one in [*updates[1:4], *updates[5:]])
    assert len(set(updates)) > 2  # in more than one go
    assert all(one % SETTLING.every == 0 for one in updates)


def test_a_member_that_stops_is_that_of_an_undisturbed_run_cut_there(settled):
    undisturbed = trainer(settling=SettlingSettings())
    at = {settled.updates(index) for index in range(8)}
    while undisturbed.step < STEPS:
        undisturbed.advance()
        if undisturbed.step in at:
            here = [index for index in range(8) if settled.updates(index) == undisturbed.step]
            assert here
            assert_same([weights(undisturbed)[i] for i in here], [weights(settled)[i] for i in here])


@pytest.mark.parametrize("at", [30, 100, 130])
def test_a_run_that_was_killed_stops_its_members_where_it_would_have(settled, tmp_path, at):
    with RunFolder(tmp_path / "whole", {}) as folder:
        whole = trainer(folder)
        whole.fit()
    assert_same(weights(whole), weights(settled))
    with RunFolder(tmp_path / "killed", {}) as folder:
        first = trainer(folder)
        while first.step < at:
            first.advance()
            if first.step % 30 == 0:
                first._log(1.0)
        first.save()
        del first
        second = trainer(folder)
        assert second.step == at
        second.fit()
    assert [second.updates(index) for index in range(8)] == [whole.updates(index) for index in range(8)]
    assert_same(weights(second), weights(whole))
    lines = [read_lines(tmp_path / name / "log.jsonl") for name in ("whole", "killed")]
    for line in (*lines[0], *lines[1]):
        del line["seconds"], line["lr_scale"]
    assert lines[0] == lines[1]


def test_the_log_repeats_the_last_values_of_a_settled_member(settled, tmp_path):
    for name, settling in (("run", SETTLING), ("undisturbed", SettlingSettings())):
        with RunFolder(tmp_path / name, {}) as folder:
            trainer(folder, settling).fit()
    lines, others = (read_lines(tmp_path / name / "log.jsonl") for name in ("run", "undisturbed"))
    assert lines[-1]["step"] == STEPS
    at_a_line = [index for index in range(8) if settled.updates(index) in (60, 90, 120, 150, 180)]
    assert at_a_line
    for index in at_a_line:
        line = settled.updates(index) // 30 - 1
        assert lines[line]["loss"][index] == others[line]["loss"][index]
    for index in range(8):
        after = {line["loss"][index] for line in lines if line["step"] >= settled.updates(index)}
        assert len(after) == 1
        assert None not in after
        assert len({line["loss"][index] for line in lines}) > 1


def test_a_run_without_anything_left_to_train_ends(tmp_path):
    with RunFolder(tmp_path / "run", {}) as folder:
        run = trainer(folder, l1=(30.0, 100.0))
        run.fit()
        assert run.step < STEPS
        assert run.done
        assert read_lines(tmp_path / "run" / "log.jsonl")[-1]["step"] == run.step
        again = trainer(folder, l1=(30.0, 100.0))
        again.fit()
        assert again.step == run.step
        assert_same(weights(again), weights(run))


def test_going_back_to_the_beginning_repeats_the_same_stops(settled):
    run = trainer()
    run.fit()
    run.restore()
    assert run.step == 0
    assert not any(stack.resting for stack in run.stacks)
    run.fit()
    assert_same(weights(run), weights(settled))


def looks(losses, patience=2, tolerance=0.1):
    """At which window a member with these losses, one a window, stops; None: never."""
    settling = Settling(SettlingSettings(every=1, tolerance=tolerance, patience=patience), 1, "cpu")
    for step, loss in enumerate(losses, 1):
        settling.count([0], torch.tensor([loss * 2.0]), torch.tensor(2.0))
        if settling.look(step):
            return step
    return None


def test_what_counts_as_falling():
    assert looks([1.0, 0.8, 0.6, 0.5, 0.4]) is None
    assert looks([1.0, 0.95, 0.94, 0.2]) == 3  # falls by less than a tenth, twice
    assert looks([1.0, 0.95, 0.8, 0.79, 0.78]) == 5  # a fall in between starts the count anew
    assert looks([1.0, 2.0, 0.95]) == 3  # against the lowest, not the last
    assert looks([1.0, 1.0, 1.0, 1.0], patience=3) == 4
    assert looks([float("nan")] * 5) == 2  # nothing is learnt any more


def test_shares_of_the_variance_are_compared():
    settling = Settling(SettlingSettings(every=1, tolerance=0.1, patience=1), 1, "cpu")
    for step, size in enumerate((4.0, 2.0, 1.0), 1):  # the rows get smaller, the loss no better
        settling.count([0], torch.tensor([size]), torch.tensor(size))
        assert settling.look(step) == (step == 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"every": -1}, "every is -1"), ({"tolerance": 1.0}, "tolerance is 1.0"), ({"patience": 0}, "patience is 0")],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SettlingSettings(**changes)


def test_settling_and_resampling_exclude_each_other():
    with pytest.raises(UserError, match="choose one"):
        TrainingSettings(100, dead=DeadSettings(resample_every=10), settling=SETTLING)

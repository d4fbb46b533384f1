"""The loop: exact resume, stopping, the log, the weights that are kept."""

from __future__ import annotations

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch

from sparse_coding.errors import Interrupted, UserError
from sparse_coding.language_models import loop, training_state
from sparse_coding.language_models import trainer as updates
from tests.language_models.tiny import IDENTITY, PERIOD, TINY, log_of, same, trainer, weights


@pytest.mark.parametrize("stop_at", [1, 8, 13])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, stop_at):
    config = dataclasses.replace(TINY, dropout=0.2, bias=False, gradient_accumulation_steps=2)
    whole = trainer(config)
    done = loop.fit(whole, tmp_path / "whole", IDENTITY)

    with pytest.raises(Interrupted, match=f"saved after update {stop_at} of 20 .*same command"):
        loop.fit(trainer(config), tmp_path / "parts", IDENTITY, stop_at=stop_at)
    with (tmp_path / "parts" / training_state.LOG).open("a") as log:  # a killed run logs past its last state
        log.write('{"iteration": 999, "loss": 1.0}\n{"iteration": 99')
    parts = trainer(dataclasses.replace(config, seed=config.seed))
    torch.manual_seed(stop_at)
    resumed = loop.fit(parts, tmp_path / "parts", IDENTITY)

    assert same(weights(parts.model), weights(whole.model))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert (resumed.best_iteration, resumed.best_loss) == (done.best_iteration, done.best_loss)
    moments = [t.optimizer.state_dict()["state"] for t in (parts, whole)]
    assert all(same(moments[0][i], moments[1][i]) for i in moments[1])
    assert len(moments[0]) == len(moments[1]) > 0


def test_a_run_stopped_at_its_last_update_only_needs_finishing(tmp_path):
    first = trainer()
    loop.fit(first, tmp_path, IDENTITY)
    lines = log_of(tmp_path)
    again = trainer()
    progress = loop.fit(again, tmp_path, IDENTITY)
    assert progress.iteration == 20
    assert same(weights(again.model), weights(first.model))
    assert log_of(tmp_path) == lines


def test_sigterm_and_ctrl_c_save_the_state_and_say_how_to_go_on(tmp_path, monkeypatch):
    whole = trainer()
    loop.fit(whole, tmp_path / "whole", IDENTITY)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    update = updates.Trainer.update
    for at, number in ((3, signal.SIGTERM), (6, signal.SIGINT)):

        def interrupted(self, iteration, at=at, number=number):
            if iteration == at:
                os.kill(os.getpid(), number)
            return update(self, iteration)

        monkeypatch.setattr(updates.Trainer, "update", interrupted)
        with pytest.raises(Interrupted, match=f"after update {at + 1} of 20"):
            loop.fit(trainer(), tmp_path / "parts", IDENTITY)
    monkeypatch.undo()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    parts = trainer()
    loop.fit(parts, tmp_path / "parts", IDENTITY)
    assert same(weights(parts.model), weights(whole.model))


def test_the_state_is_saved_by_the_clock_too_so_that_a_kill_costs_little(tmp_path, monkeypatch):
    whole = trainer()
    loop.fit(whole, tmp_path / "whole", IDENTITY)
    update = updates.Trainer.update

    def killed(self, iteration):
        if iteration == 6:  # before the first evaluation at 8
            raise RuntimeError("killed")
        return update(self, iteration)

    monkeypatch.setattr(updates.Trainer, "update", killed)
    monkeypatch.setattr(loop.Run, "save_is_late", lambda self: self.progress.iteration % 5 == 0)
    with pytest.raises(RuntimeError, match="killed"):
        loop.fit(trainer(), tmp_path / "parts", IDENTITY)
    monkeypatch.undo()
    assert [line["iteration"] for line in log_of(tmp_path / "parts")] == [0, 1, 2, 3, 4, 5, 6]
    run = loop.Run(trainer(), tmp_path / "parts", IDENTITY)
    assert run.progress.iteration == 5
    assert not run.save_is_late()
    run.saved_at -= 61
    assert run.save_is_late()
    run.save_cost = 4.0
    assert not run.save_is_late()
    parts = trainer()
    loop.fit(parts, tmp_path / "parts", IDENTITY)
    assert same(weights(parts.model), weights(whole.model))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_another_config_or_text_does_not_go_on_from_a_state(tmp_path):
    with pytest.raises(Interrupted):
        loop.fit(trainer(), tmp_path, IDENTITY, stop_at=2)
    other = {**IDENTITY, "batch_size": 4}
    with pytest.raises(UserError, match=r"other settings \(batch_size was 8, now 4\): .*another --out"):
        loop.fit(trainer(), tmp_path, other)
    with pytest.raises(UserError, match="text was 'a hash', now 'another'"):
        loop.fit(trainer(), tmp_path, {**IDENTITY, "text": "another"})


def test_the_best_weights_are_kept_unless_the_last_are_asked_for(tmp_path):
    backwards = np.tile(PERIOD[::-1], 20)  # the more is learnt, the worse it fits
    made = {last: trainer(dataclasses.replace(TINY, always_save_checkpoint=last), backwards) for last in (False, True)}
    progress = {last: loop.fit(made[last], tmp_path / str(last), IDENTITY) for last in made}
    evaluations = {line["iteration"]: line["val_loss"] for line in log_of(tmp_path / "True") if "val_loss" in line}
    assert list(evaluations) == [0, 8, 16, 20]
    assert progress[False].best_iteration == min((8, 16, 20), key=lambda i: evaluations[i]) < 20
    assert (
        made[False].evaluate()["val_loss"] == progress[False].best_loss == evaluations[progress[False].best_iteration]
    )
    assert made[True].evaluate()["val_loss"] == evaluations[20] > progress[False].best_loss


def test_evaluating_and_logging_more_often_changes_nothing(tmp_path):
    often = dataclasses.replace(TINY, eval_interval=1, log_interval=1, dropout=0.1, always_save_checkpoint=True)
    seldom = dataclasses.replace(often, eval_interval=100, log_interval=7)
    made = [trainer(often), trainer(seldom)]
    for one, name in zip(made, ("often", "seldom"), strict=True):
        loop.fit(one, tmp_path / name, IDENTITY)
    assert same(weights(made[0].model), weights(made[1].model))
    assert [line["iteration"] for line in log_of(tmp_path / "seldom")] == [0, 7, 14, 20]
    line = log_of(tmp_path / "seldom")[1]
    assert (line["tokens"], line["lr"]) == (7 * 8 * 8, updates.learning_rate(seldom, 6))


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(tmp_path):
    wild = dataclasses.replace(TINY, learning_rate=1e30, min_lr=1e30, warmup_iters=0, grad_clip=0.0)
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at update \d+: lower learning_rate \(now 1e\+30\)"):
        loop.fit(trainer(wild), tmp_path, IDENTITY)


def test_a_stop_during_an_evaluation_ends_it_and_it_is_made_again(tmp_path, monkeypatch):
    """Ctrl-C in the second batch of the evaluation after update 8."""
    config = dataclasses.replace(TINY, eval_iters=50)
    whole = trainer(config)
    loop.fit(whole, tmp_path / "whole", IDENTITY)
    passes, cross_entropy = [], updates.cross_entropy

    def counted(model, windows, **rest):
        if not model.training:
            passes.append(1)
            if len(passes) == 102:  # 100 at update 0
                os.kill(os.getpid(), signal.SIGINT)
        return cross_entropy(model, windows, **rest)

    monkeypatch.setattr(updates, "cross_entropy", counted)
    with pytest.raises(Interrupted, match="saved after update 8 of 20"):
        loop.fit(trainer(config), tmp_path / "parts", IDENTITY)
    assert len(passes) < 110, "the evaluation went on to its end"
    assert [line["iteration"] for line in log_of(tmp_path / "parts") if "val_loss" in line] == [0]
    monkeypatch.undo()
    parts = trainer(config)
    loop.fit(parts, tmp_path / "parts", IDENTITY)
    assert same(weights(parts.model), weights(whole.model))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_the_mirror_is_given_every_line(tmp_path):
    seen = []
    loop.fit(trainer(), tmp_path, IDENTITY, mirror=lambda values, step: seen.append({**values, "step": step}))
    lines = log_of(tmp_path)
    assert [line["step"] for line in seen] == [line["iteration"] for line in lines]
    assert [line.get("val_loss", line.get("loss")) for line in seen] == [
        line.get("val_loss", line.get("loss")) for line in lines
    ]

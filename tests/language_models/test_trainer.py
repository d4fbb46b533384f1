"""One update: schedule, clipping, decay, accumulation, dropout, batches; by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch

from sparse_coding.errors import Interrupted, UserError
from sparse_coding.language_models import gpt, loop
from sparse_coding.language_models import trainer as updates
from sparse_coding.language_models.ngrams import baselines
from tests.language_models.tiny import CPU, IDENTITY, PERIOD, TINY, VOCAB, log_of, same, trainer, weights


def test_schedule_by_hand():
    config = dataclasses.replace(TINY, learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=12, max_iters=20)
    rates = [updates.learning_rate(config, i) for i in (0, 3, 4, 6, 8, 12, 19)]
    a_quarter_down = 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))
    assert rates == pytest.approx([0.2, 0.8, 1.0, a_quarter_down, 0.55, 0.1, 0.1], abs=1e-12)
    assert updates.learning_rate(dataclasses.replace(config, lr_decay_iters=0), 12) == pytest.approx(0.55)
    assert updates.learning_rate(dataclasses.replace(config, decay_lr=False), 0) == 1.0
    no_cosine = dataclasses.replace(config, warmup_iters=4, lr_decay_iters=4)
    assert [updates.learning_rate(no_cosine, i) for i in (3, 4)] == pytest.approx([0.8, 0.1])


def test_one_update_is_clipped_adamw_with_decay_on_matrices_only():
    config = dataclasses.replace(TINY, weight_decay=0.5, grad_clip=0.01)
    made = trainer(config)
    model = gpt.build(config, VOCAB)
    windows = updates.windows_at(made.tokens, config, gpt.derive(config.seed, "batch", 0), config.batch_size, CPU)
    logits = model(windows[:, :-1]).logits
    expected_loss = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None]).mean()
    expected_loss.backward()
    trained = dict(model.named_parameters())
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in trained.values()))
    before = weights(model)
    loss, reported = made.update(0)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert reported.item() == pytest.approx(norm, rel=1e-4)
    assert norm > 0.01
    rate = 1e-2 * 1 / 5
    for name, after in weights(made.model).items():
        gradient = trained[name].grad * 0.01 / norm
        decay = 1 - rate * 0.5 if after.dim() >= 2 else 1.0
        # the first step of Adam: both moments are the gradient itself after bias correction
        expected = before[name] * decay - rate * gradient / (gradient.abs() + 1e-8)
        settled = gradient.abs() > 1e-6  # where rounding of the gradient does not decide
        torch.testing.assert_close(after[settled], expected[settled], rtol=1e-5, atol=1e-6)


def test_accumulating_gradients_is_the_same_as_one_large_batch():
    whole, parts = trainer(), trainer(dataclasses.replace(TINY, batch_size=2, gradient_accumulation_steps=4))
    for i in range(3):
        loss, _ = whole.update(i)
        shares, _ = parts.update(i)
        assert loss.item() == pytest.approx(shares.item(), abs=1e-5)
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(value, weights(parts.model)[name], rtol=1e-3, atol=1e-5)


def test_the_loss_falls_below_counting_single_tokens_and_pairs():
    made = trainer(dataclasses.replace(TINY, max_iters=120, batch_size=16))
    counted = baselines(made.tokens, made.held_out, VOCAB)
    before = gpt.held_out_loss(made.model, made.held_out)
    assert before == pytest.approx(math.log(VOCAB), abs=0.1)
    for i in range(120):
        made.update(i)
    after = gpt.held_out_loss(made.model, made.held_out)
    assert after < counted.bigram - 0.1 < counted.unigram - 1.0


def test_dropout_is_on_differs_between_updates_and_leaves_the_global_generator_alone():
    config = dataclasses.replace(TINY, dropout=0.5, learning_rate=1e-12, min_lr=0.0, weight_decay=0.0)
    first, second, dry = trainer(config), trainer(config), trainer(dataclasses.replace(config, dropout=0.0))
    torch.manual_seed(1)
    one = first.update(0)[0]
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(second.update(0)[0], one), "dropout depends on the global generator"
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert abs(dry.update(0)[0] - one) > 1e-6
    rows = torch.from_numpy(np.tile(PERIOD, 3)[None, :9])
    losses = set()
    for seed in (1, 2):
        with updates.dropout_from(seed, CPU):
            losses.add(gpt.cross_entropy(first.model, rows).item())
    assert len(losses) == 2


def test_every_forward_pass_has_dropout_of_its_own(monkeypatch):
    seeds = []
    dropout_from = updates.dropout_from
    monkeypatch.setattr(
        updates, "dropout_from", lambda seed, device: (seeds.append(seed), dropout_from(seed, device))[1]
    )
    made = trainer(dataclasses.replace(TINY, dropout=0.1, batch_size=4, gradient_accumulation_steps=2))
    for i in range(3):
        made.update(i)
    assert len(set(seeds)) == len(seeds) == 6


def test_batches_are_functions_of_the_seed_inside_the_text():
    tokens = np.arange(20)
    one = updates.windows_at(tokens, TINY, 5, 500, CPU)
    assert torch.equal(one, updates.windows_at(tokens, TINY, 5, 500, CPU))
    assert not torch.equal(one, updates.windows_at(tokens, TINY, 6, 500, CPU))
    assert (one == one[:, :1] + torch.arange(9)).all()
    assert set(one[:, 0].tolist()) == set(range(12)), "every window that fits is drawn: 0 to 20 - 8 - 1"


def test_bfloat16_products_learn_the_same_and_keep_float32_weights():
    exact, quick = trainer(), trainer(dataclasses.replace(TINY, dtype="bfloat16"))
    assert quick.dtype == torch.bfloat16
    for i in range(20):
        exact.update(i)
        quick.update(i)
    assert {value.dtype for value in weights(quick.model).values()} == {torch.float32}
    losses = [gpt.held_out_loss(made.model, made.held_out) for made in (exact, quick)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_float16_scales_the_loss_skips_what_overflows_and_learns(tmp_path):
    config = dataclasses.replace(TINY, dtype="float16")
    made, exact = trainer(config), trainer()
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = weights(made.model)
    made.update(0)
    assert same(weights(made.model), before), "gradients of infinity were applied"
    assert made.scaler.get_scale() == 2.0**39
    made = trainer(config)
    for i in range(20):
        made.update(i)
        exact.update(i)
    assert {value.dtype for value in weights(made.model).values()} == {torch.float32}
    losses = [gpt.held_out_loss(one.model, one.held_out) for one in (exact, made)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_float16_goes_on_with_the_scale_it_had(tmp_path):
    config = dataclasses.replace(TINY, dtype="float16")
    runs = {}
    for name, stop in (("whole", None), ("parts", 7)):
        for at in (stop, None) if stop else (None,):
            made = trainer(config)
            made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
            with contextlib.suppress(Interrupted):
                loop.fit(made, tmp_path / name, IDENTITY, stop_at=at)
        runs[name] = (weights(made.model), made.scaler.get_scale())
    assert same(runs["whole"][0], runs["parts"][0])
    assert runs["whole"][1] == runs["parts"][1]
    assert [line["iteration"] for line in log_of(tmp_path / "whole") if "grad_norm" not in line and "lr" in line]


def test_compile_is_refused_without_a_compiler(monkeypatch):
    monkeypatch.setattr(updates.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"compile = True needs a C\+\+ compiler, and there is none: .* compile=False"):
        trainer(dataclasses.replace(TINY, compile=True))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_a_compiled_model_learns_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = dataclasses.replace(TINY, n_layer=1, compile=True)
    plain, made = trainer(dataclasses.replace(config, compile=False)), trainer(config)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for i in range(3):
        assert made.update(i)[0].item() == pytest.approx(plain.update(i)[0].item(), abs=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs, "nothing was compiled"

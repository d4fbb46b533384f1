"""The training loop: hand-computed schedules and steps, exact resume, and a run from config file to model folder."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_coding.activations.text import TextSettings
from sparse_coding.errors import Interrupted, UserError
from sparse_coding.language_models import card, gpt, loop, train, training_state
from sparse_coding.language_models.config_file import TrainConfig, load_config
from sparse_coding.language_models.ngrams import baselines

CPU = torch.device("cpu")
VOCAB = 12
TINY = TrainConfig(
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=8,
    batch_size=8,
    gradient_accumulation_steps=1,
    max_iters=20,
    learning_rate=1e-2,
    min_lr=1e-3,
    warmup_iters=4,
    eval_interval=8,
    eval_iters=2,
    device="cpu",
    dtype="float32",
    bias=True,
)
# a period of 24 tokens in which one token does not tell the next, but a few do
PERIOD = np.array([1, 2, 3, 1, 4, 5, 2, 1, 6, 3, 2, 7, 1, 8, 4, 9, 2, 6, 1, 10, 3, 11, 2, 0])
IDENTITY = {**dataclasses.asdict(TINY), "text": "a hash"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer(config: TrainConfig = TINY, held_out=None) -> gpt.Trainer:
    tokens = np.tile(PERIOD, 40).astype(np.uint16)
    held_out = tokens[:240] if held_out is None else held_out
    return gpt.Trainer(config, gpt.build(config, VOCAB), tokens, held_out, CPU, train.precision(config, CPU))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def log_of(folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / training_state.LOG).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_schedule_by_hand():
    config = dataclasses.replace(TINY, learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=12, max_iters=20)
    rates = [gpt.learning_rate(config, i) for i in (0, 3, 4, 6, 8, 12, 19)]
    a_quarter_down = 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))
    assert rates == pytest.approx([0.2, 0.8, 1.0, a_quarter_down, 0.55, 0.1, 0.1], abs=1e-12)
    assert gpt.learning_rate(dataclasses.replace(config, lr_decay_iters=0), 12) == pytest.approx(0.55)
    assert gpt.learning_rate(dataclasses.replace(config, decay_lr=False), 0) == 1.0
    no_cosine = dataclasses.replace(config, warmup_iters=4, lr_decay_iters=4)
    assert [gpt.learning_rate(no_cosine, i) for i in (3, 4)] == pytest.approx([0.8, 0.1])


def test_the_model_is_gpt2_with_nanogpts_initial_weights():
    config = dataclasses.replace(TINY, n_embd=64, n_layer=8, block_size=256, dropout=0.25)
    state = torch.random.get_rng_state()
    model = gpt.build(config, 500)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was touched"
    assert (model.config.activation_function, model.config.layer_norm_epsilon) == ("gelu", 1e-5)
    assert model.config.n_positions == 256
    assert (model.config.embd_pdrop, model.config.attn_pdrop, model.config.resid_pdrop) == (0.25, 0.25, 0.25)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8 layers) = 4
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    assert same(weights(model), weights(gpt.build(config, 500)))
    assert not same(weights(model), weights(gpt.build(dataclasses.replace(config, seed=1), 500)))


def test_one_update_is_clipped_adamw_with_decay_on_matrices_only():
    config = dataclasses.replace(TINY, weight_decay=0.5, grad_clip=0.01)
    made = trainer(config)
    model = gpt.build(config, VOCAB)
    windows = gpt.windows_at(made.tokens, config, gpt.derive(config.seed, "batch", 0), config.batch_size, CPU)
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


def test_without_bias_every_bias_is_exactly_zero_after_training_and_with_it_they_move():
    for bias in (False, True):
        made = trainer(dataclasses.replace(TINY, bias=bias))
        for i in range(5):
            made.update(i)
        moved = {name: bool((value != 0).any()) for name, value in weights(made.model).items() if ".bias" in name}
        assert len(moved) == 13, "six biases per layer, and ln_f's"
        assert set(moved.values()) == {bias}


def test_the_loss_falls_below_counting_single_tokens_and_pairs():
    made = trainer(dataclasses.replace(TINY, max_iters=120, batch_size=16))
    counted = baselines(made.tokens, made.held_out, VOCAB)
    before = gpt.held_out_loss(made.model, made.held_out)
    assert before == pytest.approx(math.log(VOCAB), abs=0.1)
    for i in range(120):
        made.update(i)
    after = gpt.held_out_loss(made.model, made.held_out)
    assert after < counted.bigram - 0.1 < counted.unigram - 1.0


@pytest.mark.parametrize("length", [2, 5, 8, 9, 10, 17, 24, 30])
def test_held_out_loss_scores_every_token_but_the_first_once(length):
    made = trainer(dataclasses.replace(TINY, dropout=0.5))
    for i in range(3):
        made.update(i)
    tokens = np.tile(PERIOD, 2)[:length]
    found = gpt.held_out_loss(made.model, tokens, batch_size=2)
    assert made.model.training
    made.model.eval()
    total = 0.0
    for position in range(1, length):  # one token at a time, its context back to the last multiple of the block size
        context = tokens[(position - 1) // 8 * 8 : position]
        logits = made.model(torch.from_numpy(context)[None]).logits[0, -1]
        total -= logits.log_softmax(-1)[tokens[position]].item()
    assert found == pytest.approx(total / (length - 1), abs=1e-5)


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
        with gpt.dropout_from(seed, CPU):
            losses.add(gpt.cross_entropy(first.model, rows).item())
    assert len(losses) == 2


def test_every_forward_pass_has_dropout_of_its_own(monkeypatch):
    seeds = []
    dropout_from = gpt.dropout_from
    monkeypatch.setattr(gpt, "dropout_from", lambda seed, device: (seeds.append(seed), dropout_from(seed, device))[1])
    made = trainer(dataclasses.replace(TINY, dropout=0.1, batch_size=4, gradient_accumulation_steps=2))
    for i in range(3):
        made.update(i)
    assert len(set(seeds)) == len(seeds) == 6


def test_batches_are_functions_of_the_seed_inside_the_text():
    tokens = np.arange(20)
    one = gpt.windows_at(tokens, TINY, 5, 500, CPU)
    assert torch.equal(one, gpt.windows_at(tokens, TINY, 5, 500, CPU))
    assert not torch.equal(one, gpt.windows_at(tokens, TINY, 6, 500, CPU))
    assert (one == one[:, :1] + torch.arange(9)).all()
    assert set(one[:, 0].tolist()) == set(range(12)), "every window that fits is drawn: 0 to 20 - 8 - 1"


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
    update = gpt.Trainer.update
    for at, number in ((3, signal.SIGTERM), (6, signal.SIGINT)):

        def interrupted(self, iteration, at=at, number=number):
            if iteration == at:
                os.kill(os.getpid(), number)
            return update(self, iteration)

        monkeypatch.setattr(gpt.Trainer, "update", interrupted)
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
    update = gpt.Trainer.update

    def killed(self, iteration):
        if iteration == 6:  # before the first evaluation at 8
            raise RuntimeError("killed")
        return update(self, iteration)

    monkeypatch.setattr(gpt.Trainer, "update", killed)
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
    assert (line["tokens"], line["lr"]) == (7 * 8 * 8, gpt.learning_rate(seldom, 6))


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(tmp_path):
    wild = dataclasses.replace(TINY, learning_rate=1e30, min_lr=1e30, warmup_iters=0, grad_clip=0.0)
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at update \d+: lower learning_rate \(now 1e\+30\)"):
        loop.fit(trainer(wild), tmp_path, IDENTITY)


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


def test_a_device_that_is_not_there_is_refused():
    assert train.device_for(TINY) == CPU
    absent = f"cuda:{torch.cuda.device_count() + 7}"
    with pytest.raises(UserError, match=f"device = '{absent}' is not on this machine"):
        train.device_for(dataclasses.replace(TINY, device=absent))


def test_samples_continue_the_text_within_the_context_and_follow_the_seed():
    made = trainer()
    for i in range(20):
        made.update(i)
    made.model.eval()
    prompt = torch.from_numpy(PERIOD[:6])
    drawn = [card.sample(made.model, prompt, new_tokens=12, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0][:6], prompt)
    assert len(drawn[0]) == 18
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# --- from config file to folder --------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A file of repeating lines, cut into twenty-odd documents; caches go to the test's folder."""
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path / "cache"))
    lines = [f"the {animal} sat on the {place}.\n\n" for animal in ("cat", "dog", "owl") for place in ("mat", "roof")]
    (tmp_path / "text.txt").write_text("".join(lines) * 300)
    return TextSettings(source=str(tmp_path / "text.txt"), held_out=0.2)


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(
        "n_layer = 2\nn_head = 2\nn_embd = 16\nblock_size = 16\nbatch_size = 16\ngradient_accumulation_steps = 1\n"
        "max_iters = 60\nlearning_rate = 1e-2\nwarmup_iters = 5\neval_interval = 30\neval_iters = 2\nbias = True\n"
        "device = 'cpu'\ncompile = True\n"
    )
    return path


def test_a_config_and_a_text_become_a_hugging_face_folder(tmp_path, text, config_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    facts = train.train_lm(config_path, {"n_layer": 1}, text, out, tokenizer="bpe", vocab_size=300)
    assert facts.validation_loss < facts.unigram - 1.0
    assert facts.bigram < facts.unigram
    assert "note: compile = True has no effect" in capsys.readouterr().out

    files = {path.name for path in out.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", card.FACTS, training_state.LOG}
    assert training_state.STATE not in files
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.n_layer == 1
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    prompt = tokenizer("the cat sat on the roof.\n\nthe cat", return_tensors="pt")["input_ids"]
    after = [tokenizer.decode([i]) for i in model(prompt).logits[0, -1].topk(2).indices]
    assert " sat" in after or " s" in after

    assert json.loads((out / card.FACTS).read_text())["validation_loss"] == facts.validation_loss
    assert facts.tokens_seen == 60 * 16 * 16
    readme = (out / "README.md").read_text()
    for said in (
        f"| **this model** | {facts.validation_loss:.4f} |",
        f"| pair counts | {facts.bigram:.4f} |",
        f"| single-token counts | {facts.unigram:.4f} |",
        f"| SHA-256 of the tokens | `{facts.text_sha256}` |",
        f"| model.safetensors | {(out / 'model.safetensors').stat().st_size:,} |",
        "1 CPU thread, float32",
        "    n_layer = 1\n",
        facts.command,
        facts.samples[2][1].splitlines()[0],
    ):
        assert said in readme, said

    again = train.train_lm(config_path, {"n_layer": 1}, text, out, tokenizer="bpe", vocab_size=300)
    assert again == facts
    assert "is trained already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"other settings \(n_layer was 1, now 2\)"):
        train.train_lm(config_path, {}, text, out, tokenizer="bpe", vocab_size=300)
    with pytest.raises(UserError, match=r"other settings \(vocab_size was 300, now 290\)"):
        train.train_lm(config_path, {"n_layer": 1}, text, out, tokenizer="bpe", vocab_size=290)
    with pytest.raises(
        UserError, match=r"other settings \(tokenizer was 'bpe', now 'char'; vocab_size was 300, now None"
    ):
        train.train_lm(config_path, {"n_layer": 1}, text, out, tokenizer="char")
    (tmp_path / "text.txt").write_text("other words\n\n" * 3000)
    with pytest.raises(UserError, match=r"other settings \(text was "):
        train.train_lm(config_path, {"n_layer": 1}, text, out, tokenizer="bpe", vocab_size=300)


def test_a_start_that_failed_lends_its_tokenizer_to_the_same_run_only(tmp_path, text):
    def size(vocab_size: int) -> int:
        return len(train.tokenizer_for("bpe", vocab_size, text, tmp_path / "out")[0])

    _, folder = train.tokenizer_for("bpe", 270, text, tmp_path / "out")
    first = (folder / "tokenizer.json").stat()
    assert size(270) == 270
    assert (folder / "tokenizer.json").stat() == first, "it was made again"
    assert size(265) == 265
    (tmp_path / "text.txt").write_text("zzzz " * 5000)
    assert size(270) < 270, "the tokenizer of the old text was taken"


def test_a_stopped_command_goes_on_and_ends_where_an_unstopped_one_does(
    tmp_path, text, config_path, monkeypatch, capsys
):
    from safetensors.torch import load_file

    def command(out: str) -> list[str]:
        settings = [
            "--set",
            "max_iters=12",
            "--tokenizer",
            "char",
            "--held-out",
            "0.2",
            "--set",
            "warmup_iters=2",
            "n_layer=1",
        ]
        return [str(config_path), "--text", text.source, "--out", str(tmp_path / out), *settings]

    train.main(command("whole"))
    update = gpt.Trainer.update

    def stopped(self, iteration):
        if iteration == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, iteration)

    monkeypatch.setattr(gpt.Trainer, "update", stopped)
    with pytest.raises(SystemExit) as stop:
        train.main(command("parts"))
    assert stop.value.code == 130
    assert "saved after update 6 of 12" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    monkeypatch.undo()
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path / "cache"))
    train.main(command("parts"))
    models = [load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts")]
    assert same(*models)
    facts = json.loads((tmp_path / "whole" / card.FACTS).read_text())
    assert facts["command"].startswith("python -m sparse_coding train-lm ")
    assert facts["tokenizer"] == "char"
    assert [facts["config"][key] for key in ("max_iters", "warmup_iters", "n_layer")] == [12, 2, 1]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "n_lyer=2"], "error: --set: unknown key 'n_lyer'; did you mean 'n_layer'"),
        (["--tokenizer", "char", "--vocab-size", "300"], "error: --vocab-size is for --tokenizer bpe"),
        (["--vocab-size", "300", "--set", "block_size=100000"], "error: the training text has "),
        (["--text", "missing.txt"], "no such file"),
        (["--text-split", "test"], "no splits but 'train'"),
        (["--text-config", "en"], "config='en' is for data sets by name"),
        (["--text-column", "body", "--text", "ROWS"], "no column 'body'"),
        (["--max-documents", "0"], "max_documents must be at least 1"),
        (["--held-out", "1.5"], "held_out is the share"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_and_exit_2(tmp_path, text, config_path, capsys, extra, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    extra = [str(tmp_path / "rows.jsonl") if word == "ROWS" else word for word in extra]
    source = [] if "--text" in extra else ["--text", text.source]
    with pytest.raises(SystemExit) as stop:
        train.main([str(config_path), *source, "--out", str(tmp_path / "out"), *extra])
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]


def test_a_folder_of_something_else_is_never_written_into(tmp_path, text, config_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my notes")
    with pytest.raises(UserError, match="holds files that are no training run"):
        train.train_lm(config_path, {}, text, tmp_path / "mine")
    with pytest.raises(UserError, match="is a file; name a folder"):
        train.train_lm(config_path, {}, text, config_path)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]


# --- the bundled model -----------------------------------------------------------------------------------------------

BUNDLED = Path(train.__file__).parent / "assets" / "python-gpt"
PROSE = """The method returns a copy of the string in which each character has been mapped through the given
translation table. If the optional argument is omitted or None, the default encoding is used. Raises ValueError if the
object is not a string; otherwise the result is a list of the values in the dictionary."""


def test_the_bundled_model_is_small_is_what_its_config_says_and_beats_counting():
    facts = card.read(BUNDLED)
    config, _ = load_config(Path(__file__).parents[2] / "nanogpt_configs" / "python_gpt.py")
    assert facts.config == dataclasses.asdict(config)
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 3_000_000
    assert facts.validation_loss < facts.bigram - 0.8
    assert (facts.kept_iteration, facts.tokens_seen) == (
        config.max_iters,
        config.max_iters * config.tokens_per_iteration,
    )


def test_the_bundled_model_predicts_prose_about_python_as_its_card_promises():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = card.read(BUNDLED)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts.parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size == facts.vocab_size
    tokens = np.array(tokenizer(PROSE)["input_ids"])
    assert tokenizer.decode(tokens.tolist()) == PROSE
    assert gpt.held_out_loss(model, tokens) < facts.validation_loss + 0.5

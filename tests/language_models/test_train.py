"""A run from config file to model folder."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal

import numpy as np
import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.language_models import card, corpus, train, training_state
from sparse_coding.language_models import trainer as updates
from tests.language_models.tiny import CPU, TINY, same


def test_a_device_that_is_not_there_is_refused():
    assert train.device_for(TINY) == CPU
    absent = f"cuda:{torch.cuda.device_count() + 7}"
    with pytest.raises(UserError, match=f"device = '{absent}' is not on this machine"):
        train.device_for(dataclasses.replace(TINY, device=absent))


def test_a_config_and_a_text_become_a_hugging_face_folder(tmp_path, text, config_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    facts = train.train_lm(config_path, {"n_layer": 1}, text, out, tokenizer="bpe", vocab_size=300)
    assert facts.validation_loss < facts.unigram - 1.0
    assert facts.trigram < facts.bigram < facts.unigram
    files = {path.name for path in out.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert files >= {card.FACTS, card.CURVE, training_state.LOG}
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
        f"| triple counts | {facts.trigram:.4f} |",
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
        return len(corpus.tokenizer_for("bpe", vocab_size, text, tmp_path / "out")[0])

    _, folder = corpus.tokenizer_for("bpe", 270, text, tmp_path / "out")
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
    update = updates.Trainer.update

    def stopped(self, iteration):
        if iteration == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, iteration)

    monkeypatch.setattr(updates.Trainer, "update", stopped)
    with pytest.raises(SystemExit) as stop:
        train.main(command("parts"))
    assert stop.value.code == 130
    assert "saved after update 6 of 12" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    monkeypatch.undo()
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path / "cache"))
    train.main(command("parts"))
    assert "going on after update 6 of 12" in capsys.readouterr().out
    models = [load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts")]
    assert same(*models)
    facts = json.loads((tmp_path / "whole" / card.FACTS).read_text())
    assert facts["command"].startswith("python -m sparse_coding train-lm ")
    assert facts["tokenizer_asked"] == "char"
    assert [facts["config"][key] for key in ("max_iters", "warmup_iters", "n_layer")] == [12, 2, 1]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set"], "error: --set without a value: write key=value"),
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


# --- the keys of nanoGPT's train.py that name things and places ------------------------------------------------------


def test_training_can_start_from_another_model(tmp_path, text, config_path):
    """`init_from` a folder: its weights, its shape, its tokenizer; the loss goes on where that model was."""
    first = train.train_lm(config_path, {}, text, tmp_path / "first", vocab_size=270)
    assert first is not None
    settings = {"init_from": str(tmp_path / "first"), "learning_rate": 1e-4, "warmup_iters": 0, "max_iters": 3}
    tokenizer = str(tmp_path / "first")
    second = train.train_lm(config_path, {**settings, "n_layer": 7}, text, tmp_path / "second", tokenizer)
    assert second is not None
    brought = train.train_lm(config_path, settings, text, tmp_path / "brought")
    assert brought is not None
    assert brought.validation_loss == second.validation_loss, "its tokenizer is the default"
    log = [json.loads(line) for line in (tmp_path / "second" / training_state.LOG).read_text().splitlines()]
    assert abs(log[0]["val_loss"] - first.validation_loss) < 0.1
    assert log[0]["val_loss"] < first.unigram - 0.5
    assert second.config["n_layer"] == 2, "the shape is that of the model"
    again = train.train_lm(config_path, {**settings, "n_layer": 7}, text, tmp_path / "second", tokenizer)
    assert again == second
    with pytest.raises(
        UserError, match=r"knows 270 tokens and the text has 279: tokenize it with the model's own tokenizer"
    ):
        train.train_lm(config_path, settings, text, tmp_path / "third", vocab_size=300)
    with pytest.raises(UserError, match=r"init_from = 'scrach' is neither .*did you mean 'scratch'"):
        train.train_lm(config_path, {"init_from": "scrach"}, text, tmp_path / "third", vocab_size=300)


def test_a_run_that_began_from_another_model_is_resumed_as_such(tmp_path, text, config_path):
    train.train_lm(config_path, {"max_iters": 2}, text, tmp_path / "first", vocab_size=270)
    began = {"init_from": str(tmp_path / "first"), "warmup_iters": 0, "max_iters": 6}
    out, tokenizer = tmp_path / "second", str(tmp_path / "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates.Trainer, "update", raising(3, updates.Trainer.update))
        patch.setattr("sparse_coding.language_models.loop.Run.save_is_late", lambda run: True)
        with pytest.raises(RuntimeError):
            train.train_lm(config_path, began, text, out, tokenizer)
    facts = train.train_lm(config_path, {**began, "init_from": "resume"}, text, out, tokenizer)
    assert facts is not None
    assert facts.config["init_from"] == str(tmp_path / "first")
    assert train.train_lm(config_path, {**began, "init_from": "resume"}, text, out, tokenizer) == facts


def test_two_runs_never_train_into_one_folder(tmp_path, text, config_path):
    with (
        training_state.own_folder(tmp_path / "out"),
        pytest.raises(UserError, match="is being trained by another process"),
    ):
        train.train_lm(config_path, {}, text, tmp_path / "out", vocab_size=300)


def test_damaged_files_of_a_run_are_one_line(tmp_path, text, config_path):
    state = tmp_path / "out" / training_state.STATE
    state.mkdir(parents=True)
    (state / training_state.STATE_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match=r"state\.safetensors is damaged: delete"):
        train.train_lm(config_path, {}, text, tmp_path / "out", vocab_size=300)
    for content in ("{}", "junk"):
        (tmp_path / "out" / card.FACTS).write_text(content)
        with pytest.raises(UserError, match=r"training\.json is not what train-lm writes"):
            card.read(tmp_path / "out")


def test_resume_needs_something_to_resume(tmp_path, text, config_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"init_from = 'resume', but .* holds no run to go on with"):
        train.train_lm(config_path, {"init_from": "resume"}, text, out, vocab_size=300)
    monkeypatch.setattr(updates.Trainer, "update", raising(3, updates.Trainer.update))
    monkeypatch.setattr("sparse_coding.language_models.loop.Run.save_is_late", lambda run: True)
    with pytest.raises(RuntimeError):
        train.train_lm(config_path, {}, text, out, vocab_size=300)
    monkeypatch.undo()
    facts = train.train_lm(config_path, {"init_from": "resume"}, text, out, vocab_size=300)
    assert facts is not None
    assert facts.iterations == 60


def raising(at, update):
    def killed(self, iteration):
        if iteration == at:
            raise RuntimeError("killed")
        return update(self, iteration)

    return killed


def test_eval_only_trains_and_writes_nothing(tmp_path, text, config_path, capsys):
    out = tmp_path / "out"
    assert train.train_lm(config_path, {"eval_only": True}, text, out, vocab_size=300) is None
    assert "after 0 updates: train_loss 5.6" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == [training_state.STATE], "the tokenizer is kept for the real run"


def test_the_folder_is_the_configs_unless_another_is_given(tmp_path, text, config_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.train_lm(config_path, {"out_dir": "there", "max_iters": 2, "eval_only": True}, text, vocab_size=300)
    train.train_lm(config_path, {"max_iters": 2, "eval_only": True}, text, vocab_size=300)
    assert (tmp_path / "there").is_dir()
    assert (tmp_path / "outputs" / "tiny").is_dir()


def test_a_data_set_by_its_name_or_its_path(tmp_path, config_path, monkeypatch, capsys):
    """nanoGPT's layout as nanoGPT leaves it for characters: two files of ids and meta.pkl."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "letters"
    folder.mkdir(parents=True)
    ids = np.tile([0, 1, 2, 1, 0, 2, 3], 300).astype("<u2")
    ids[:1800].tofile(folder / "train.bin")
    ids[1800:].tofile(folder / "val.bin")
    stoi = {"a": 0, "b": 1, "c": 2, "\n": 3}
    meta = {"vocab_size": 4, "stoi": stoi, "itos": {i: c for c, i in stoi.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    settings = {"dataset": "letters", "max_iters": 30}
    facts = train.train_lm(config_path, settings, out=tmp_path / "out")
    assert facts is not None
    assert (facts.vocab_size, facts.train_tokens, facts.held_out_tokens) == (4, 1800, 300)
    assert facts.text == {"source": "data/letters"}
    assert facts.samples[0][0] == "bcbac\nab"
    train.main([str(config_path), "--text", str(folder), "--out", str(tmp_path / "by-path"), "--set", "max_iters=2"])
    for flag in (["--tokenizer", "char"], ["--vocab-size", "300"], ["--held-out", "0.5"], ["--max-documents", "3"]):
        with pytest.raises(SystemExit):
            train.main([str(config_path), "--text", str(folder), "--out", str(tmp_path / "no"), *flag])
        assert f"error: {flag[0]} is for text, and" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"dataset = 'numbers': there is no data/numbers .* prepare-text"):
        train.train_lm(config_path, {"dataset": "numbers"}, out=tmp_path / "no")


def test_weights_and_biases_mirrors_the_log(tmp_path, text, config_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"wandb_log": True, "wandb_project": "small", "wandb_run_name": "tiny", "max_iters": 4}
    assert train.train_lm(config_path, settings, text, tmp_path / "out", vocab_size=300) is not None
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))

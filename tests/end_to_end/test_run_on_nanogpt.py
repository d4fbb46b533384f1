"""run.py on a checkpoint as it lies in a checkout of nanoGPT."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from sparse_coding.config import parse
from sparse_coding.errors import UserError
from sparse_coding.pipeline import capture, run, run_folder
from sparse_coding.run_flags import ModelFlags
from sparse_coding.run_settings import RunSettings
from sparse_coding.training.run_folder import read_lines
from tests.formats.nanogpt_oracle import NanoGPT, checkpoint, saved

SMALL = "--tokens 4k --batch-size 128 --buffer-rows 2048 --eval-rows 500 --splice-tokens 200 --ratios 1 --latents 2"


def flags(model: Path, text: Path, out: Path, *more: str) -> RunSettings:
    words = [*SMALL.split(), "--l1", "1", "--model", str(model), "--text", str(text), "--out", str(out), *more]
    return parse(RunSettings, words, "run.py", "")


@pytest.fixture
def checkout(small_text: Path, tmp_path: Path) -> Path:
    """out-small/ckpt.pt, and its vocabulary in data/letters/meta.pkl: the characters of the text."""
    characters = sorted(set(small_text.read_text()))
    (tmp_path / "data" / "letters").mkdir(parents=True)
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters))}
    (tmp_path / "data" / "letters" / "meta.pkl").write_bytes(pickle.dumps(meta))
    saved(tmp_path / "out-small" / "ckpt.pt", checkpoint(NanoGPT(False, vocab=len(characters)), prefix="_orig_mod."))
    return tmp_path


def test_a_character_model_runs_to_its_report(checkout, small_text, tmp_path):
    out = tmp_path / "run"
    assert run(flags(checkout / "out-small" / "ckpt.pt", small_text, out)) == out / "report.html"
    (record,) = read_lines(out / "results.jsonl")
    assert (record["site"], record["d_in"]) == ("blocks.2.mlp.hook_post", 64)
    assert record["metrics"]["ce_clean"] > 0
    known = (out / "settings.json").read_text()
    assert '"gelu": null' in known


def test_padding_is_cut_where_another_tokenizer_is_named(checkout, small_text, small_gpt2, tmp_path):
    path = saved(checkout / "out-large" / "ckpt.pt", checkpoint(NanoGPT(True, vocab=320)))
    with pytest.raises(UserError, match=r"has 320 tokens, .*meta\.pkl' .*--tokenizer"):
        capture(flags(path, small_text, tmp_path / "run"))
    captured = capture(flags(path, small_text, tmp_path / "run", "--tokenizer", str(small_gpt2), "--gelu", "tanh"))
    assert captured.model.vocab_size == len(captured.tokenizer) == 300
    assert captured.model.config.activation_function == "gelu_new"


def test_flags_that_do_not_fit_are_refused(checkout, small_text, small_gpt2, tmp_path):
    with pytest.raises(UserError, match="--gelu exact is for checkpoints of nanoGPT"):
        capture(flags(small_gpt2, small_text, tmp_path / "run", "--gelu", "exact"))
    with pytest.raises(UserError, match=r"the tokenizer has 300 tokens, model .*ckpt\.pt' has .*--tokenizer"):
        capture(flags(checkout / "out-small" / "ckpt.pt", small_text, tmp_path / "run", "--tokenizer", str(small_gpt2)))


def test_a_checkpoint_written_anew_is_another_run(tmp_path):
    path = tmp_path / "out-small" / "ckpt.pt"
    path.parent.mkdir()
    settings = RunSettings(model=ModelFlags(model=str(path)))
    folders = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        folders.append(run_folder(settings))
    assert folders[0] != folders[1]
    assert all(folder.name.startswith("out-small-2-mlp-") for folder in folders)


def test_a_model_of_train_lm_reads_its_own_text_unless_another_is_named(tmp_path):
    (tmp_path / "training.json").write_text('{"text": {"source": "notes.txt"}}')
    assert RunSettings(model=ModelFlags(model=str(tmp_path))).text_settings().source == "notes.txt"
    assert RunSettings().text_settings().source == "python-docs"
    assert RunSettings(model=ModelFlags(model="gpt2")).text_settings().source == "NeelNanda/pile-10k"
    (tmp_path / "training.json").write_text("junk")
    assert RunSettings(model=ModelFlags(model=str(tmp_path))).text_settings().source == "NeelNanda/pile-10k"

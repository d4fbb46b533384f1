from __future__ import annotations

import json
import pickle
import stat
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sparse_coding.__main__ import main
from sparse_coding.activations.models import bundled_models, load_model
from sparse_coding.activations.tokenizers import load_tokenizer, train_byte_bpe
from sparse_coding.errors import UserError
from sparse_coding.formats.nanogpt import read_checkpoint
from sparse_coding.formats.nanogpt_file import read_facts
from sparse_coding.language_models.exchange import export_nanogpt, import_nanogpt
from tests.formats.nanogpt_oracle import CONFIG, NanoGPT, checkpoint, saved, tokens_for

LETTERS = ["\n", *(chr(ord("a") + index) for index in range(26))]


@pytest.fixture
def char_checkpoint(tmp_path: Path) -> Path:
    """A character-level model in a checkout of nanoGPT: out-letters/ckpt.pt beside data/letters/meta.pkl."""
    meta = {"vocab_size": 27, "itos": dict(enumerate(LETTERS)), "stoi": {c: i for i, c in enumerate(LETTERS)}}
    (tmp_path / "data" / "letters").mkdir(parents=True)
    (tmp_path / "data" / "letters" / "meta.pkl").write_bytes(pickle.dumps(meta))
    return saved(tmp_path / "out-letters" / "ckpt.pt", checkpoint(NanoGPT(False, vocab=27), prefix="_orig_mod."))


def test_a_checkpoint_becomes_a_folder_that_every_tool_opens(char_checkpoint, tmp_path, capsys):
    folder = tmp_path / "models" / "letters"
    main(["import-nanogpt", str(char_checkpoint), str(folder)])
    said = capsys.readouterr().out
    assert "update 1,000, n_layer=3, n_head=4, n_embd=16, block_size=12, bias=False, vocab_size=27" in said
    assert "exact GELU" in said
    assert f"run.py --model {folder}\n" in said
    oracle = NanoGPT(False, vocab=27)
    tokens = tokens_for(oracle)
    for model in (AutoModelForCausalLM.from_pretrained(folder), load_model(folder, device="cpu").hf):
        torch.testing.assert_close(model(tokens).logits, oracle(tokens), rtol=0, atol=1e-5)
    for tokenizer in (AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
        assert tokenizer("abc\nz")["input_ids"] == [1, 2, 3, 0, 26]
    config = json.loads((folder / "config.json").read_text())
    assert config["nanogpt"] == {
        "bias": False,
        "iter_num": 1000,
        "best_val_loss": torch.tensor(1.4697).item(),
        "config": CONFIG,
    }
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, None)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert [path.name for path in folder.parent.iterdir()] == ["letters"]


def test_there_and_back_gives_the_same_checkpoint(char_checkpoint, tmp_path, capsys):
    main(["import-nanogpt", str(char_checkpoint), str(tmp_path / "folder"), "--gelu", "tanh"])
    assert "tanh GELU" in capsys.readouterr().out
    main(["export-nanogpt", str(tmp_path / "folder"), str(tmp_path / "again" / "ckpt.pt")])
    said = capsys.readouterr().out
    assert "nanoGPT computes the exact one" in said
    assert f"sample.py --out_dir={tmp_path / 'again'}" in said
    assert "--init_from=resume" in said
    first, again = (torch.load(path, weights_only=True) for path in (char_checkpoint, tmp_path / "again" / "ckpt.pt"))
    for name, value in first["model"].items():
        assert torch.equal(again["model"][name.removeprefix("_orig_mod.")], value), name
    for name in ("model_args", "iter_num", "best_val_loss"):
        assert again[name] == first[name], name
    assert again["config"] == {**first["config"], "gelu": "tanh"}


def test_the_bundled_model_goes_out_with_the_facts_of_its_training_and_comes_back(tmp_path, capsys):
    folder = bundled_models()["python-gpt"]
    known = json.loads((folder / "training.json").read_text())
    export_nanogpt("python-gpt", tmp_path / "ckpt.pt")
    assert "note" not in capsys.readouterr().out
    facts = read_facts(tmp_path / "ckpt.pt")
    assert facts.iter_num == known["kept_iteration"] > 0
    assert facts.best_val_loss == pytest.approx(known["validation_loss"])
    assert facts.config["learning_rate"] == known["config"]["learning_rate"]
    assert facts.config["dataset"] == "python-docs"
    assert facts.config["gelu"] == "exact"
    import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "back", tokenizer=str(folder))
    model, again = (load_model(path, device="cpu").hf for path in (folder, tmp_path / "back"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    tokens = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back"))
    assert after.pop("nanogpt")["iter_num"] == known["kept_iteration"]
    assert {**after, "transformers_version": 0} == {**before, "transformers_version": 0}


def test_a_checkpoint_without_a_tokenizer_is_imported_and_the_lack_is_said(tmp_path, capsys):
    path = saved(tmp_path / "ckpt.pt", checkpoint(NanoGPT(True)))
    import_nanogpt(path, tmp_path / "folder")
    said = capsys.readouterr().out
    assert "note: the folder gets no tokenizer" in said
    assert f"--model {tmp_path / 'folder'} --tokenizer NAME" in said
    assert not list((tmp_path / "folder").glob("tokenizer*"))
    assert load_model(tmp_path / "folder", device="cpu").vocab_size == 50, "padding goes back to nanoGPT as it came"


def test_a_tokenizer_that_does_not_fit_or_is_not_there_is_refused_and_nothing_written(char_checkpoint, tmp_path):
    train_byte_bpe(["some text"], 260, tmp_path / "words")
    with pytest.raises(UserError, match=r"tokenizer has 260 tokens, model .*ckpt\.pt' has 27"):
        import_nanogpt(char_checkpoint, tmp_path / "folder", tokenizer=str(tmp_path / "words"))
    with pytest.raises(UserError, match="no such folder"):
        import_nanogpt(char_checkpoint, tmp_path / "folder", tokenizer="./nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out-letters", "words"]


def test_nothing_is_overwritten(char_checkpoint, tmp_path):
    before = char_checkpoint.read_bytes()
    with pytest.raises(UserError, match="exists already: nothing is overwritten"):
        export_nanogpt("python-gpt", char_checkpoint)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="exists already: nothing is overwritten"):
        import_nanogpt(char_checkpoint, tmp_path / "folder")
    assert char_checkpoint.read_bytes() == before


def test_a_folder_appears_whole_or_not_at_all(char_checkpoint, tmp_path, monkeypatch):
    def fail(self: GPT2LMHeadModel, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        import_nanogpt(char_checkpoint, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out-letters"]


def test_exports_that_cannot_be_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"a checkpoint is a file such as out/ckpt\.pt"):
        export_nanogpt("python-gpt", tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        export_nanogpt("./nowhere", tmp_path / "ckpt.pt")
    sizes = {"vocab_size": 50, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, layer_norm_epsilon=1e-6, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="layer_norm_epsilon"):
        export_nanogpt(str(tmp_path / "other"), tmp_path / "ckpt.pt")
    for text in ("{", "[]", '{"config": {}}', '{"config": 3, "text": {"source": "a"}}'):
        (tmp_path / "other" / "training.json").write_text(text)
        with pytest.raises(UserError, match=r"training\.json is not what train-lm writes"):
            export_nanogpt(str(tmp_path / "other"), tmp_path / "ckpt.pt")
    assert not (tmp_path / "ckpt.pt").exists()


def test_an_export_of_openais_kind_of_model_is_read_back_with_its_own_gelu(tmp_path, capsys):
    sizes = {"vocab_size": 50, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "gpt2")
    export_nanogpt(str(tmp_path / "gpt2"), tmp_path / "model.pt")
    said = capsys.readouterr().out
    assert "tanh" in said
    assert "once it is named ckpt.pt" in said
    model, again = load_model(tmp_path / "gpt2", device="cpu").hf, read_checkpoint(tmp_path / "model.pt").model
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens).logits, again(tokens).logits)

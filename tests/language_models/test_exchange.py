from __future__ import annotations

import json
import pickle
import shutil
import stat
import subprocess
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
from sparse_coding.language_models import exchange
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
    assert f"run.py --model {folder} --layer 0 --text TEXT\n" in said
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
    assert "--block_size=12" in said, "nanoGPT's 1024 is longer than the model's"
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
    import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "back")
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


# ---- the tokenizer goes along


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    """A model with byte pairs of its own, 260 of them, and five ids of padding."""
    train_byte_bpe(["def f(x):\n    return x\n"] * 3, 260, tmp_path / "own")
    sizes = {"vocab_size": 265, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_an_export_comes_back_from_the_checkpoint_alone_with_its_tokenizer(own_model, tmp_path):
    export_nanogpt(str(own_model), tmp_path / "out" / "ckpt.pt")
    words = (own_model / "tokenizer.json").read_bytes()
    shutil.rmtree(own_model)
    assert load_tokenizer(tmp_path / "out" / "ckpt.pt").get_vocab() == load_tokenizer(tmp_path / "out").get_vocab()
    import_nanogpt(tmp_path / "out" / "ckpt.pt", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == words
    assert AutoTokenizer.from_pretrained(tmp_path / "back").eos_token_id == 0


def test_what_is_printed_makes_nanogpt_write_text(own_model, tmp_path, capsys):
    """The printed command is carried out in nanoGPT's folder; then the vocabulary is read as its sample.py does."""
    checkpoint = tmp_path / "a folder" / "ckpt.pt"
    export_nanogpt(str(own_model), checkpoint)
    command = next(line for line in capsys.readouterr().out.splitlines() if "mkdir" in line)
    (tmp_path / "nanoGPT").mkdir()
    subprocess.run(command, shell=True, check=True, cwd=tmp_path / "nanoGPT")
    data_set = torch.load(checkpoint, weights_only=True)["config"]["dataset"]
    meta = pickle.loads((tmp_path / "nanoGPT" / "data" / data_set / "meta.pkl").read_bytes())
    prompt = [meta["stoi"][character] for character in "\nreturn"]
    assert "".join(meta["itos"][i] for i in prompt) == "\nreturn"
    assert "".join(meta["itos"][i] for i in load_tokenizer(checkpoint)("return x")["input_ids"]) == "return x"
    assert [meta["itos"][i] for i in range(260, 265)] == [""] * 5, "the model may sample its padding"


@pytest.mark.parametrize("named", ["../../etc", "a;b", "", 3])
def test_a_data_set_that_no_folder_can_be_gives_way(own_model, tmp_path, named):
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps({**config, "nanogpt": {"config": {"dataset": named}}}))
    export_nanogpt(str(own_model), tmp_path / "out" / "ckpt.pt")
    assert read_facts(tmp_path / "out" / "ckpt.pt").config["dataset"] == "own"


def test_another_tokenizer_beside_the_checkpoint_is_kept_and_nothing_written(own_model, tmp_path):
    out = tmp_path / "out"
    train_byte_bpe(["other words"] * 3, 259, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="holds another tokenizer than the model's: name another folder"):
        export_nanogpt(str(own_model), out / "ckpt.pt")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    shutil.rmtree(out)
    out.mkdir()
    (out / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 27, "itos": dict(enumerate(LETTERS))}))
    with pytest.raises(UserError, match=r"holds another meta\.pkl than the model's"):
        export_nanogpt(str(own_model), out / "ckpt.pt")
    assert [path.name for path in out.iterdir()] == ["meta.pkl"]


def test_the_same_tokenizer_beside_the_checkpoint_is_left_as_it_is(own_model, tmp_path):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in own_model.iterdir()}
    export_nanogpt(str(own_model), own_model / "ckpt.pt")
    export_nanogpt(str(own_model), own_model / "second.pt")
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in own_model.iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"ckpt.pt", "second.pt", "meta.pkl"}


def test_gpt2s_own_tokens_need_no_meta(own_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exchange, "is_gpt2", lambda _: True)
    export_nanogpt(str(own_model), tmp_path / "out" / "ckpt.pt")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("ckpt.pt", "tokenizer.json", "tokenizer_config.json")
    ]
    assert "mkdir" not in capsys.readouterr().out
    assert "dataset" not in read_facts(tmp_path / "out" / "ckpt.pt").config


def test_a_model_without_a_tokenizer_that_fits_goes_out_without(own_model, tmp_path, capsys):
    train_byte_bpe([" ".join(f"word{i}" for i in range(99))] * 3, 290, own_model)
    export_nanogpt(str(own_model), tmp_path / "out" / "ckpt.pt")
    assert "note: no tokenizer is written (the tokenizer has 290 tokens, model" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ckpt.pt"]


def test_a_place_below_a_file_is_one_line(char_checkpoint, own_model, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt is a file"):
        export_nanogpt(str(own_model), tmp_path / "a.txt" / "ckpt.pt")
    with pytest.raises(UserError, match=r"a\.txt is a file"):
        import_nanogpt(char_checkpoint, tmp_path / "a.txt" / "folder")

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import AutoTokenizer

from sparse_coding.activations import tokenizers as module
from sparse_coding.activations.tokenizers import (
    END_OF_TEXT,
    UNKNOWN,
    character_tokenizer,
    load_tokenizer,
    tokenizer_from_characters,
    train_byte_bpe,
)
from sparse_coding.errors import UserError
from tests.formats import nanogpt_oracle
from tests.formats.nanogpt_oracle import NanoGPT

TEXTS = ["the cat sat on the mat\n", "the dog sat on the log\n", "a cat, a dog; a mat and a log!\n"] * 5
HOSTILE = "  two  spaces\t\r\n\x00\x7f é 漢字 😀\u200d\u2028 <|endoftext|> don't  \n\n"


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- byte-level BPE


def test_byte_bpe_round_trips_any_text_even_bytes_it_never_saw(tmp_path: Path) -> None:
    tokenizer = train_byte_bpe(TEXTS, 300, tmp_path)
    for text in [*TEXTS, HOSTILE, "", *(chr(code) for code in range(1, 0x250))]:
        assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_byte_bpe_has_the_size_asked_for_and_its_separator_is_token_0(tmp_path: Path) -> None:
    tokenizer = train_byte_bpe(TEXTS, 270, tmp_path)
    assert len(tokenizer) == 270
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.eos_token_id == 0
    assert sorted(tokenizer.get_vocab().values()) == list(range(270))
    assert ids_of(tokenizer, "") == []  # nothing put around texts, as with GPT-2
    few = train_byte_bpe(["ab ab"], 5000, tmp_path / "few")
    assert 257 < len(few) < 270  # no more pairs to merge than the text holds


def test_byte_bpe_merges_the_most_frequent_pairs_first(tmp_path: Path) -> None:
    tokenizer = train_byte_bpe(["xyxyxy " * 10, "xy " * 5, "ab"], 258, tmp_path)
    assert "xy" in tokenizer.get_vocab()
    assert len(ids_of(tokenizer, "xyxy")) == 2


def test_training_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    train_byte_bpe(TEXTS, 300, tmp_path / "a")
    train_byte_bpe(iter(TEXTS), 300, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert not any(name.startswith(".") for name in files_of(tmp_path / "a"))  # nothing temporary stays


def test_saved_tokenizers_load_as_they_were(tmp_path: Path) -> None:
    for tokenizer, folder in (
        (train_byte_bpe(TEXTS, 300, tmp_path / "bpe"), tmp_path / "bpe"),
        (character_tokenizer(TEXTS, tmp_path / "characters"), tmp_path / "characters"),
    ):
        for loaded in (load_tokenizer(folder), load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)):
            assert ids_of(loaded, HOSTILE) == ids_of(tokenizer, HOSTILE)
            assert loaded.decode(ids_of(loaded, TEXTS[2])) == TEXTS[2]
            assert loaded.eos_token_id == tokenizer.eos_token_id == 0
            assert loaded.is_fast


def test_a_tokenizer_is_saved_beside_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    train_byte_bpe(TEXTS, 260, tmp_path)
    train_byte_bpe(TEXTS, 270, tmp_path)  # and over an earlier one
    assert len(load_tokenizer(tmp_path)) == 270
    assert (tmp_path / "config.json").read_text() == "{}"


def test_nothing_is_left_where_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    def fail(self: Any, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        train_byte_bpe(TEXTS, 260, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_vocabulary_and_no_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size=256: a byte-level vocabulary needs at least 257"):
        train_byte_bpe(TEXTS, 256, tmp_path)
    for make in (lambda: train_byte_bpe(["", ""], 300, tmp_path), lambda: character_tokenizer(iter([]), tmp_path)):
        with pytest.raises(UserError, match="no text"):
            make()
    assert list(tmp_path.iterdir()) == []


# ---- characters


def test_characters_are_numbered_in_order_after_the_special_tokens(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(["ba", "a\n"], tmp_path)
    assert tokenizer.get_vocab() == {END_OF_TEXT: 0, UNKNOWN: 1, "\n": 2, "a": 3, "b": 4}
    assert ids_of(tokenizer, "ab\nba") == [3, 4, 2, 4, 3]


def test_one_token_per_character_and_an_exact_round_trip_of_known_ones(tmp_path: Path) -> None:
    text = HOSTILE.replace(END_OF_TEXT, "") + "\r\r  \n"
    tokenizer = character_tokenizer([text], tmp_path)
    assert len(ids_of(tokenizer, text)) == len(text)
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_an_unknown_character_keeps_its_place(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(["abc"], tmp_path)
    assert tokenizer.unk_token_id == 1
    assert ids_of(tokenizer, "a??c") == [2, 1, 1, 4]


# ---- loading


def test_a_missing_folder_is_an_error_that_names_the_near_one(tmp_path: Path) -> None:
    train_byte_bpe(TEXTS, 260, tmp_path / "tiny-gpt")
    with pytest.raises(UserError, match="no such folder; did you mean 'tiny-gpt'"):
        load_tokenizer(tmp_path / "tiny-gtp")
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer("./nowhere")


def test_a_folder_without_a_tokenizer_is_an_error_not_an_invented_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_an_error(tmp_path: Path) -> None:
    train_byte_bpe(TEXTS, 260, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_without_the_hub_the_error_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match="not to be had from the Hugging Face hub or its local cache") as caught:
        load_tokenizer("no-such-owner/no-such-model")
    assert "\n" not in str(caught.value)
    assert "give a folder that holds a tokenizer" in str(caught.value)
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "evil.py").write_text("raise SystemExit('this ran')\n")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
    assert not any("evil" in name for name in sys.modules)


# ---- nanoGPT: a given list of characters, data sets and checkpoints


CHARACTERS = ["\n", " ", "b", "\r", "a", "é", "漢", "😀", "\x00", "\u2028", "\\", "#"]


def test_a_list_of_characters_gives_exactly_its_ids_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_characters(CHARACTERS)
    text = "".join(CHARACTERS) + "ba  \r\n\n##a\\\n 😀😀"
    for known in (tokenizer, save_and_load(tokenizer, tmp_path)):
        assert ids_of(known, text) == [CHARACTERS.index(character) for character in text]
        assert known.decode(ids_of(known, text)) == text
        assert known.get_vocab() == {character: index for index, character in enumerate(CHARACTERS)}
        assert (known.bos_token_id, known.eos_token_id, known.unk_token_id) == (None, None, None)
        assert ids_of(known, "") == []


def save_and_load(tokenizer: Any, folder: Path) -> Any:
    """As `import-nanogpt` leaves it: beside the config of a GPT-2."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": len(tokenizer)}))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (["a", "bc"], "token 1 of a vocabulary of characters is 'bc', which is no character"),
        (["", "b"], "token 0 .* is '', which is no character"),
        (["a", "\ud83d"], r"token 1 .* is '\\ud83d', which is no character"),
        (["a", "b", "a"], "the character 'a' has two ids"),
    ],
)
def test_what_is_no_list_of_characters_is_refused(tokens: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        tokenizer_from_characters(tokens)


def data_set(folder: Path, characters: list[str] | None, size: int | None = None) -> Path:
    """A folder as prepare.py of nanoGPT leaves it."""
    folder.mkdir(parents=True)
    meta: dict[str, Any] = {"vocab_size": size or len(characters or [])}
    if characters is not None:
        meta["itos"] = dict(enumerate(characters))
        meta["stoi"] = {character: index for index, character in enumerate(characters)}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def checkpoint(path: Path, vocab: int, dataset: Any = "letters") -> Path:
    data = nanogpt_oracle.checkpoint(NanoGPT(False, vocab=vocab, width=4, layers=1))
    data["config"]["dataset"] = dataset
    return nanogpt_oracle.saved(path, data)


def test_a_data_set_of_nanogpt_is_a_tokenizer_by_its_characters(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "letters", CHARACTERS)
    assert ids_of(load_tokenizer(folder), "ab\n") == [4, 2, 0]
    train_byte_bpe(TEXTS, 260, folder)
    assert len(load_tokenizer(folder)) == 260, "the tokenizer's own files win"
    with pytest.raises(UserError, match=r"meta\.pkl' gives a vocabulary's size and not its tokens"):
        load_tokenizer(data_set(tmp_path / "size", None, 12))


def test_a_checkpoint_finds_the_characters_of_its_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path / "nano" / "runs" / "out-letters" / "ckpt.pt", len(CHARACTERS))
    with pytest.raises(UserError, match=r"comes without .*nor data/letters above it.*12 tokens.*--tokenizer"):
        load_tokenizer(path)
    data_set(tmp_path / "elsewhere" / "data" / "letters", CHARACTERS)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ids_of(load_tokenizer(path), "a") == [4], "in data/ of the current folder"
    data_set(tmp_path / "nano" / "data" / "letters", CHARACTERS[::-1])
    assert ids_of(load_tokenizer(path), "a") == [7], "in nanoGPT's folder above it"
    assert ids_of(load_tokenizer(str(path)), "a") == [7]
    character_tokenizer(["a"], path.parent)
    assert ids_of(load_tokenizer(path), "a") == [2], "beside it"


def test_a_tokenizer_of_the_data_set_wins_over_its_meta(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "out" / "ckpt.pt", 300)
    train_byte_bpe(TEXTS, 270, data_set(tmp_path / "data" / "letters", None, 300))
    assert len(load_tokenizer(path)) == 270


def test_a_vocabulary_of_another_size_is_not_taken_for_the_checkpoints(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "ckpt.pt", len(CHARACTERS) + 1)
    data_set(tmp_path / "data" / "letters", CHARACTERS)
    with pytest.raises(UserError, match=r"has 13 tokens, .*meta\.pkl' 12: it was trained on other data"):
        load_tokenizer(path)


@pytest.mark.parametrize("size", [50257, 50304])
def test_a_vocabulary_of_gpt2s_size_means_gpt2s_tokenizer(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_of_hub", lambda name: f"{name} of the hub")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()  # a folder of that name is something else
    path = checkpoint(tmp_path / "ckpt.pt", size, "openwebtext")
    data_set(tmp_path / "data" / "openwebtext", None, size)  # says the size alone
    assert load_tokenizer(path) == "gpt2 of the hub"


@pytest.mark.parametrize("dataset", ["../letters", "/letters", "a/../../letters", "..", "", "x" * 5000, "a\0b", 3])
def test_a_checkpoint_names_no_way_out_of_the_data_folder(dataset: Any, tmp_path: Path) -> None:
    data_set(tmp_path / "letters", CHARACTERS)
    data_set(tmp_path / "data", CHARACTERS)
    path = checkpoint(tmp_path / "out" / "ckpt.pt", len(CHARACTERS), dataset)
    with pytest.raises(UserError, match="comes without a tokenizer: there is none beside it"):
        load_tokenizer(path)


# ---- what --tokenizer names


def test_a_tokenizer_is_made_from_its_part_of_the_text_or_loaded(tmp_path: Path, monkeypatch) -> None:
    parts = {"train": ["aaaa", "bbbb", "cccc"], "all": ["aaaa", "bbbb", "cccc", "d"]}
    monkeypatch.setattr(module, "LEARNT_FROM", 5)
    module.make_tokenizer("bpe", 300, lambda part: iter(parts[part]), tmp_path / "bpe")
    vocabulary = load_tokenizer(tmp_path / "bpe").get_vocab()
    assert "bb" in vocabulary, "the document that passes the bound is taken whole"
    assert "cc" not in vocabulary, "and none after it"
    module.make_tokenizer("char", None, parts.__getitem__, tmp_path / "char")
    assert sorted(load_tokenizer(tmp_path / "char").get_vocab())[2:] == ["a", "b", "c", "d"]
    module.make_tokenizer(str(tmp_path / "bpe"), None, parts.__getitem__, tmp_path / "loaded")
    assert load_tokenizer(tmp_path / "loaded").get_vocab() == vocabulary
    with pytest.raises(UserError, match="--vocab-size is for --tokenizer bpe; 'char' has its own vocabulary"):
        module.check_vocab_size("char", 300)


def test_a_vocabulary_of_ours_keeps_its_two_special_tokens(tmp_path):
    ours = character_tokenizer(["ab\n"], tmp_path)
    tokens = [token for token, _ in sorted(ours.get_vocab().items(), key=lambda item: item[1])]
    read = tokenizer_from_characters(tokens)
    assert read.get_vocab() == ours.get_vocab()
    assert (read.eos_token_id, read.unk_token_id) == (ours.eos_token_id, ours.unk_token_id) == (0, 1)
    assert read("a\nbz")["input_ids"] == ours("a\nbz")["input_ids"]

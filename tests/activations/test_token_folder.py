"""Token folders as text: documents where separators stand, one long text where none do, whatever the chunks."""

from __future__ import annotations

import json
import pickle
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_coding.activations import text_files
from sparse_coding.activations import token_folder as module
from sparse_coding.activations.encoding import encoder_of
from sparse_coding.activations.text import Part, TextSettings, documents, documents_of_both, is_held_out, text_identity
from sparse_coding.activations.tokenizers import train_byte_bpe
from sparse_coding.errors import UserError

LINES = "".join(f"line {i} é 😀😀 漢字{'!' * (i % 7)}\r\n" + "\n" * (i % 5 == 0) for i in range(2000))


def read(folder: Path, part: Part = "all", **settings: Any) -> list[str]:
    return list(documents(TextSettings(str(folder), **settings), part))


@pytest.fixture
def characters(tmp_path: Path) -> Path:
    """LINES as nanoGPT's shakespeare_char has its text: sorted characters, nine tenths and the rest, no separator."""
    folder = tmp_path / "characters"
    folder.mkdir()
    known = sorted(set(LINES))
    ids = np.array([known.index(character) for character in LINES], "<u2")
    cut = int(len(ids) * 0.9)
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(known), "itos": dict(enumerate(known)), "stoi": {c: i for i, c in enumerate(known)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@pytest.fixture
def bpe(tmp_path: Path) -> tuple[Path, Any]:
    """An empty folder with a tokenizer that has no token for 😀 or 漢: each is several."""
    folder = tmp_path / "bpe"
    return folder, train_byte_bpe(["line after line of text "] * 9, 300, folder)


def ids_of(tokenizer: Any, texts: list[str], end: bool = True) -> np.ndarray:
    encoded = encoder_of(tokenizer).encode(texts)
    return np.array([token for ids in encoded for token in (*ids, *([tokenizer.eos_token_id] if end else []))], "<u2")


@pytest.mark.parametrize("chunk", [7, 1000, 1 << 18])
def test_a_text_without_separators_is_cut_as_the_same_text_file_is(
    characters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    cut = int(len(LINES) * 0.9)
    halves: dict[Part, str] = {"train": LINES[:cut], "held_out": LINES[cut:]}
    for part, text in halves.items():
        (tmp_path / f"{part}.txt").write_bytes(text.encode())
        found = read(characters, part)
        assert "".join(found) == text
        assert found == read(tmp_path / f"{part}.txt")
    assert len(read(characters, "train")) > 10
    assert "".join(read(characters)) == LINES


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 997])
def test_a_character_of_several_tokens_may_lie_across_chunks(
    bpe: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Half characters decode to U+FFFD: one lost cut would show. A real U+FFFD is text like any other."""
    folder, tokenizer = bpe
    monkeypatch.setattr(module, "CHUNK", chunk)
    text = "😀" * 40 + "\ufffd漢\ufffd" * 20 + "plain é"
    ids_of(tokenizer, [text], end=False).tofile(folder / "train.bin")
    assert "".join(read(folder)) == text


@pytest.mark.parametrize("chunk", [1, 3, 64, 1 << 18])
def test_documents_end_at_separators_wherever_chunks_end(
    bpe: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    folder, tokenizer = bpe
    monkeypatch.setattr(module, "CHUNK", chunk)
    draw = random.Random(0)
    texts = ["".join(draw.choices("ab \n\r😀é<|endoftext|>", k=draw.randrange(1, 30))) for _ in range(40)]
    texts += ["<|endoftext|>", "\ufeffmark"]
    ids = ids_of(tokenizer, texts)
    ids.tofile(folder / "train.bin")
    assert read(folder) == texts
    np.concatenate([ids[-1:], ids[-1:], ids[:-1]]).tofile(folder / "train.bin")  # begun by them, and an empty one
    assert read(folder) == texts


def test_the_files_are_the_parts_and_the_share_is_not_used(bpe: tuple[Path, Any]) -> None:
    folder, tokenizer = bpe
    texts = [f"document {i}" for i in range(50)]
    ids_of(tokenizer, texts[:30]).tofile(folder / "train.bin")
    ids_of(tokenizer, texts[30:]).tofile(folder / "val.bin")
    for share in (0.0, 0.5):
        assert read(folder, "train", held_out=share) == texts[:30]
        assert read(folder, "held_out", held_out=share) == texts[30:]
        assert read(folder, held_out=share) == texts
    pairs = list(documents_of_both(TextSettings(str(folder))))
    assert pairs == [("train", text) for text in texts[:30]] + [("held_out", text) for text in texts[30:]]
    assert read(folder, "held_out", max_documents=3) == texts[30:33]
    (folder / "val.bin").unlink()
    assert read(folder, "held_out", held_out=0.3) == [texts[i] for i in range(30) if is_held_out(i, 0.3)]
    with pytest.raises(UserError, match="held_out is 0"):
        read(folder, "held_out", held_out=0.0)


def test_both_parts_in_one_pass_are_the_two_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}" if i % 9 else ""}) + "\n" for i in range(300)))
    text = TextSettings(str(path), held_out=0.2)
    pairs = list(documents_of_both(text))
    for part in ("train", "held_out"):
        assert [document for where, document in pairs if where == part] == list(documents(text, part))
    assert [document for _, document in pairs] == list(documents(text, "all"))


def test_settings_of_data_sets_and_wrong_tokens_are_refused_at_once(characters: Path, bpe: tuple[Path, Any]) -> None:
    for settings in ({"config": "en"}, {"split": "test"}, {"column": "text"}):
        with pytest.raises(UserError, match=r"leave (it|them) out"):
            documents(TextSettings(str(characters), **settings))  # type: ignore[arg-type]
    folder, _ = bpe
    np.array([1, 300], "<u2").tofile(folder / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin holds token 300, and its tokenizer ends at \d+"):
        read(folder)
    (folder / "train.bin").write_bytes(b"odd")
    with pytest.raises(UserError, match="no whole number"):
        documents(TextSettings(str(folder)))
    (folder / "train.bin").unlink()
    (folder / "unfinished.json").write_text("{}")
    with pytest.raises(UserError, match="is not finished"):
        documents(TextSettings(str(folder)))


def test_a_folder_that_names_no_tokenizer_is_taken_for_gpt2s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.array([0, 1], "<u2").tofile(tmp_path / "train.bin")
    asked = []

    def load(name: str) -> Any:
        asked.append(name)
        raise UserError("the hub cannot be reached")

    monkeypatch.setattr(module, "load_tokenizer", load)
    with pytest.raises(UserError, match=r"names no tokenizer, so its tokens are taken for GPT-2's: the hub cannot"):
        documents(TextSettings(str(tmp_path)))
    assert asked == ["gpt2"]


def test_the_identity_follows_the_tokens_and_their_vocabulary(characters: Path) -> None:
    first = text_identity(TextSettings(str(characters)))
    assert json.loads(json.dumps(first)) == first
    assert [file["name"] for file in first["files"]] == ["train.bin", "val.bin", "meta.pkl"]
    ids = np.fromfile(characters / "val.bin", "<u2")
    ids[::-1].tofile(characters / "val.bin")
    assert text_identity(TextSettings(str(characters))) != first


def test_reading_holds_a_chunk_and_not_the_file(characters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1 << 12)
    known = len(set(LINES))
    np.tile(np.arange(known, dtype="<u2"), 2_000_000 // known).tofile(characters / "train.bin")
    read(characters, "held_out")  # what is loaded once
    tracemalloc.start()
    total = sum(len(text) for text in documents(TextSettings(str(characters)), "train"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 2_000_000 // known * known
    assert peak < 2_000_000 + 100 * text_files.LONGEST

"""The data folder of nanoGPT: bytes worked out by hand, folders of ours and of others, and everything cut short."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from sparse_coding.errors import UserError
from sparse_coding.formats import nanogpt_data as module
from sparse_coding.formats.nanogpt_data import (
    Counts,
    Facts,
    TokenFile,
    ids_for,
    is_data_folder,
    open_tokens,
    read_facts,
    stored,
    write_facts,
    write_meta,
)
from sparse_coding.formats.nanogpt_meta import read_meta


def write_ours(folder: Path, train: list[int], val: list[int], vocab_size: int = 300) -> Facts:
    folder.mkdir(exist_ok=True)
    facts = []
    for name, ids in (("train.bin", train), ("val.bin", val)):
        file = TokenFile(folder / name, stored(ids_for(vocab_size)))
        file.add(np.array(ids, np.int64), documents=1, characters=len(ids))
        facts.append(file.finish())
        file.close()
    found = Facts(module.FORMAT, ids_for(vocab_size), vocab_size, 0, "a hash", *facts, made_from={"text": {"a": 1}})
    write_facts(folder, found)
    return found


def test_the_bytes_are_little_endian_ids_and_nothing_else(tmp_path: Path) -> None:
    facts = write_ours(tmp_path / "a", [1, 258, 65535], [0], vocab_size=65536)
    assert (tmp_path / "a" / "train.bin").read_bytes() == bytes([1, 0, 2, 1, 255, 255])
    assert facts.train.sha256 == hashlib.sha256(bytes([1, 0, 2, 1, 255, 255])).hexdigest()
    facts = write_ours(tmp_path / "b", [1, 65536], [0], vocab_size=65537)
    assert (tmp_path / "b" / "train.bin").read_bytes() == bytes([1, 0, 0, 0, 0, 0, 1, 0])
    assert facts.dtype == "uint32"
    assert open_tokens(tmp_path / "b").train.tolist() == [1, 65536]


def test_a_folder_of_ours_is_read_as_meta_json_says(tmp_path: Path) -> None:
    facts = write_ours(tmp_path, [1, 2, 0], [3, 0])
    assert read_facts(tmp_path) == facts
    assert is_data_folder(tmp_path)
    data = open_tokens(tmp_path)
    assert (data.train.tolist(), data.held_out.tolist()) == ([1, 2, 0], [3, 0])
    assert isinstance(data.train, np.memmap)
    assert (data.vocab_size, data.separator, data.folder) == (300, 0, tmp_path)


def test_a_folder_of_nanogpt_is_read_as_nanogpt_reads_it(tmp_path: Path) -> None:
    np.array([0, 1, 1], "<u2").tofile(tmp_path / "train.bin")
    np.array([1], "<u2").tofile(tmp_path / "val.bin")
    data = open_tokens(tmp_path)
    assert (data.vocab_size, data.separator) == (50257, 50256)
    with (tmp_path / "meta.pkl").open("wb") as file:
        pickle.dump({"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}, file)
    characters = open_tokens(tmp_path)
    assert (characters.vocab_size, characters.separator) == (2, None)
    assert characters.held_out.tolist() == [1]
    assert characters.sha256 != data.sha256


def test_the_hash_is_that_of_the_tokens_and_their_vocabulary(tmp_path: Path) -> None:
    """Ours, known from meta.json, and the same tokens without it, hashed when opened."""
    write_ours(tmp_path / "a", [1, 2, 0], [3, 0], vocab_size=50257)
    ours = open_tokens(tmp_path / "a").sha256
    (tmp_path / "a" / "meta.json").unlink()
    assert open_tokens(tmp_path / "a").sha256 == ours
    np.array([1, 2, 3], "<u2").tofile(tmp_path / "a" / "train.bin")
    assert open_tokens(tmp_path / "a").sha256 != ours
    write_ours(tmp_path / "b", [1, 2], [0, 3, 0], vocab_size=50257)
    assert open_tokens(tmp_path / "b").sha256 != ours


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_file_that_is_missing_cut_short_or_empty_is_named(tmp_path: Path, name: str) -> None:
    write_ours(tmp_path, [1, 2, 3, 0], [1, 2, 3, 0])
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"{name} has 6 bytes and should have 8 \(4 tokens of uint16\)"):
        open_tokens(tmp_path)
    (tmp_path / "meta.json").unlink()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name} has 5 bytes, which is no whole number of uint16 tokens .* 4 or 6"):
        open_tokens(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is empty"):
        open_tokens(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"has no {name}: .*prepare-text"):
        open_tokens(tmp_path)


def test_an_id_outside_the_vocabulary_is_found_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    write_ours(tmp_path, [1] * 9 + [299], [299, 1], vocab_size=300)
    open_tokens(tmp_path)
    write_ours(tmp_path, [1] * 9 + [300], [1], vocab_size=300)
    with pytest.raises(
        UserError, match=r"train\.bin holds token 300, and its vocabulary has 300 .*0 to 299.*meta\.json"
    ):
        open_tokens(tmp_path)
    write_ours(tmp_path, [1], [1] * 4 + [300, 1], vocab_size=300)
    with pytest.raises(UserError, match=r"val\.bin holds token 300"):
        open_tokens(tmp_path)
    (tmp_path / "meta.json").unlink()
    np.array([50257], "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"holds token 50257, and its vocabulary has 50257 .*meta\.pkl"):
        open_tokens(tmp_path)


def test_a_folder_without_held_out_text_says_how_to_get_some(tmp_path: Path) -> None:
    facts = write_ours(tmp_path, [1, 0], [1, 0])
    write_facts(tmp_path, Facts(**{**vars(facts), "val": None}))
    (tmp_path / "val.bin").unlink()
    with pytest.raises(UserError, match=r"no val\.bin: it was prepared with --held-out 0"):
        open_tokens(tmp_path)


def test_a_meta_json_that_is_unfinished_damaged_or_newer_is_refused(tmp_path: Path) -> None:
    write_ours(tmp_path, [1, 0], [1, 0])
    written = (tmp_path / "meta.json").read_text()
    for content, message in (
        (written[:-10], "is not what prepare-text writes"),
        ("[]", "is not what prepare-text writes"),
        (written.replace('"format": 1', '"format": 2'), "has format 2, this version reads 1"),
        (written.replace('"uint16"', '"float"'), "dtype is 'float'"),
        (json.dumps({"format": 1}), "'dtype' is missing|dtype.* is missing"),
    ):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(UserError, match=message):
            open_tokens(tmp_path)
    (tmp_path / "meta.json").unlink()
    (tmp_path / "unfinished.json").write_text("{}")
    with pytest.raises(UserError, match="is not finished: start the prepare-text command"):
        open_tokens(tmp_path)


# ---- writing


def test_a_file_is_cut_back_to_what_is_known_to_be_in_it(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    first = TokenFile(path, stored("uint16"))
    first.add(np.array([7, 8]), 1, 5)
    first.sync()
    known = Counts(**vars(first.counts))
    first.add(np.array([9]), 1, 2)
    first.close()
    assert not path.exists()
    assert (tmp_path / "train.bin.part").stat().st_size == 6
    again = TokenFile(path, stored("uint16"), known)
    again.add(np.array([10]), 1, 3)
    facts = again.finish()
    again.close()
    assert np.fromfile(path, "<u2").tolist() == [7, 8, 10]
    assert facts is not None
    assert (facts.documents, facts.characters, facts.tokens) == (2, 8, 3)
    renamed = TokenFile(path, stored("uint16"), Counts(1, 5, 2))  # finished once, but the folder was not
    renamed.finish()
    renamed.close()
    assert np.fromfile(path, "<u2").tolist() == [7, 8]


def test_a_file_shorter_than_known_and_one_in_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.bin.part").write_bytes(b"\0\0")
    with pytest.raises(UserError, match="has 2 bytes, and 4 were written: delete the folder"):
        TokenFile(tmp_path / "train.bin", stored("uint16"), Counts(1, 1, 2))
    file = TokenFile(tmp_path / "train.bin", stored("uint16"))
    with pytest.raises(UserError, match="is being written by another process"):
        TokenFile(tmp_path / "train.bin", stored("uint16"))
    file.close()


def test_an_empty_file_is_left_out(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "val.bin", stored("uint16"))
    assert file.finish() is None
    file.close()
    assert list(tmp_path.iterdir()) == []


def test_meta_pkl_is_what_nanogpt_unpickles(tmp_path: Path) -> None:
    write_meta(tmp_path, ["<|endoftext|>", "é", "\n"], {"é": 1, "\n": 2})
    content = (tmp_path / "meta.pkl").read_bytes()
    assert content[:2] == b"\x80\x04"  # protocol 4
    meta = pickle.loads(content)
    stoi, itos = meta["stoi"], meta["itos"]
    assert meta["vocab_size"] == 3
    assert "".join(itos[i] for i in [stoi[c] for c in "é\né"]) == "é\né"
    read = read_meta(tmp_path / "meta.pkl")
    assert (read.vocab_size, read.tokens) == (3, ["<|endoftext|>", "é", "\n"])

"""prepare-text: bytes by hand, text -> tokens -> text exactly, and stopping anywhere without a trace in the files."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparse_coding.__main__ import main
from sparse_coding.activations import encoding
from sparse_coding.activations.text import TextSettings, documents
from sparse_coding.errors import Interrupted, UserError, reported
from sparse_coding.formats.nanogpt_data import Facts, open_tokens, read_facts
from sparse_coding.formats.nanogpt_meta import read_meta
from sparse_coding.language_models import prepare_text as module
from sparse_coding.language_models import tokenize_text
from sparse_coding.language_models.prepare_text import prepare_text, write_back

NASTY = [
    "",
    "😀 emoji 漢字",
    "CRLF\r\nand\rCR\n",
    "<|endoftext|>",
    " ",
    "\n\n",
    "\ufeffmark \ufffd",
    "tab\tand \x00 null",
]


def texts(count: int = 120) -> list[str]:
    draw = random.Random(0)
    words = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "é", "😀", "\n"]
    made = [" ".join(draw.choices(words, k=draw.randrange(1, 40))) for _ in range(count)]
    return [text for pair in zip(made, NASTY * count, strict=False) for text in pair]


def write_jsonl(path: Path, documents: list[str]) -> TextSettings:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return TextSettings(str(path), held_out=0.2)


@pytest.fixture
def text(tmp_path: Path) -> TextSettings:
    return write_jsonl(tmp_path / "text.jsonl", texts())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is written


def test_a_tiny_text_of_characters_by_hand(tmp_path: Path) -> None:
    """Ids: 0 the separator, 1 the unknown character (of which there is none), then the characters in order."""
    text = write_jsonl(tmp_path / "a.jsonl", ["ba", "", "c\r"])
    facts = prepare_text(TextSettings(text.source, held_out=0.0), tmp_path / "out", "char")
    # \r = 2, a = 3, b = 4, c = 5
    assert (tmp_path / "out" / "train.bin").read_bytes() == bytes([4, 0, 3, 0, 0, 0, 5, 0, 2, 0, 0, 0])
    assert (facts.vocab_size, facts.separator, facts.dtype, facts.val) == (6, 0, "uint16", None)
    assert (facts.train.documents, facts.train.characters, facts.train.tokens) == (2, 4, 6)
    assert not (tmp_path / "out" / "val.bin").exists()
    meta = pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes())
    assert meta["stoi"] == {"\r": 2, "a": 3, "b": 4, "c": 5}
    assert [meta["itos"][i] for i in (0, 2, 3, 4, 5)] == ["<|endoftext|>", "\r", "a", "b", "c"]


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_text_comes_back_exactly_and_so_do_the_parts(text: TextSettings, tmp_path: Path, tokenizer: str) -> None:
    prepare_text(text, tmp_path / "data", tokenizer, 300 if tokenizer == "bpe" else None)
    back = TextSettings(str(tmp_path / "data"))
    for part in ("train", "held_out"):
        assert list(documents(back, part)) == list(documents(text, part))
    write_back(back, tmp_path / "back.jsonl")
    both = [*documents(text, "train"), *documents(text, "held_out")]
    assert list(documents(TextSettings(str(tmp_path / "back.jsonl")), "all")) == both
    write_back(back, tmp_path / "back.txt")
    assert (tmp_path / "back.txt").read_bytes() == "".join(both).encode()
    prepare_text(back, tmp_path / "again", tokenizer, 300 if tokenizer == "bpe" else None)
    for name in ("train.bin", "val.bin"):  # the split of the folder is kept, whatever --held-out says
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "data" / name).read_bytes()


def test_documents_end_with_the_separator_and_counts_add_up(text: TextSettings, tmp_path: Path) -> None:
    facts = prepare_text(text, tmp_path / "data", "bpe", 300)
    data = open_tokens(tmp_path / "data")
    assert data.separator == 0
    assert facts.val is not None
    for part, ids, file in (("train", data.train, facts.train), ("held_out", data.held_out, facts.val)):
        known = list(documents(text, part))  # type: ignore[arg-type]
        assert ids[0] != 0
        assert ids[-1] == 0
        assert (ids == 0).sum() == file.documents == len(known)
        assert file.characters == sum(map(len, known))
        assert file.tokens == len(ids)
    assert AutoTokenizer.from_pretrained(tmp_path / "data").decode(data.train[:-1].tolist()).count("<|endoftext|>") > 9
    assert sorted(content(tmp_path / "data")) == [
        *("meta.json", "meta.pkl", "tokenizer.json", "tokenizer_config.json", "train.bin", "val.bin")
    ]


def test_the_vocabulary_that_nanogpt_reads_gives_the_text_of_every_id(text: TextSettings, tmp_path: Path) -> None:
    facts = prepare_text(text, tmp_path / "data", "bpe", 300)
    meta = read_meta(tmp_path / "data" / "meta.pkl")
    assert meta.vocab_size == facts.vocab_size == 300
    assert meta.tokens is not None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data")
    assert "".join(meta.tokens[i] for i in tokenizer("the of and that")["input_ids"]) == "the of and that"
    stoi = pickle.loads((tmp_path / "data" / "meta.pkl").read_bytes())["stoi"]
    assert all(tokenizer(character)["input_ids"] == [index] for character, index in stoi.items())
    assert set(map(chr, range(128))) <= set(stoi)
    assert "\ufffd" not in stoi


def word_tokenizer(folder: Path, size: int, eos: str | None = "w0") -> str:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos).save_pretrained(folder)
    return str(folder)


def test_more_than_65536_ids_are_written_as_uint32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_jsonl(tmp_path / "a.jsonl", ["w69999 w5 w65536"])
    words = word_tokenizer(tmp_path / "words", 70_000)
    facts = prepare_text(TextSettings(text.source, held_out=0.0), tmp_path / "data", words)
    assert (facts.dtype, facts.vocab_size) == ("uint32", 70_000)
    assert np.fromfile(tmp_path / "data" / "train.bin", "<u4").tolist() == [69_999, 5, 65_536, 0]
    assert "need uint32, which train-lm reads and nanoGPT does not" in capsys.readouterr().out
    assert not (tmp_path / "data" / "meta.pkl").exists()
    assert next(documents(TextSettings(str(tmp_path / "data")), "all")) == "w69999w5w65536"


def test_gpt2s_own_vocabulary_has_no_meta_pkl(
    text: TextSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = word_tokenizer(tmp_path / "words", 3)
    prepare_text(text, tmp_path / "a", words)
    monkeypatch.setattr(tokenize_text, "GPT2_TOKENS", tokenize_text.hashlib.sha256(b"w0\nw1\nw2").hexdigest())
    prepare_text(text, tmp_path / "b", words)
    assert (tmp_path / "a" / "meta.pkl").exists()
    assert not (tmp_path / "b" / "meta.pkl").exists()


def test_a_tokenizer_without_end_of_text_is_noted(
    text: TextSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = prepare_text(text, tmp_path / "a", word_tokenizer(tmp_path / "words", 3, eos=None))
    assert facts.separator is None
    assert "documents run into one another" in capsys.readouterr().out


# ---- stopping and going on


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(tokenize_text, "SAVE_SECONDS", 0.0)


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, action: Any) -> None:
    """The text as it is, but `action` is called after so many documents of the pass that writes."""

    def stopping(text: TextSettings) -> Iterator[Any]:
        for index, row in enumerate(real(text)):
            if index == count:
                action()
            yield row

    real = module.documents_of_both
    monkeypatch.setattr(module, "documents_of_both", stopping)


class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    text: TextSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: None, tokenizer: str
) -> None:
    vocab_size = 300 if tokenizer == "bpe" else None
    prepare_text(text, tmp_path / "whole", tokenizer, vocab_size)
    out = tmp_path / "out"
    for count in (0, 1, 60, 61, 150, 200):
        with monkeypatch.context() as patch:
            stop_after(patch, count, kill)
            with pytest.raises(Killed):
                prepare_text(text, out, tokenizer, vocab_size)
        assert not (out / "train.bin").exists()
        assert not (out / "meta.json").exists()
        with (out / "train.bin.part").open("ab") as file:
            file.write(b"half written")
        with pytest.raises(UserError, match="is not finished"):
            open_tokens(out)
    noted = json.loads((out / "unfinished.json").read_text())["counts"]
    assert noted["train"]["documents"] + noted["held_out"]["documents"] > 150
    prepare_text(text, out, tokenizer, vocab_size)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["write_meta", "write_facts", "unlink"])
def test_killed_while_finishing_it_finishes(
    text: TextSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    prepare_text(text, tmp_path / "whole", "char")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if moment == "unlink":
            patch.setattr(module.Path, "unlink", lambda *_, **__: kill())
        else:
            patch.setattr(tokenize_text, moment, lambda *_: kill())
        with pytest.raises(Killed):
            prepare_text(text, out, "char")
    prepare_text(text, out, "char")
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_130(
    text: TextSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    prepare_text(text, tmp_path / "whole", "bpe", 300)
    out = tmp_path / "out"
    command = ["prepare-text", "--text", text.source, "--out", str(out), "--vocab-size", "300", "--held-out", "0.2"]
    with monkeypatch.context() as patch:
        stop_after(patch, 100, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped, reported():
            main(command)
    assert stopped.value.code == 130
    assert "100 documents are tokenized in" in capsys.readouterr().err
    noted = json.loads((out / "unfinished.json").read_text())["counts"]
    assert noted["train"]["documents"] + noted["held_out"]["documents"] == 100
    main(command)
    assert "going on after 100 documents" in capsys.readouterr().out
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_stopped_while_the_vocabulary_is_learnt_it_leaves_nothing(
    text: TextSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    def stopping(*_: Any) -> Iterator[str]:
        for index in range(10):
            if index == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield "some text"

    monkeypatch.setattr(module, "documents", stopping)
    with pytest.raises(Interrupted, match="not learnt yet"):
        prepare_text(text, tmp_path / "data" / "out", tokenizer)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_finished_folder_says_so_and_another_command_is_refused(
    text: TextSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    facts = prepare_text(text, out, "bpe", 300)
    before = content(out)
    capsys.readouterr()
    monkeypatch.setattr(module, "documents_of_both", lambda _: pytest.fail("read again"))
    assert prepare_text(text, out, "bpe", 300) == facts == read_facts(out)
    assert "is prepared already" in capsys.readouterr().out
    for tokenizer, vocab_size, held_out, message in (
        ("bpe", 400, 0.2, "vocab_size: was 300, is 400"),
        ("char", None, 0.2, 'tokenizer: was "bpe", is "char"'),
        ("bpe", 300, 0.1, "held_out: was 0.2, is 0.1"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_text(TextSettings(text.source, held_out=held_out), out, tokenizer, vocab_size)
    write_jsonl(Path(text.source), ["other text"])
    with pytest.raises(UserError, match=r"text\.files: was"):
        prepare_text(text, out, "bpe", 300)
    assert content(out) == before


def test_an_unfinished_folder_refuses_another_command(
    text: TextSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 50, kill)
        with pytest.raises(Killed):
            prepare_text(text, tmp_path / "out", "char")
    with pytest.raises(UserError, match='tokenizer: was "char", is "bpe"'):
        prepare_text(text, tmp_path / "out", "bpe")


# ---- mistakes


def test_mistakes_are_found_before_anything_is_written(text: TextSettings, tmp_path: Path) -> None:
    data = tmp_path / "data"
    one = write_jsonl(tmp_path / "one.jsonl", ["only one"])
    for source, tokenizer, vocab_size, message in (
        (TextSettings("nowhere.jsonl"), "bpe", None, "no such file"),
        (text, "bpe", 100, "at least 257"),
        (text, "char", 300, "--vocab-size is for --tokenizer bpe"),
        (text, "./nowhere", None, "no such folder"),
        (TextSettings(one.source, held_out=0.05), "char", None, r"in the held_out part \(--held-out 0.05\): raise"),
        (TextSettings(one.source, held_out=0.999), "char", None, r"in the train part .*: lower"),
        (write_jsonl(tmp_path / "empty.jsonl", [""]), "char", None, "is empty"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_text(source, data / "out", tokenizer, vocab_size)
        assert not data.exists() or list(data.iterdir()) == []


def test_other_files_are_never_touched(text: TextSettings, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        prepare_text(text, tmp_path / "out")
    with pytest.raises(UserError, match="is a file"):
        prepare_text(text, tmp_path / "out" / "notes")
    with pytest.raises(UserError, match="cannot be made"):
        prepare_text(text, tmp_path / "out" / "notes" / "below")
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_back(text, tmp_path / "a.txt")
    for name in ("a.jsonl.gz", "a.parquet"):
        with pytest.raises(UserError, match=r"as \.jsonl or \.txt"):
            main(["prepare-text", "--text", text.source, "--out", str(tmp_path / name)])
    with pytest.raises(UserError, match="leave --tokenizer out"):
        main(["prepare-text", "--text", text.source, "--out", "b.txt", "--tokenizer", "char"])
    (tmp_path / "empty").mkdir()  # an empty folder is as good as none
    prepare_text(text, tmp_path / "empty", "char")


@pytest.mark.parametrize("name", ["y.jsonl", "x/y.txt", "folder", "x/folder"])
def test_a_place_below_a_file_is_one_line(text: TextSettings, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt is a file"):
        main(["prepare-text", "--text", text.source, "--out", str(tmp_path / "a.txt" / name)])
    assert (tmp_path / "a.txt").read_text() == "text"


EMPTY = {"documents": 0, "characters": 0, "tokens": 0}


@pytest.mark.parametrize(
    "note",
    [
        "",
        "{}",
        "[]",
        "\x00junk",
        json.dumps({"made_from": {}}),
        json.dumps({"made_from": {}, "counts": {"train": EMPTY}}),
        json.dumps({"made_from": {}, "counts": {"train": EMPTY, "held_out": 3}}),
        json.dumps({"made_from": {}, "counts": {"train": EMPTY, "held_out": {**EMPTY, "tokens": "3"}}}),
        json.dumps({"made_from": {}, "counts": {"train": EMPTY, "held_out": {**EMPTY, "tokens": -1}}}),
        json.dumps({"made_from": 3, "counts": {"train": EMPTY, "held_out": EMPTY}}),
    ],
)
def test_a_note_that_is_none_is_one_line_and_stays(text: TextSettings, tmp_path: Path, note: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished.json").write_text(note)
    with pytest.raises(UserError, match=r"unfinished\.json"):
        prepare_text(text, tmp_path / "out", "char")
    assert content(tmp_path / "out") == {"unfinished.json": note.encode()}


def test_text_is_written_back_whole_or_not_at_all(
    text: TextSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Iterator[str]:
        yield "some text"
        raise OSError("the disk is gone")

    def stopping(*_: Any) -> Iterator[str]:
        yield "some text"
        os.kill(os.getpid(), signal.SIGTERM)
        yield "more text"

    out = tmp_path / "new" / "a.txt"
    for read, error in ((failing, OSError), (stopping, Interrupted)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "documents", read)
            with pytest.raises(error):
                write_back(text, out)
        assert list(out.parent.iterdir()) == []
    main(["prepare-text", "--text", text.source, "--out", str(out)])
    assert out.read_bytes() == "".join(documents(text, "all")).encode()


def test_the_verb_passes_every_flag_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(module, "prepare_text", lambda *args: calls.append(args))
    flags = "--text some/data --text-config en --text-split test --text-column body --max-documents 7 --streaming"
    main(["prepare-text", *flags.split(), *["--held-out", "0.1", "--out", "data/x", "--tokenizer", "gpt2"]])
    settings = TextSettings("some/data", "en", "test", "body", streaming=True, max_documents=7, held_out=0.1)
    assert calls == [(settings, Path("data/x"), "gpt2", None)]


# ---- memory


def test_memory_does_not_grow_with_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: None
) -> None:
    def peak(count: int) -> int:
        def many(_: TextSettings) -> Iterator[tuple[str, str]]:
            return (("train" if i % 10 else "held_out", "some words " * 20) for i in range(count))

        monkeypatch.setattr(module, "documents_of_both", many)
        tracemalloc.start()
        facts: Facts = prepare_text(text, tmp_path / f"out{count}", str(tmp_path / "words"))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert facts.train.tokens == count * 9 // 10 * 41
        return found

    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 10_000)
    monkeypatch.setattr(tokenize_text, "SAVE_SECONDS", 10.0)
    text = write_jsonl(tmp_path / "a.jsonl", ["not read"])
    word_tokenizer(tmp_path / "words", 3)
    peak(100)  # what is loaded once
    assert peak(4000) < 1.2 * peak(400)

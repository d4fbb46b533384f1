"""nanoGPT's data folder: token ids in flat files, and what says how to read them.

| file | holds | who reads it |
|---|---|---|
| `train.bin`, `val.bin` | token ids and nothing else, little-endian uint16; documents end with the separator | both |
| `meta.json` | `Facts`: width of the ids, vocabulary, counts, sha256 of each file, what it was made from | we |
| `meta.pkl` | vocab_size, stoi, itos: the vocabulary where it is not GPT-2's, in plain values | nanoGPT |
| `tokenizer.json`, `tokenizer_config.json` | the tokenizer, for `AutoTokenizer.from_pretrained(folder)` | we |
| `unfinished.json` | how far `prepare-text` got; gone in the end | we |

A vocabulary of more than 65,536 ids is written as uint32, which nanoGPT does not read; `meta.json` says so.
A folder of nanoGPT's own has neither `meta.json` nor a tokenizer, and without `meta.pkl` its tokens are GPT-2's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer, UInt

from sparse_coding.config import from_dict, to_dict
from sparse_coding.errors import UserError
from sparse_coding.files import write_text, written_whole
from sparse_coding.formats.nanogpt import GPT2_END_OF_TEXT
from sparse_coding.formats.nanogpt_meta import META, read_meta

TRAIN, VAL, FACTS, UNFINISHED = "train.bin", "val.bin", "meta.json", "unfinished.json"
FORMAT = 1  # of meta.json
GPT2_VOCABULARY = 50257  # without a meta.pkl; nanoGPT says 50304, the same with 47 ids that never occur
CHUNK = 1 << 22  # ids read at once

Ids = Literal["uint16", "uint32"]


def ids_for(vocab_size: int) -> Ids:
    """The type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def stored(ids: Ids) -> np.dtype:
    """The type as it is on disk: little-endian on every machine."""
    return np.dtype("<u2" if ids == "uint16" else "<u4")


@dataclass
class Counts:
    """What went into one file; separators count as tokens."""

    documents: int = 0
    characters: int = 0
    tokens: int = 0


@dataclass
class FileFacts(Counts):
    sha256: str = ""  # of the file


@dataclass(frozen=True)
class Facts:
    """What meta.json says."""

    format: int
    dtype: Ids
    vocab_size: int  # every id is below it
    separator: int | None  # the id each document ends with
    tokenizer_sha256: str  # of all that decides the ids
    train: FileFacts
    val: FileFacts | None  # None: nothing is held out, and there is no val.bin
    made_from: dict[str, Any]  # the text and the settings


@dataclass(frozen=True)
class TokenData:
    """A data folder to train on."""

    folder: Path
    train: UInt[np.ndarray, "N"]  # memory-mapped, uint16 or uint32
    held_out: UInt[np.ndarray, "K"]
    vocab_size: int  # every id is below it
    separator: int | None  # the id that ends documents; None: nothing does
    sha256: str  # of both files, their type and vocab_size


def is_data_folder(path: Path) -> bool:
    """Whether `path` is a folder of tokens, finished or not."""
    return (path / TRAIN).is_file() or (path / UNFINISHED).is_file()


# ---- reading


def open_tokens(folder: Path) -> TokenData:
    """Open a data folder, ours or nanoGPT's own. Raises `UserError` for files that are missing, cut short or not it.

    Every id is looked at once; files that no meta.json vouches for are hashed as well.
    """
    facts = read_facts(folder)
    vocab_size, separator = vocabulary(folder, facts)
    train, held_out = open_file(folder, TRAIN, facts), open_file(folder, VAL, facts)
    hashes = []
    for name, tokens, known in ((TRAIN, train, facts and facts.train), (VAL, held_out, facts and facts.val)):
        found, largest = _look_through(tokens, known is None)
        hashes.append(known.sha256 if known else found)
        if largest >= vocab_size:
            raise UserError(
                f"{folder / name} holds token {largest}, and its vocabulary has {vocab_size} (ids from 0 to "
                f"{vocab_size - 1}): it belongs to another {FACTS if facts else META}, or is no file of tokens"
            )
    identity = f"{train.dtype.str} {vocab_size} {' '.join(hashes)}"
    return TokenData(folder, train, held_out, vocab_size, separator, hashlib.sha256(identity.encode()).hexdigest())


def read_facts(folder: Path) -> Facts | None:
    """What meta.json says, None for a folder of nanoGPT's own. Raises `UserError` for a folder that is unfinished."""
    path = folder / FACTS
    if not path.is_file():
        if (folder / UNFINISHED).is_file():
            raise UserError(f"{folder} is not finished: start the prepare-text command that makes it again, it goes on")
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what prepare-text writes: remove it, or prepare the data again") from None
    if version != FORMAT:
        raise UserError(f"{path} has format {version!r}, this version reads {FORMAT}: prepare the data again")
    return from_dict(Facts, data, f"{path}: ")


def vocabulary(folder: Path, facts: Facts | None) -> tuple[int, int | None]:
    """How many ids there are, and which one ends documents, as meta.json says, or meta.pkl, or else nanoGPT assumes."""
    if facts is not None:
        return facts.vocab_size, facts.separator
    if (folder / META).is_file():
        return read_meta(folder / META).vocab_size, None
    return GPT2_VOCABULARY, GPT2_END_OF_TEXT


def open_file(folder: Path, name: str, facts: Facts | None) -> UInt[np.ndarray, "N"]:
    """Map train.bin or val.bin. Raises `UserError` where it is missing, empty, or not as long as it should be."""
    path, known = folder / name, None if facts is None else facts.train if name == TRAIN else facts.val
    if not path.is_file():
        if facts is not None and known is None:
            raise UserError(
                f"{folder} has no {name}: it was prepared with --held-out 0; prepare it with a share like 0.05"
            )
        raise UserError(f"{folder} has no {name}: `python -m sparse_coding prepare-text` makes {TRAIN} and {VAL}")
    dtype, size = stored(facts.dtype if facts else "uint16"), path.stat().st_size
    if known is not None and size != known.tokens * dtype.itemsize:
        expected = known.tokens * dtype.itemsize
        raise UserError(
            f"{path} has {size:,} bytes and should have {expected:,} ({known.tokens:,} tokens of {facts.dtype}): "  # type: ignore[union-attr]
            "it was cut short or changed; copy or prepare it again"
        )
    if size == 0:
        raise UserError(f"{path} is empty: prepare the data again")
    if size % dtype.itemsize:
        raise UserError(
            f"{path} has {size:,} bytes, which is no whole number of uint16 tokens (it would be {size - 1:,} or "
            f"{size + 1:,}): it was cut short, or is no file of tokens"
        )
    return np.memmap(path, dtype, "r")


def _look_through(tokens: Integer[np.ndarray, "N"], hashed: bool) -> tuple[str, int]:
    """The sha256 of the ids (empty if not `hashed`) and the largest one; reads CHUNK at a time."""
    digest, largest = hashlib.sha256(), 0
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        largest = max(largest, int(chunk.max()))
        if hashed:
            digest.update(chunk)  # type: ignore[arg-type]
    return digest.hexdigest() if hashed else "", largest


# ---- writing


@dataclass
class TokenFile:
    """train.bin or val.bin while it is written, under the name `.part`; cut back to `counts`, which is all it held."""

    path: Path
    dtype: np.dtype
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self.part = self.path.with_name(self.path.name + ".part")
        if self.path.exists():  # finishing was stopped
            self.path.replace(self.part)
        self.part.touch()
        self._file = self.part.open("r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"{self.path.parent} is being written by another process: wait for it or stop it") from None
        size, wanted = self.part.stat().st_size, self.counts.tokens * self.dtype.itemsize
        if size < wanted:
            self._file.close()
            raise UserError(
                f"{self.part} has {size:,} bytes, and {wanted:,} were written: delete the folder and start again"
            )
        self._file.truncate(wanted)
        self._file.seek(wanted)

    def add(self, ids: Integer[np.ndarray, "n"], documents: int, characters: int) -> None:
        """Append the tokens of whole documents, separators included."""
        self._file.write(ids.astype(self.dtype, copy=False))  # type: ignore[arg-type]
        self.counts.tokens += len(ids)
        self.counts.documents += documents
        self.counts.characters += characters

    def sync(self) -> None:
        """After this the bytes that `counts` speaks of survive a crash."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> FileFacts | None:
        """Give the file its name and return its facts; an empty one is removed instead."""
        self.sync()
        if not self.counts.tokens:
            self.part.unlink()
            return None
        sha256, _ = _look_through(np.memmap(self.part, self.dtype, "r"), hashed=True)
        self.part.replace(self.path)
        return FileFacts(**vars(self.counts), sha256=sha256)

    def close(self) -> None:
        self._file.close()


def write_facts(folder: Path, facts: Facts) -> None:
    """Write meta.json: with it the folder is whole."""
    write_text(folder / FACTS, json.dumps(to_dict(facts), indent=1))


def write_meta(folder: Path, itos: Sequence[str], stoi: Mapping[str, int]) -> None:
    """Write the meta.pkl that nanoGPT's train.py and sample.py read: plain dicts, texts and numbers, in protocol 4.

    itos: the text of each id. stoi: the id of each character that a prompt may hold.
    """
    data = {"vocab_size": len(itos), "stoi": dict(stoi), "itos": dict(enumerate(itos))}
    with written_whole(folder / META, "wb") as file:
        pickle.dump(data, file, protocol=4)

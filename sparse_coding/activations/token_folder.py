"""A nanoGPT data folder as text: its token ids back to the documents they were made of.

Documents end where the separator stands. A file without separators (nanoGPT's character sets, its `shakespeare`) is
one long text and cut as a `.txt` file is. Reading is lazy: memory holds a chunk of tokens and the document in hand.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import UInt

from sparse_coding.activations.text_files import pieces
from sparse_coding.activations.tokenizers import load_tokenizer
from sparse_coding.errors import UserError
from sparse_coding.formats.nanogpt_data import FACTS, TRAIN, VAL, Facts, open_file, read_facts
from sparse_coding.formats.nanogpt_meta import META

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decode = Callable[[Sequence[UInt[np.ndarray, "n"]]], list[str]]

CHUNK = 1 << 18  # tokens decoded at once


def token_documents(folder: Path) -> dict[Literal["train", "held_out"], Iterator[str]]:
    """The documents of train.bin and, where there is one, of val.bin; raises `UserError` where they cannot be read."""
    facts = read_facts(folder)
    tokenizer = folder_tokenizer(folder)
    known = facts.separator if facts else tokenizer.eos_token_id
    found: dict[Literal["train", "held_out"], Iterator[str]] = {}
    for part, name in (("train", TRAIN), ("held_out", VAL)):
        if part == "train" or (facts.val if facts else (folder / name).is_file()):
            tokens = open_file(folder, name, facts)
            separated = facts is not None or (tokens[: 1 << 22] == known).any()
            found[part] = _documents(folder / name, tokens, tokenizer, known if separated else None)  # type: ignore[arg-type]
    return found


def folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a data folder: its own, that of the characters in meta.pkl, else GPT-2's as nanoGPT assumes."""
    if any((folder / name).is_file() for name in (FACTS, META, "tokenizer.json")):
        return load_tokenizer(folder)
    try:
        return load_tokenizer("gpt2")
    except UserError as error:
        raise UserError(f"{folder} names no tokenizer, so its tokens are taken for GPT-2's: {error}") from None


def files_read(folder: Path) -> list[Path]:
    """The files that decide the documents; meta.json holds the sha256 of what it stands for, so it is enough."""
    facts: Facts | None = read_facts(folder)
    if facts is None:
        names = (TRAIN, VAL, META, "tokenizer.json")
        return [folder / name for name in names if (folder / name).is_file()]
    for name in (TRAIN, VAL) if facts.val else (TRAIN,):
        open_file(folder, name, facts)  # as long as meta.json says
    return [folder / FACTS]


# ---- tokens to text


def _documents(
    path: Path, tokens: UInt[np.ndarray, "N"], tokenizer: PreTrainedTokenizerBase, separator: int | None
) -> Iterator[str]:
    chunks, decode = _chunks(path, tokens, max(tokenizer.get_vocab().values())), decoder_of(tokenizer)
    if separator is None:
        return pieces(io.TextIOWrapper(_AsFile(_stretches(chunks, decode)), "utf-8", newline=""))  # type: ignore[arg-type]
    return _separated(chunks, decode, separator)


def _chunks(path: Path, tokens: UInt[np.ndarray, "N"], largest: int) -> Iterator[UInt[np.ndarray, "n"]]:
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        if chunk.max() > largest:
            raise UserError(
                f"{path} holds token {chunk.max()}, and its tokenizer ends at {largest}: "
                "it was made with another tokenizer, or is no file of tokens"
            )
        yield chunk


def decoder_of(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Token ids to text, many at once, with nothing left out or tidied up."""
    if not tokenizer.is_fast:
        slow = partial(tokenizer.batch_decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return lambda batch: slow([ids.tolist() for ids in batch])  # type: ignore[return-value]
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    return lambda batch: backend.decode_batch([ids.tolist() for ids in batch], skip_special_tokens=False)


def _separated(chunks: Iterable[UInt[np.ndarray, "n"]], decode: Decode, separator: int) -> Iterator[str]:
    begun: list[UInt[np.ndarray, "n"]] = []  # of the document in hand, which a chunk may end in the middle of
    for chunk in chunks:
        first, *others = np.split(chunk, np.flatnonzero(chunk == separator))
        begun.append(first)
        whole = []
        for other in others:
            whole.append(np.concatenate(begun))
            begun = [other[1:]]
        yield from decode(whole)
    yield from decode([np.concatenate(begun)])


def _stretches(chunks: Iterable[UInt[np.ndarray, "n"]], decode: Decode) -> Iterator[str]:
    """One long text in stretches that end between two characters, though a token may end within one."""
    rest = np.zeros(0, np.uint16)
    for chunk in chunks:
        ids = np.concatenate([rest, chunk])
        end = _between_characters(ids, decode)
        yield decode([ids[:end]])[0]
        rest = ids[end:]
    yield decode([rest])[0]


def _between_characters(ids: UInt[np.ndarray, "n"], decode: Decode) -> int:
    """A place among the last tokens where the texts on both sides make the whole text; 0 for a few tokens."""
    last = ids[-16:]  # four tokens hold a character, or more than one
    if len(last) < 16:
        return 0
    for end in range(15, 0, -1):
        before, after, whole = decode([last[:end], last[end:], last])
        if before + after == whole:
            return len(ids) - len(last) + end
    return len(ids)  # a tokenizer that gives no text back exactly anyhow


class _AsFile(io.BufferedIOBase):
    """Texts, laid end to end, as a file of UTF-8."""

    def __init__(self, texts: Iterator[str]) -> None:
        self.texts = texts

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1) -> bytes:
        """Everything of the next text that is not empty, whatever `size` says: TextIOWrapper takes what it gets."""
        return next((text.encode() for text in self.texts if text), b"")

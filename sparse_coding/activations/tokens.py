"""Text to token contexts of one length: packed, counted, and kept on disk so that it is done once.

Documents are laid end to end with a separator after each (the tokenizer's end-of-text token, `[SEP]` for BERT and its
kin, none where it has neither), and the stream is cut every `body` tokens. What the model expects around every input
(`[CLS] ... [SEP]`, a leading BOS) frames each context, `context = prefix + body + suffix`.
Nothing is dropped: a document longer than a context goes on in the next; the last, short one is padded and masked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, UInt

from sparse_coding.activations.encoding import Encode, Report, all_cores, batches_of, encoder_of, tokenizing
from sparse_coding.activations.packing import Writer, packing_of
from sparse_coding.activations.text import Part, TextSettings, documents, text_identity
from sparse_coding.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # raise when the same settings would write other tokens
ABANDONED = 24 * 3600  # seconds without a write after which a half-written folder belongs to nobody


@dataclass(frozen=True)
class Contexts:
    """Tokenized text, on disk: `n_contexts * context = n_tokens + n_frame + n_padding`."""

    tokens: UInt[np.ndarray, "n_contexts context"]  # memory-mapped, uint16 where the vocabulary allows, else uint32
    mask: Bool[np.ndarray, "n_contexts context"] | None  # False: padding, or special if excluded; None: all True
    n_documents: int  # documents that went in, the last perhaps cut by max_tokens
    n_characters: int  # characters of those documents
    n_tokens: int  # tokens of the text and its separators
    n_frame: int  # BOS, [CLS], [SEP] that frame the contexts
    n_padding: int  # the last n_padding positions of the last context are padding; models must not attend to them
    identity: dict[str, Any]  # everything the tokens depend on, and their sha256
    folder: Path  # where it lies


def contexts(
    text: TextSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    part: Part = "train",
    context: int = 128,
    max_tokens: int | None = None,
    cache: Path | None = None,
    exclude_special: bool = False,
    prepend_bos: bool | None = None,
    special_tokens: bool = True,
    progress: bool = True,
) -> Contexts:
    """Tokenize one part of a text into contexts of `context` tokens, or open them where that was done before.

    max_tokens: stop after exactly this many tokens of text and separators. cache: folder to keep them in, by default
    `$SPARSE_CODING_CACHE` or `~/.cache/sparse_coding`. exclude_special: mask separators and frame too.
    prepend_bos: begin each context with BOS; None does as the tokenizer itself does (Llama yes, GPT-2 and Pythia no).
    special_tokens: False frames nothing and separates nothing, whatever the tokenizer would do.
    Raises `UserError` for text that is missing or empty and for settings that leave no room for text.
    """
    encoder = encoder_of(tokenizer)
    packing = packing_of(tokenizer, encoder.around if special_tokens else [], context, prepend_bos, special_tokens)
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, or left out to read everything; got {max_tokens}")
    identity: dict[str, Any] = {
        "format": FORMAT,
        "text": text_identity(text),
        "part": part,
        "held_out": None if part == "all" else text.held_out,
        "tokenizer": encoder.sha256,
        "context": context,
        "prefix": packing.prefix,
        "suffix": packing.suffix,
        "separator": packing.separator,
        "padding": packing.padding,
        "exclude_special": exclude_special,
        "max_tokens": max_tokens,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = (cache or default_cache()) / "contexts" / key
    if not _whole(folder):
        with (
            _written_whole(folder) as writing,
            tokenizing(f"{text.source} ({part})", progress) as report,
            closing(Writer(writing, packing, exclude_special)) as writer,
        ):
            _tokenize(documents(text, part), encoder.encode, writer, max_tokens, report)
            writer.finish(identity)
            report(writer.n_tokens, writer.counts())
    return _open(folder)


def flat(contexts: Contexts) -> UInt[np.ndarray, " n_tokens"]:
    """The stream that was packed: separators included, frame and padding not; a view where there is no frame."""
    first = len(contexts.identity["prefix"])
    last = contexts.identity["context"] - len(contexts.identity["suffix"])
    return contexts.tokens[:, first:last].reshape(-1)[: contexts.n_tokens]


def default_cache() -> Path:
    """`$SPARSE_CODING_CACHE`, or `~/.cache/sparse_coding`."""
    return Path(os.environ.get("SPARSE_CODING_CACHE") or "~/.cache/sparse_coding").expanduser()


def _tokenize(texts: Iterable[str], encode: Encode, writer: Writer, max_tokens: int | None, report: Report) -> None:
    with all_cores():
        for batch in batches_of(texts):
            left = None if max_tokens is None else max_tokens - writer.n_tokens
            writer.add(batch, encode(batch), left)
            report(writer.n_tokens, writer.counts())
            if writer.n_tokens == max_tokens:
                return


# ---- on disk


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write in that takes its name when all is done, or vanishes; of two writers at once the first wins."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        writing = folder.parent / f".writing-{uuid.uuid4().hex}"
        writing.mkdir()
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(
            f"the cache folder {str(folder.parent)!r} cannot be written ({error.strerror}): "
            "set SPARSE_CODING_CACHE to another"
        ) from None
    try:
        yield writing
        if folder.exists() and not _whole(folder):  # damaged from outside: folders appear whole
            shutil.rmtree(folder)
        try:
            writing.rename(folder)
        except OSError:
            if not _whole(folder):
                raise
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _whole(folder: Path) -> bool:
    return (folder / "contexts.json").is_file()


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _remove_abandoned(root: Path) -> None:
    """Clear what a killed process left half-written a day ago or earlier."""
    for folder in root.glob(".writing-*"):
        with suppress(FileNotFoundError):  # another process may be finishing it
            newest = max(entry.stat().st_mtime for entry in (folder, *folder.iterdir()))
            if time.time() - newest > ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def _open(folder: Path) -> Contexts:
    facts = json.loads((folder / "contexts.json").read_text(encoding="utf-8"))
    shape = facts.pop("n_contexts"), facts["identity"]["context"]
    dtype = np.dtype(facts.pop("dtype"))
    masked = facts["identity"]["exclude_special"] or facts["n_padding"] > 0
    for name, width in (("tokens.bin", dtype.itemsize), *([("mask.bin", 1)] if masked else [])):
        path = folder / name
        if not path.is_file() or path.stat().st_size != shape[0] * shape[1] * width:
            raise UserError(
                f"the cached tokens in {str(folder)!r} are damaged ({name}): delete that folder and start again"
            )
    tokens = np.memmap(folder / "tokens.bin", dtype, "r", shape=shape)
    mask = np.memmap(folder / "mask.bin", bool, "r", shape=shape) if masked else None
    return Contexts(tokens=tokens, mask=mask, folder=folder, **facts)

"""Text to token contexts of one length: packed, counted, and kept on disk so that it is done once.

Documents are laid end to end with a separator after each (the tokenizer's end-of-text token, `[SEP]` for BERT and its
kin, none where it has neither), and the stream is cut every `body` tokens. What the model expects around every input
(`[CLS] ... [SEP]`, a leading BOS) frames each context, `context = prefix + body + suffix`.
Nothing is dropped: a document longer than a context goes on in the next; the last, short one is padded and masked.
Text is text: a `<|endoftext|>` written out in a document is tokenized as characters, not as the separator.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Bool, UInt

from sparse_coding.activations.text import Part, TextSettings, documents, text_identity
from sparse_coding.errors import UserError
from sparse_coding.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Encode = Callable[[list[str]], list[list[int]]]
Report = Callable[[int, str], None]

FORMAT = 1  # raise when the same settings would write other tokens
BATCH_CHARACTERS = 1_000_000  # characters tokenized at once: enough for every thread, little in memory
ABANDONED = 24 * 3600  # seconds without a write after which a half-written folder belongs to nobody
REPORT_SECONDS = 10.0  # between plain progress lines


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


@dataclass(frozen=True)
class _Packing:
    """How tokens become contexts."""

    context: int
    prefix: list[int]
    suffix: list[int]
    separator: int | None
    padding: int
    dtype: str  # little-endian on every machine

    @property
    def body(self) -> int:
        return self.context - len(self.prefix) - len(self.suffix)


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
    packing = _packing(tokenizer, encoder.around if special_tokens else [], context, prepend_bos, special_tokens)
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
            closing(_Writer(writing, packing, exclude_special)) as writer,
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


# ---- the tokenizer


def _packing(
    tokenizer: PreTrainedTokenizerBase, around: list[int], context: int, prepend_bos: bool | None, special_tokens: bool
) -> _Packing:
    """The frame, separator and padding of this tokenizer. Raises `UserError` where they leave no room for text."""
    prefix, suffix = _frame(tokenizer, around)
    if prepend_bos is not None and not special_tokens:
        raise UserError(f"prepend_bos={prepend_bos} with special_tokens=False: a BOS is a special token; leave one out")
    if prepend_bos:
        if tokenizer.bos_token_id is None and not prefix:
            raise UserError("prepend_bos: this tokenizer has no BOS token; leave prepend_bos out")
        prefix = prefix or [int(tokenizer.bos_token_id)]  # type: ignore[arg-type]
    elif prepend_bos is False and prefix == [tokenizer.bos_token_id]:
        prefix = []
    separator = separator_of(tokenizer, around) if special_tokens else None
    known = (tokenizer.pad_token_id, separator, 0)
    padding = next(int(token) for token in known if token is not None)  # type: ignore[arg-type]
    smallest = len(prefix) + len(suffix) + 1
    if context < smallest:
        raise UserError(f"context={context} leaves no room for text: this tokenizer needs at least {smallest}")
    dtype = "<u2" if max(tokenizer.get_vocab().values()) < 1 << 16 else "<u4"
    return _Packing(context, prefix, suffix, separator, padding, dtype)  # type: ignore[arg-type]


def _frame(tokenizer: PreTrainedTokenizerBase, around: list[int]) -> tuple[list[int], list[int]]:
    leads = bool(around) and around[0] in (tokenizer.cls_token_id, tokenizer.bos_token_id)
    return (around[:1], around[1:]) if leads else ([], around)


def separator_of(tokenizer: PreTrainedTokenizerBase, around: list[int]) -> int | None:
    """The token that ends documents; `around` is what the tokenizer puts around every text (`Encoder.around`)."""
    _, suffix = _frame(tokenizer, around)
    known = (*suffix[-1:], tokenizer.eos_token_id, tokenizer.sep_token_id)
    return next((int(token) for token in known if token is not None), None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Encoder:
    encode: Encode  # texts to token ids without special tokens, on every core
    around: list[int]  # the special tokens that the tokenizer puts around every text
    sha256: str  # of all that decides the ids


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """What a tokenizer does, on a copy of it: truncation left on in the caller's cuts nothing, and stays on there."""
    if not tokenizer.is_fast:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            content = b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in files)
        slow = partial(tokenizer, add_special_tokens=False, truncation=False, verbose=False)
        return Encoder(
            encode=lambda texts: slow(texts)["input_ids"],  # type: ignore[return-value]
            around=list(tokenizer("")["input_ids"]),  # type: ignore[arg-type]
            sha256=hashlib.sha256(content).hexdigest(),
        )

    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in copy.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library has no class of its own for this
            unknown = sorted({character for text in texts for character in text} - copy.get_vocab().keys())
            if "[UNK]" not in str(error) or not unknown:
                raise
            raise UserError(
                f"the text holds {len(unknown)} characters that the tokenizer does not know, such as "
                f"{', '.join(map(repr, unknown[:5]))}: read other text, or take them out"
            ) from None

    return Encoder(encode, copy.encode("").ids, hashlib.sha256(copy.to_str().encode()).hexdigest())


@contextmanager
def all_cores() -> Iterator[None]:
    """The `tokenizers` library stops using threads after a fork unless this variable says otherwise."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = before or "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]


# ---- packing


def batches_of(texts: Iterable[T], length: Callable[[T], int] = len) -> Iterator[list[T]]:  # type: ignore[assignment]
    """Documents in lists of about `BATCH_CHARACTERS`, so that memory does not grow with the text."""
    batch: list[T] = []
    characters = 0
    for document in texts:
        batch.append(document)
        characters += length(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenize(texts: Iterable[str], encode: Encode, writer: _Writer, max_tokens: int | None, report: Report) -> None:
    with all_cores():
        for batch in batches_of(texts):
            left = None if max_tokens is None else max_tokens - writer.n_tokens
            writer.add(batch, encode(batch), left)
            report(writer.n_tokens, writer.counts())
            if writer.n_tokens == max_tokens:
                return


class _Writer:
    """Packs token ids into contexts on disk and counts what goes in; memory holds one batch."""

    def __init__(self, folder: Path, packing: _Packing, exclude_special: bool) -> None:
        self.folder, self.packing, self.exclude_special = folder, packing, exclude_special
        self.tokens, self.mask = (folder / "tokens.bin").open("wb"), (folder / "mask.bin").open("wb")
        self.digest = hashlib.sha256()
        self.rest = np.zeros(0, packing.dtype)  # not yet a whole context
        self.rest_mask = np.zeros(0, bool)
        self.n_documents = self.n_characters = self.n_tokens = self.n_contexts = self.n_padding = 0

    def add(self, texts: list[str], encoded: list[list[int]], left: int | None) -> None:
        """Append documents with their separators, `left` tokens at most."""
        end = [] if self.packing.separator is None else [self.packing.separator]
        ids, masks = [self.rest], [self.rest_mask]
        for document, tokens in zip(texts, encoded, strict=True):
            if left == 0:
                break
            stream = np.array(tokens + end, self.packing.dtype)[:left]
            mask = np.ones(len(stream), bool)
            mask[len(tokens) :] = not self.exclude_special
            ids.append(stream)
            masks.append(mask)
            left = None if left is None else left - len(stream)
            self.n_documents += 1
            self.n_characters += len(document)
            self.n_tokens += len(stream)
        stream, mask, body = np.concatenate(ids), np.concatenate(masks), self.packing.body
        whole = len(stream) // body * body
        self.rest, self.rest_mask = stream[whole:], mask[whole:]
        self._write(stream[:whole].reshape(-1, body), mask[:whole].reshape(-1, body), 0)

    def _write(self, body: np.ndarray, mask: np.ndarray, padding: int) -> None:
        """Frame rows of tokens, pad them by `padding` positions at the end, and write them."""

        def framed(rows: np.ndarray, prefix: Any, suffix: Any, pad: Any) -> np.ndarray:
            sides = [
                np.broadcast_to(np.array(side, rows.dtype), (len(rows), len(side))) for side in (prefix, suffix, pad)
            ]
            return np.concatenate([sides[0], rows, *sides[1:]], axis=1)

        packing, shown = self.packing, not self.exclude_special
        block = framed(body, packing.prefix, packing.suffix, [packing.padding] * padding).tobytes()
        self.tokens.write(block)
        self.digest.update(block)
        kept = framed(mask, [shown] * len(packing.prefix), [shown] * len(packing.suffix), [False] * padding)
        self.mask.write(kept.tobytes())
        self.n_contexts += len(body)
        self.n_padding += padding

    def counts(self) -> str:
        return (
            f"{self.n_documents:,} documents, {self.n_characters:,} characters, {self.n_contexts:,} contexts, "
            f"{self.n_padding} positions of padding"
        )

    def finish(self, identity: dict[str, Any]) -> None:
        """Pad the last context, check the sums, and write the facts; after this the folder is whole."""
        packing = self.packing
        if len(self.rest):
            self._write(self.rest[None], self.rest_mask[None], packing.body - len(self.rest))
        n_frame = self.n_contexts * (packing.context - packing.body)
        assert self.n_contexts * packing.context == self.n_tokens + n_frame + self.n_padding, "tokens in are tokens out"
        if not self.n_tokens:
            raise UserError("the tokenizer makes no token of this text: is it the right tokenizer for it?")
        for file in (self.tokens, self.mask):
            file.flush()
            os.fsync(file.fileno())
        self.close()  # before one is removed
        if not self.exclude_special and not self.n_padding:
            (self.folder / "mask.bin").unlink()  # all True
        facts = {name: getattr(self, name) for name in ("n_documents", "n_characters", "n_tokens", "n_padding")}
        facts |= {"n_contexts": self.n_contexts, "n_frame": n_frame, "dtype": packing.dtype}
        facts["identity"] = identity | {"sha256": self.digest.hexdigest()}
        write_text(self.folder / "contexts.json", json.dumps(facts, indent=1))

    def close(self) -> None:
        self.tokens.close()
        self.mask.close()


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


# ---- progress


@contextmanager
def tokenizing(what: str, shown: bool = True, done: int = 0) -> Iterator[Report]:
    """Report (tokens, other counts): a line that is rewritten on a terminal, a line every few seconds elsewhere, and
    one at the end in both. done: tokens of an earlier start."""
    if not shown:
        yield lambda n_tokens, counts: None
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    start = told = time.perf_counter()
    line = f"tokenizing {what}"

    def report(n_tokens: int, counts: str) -> None:
        nonlocal told, line
        now = time.perf_counter()
        rate = (n_tokens - done) / (now - start)
        line = f"tokenizing {what}: {n_tokens:,} tokens, {rate:,.0f} tokens/s, {now - start:.1f} s; {counts}"
        if status is not None:
            status.update(line)
        elif now - told >= REPORT_SECONDS:
            told = now
            console.print(line)

    if console.is_terminal:
        with console.status(line) as status:
            yield report
    else:
        status = None
        yield report
    console.print(line)

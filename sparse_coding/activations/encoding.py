"""What a tokenizer does to documents: their ids without special tokens, batch by batch, with progress shown.

Text is text: a `<|endoftext|>` written out in a document is tokenized as characters, not as the separator.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sparse_coding.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Encode = Callable[[list[str]], list[list[int]]]
Report = Callable[[int, str], None]

BATCH_CHARACTERS = 1_000_000  # characters tokenized at once: enough for every thread, little in memory
REPORT_SECONDS = 10.0  # between plain progress lines


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


def frame_of(tokenizer: PreTrainedTokenizerBase, around: list[int]) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind every text; `around` is all of it (`Encoder.around`)."""
    leads = bool(around) and around[0] in (tokenizer.cls_token_id, tokenizer.bos_token_id)
    return (around[:1], around[1:]) if leads else ([], around)


def separator_of(tokenizer: PreTrainedTokenizerBase, around: list[int]) -> int | None:
    """The token that ends documents; `around` is what the tokenizer puts around every text (`Encoder.around`)."""
    _, suffix = frame_of(tokenizer, around)
    known = (*suffix[-1:], tokenizer.eos_token_id, tokenizer.sep_token_id)
    return next((int(token) for token in known if token is not None), None)  # type: ignore[arg-type]


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

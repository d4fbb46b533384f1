"""Documents to the token files of a data folder, in one pass, from wherever an earlier start got to."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_coding.activations.encoding import Encoder, all_cores, batches_of, encoder_of, separator_of, tokenizing
from sparse_coding.activations.text import Part
from sparse_coding.activations.token_folder import decoder_of
from sparse_coding.activations.tokenizers import load_tokenizer
from sparse_coding.errors import Interrupted, UserError
from sparse_coding.formats.nanogpt_data import (
    FORMAT,
    TRAIN,
    VAL,
    Counts,
    Facts,
    TokenFile,
    ids_for,
    stored,
    write_facts,
    write_meta,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Asked = Callable[[], bool]  # whether to stop

SAVE_SECONDS = 10.0  # between two notes of how far the files reach
GPT2_TOKENS = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"  # sha256 of GPT-2's, by id, in lines


def tokenize(
    rows: Iterator[tuple[Part, str]],
    out: Path,
    counts: dict[Part, Counts],
    made_from: dict[str, Any],
    note: Callable[[], None],
    asked: Asked,
) -> Facts:
    """Write every document that the files do not hold yet, then the rest of the folder; meta.json comes last.

    rows: all documents. out: holds the tokenizer. counts: what was in each file when it was noted last, kept up to
    date here; `note` notes it. Raises `UserError` where a file stays empty, `Interrupted`, after a note, when stopped.
    """
    words = load_tokenizer(out)
    encoder, vocab_size = encoder_of(words), max(words.get_vocab().values()) + 1
    separator, dtype = separator_of(words, encoder.around), stored(ids_for(vocab_size))
    with (
        closing(TokenFile(out / TRAIN, dtype, counts["train"])) as train,
        closing(TokenFile(out / VAL, dtype, counts["held_out"])) as held_out,
    ):
        files: dict[Part, TokenFile] = {"train": train, "held_out": held_out}

        def save() -> None:
            for file in files.values():
                file.sync()
            note()

        _append(rows, files, encoder, separator, made_from["text"]["source"], save, asked)
        if asked():
            save()
            done = sum(count.documents for count in counts.values())
            raise Interrupted(f"{done:,} documents are tokenized in {out}; start the same command again to go on")
        _refuse_empty(counts, made_from["held_out"])
        train_facts, val_facts = train.finish(), held_out.finish()
    assert train_facts is not None
    facts = Facts(FORMAT, ids_for(vocab_size), vocab_size, separator, encoder.sha256, train_facts, val_facts, made_from)
    if facts.dtype == "uint16" and not is_gpt2(words):
        write_meta(out, *texts_of_ids(words))
    write_facts(out, facts)
    return facts


def _refuse_empty(counts: dict[Part, Counts], share: float) -> None:
    for part, count in counts.items():
        if not count.documents and (part == "train" or share):
            raise UserError(
                f"no document of this text is in the {part} part (--held-out {share}): "
                f"{'lower' if part == 'train' else 'raise'} --held-out or give more text"
            )
        if count.documents and not count.tokens:
            raise UserError("the tokenizer makes no token of this text: is it the right tokenizer for it?")


def _append(
    rows: Iterator[tuple[Part, str]],
    files: dict[Part, TokenFile],
    encoder: Encoder,
    separator: int | None,
    source: str,
    save: Callable[[], None],
    asked: Asked,
) -> None:
    """Append the documents that the files do not hold yet, to the end or until asked to stop; `save` now and then."""
    end = [] if separator is None else [separator]
    begun = sum(file.counts.documents for file in files.values())
    tokens = sum(file.counts.tokens for file in files.values())
    if begun:
        print(f"going on after {begun:,} documents", flush=True)
    new = islice(takewhile(lambda _: not asked(), rows), begun, None)
    saved = time.monotonic()
    with tokenizing(source, done=tokens) as report, all_cores():
        for batch in batches_of(new, lambda row: len(row[1])):
            encoded = encoder.encode([document for _, document in batch])
            for part, file in files.items():
                chosen = [
                    (document, ids) for (where, document), ids in zip(batch, encoded, strict=True) if where == part
                ]
                ids = chain.from_iterable(piece for _, ids in chosen for piece in (ids, end))
                file.add(np.fromiter(ids, file.dtype), len(chosen), sum(len(document) for document, _ in chosen))
            documents, tokens = (
                sum(getattr(file.counts, name) for file in files.values()) for name in ("documents", "tokens")
            )
            report(tokens, f"{documents:,} documents")
            if time.monotonic() - saved >= SAVE_SECONDS:
                save()
                saved = time.monotonic()


def is_gpt2(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether these are GPT-2's own tokens, which nanoGPT takes for granted where there is no meta.pkl."""
    vocabulary = tokenizer.get_vocab()
    return hashlib.sha256("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)).encode()).hexdigest() == GPT2_TOKENS


def texts_of_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], dict[str, int]]:
    """The text of each id, and the id of each character that is a token by itself: what meta.pkl holds."""
    ids = np.arange(max(tokenizer.get_vocab().values()) + 1, dtype=np.uint32)
    itos, encoder = decoder_of(tokenizer)(list(ids[:, None])), encoder_of(tokenizer)
    characters = sorted({text for text in itos if len(text) == 1})
    encoded = encoder.encode(characters)  # half a character decodes to U+FFFD, and is none
    return itos, {text: ids[0] for text, ids in zip(characters, encoded, strict=True) if len(ids) == 1}

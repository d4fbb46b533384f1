"""Text to a folder of tokens in nanoGPT's layout, and back: what `prepare-text` does.

One pass over the documents writes both files; memory holds a batch of them. What is written, and how far it reaches
into the text, is noted every few seconds, so a command that was stopped or killed goes on where it was and ends with
the files, byte for byte, of one that never stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_coding.activations.text import (
    PYTHON_DOCS,
    Part,
    TextSettings,
    documents,
    documents_of_both,
    text_identity,
)
from sparse_coding.activations.token_folder import decoder_of
from sparse_coding.activations.tokenizers import character_tokenizer, load_tokenizer, train_byte_bpe
from sparse_coding.activations.tokens import Encoder, all_cores, batches_of, encoder_of, separator_of, tokenizing
from sparse_coding.errors import Interrupted, UserError
from sparse_coding.files import write_text
from sparse_coding.formats import nanogpt_data as layout
from sparse_coding.formats.nanogpt_data import Counts, Facts, TokenFile
from sparse_coding.language_models.loop import stop_requests
from sparse_coding.training.run_folder import differences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES: dict[Part, str] = {"train": layout.TRAIN, "held_out": layout.VAL}
TEXT_FILES = (".jsonl", ".txt")  # an --out that ends so is text
LEARNT_FROM = 200_000_000  # characters that byte pairs are learnt from; the words of more text need ever more memory
SAVE_SECONDS = 10.0
GPT2_TOKENS = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"  # sha256 of GPT-2's, in order of id


def prepare_text(text: TextSettings, out: Path, tokenizer: str = "bpe", vocab_size: int | None = None) -> Facts:
    """Tokenize a text into `out` (see `formats/nanogpt_data.py`), or go on with it, and say what came of it.

    tokenizer: `bpe` is learnt from the training part, `char` has every character of the text, anything else is loaded.
    vocab_size: of `bpe`, 2048 if None. Raises `UserError` for wrong settings and for a folder that holds anything
    else, `Interrupted` when stopped.
    """
    if vocab_size is not None and tokenizer != "bpe":
        raise UserError(f"--vocab-size is for --tokenizer bpe; {tokenizer!r} has its own vocabulary")
    settings = {"text": text_identity(text), "held_out": text.held_out, "tokenizer": tokenizer}
    settings |= {"vocab_size": vocab_size}
    begun = _begun(out, settings)
    if (out / layout.FACTS).is_file():
        facts = layout.read_facts(out)
        assert facts is not None
        (out / layout.UNFINISHED).unlink(missing_ok=True)  # the last step, if a kill came before it
        print(f"{out} is prepared already: {_words(facts)}")
        return facts
    with stop_requests() as asked:
        rows = documents_of_both(text)  # opened before anything is written
        if not begun:
            _begin(out, settings, text, asked)
        try:
            facts = _Preparation(out, settings, text, asked).run(rows)
        except UserError:
            if not begun and not any(counts.documents for counts in _counts(out).values()):
                shutil.rmtree(out)  # a mistake found before anything was done leaves nothing behind
            raise
    print(f"{out}: {_words(facts)}")
    return facts


def write_back(text: TextSettings, out: Path) -> None:
    """Write a text as one file: .jsonl has a document per line, .txt all of them end to end.

    Every document is written, in order; of a data folder those of train.bin, then those of val.bin. The file appears
    whole or not at all. Raises `UserError` for a file that exists, `Interrupted` when stopped.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already: nothing is overwritten; name another file, or remove it first")
    count = characters = 0
    rows = documents(text, "all")
    with stop_requests() as asked, _written_whole(out) as file:
        for document in takewhile(lambda _: not asked(), rows):
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n" if out.suffix == ".jsonl" else document)
            count += 1
            characters += len(document)
        if asked():
            raise Interrupted(f"{out} is not written; start the same command again")
    print(f"{out}: {count:,} documents, {characters:,} characters")

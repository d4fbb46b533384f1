"""What a GPT is trained on: two streams of token ids and the tokenizer they come from.

They are made from a text by a tokenizer learnt from it or loaded, or read from a folder in nanoGPT's layout.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Integer, UInt

from sparse_coding.activations.models import bundled_models
from sparse_coding.activations.text import PYTHON_DOCS, TextSettings, documents, text_identity
from sparse_coding.activations.token_folder import folder_tokenizer
from sparse_coding.activations.tokens import contexts, flat
from sparse_coding.errors import UserError
from sparse_coding.formats.nanogpt_data import is_data_folder, open_tokens
from sparse_coding.language_models.card import FACTS
from sparse_coding.language_models.config_file import TrainConfig
from sparse_coding.language_models.training_state import STATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA = Path("data")
"""Where nanoGPT keeps its data sets, and `dataset = 'name'` is looked for."""


TEXT_FLAGS = {
    "--text-config": "config",
    "--text-split": "split",
    "--text-column": "column",
    "--max-documents": "max_documents",
    "--held-out": "held_out",
}


@dataclass(frozen=True)
class Corpus:
    """Token ids to train on and to evaluate on, documents end to end."""

    train: UInt[np.ndarray, "N"]
    held_out: UInt[np.ndarray, "K"]
    vocab_size: int  # of the model: every id is below it
    end_of_text: int | None  # the id that ends documents
    tokenizer: PreTrainedTokenizerBase | None  # None: a folder of tokens that names none
    files: Path | None  # a folder with the tokenizer's files
    sha256: str  # of both streams and the size of the vocabulary


def source_of(text: str | None, dataset: str) -> str:
    """What is read: `--text` if given, else `data/<dataset>`, else python-docs. `UserError` if there is no such set."""
    if text is not None or not dataset:
        return text or PYTHON_DOCS
    if not is_data_folder(DATA / dataset):
        raise UserError(
            f"dataset = {dataset!r}: there is no {DATA / dataset} with train.bin and val.bin here; make it with "
            f"`python -m sparse_coding prepare-text --text ... --out {DATA / dataset}`, or give --text"
        )
    return str(DATA / dataset)


def corpus_of(
    text: TextSettings, tokenizer: str | None, vocab_size: int | None, config: TrainConfig, out: Path
) -> Corpus:
    """The tokens of a text, or of a data folder as they are. Raises `UserError` for less than one window of them.

    tokenizer: None is that of the model to start from, else `bpe`. `bpe` and `char` are made from the text and kept in
    `out`; anything else is loaded.
    """
    if is_data_folder(Path(text.source)):
        _refuse_for_tokens(text, tokenizer, vocab_size)
        found = _read(Path(text.source))
    else:
        fresh = config.init_from == "scratch" or vocab_size is not None  # another model brings its own tokenizer
        name = tokenizer or ("bpe" if fresh else str(bundled_models().get(config.init_from, config.init_from)))
        found = _make(text, name, vocab_size, config.block_size, out)
    for name, tokens in (("training", found.train), ("held-out", found.held_out)):
        if len(tokens) <= config.block_size:
            raise UserError(
                f"the {name} text has {len(tokens)} tokens, block_size = {config.block_size} needs at least one more: "
                "give more text or set a smaller block_size"
            )
    return found


def _refuse_for_tokens(text: TextSettings, tokenizer: str | None, vocab_size: int | None) -> None:
    """`UserError` for settings of text where the tokens are there already, and split."""
    given = {"--tokenizer": tokenizer is not None, "--vocab-size": vocab_size is not None}
    usual = TextSettings(source=text.source)
    for flag, name in TEXT_FLAGS.items():
        given[flag] = getattr(text, name) != getattr(usual, name)
    for flag in (flag for flag, asked in given.items() if asked):
        raise UserError(f"{flag} is for text, and {text.source} holds tokens already: leave it out")


def _read(folder: Path) -> Corpus:
    data = open_tokens(folder)
    try:
        tokenizer = folder_tokenizer(folder)
    except UserError as error:
        tokenizer = None
        print(f"note: the model gets no tokenizer and its card no samples: {error}")
    return Corpus(data.train, data.held_out, data.vocab_size, data.separator, tokenizer, None, data.sha256)


def _make(text: TextSettings, name: str, vocab_size: int | None, block_size: int, out: Path) -> Corpus:
    words, files = tokenizer_for(name, vocab_size, text, out)
    train, held_out = (flat(contexts(text, words, part=part, context=block_size)) for part in ("train", "held_out"))
    end = None if words.eos_token_id is None else int(words.eos_token_id)  # type: ignore[arg-type]
    return Corpus(train, held_out, len(words), end, words, files, sha256_of(train, held_out, len(words)))


def tokenizer_for(
    name: str, vocab_size: int | None, text: TextSettings, out: Path
) -> tuple[PreTrainedTokenizerBase, Path]:
    """The run's tokenizer and the folder of its files: kept from an earlier start, made from the text, or loaded.

    What is kept is filed under everything it depends on, so another text or size never gets it.
    """
    from sparse_coding.activations.tokenizers import check_vocab_size, load_tokenizer, make_tokenizer

    check_vocab_size(name, vocab_size)
    if (out / FACTS).exists():
        return load_tokenizer(out), out
    key = json.dumps([name, vocab_size, text_identity(text), text.held_out], sort_keys=True)
    kept = out / STATE / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not kept.exists():
        part = out / STATE / "tokenizer.part"
        shutil.rmtree(part, ignore_errors=True)
        make_tokenizer(name, vocab_size, lambda of: documents(text, of), part)
        part.rename(kept)
    return load_tokenizer(kept), kept


def sha256_of(train: Integer[np.ndarray, "N"], held_out: Integer[np.ndarray, "K"], vocab_size: int) -> str:
    """The identity of what a run reads: both token streams and the size of the vocabulary."""
    digest = hashlib.sha256(f"{vocab_size} {len(train)} {len(held_out)}".encode())
    for tokens in (train, held_out):
        for start in range(0, len(tokens), 1 << 24):
            digest.update(tokens[start : start + (1 << 24)].astype("<u4").tobytes())
    return digest.hexdigest()

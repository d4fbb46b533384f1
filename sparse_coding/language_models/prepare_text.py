"""Text to a folder of tokens in nanoGPT's layout, and back: what `prepare-text` does.

One pass over the documents writes both files; memory holds a batch of them. How far the files reach into the text is
noted every few seconds, so a command that was stopped or killed goes on where it was, and ends with the files, byte
for byte, of one that never stopped.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from sparse_coding.activations.text import (
    PYTHON_DOCS,
    Part,
    TextSettings,
    documents,
    documents_of_both,
    text_identity,
)
from sparse_coding.activations.tokenizers import check_vocab_size, make_tokenizer
from sparse_coding.config import from_dict
from sparse_coding.errors import Interrupted, UserError
from sparse_coding.files import make_folder, write_text, written_whole
from sparse_coding.formats.nanogpt_data import FACTS, TRAIN, UNFINISHED, VAL, Counts, Facts, read_facts
from sparse_coding.language_models.loop import stop_requests
from sparse_coding.language_models.tokenize_text import Asked, tokenize
from sparse_coding.training.run_folder import differences

PARTS: tuple[Part, ...] = ("train", "held_out")
TEXT_FILES = (".jsonl", ".txt")  # an --out that ends so is text


def prepare_text(text: TextSettings, out: Path, tokenizer: str = "bpe", vocab_size: int | None = None) -> Facts:
    """Tokenize a text into the folder `out` (`formats/nanogpt_data.py` has its layout), or go on with it.

    tokenizer: `bpe` is learnt from the training part, `char` has every character of the text, anything else is loaded.
    vocab_size: of `bpe`, 2048 if None. Raises `UserError` for settings that make no sense and for a folder that holds
    anything else, `Interrupted` when stopped.
    """
    check_vocab_size(tokenizer, vocab_size)
    settings = {
        "text": text_identity(text),
        "held_out": text.held_out,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
    }
    facts = read_facts(out) if (out / FACTS).is_file() else None
    new = _is_new(out, facts, settings)
    if facts is not None:
        (out / UNFINISHED).unlink(missing_ok=True)  # the last step; a kill may have come before it
        print(f"{out} is prepared already: {_words(facts)}")
        return facts
    with stop_requests() as asked:
        rows = documents_of_both(text)  # opened before anything is written
        if new:
            _begin(out, settings, text, asked)
        try:
            _, counts = _noted(out)
            facts = tokenize(rows, out, counts, settings, lambda: _note(out, settings, counts), asked)
            (out / UNFINISHED).unlink()
        except UserError:
            if new and not any(counts.documents for counts in _noted(out)[1].values()):
                shutil.rmtree(out)  # a mistake found before anything was done leaves nothing behind
            raise
    print(f"{out}: {_words(facts)}")
    return facts


# ---- the folder


def _is_new(out: Path, facts: Facts | None, settings: dict[str, Any]) -> bool:
    """Whether nothing is there yet. Raises `UserError` unless it is nothing, or what these settings began."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return True
    if facts is None and not (out / UNFINISHED).is_file():
        kind = "holds other files" if out.is_dir() else "is a file"
        raise UserError(f"--out {out} {kind}: name a new folder for tokens, or a new file ending in .jsonl or .txt")
    before = facts.made_from if facts else _noted(out)[0]
    changed = differences(before, json.loads(json.dumps(settings)))
    if changed:
        raise UserError(
            f"{out} was made by another command ({'; '.join(changed)}): give the same again to go on, name another "
            "--out, or delete the folder"
        )
    return False


def _begin(out: Path, settings: dict[str, Any], text: TextSettings, asked: Asked) -> None:
    """Make the folder, with the tokenizer and the note that nothing is written yet; it appears whole."""
    out = out.resolve()
    make_folder(out.parent, f"--out {out}")
    writing = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _save_tokenizer(writing, settings["tokenizer"], settings["vocab_size"], text, asked)
        _note(writing, settings, {part: Counts() for part in PARTS})
        writing.chmod(0o755)
        writing.replace(out)  # an empty folder gives way
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _save_tokenizer(folder: Path, name: str, vocab_size: int | None, text: TextSettings, asked: Asked) -> None:
    def read(part: Part) -> Iterator[str]:
        yield from takewhile(lambda _: not asked(), documents(text, part))
        if asked():
            raise Interrupted("the vocabulary was not learnt yet; start the same command again")

    make_tokenizer(name, vocab_size, read, folder)


def _note(out: Path, settings: dict[str, Any], counts: dict[Part, Counts]) -> None:
    said = {name: asdict(value) for name, value in counts.items()}
    write_text(out / UNFINISHED, json.dumps({"made_from": settings, "counts": said}, indent=1))


def _noted(out: Path) -> tuple[dict[str, Any], dict[Part, Counts]]:
    """The settings, and what was in each file when it was noted last; raises `UserError` for what is no such note."""
    path = out / UNFINISHED
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        counts: dict[Part, Counts] = {
            part: from_dict(Counts, dict(said["counts"][part]), f"{path}: ") for part in PARTS
        }
        if min(min(vars(count).values()) for count in counts.values()) < 0:
            raise ValueError
        return dict(said["made_from"]), counts
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what prepare-text writes: delete {out} and start again") from None


def _words(facts: Facts) -> str:
    said = [
        f"{name} {file.tokens:,} tokens ({file.documents:,} documents, {file.characters:,} characters)"
        for name, file in ((TRAIN, facts.train), (VAL, facts.val))
        if file is not None
    ]
    said.append(f"a vocabulary of {facts.vocab_size:,}")
    if facts.dtype == "uint32":
        said.append("\nnote: that many ids need uint32, which train-lm reads and nanoGPT does not")
    if facts.val is None:
        said.append("\nnote: there is no val.bin, which nanoGPT needs: --held-out is 0")
    if facts.separator is None:
        said.append("\nnote: the tokenizer has no end-of-text token, so documents run into one another")
    return ", ".join(said).replace(", \n", "\n")


# ---- back to text


def write_back(text: TextSettings, out: Path) -> None:
    """Write a text into one file: .jsonl has one document per line, .txt has them end to end.

    Every document is written, in order; of a data folder those of train.bin, then those of val.bin. The file appears
    whole or not at all. Raises `UserError` for a file that exists, `Interrupted` when stopped.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already: nothing is overwritten; name another file, or remove it first")
    count = characters = 0
    rows = documents(text, "all")
    with stop_requests() as asked, written_whole(out) as file:
        for document in takewhile(lambda _: not asked(), rows):
            file.write(document if out.suffix == ".txt" else json.dumps({"text": document}, ensure_ascii=False) + "\n")
            count += 1
            characters += len(document)
        if asked():
            raise Interrupted(f"{out} is not written; start the same command again")
    print(f"{out}: {count:,} documents, {characters:,} characters")


# ---- the verb


@dataclass(frozen=True)
class PrepareText:
    """Turn text into token files in nanoGPT's layout (train.bin, val.bin), or such a folder back into text.

    What it makes is trained on with `train-lm CONFIG --text data/NAME`, or by nanoGPT with `--dataset=NAME`. A command
    that was stopped or killed goes on when it is started again. An --out that ends in .jsonl or .txt is text again.

    Examples:
      prepare-text --text Skylion007/openwebtext --streaming --tokenizer gpt2 --held-out 0.0005 --out data/openwebtext
      prepare-text --text shakespeare.txt --tokenizer char --out data/shakespeare
      prepare-text --text data/shakespeare --out shakespeare.jsonl
    """

    out: Path
    """A new folder, as data/NAME, or the one that this same command began; or a file to write the text back into:
    .jsonl with one document per line, .txt with all of them end to end."""
    text: str = PYTHON_DOCS
    """python-docs (comes with Python), a file or folder of text, a data set on the hub by name, or a folder with
    train.bin, of ours or nanoGPT's own (documents of train.bin, then of val.bin)."""
    tokenizer: str | None = None
    """bpe (byte pairs learnt from the training text, the default; the first 200 million characters of it are enough),
    char (one token per character), gpt2, or any on the hub or in a folder. nanoGPT's sample.py spells prompts for bpe
    character by character, and knows those that are tokens by themselves."""
    vocab_size: int | None = None
    """Tokens that bpe learns; 2048 if not given. A large vocabulary makes a small model mostly embedding."""
    held_out: float = 0.05
    """Share of the documents that go into val.bin. The text of a folder with a val.bin of its own keeps its split."""
    text_config: str | None = None
    """Configuration of the data set, as wikitext-103-raw-v1."""
    text_split: str = "train"
    """Split of the data set to read; held-out documents are taken from it."""
    text_column: str | None = None
    """Column that holds the text, if it is not `text` or the only column of strings."""
    max_documents: int | None = None
    """Read only so many documents (of each file, where the text is a folder with train.bin and val.bin)."""
    streaming: bool = False
    """Read a data set of the hub while it downloads, keeping nothing of it on disk."""


def run(flags: PrepareText) -> None:
    """Prepare the text, or write it back."""
    text = TextSettings(
        source=flags.text,
        config=flags.text_config,
        split=flags.text_split,
        column=flags.text_column,
        streaming=flags.streaming,
        max_documents=flags.max_documents,
        held_out=flags.held_out,
    )
    if flags.out.suffix in (".gz", ".json", ".parquet", ".bin"):
        raise UserError(f"--out {flags.out}: text is written as .jsonl or .txt, tokens into a folder such as data/NAME")
    if flags.out.suffix in TEXT_FILES:
        if flags.tokenizer is not None or flags.vocab_size is not None:
            given = "--vocab-size" if flags.tokenizer is None else "--tokenizer"
            raise UserError(f"--out {flags.out} is text, which has no tokens: leave {given} out, or name a folder")
        write_back(text, flags.out)
    else:
        prepare_text(text, flags.out, flags.tokenizer or "bpe", flags.vocab_size)

"""Tokenizers: trained here without a network, or loaded from the hub, its cache or a folder.

All are Hugging Face fast tokenizers saved in their usual layout, so `AutoTokenizer.from_pretrained(folder)` opens them.
Training is deterministic: the same documents in the same order give the same file, byte for byte.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparse_coding.errors import UserError, near
from sparse_coding.files import make_folder
from sparse_coding.formats.nanogpt_file import checkpoint_file, read_facts
from sparse_coding.formats.nanogpt_meta import META, read_meta
from sparse_coding.hub import offline_if_unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # GPT-2's separator; documents end with it
UNKNOWN = "<|unknown|>"
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "tekken.json")  # one of them makes a folder with a tokenizer
SMALLEST_BPE = 257  # 256 bytes and the separator
LEARNT_FROM = 200_000_000  # characters that byte pairs are learnt from; the words of more would fill the memory
GPT2_SIZES = (50257, 50304)  # as it is, and as nanoGPT rounds it up
DATA_SET = re.compile(r"\w[\w. -]{,99}")  # what a checkpoint may name: a folder in data/, and no way out of it


def check_vocab_size(name: str, vocab_size: int | None) -> None:
    """Raises `UserError` for a `--vocab-size` beside a `--tokenizer` that learns nothing."""
    if vocab_size is not None and name != "bpe":
        raise UserError(f"--vocab-size is for --tokenizer bpe; {name!r} has its own vocabulary")


def make_tokenizer(
    name: str, vocab_size: int | None, read: Callable[[Literal["train", "all"]], Iterable[str]], folder: Path
) -> None:
    """Save what `--tokenizer` names in `folder`: `bpe` and `char` are made from a text, anything else is loaded.

    read: the documents of a part of the text. Byte pairs are learnt from the training part; the characters are those
    of all the text, as in nanoGPT's data sets, so that no held-out one is unknown. vocab_size: of `bpe`; None is 2048.
    """
    if name == "bpe":
        print(f"learning {vocab_size or 2048:,} tokens from the training text ...", flush=True)
        train_byte_bpe(_first(read("train"), LEARNT_FROM), vocab_size or 2048, folder)
    elif name == "char":
        print("collecting the characters of the text ...", flush=True)
        character_tokenizer(read("all"), folder)
    else:
        save_tokenizer(load_tokenizer(name), folder)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def train_byte_bpe(documents: Iterable[str], vocab_size: int, folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE (GPT-2's kind) with at most `vocab_size` tokens, id 0 the separator; saved in `folder`.

    Every text round-trips exactly, whatever it was trained on. Little text may give fewer tokens: `len(tokenizer)`.
    Raises `UserError` for a vocabulary below 257 tokens and for no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_BPE:
        raise UserError(f"vocab_size={vocab_size}: a byte-level vocabulary needs at least {SMALLEST_BPE} tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(documents)
    tokenizer.train_from_iterator(counted, trainer)
    if not counted.characters:
        raise UserError("a tokenizer cannot be trained on no text: the documents are empty")
    return _save(tokenizer, folder)


def character_tokenizer(documents: Iterable[str], folder: Path) -> PreTrainedTokenizerFast:
    """One token per character: the separator (id 0), the unknown token (id 1), then the characters seen, in order.

    A character that `documents` do not hold becomes the unknown token, one for one: positions stay those of the text.
    Raises `UserError` for no text.
    """
    seen: set[str] = set()
    for document in documents:
        seen.update(document)
    if not seen:
        raise UserError("a tokenizer cannot be made from no text: the documents are empty")
    return _save(_one_per_character([END_OF_TEXT, UNKNOWN, *sorted(seen)]), folder, unk_token=UNKNOWN)


def tokenizer_from_characters(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of nanoGPT's character-level data sets: `tokens[i]` is the character with id i, and that is all.

    No separator, no unknown token: `contexts` refuses a text with other characters and names them. The two special
    tokens of `character_tokenizer` mean here what they mean there.
    Raises `UserError` where the tokens are not distinct single characters.
    """
    from transformers import PreTrainedTokenizerFast

    special = {END_OF_TEXT, UNKNOWN}.intersection(tokens)
    for index, token in enumerate(tokens):
        if token in special:
            continue
        if len(token) != 1 or "\ud800" <= token <= "\udfff":  # half a surrogate pair is in no text
            raise UserError(f"token {index} of a vocabulary of characters is {token[:20]!r}, which is no character")
    if len(set(tokens)) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if token in tokens[:index])
        raise UserError(f"the character {twice!r} has two ids in the vocabulary: each must stand there once")
    tokenizer = _one_per_character(tokens)
    tokenizer.add_special_tokens(sorted(special))
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": UNKNOWN}
    known = {name: token for name, token in names.items() if token in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **known)


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model on the hub (or in its cache), of a local folder, or of a checkpoint of nanoGPT.

    A folder may be a data set of nanoGPT: its meta.pkl gives one token per character. The tokenizer of a checkpoint is
    the one beside it, or of its data set (`data/DATASET` in a folder above it or in the current one), or GPT-2's where
    the vocabulary has that size. Never runs code of a repository.
    Raises `UserError` in one line where it is missing, or the hub cannot be reached and nothing is cached.
    """
    from transformers import AutoTokenizer

    name = str(name_or_folder)
    checkpoint = checkpoint_file(name)
    if checkpoint:
        return _of_checkpoint(checkpoint.resolve())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / META).is_file() and not holds_tokenizer(folder):
            return _of_data_set(folder)
        _check_folder(folder)
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"the tokenizer in {name!r} cannot be read: {error}") from None
    if isinstance(name_or_folder, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        known = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"tokenizer {name!r}: no such folder{near(folder.name, known)}")
    return _of_hub(name)


def _of_hub(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        with offline_if_unreachable():
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer {name!r}: no such folder, and not to be had from the Hugging Face hub or its local cache; "
            f"check the name and the network, or give a folder that holds a tokenizer ({_first_line(error)})"
        ) from None


def _of_checkpoint(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint of nanoGPT, which names its data set and no tokenizer."""
    facts = read_facts(path)
    size, data_set = facts.model_args["vocab_size"], facts.config.get("dataset")
    folders = [path.parent]
    if isinstance(data_set, str) and DATA_SET.fullmatch(data_set):
        folders += [folder / "data" / data_set for folder in (*path.parents, Path.cwd())]
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return load_tokenizer(folder)
        if (folder / META).is_file() and (meta := read_meta(folder / META)).tokens is not None:
            if meta.vocab_size != size:
                raise UserError(
                    f"checkpoint {str(path)!r} has {size:,} tokens, {str(folder / META)!r} {meta.vocab_size:,}: it was "
                    "trained on other data; name its tokenizer with --tokenizer"
                )
            return _of_data_set(folder)
    if size in GPT2_SIZES:
        return _of_hub("gpt2")
    where = f"beside it, nor data/{data_set} above it" if len(folders) > 1 else "beside it"
    raise UserError(
        f"checkpoint {str(path)!r} comes without a tokenizer: there is none {where} (tokenizer.json, or {META} with "
        f"characters), and {size:,} tokens are not GPT-2's; name one with --tokenizer"
    )


def _of_data_set(folder: Path) -> PreTrainedTokenizerBase:
    tokens = read_meta(folder / META).tokens
    if tokens is None:
        raise UserError(
            f"{str(folder / META)!r} gives a vocabulary's size and not its tokens: name its tokenizer instead"
        )
    return tokenizer_from_characters(tokens)


def holds_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer, of whatever kind."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def _check_folder(folder: Path) -> None:
    """Without this, transformers makes up a tokenizer of one token for a folder that holds only a config."""
    if not holds_tokenizer(folder):
        raise UserError(f"folder {str(folder)!r} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}")


def _one_per_character(tokens: Sequence[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it decoding puts a space between characters
    return tokenizer


def _save(tokenizer: Any, folder: Path, **special: str) -> PreTrainedTokenizerFast:
    """Wrap, save in `folder`, and return the tokenizer as it loads from there."""
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([END_OF_TEXT, *special.values()])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **special,
    )
    save_tokenizer(wrapped, folder)
    return wrapped


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer's files in `folder`, where others may lie; each appears whole."""
    make_folder(folder, "the tokenizer")
    temporary = Path(tempfile.mkdtemp(prefix=".tokenizer-", dir=folder))
    try:
        tokenizer.save_pretrained(temporary)
        for file in sorted(temporary.iterdir()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary)


class _Counted:
    """Documents on their way into a trainer, with the count of their characters."""

    def __init__(self, documents: Iterable[str]) -> None:
        self.documents, self.characters = documents, 0

    def __iter__(self):
        for document in self.documents:
            self.characters += len(document)
            yield document


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]

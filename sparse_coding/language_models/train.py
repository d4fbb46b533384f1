"""Train a small GPT on the CPU or one GPU from a nanoGPT-style config file.

The model is the Hugging Face `GPT2LMHeadModel` with nanoGPT's initial weights, optimiser groups and schedule. A run is
a pure function of its settings and its text: batches and dropout depend on (seed, update) alone, so a run that was
killed and started again gives the same weights, bit for bit, as one that never stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import numpy as np
import torch
import tyro
from jaxtyping import Integer, UInt

from sparse_coding.activations.text import PYTHON_DOCS, TextSettings, documents, text_identity
from sparse_coding.activations.tokens import contexts, flat
from sparse_coding.device import pick_device
from sparse_coding.errors import UserError, reported
from sparse_coding.language_models import card
from sparse_coding.language_models.config_file import TrainConfig, Value, load_config, parse_overrides
from sparse_coding.language_models.gpt import Trainer, build, derive, held_out_loss
from sparse_coding.language_models.loop import fit
from sparse_coding.language_models.ngrams import baselines
from sparse_coding.language_models.training_state import STATE, refuse_other_run
from sparse_coding.training.precision import has_bf16

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train_lm(
    config_path: Path,
    overrides: Mapping[str, Value],
    text: TextSettings,
    out: Path,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    command: str | None = None,
) -> card.Facts:
    """Train the GPT of a config file on a text, or go on with it; `out` becomes a Hugging Face model folder.

    tokenizer: `bpe` and `char` are made from the training text, anything else is a tokenizer on the hub or in a folder.
    vocab_size: of `bpe`, 2048 if None. command: what to write into the README; None: this call.
    Leaves config.json, model.safetensors, the tokenizer's files, README.md, training.json (the returned facts) and
    train_log.jsonl. Raises `UserError` for wrong settings and `Interrupted` when stopped.
    """
    config, notes = load_config(config_path, overrides)
    for note in notes:
        print(f"note: {note}")
    device = device_for(config)
    refuse_foreign_folder(out)
    words, words_folder = tokenizer_for(tokenizer, vocab_size, text, out)
    train, held_out = token_streams(text, words, config.block_size)
    asked = {"tokenizer": tokenizer, "vocab_size": vocab_size}
    identity = {**dataclasses.asdict(config), **asked, "text": sha256_of(train, held_out, len(words))}
    if (out / card.FACTS).exists():
        facts = card.read(out)
        asked = {"tokenizer": facts.tokenizer, "vocab_size": facts.vocab_size_asked}
        refuse_other_run(out, {**facts.config, **asked, "text": facts.text_sha256}, identity)
        shutil.rmtree(out / STATE, ignore_errors=True)
        print(f"{out} is trained already: {facts.result()}")
        return facts

    model = build(config, len(words), int(words.eos_token_id) if words.eos_token_id is not None else None)  # type: ignore[arg-type]
    trainer = Trainer(config, model, train, held_out, device, precision(config, device))
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(
        f"{counted:,} parameters, {len(words):,} tokens in the vocabulary; {len(train):,} tokens of text, "
        f"{len(held_out):,} held out; {config.max_iters:,} updates of {config.tokens_per_iteration:,} tokens "
        f"on {card.hardware(device)}, {dtype_name(trainer.dtype)}"
    )
    progress = fit(trainer, out, identity)
    counting = baselines(train, held_out, len(words))
    call = f"train_lm({str(config_path)!r}, {dict(overrides)!r}, {text!r}, out={str(out)!r}, tokenizer={tokenizer!r})"
    facts = card.Facts(
        command=command or call,
        config=dataclasses.asdict(config),
        text={key: value for key, value in dataclasses.asdict(text).items() if value is not None},
        text_sha256=identity["text"],
        tokenizer=tokenizer,
        vocab_size=len(words),
        vocab_size_asked=vocab_size,
        train_tokens=len(train),
        held_out_tokens=len(held_out),
        tokens_seen=config.max_iters * config.tokens_per_iteration,
        seconds=progress.seconds,
        hardware=card.hardware(device),
        dtype=dtype_name(trainer.dtype),
        python=platform.python_version(),
        torch=torch.__version__.partition("+")[0],
        parameters=counted,
        iterations=config.max_iters,
        kept_iteration=config.max_iters if config.always_save_checkpoint else progress.best_iteration,
        validation_loss=held_out_loss(model, held_out),
        unigram=counting.unigram,
        bigram=counting.bigram,
        bigram_weight=counting.bigram_weight,
        samples=card.samples(model.eval(), words, held_out, derive(config.seed, "samples")),
    )
    card.publish(out, out / STATE / "finished", model, words_folder, facts)
    shutil.rmtree(out / STATE)
    print(f"{out}: {facts.result()}")
    return facts


def token_streams(
    text: TextSettings, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> tuple[UInt[np.ndarray, "N"], UInt[np.ndarray, "K"]]:
    """The training and the held-out tokens, documents end to end; raises `UserError` for less than one window."""
    train, held_out = (flat(contexts(text, tokenizer, part=part, context=block_size)) for part in ("train", "held_out"))
    for name, tokens in (("training", train), ("held-out", held_out)):
        if len(tokens) <= block_size:
            raise UserError(
                f"the {name} text has {len(tokens)} tokens, block_size = {block_size} needs at least one more: "
                "give more text or set a smaller block_size"
            )
    return train, held_out


def device_for(config: TrainConfig) -> torch.device:
    """The device asked for; raises `UserError` if this machine has none such."""
    try:
        return torch.device(pick_device(config.device))
    except UserError:
        raise UserError(f"device = {config.device!r} is not on this machine: set device=auto or device=cpu") from None


def precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The type of the matrix products; auto takes bfloat16 on GPUs that have it, and on CPUs that do if it pays there.

    On CPUs with bfloat16 units a width of 96 ran a third faster; at 64 the conversions cost more than they saved.
    """
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    quick = has_bf16(device) and (device.type != "cpu" or config.n_embd >= 96)
    return torch.bfloat16 if quick else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse_foreign_folder(out: Path) -> None:
    """`UserError` if `out` holds files of something else, which the model's files could overwrite."""
    if out.is_file():
        raise UserError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in (STATE, card.FACTS)):
        raise UserError(f"--out {out} holds files that are no training run; name a new folder")


def tokenizer_for(
    name: str, vocab_size: int | None, text: TextSettings, out: Path
) -> tuple[PreTrainedTokenizerBase, Path]:
    """The run's tokenizer and the folder of its files: kept from an earlier start, made from the text, or loaded.

    What is kept is filed under everything it depends on, so another text or size never gets it.
    """
    from sparse_coding.activations.tokenizers import character_tokenizer, load_tokenizer, train_byte_bpe

    if vocab_size is not None and name != "bpe":
        raise UserError(f"--vocab-size is for --tokenizer bpe; {name!r} has its own vocabulary")
    if (out / card.FACTS).exists():
        return load_tokenizer(out), out
    key = json.dumps([name, vocab_size, text_identity(text), text.held_out], sort_keys=True)
    kept = out / STATE / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not kept.exists():
        part = out / STATE / "tokenizer.part"
        shutil.rmtree(part, ignore_errors=True)
        if name == "bpe":
            train_byte_bpe(documents(text, "train"), vocab_size or 2048, part)
        elif name == "char":
            character_tokenizer(documents(text, "train"), part)
        else:
            load_tokenizer(name).save_pretrained(part)
        part.rename(kept)
    return load_tokenizer(kept), kept


def sha256_of(train: Integer[np.ndarray, "N"], held_out: Integer[np.ndarray, "K"], vocab_size: int) -> str:
    """The identity of what a run reads: both token streams and the size of the vocabulary."""
    digest = hashlib.sha256(f"{vocab_size} {len(train)} {len(held_out)}".encode())
    for tokens in (train, held_out):
        for start in range(0, len(tokens), 1 << 24):
            digest.update(tokens[start : start + (1 << 24)].astype("<u4").tobytes())
    return digest.hexdigest()


Pairs: TypeAlias = tuple[tuple[str, ...], ...]  # one tuple for each time that --set is given


@dataclass(frozen=True)
class TrainLM:
    """Train a small GPT from a nanoGPT-style config file, on text that is on disk or in a data set.

    The folder it leaves is a Hugging Face model: everything here that takes a model takes it by its path. A stopped or
    killed run goes on when the same command is started again, and ends with the same weights as one never stopped.

    Example: train-lm nanogpt_configs/supertiny.py --set max_iters=2000 batch_size=32 --text python-docs --out my-gpt
    """

    config: Annotated[Path, tyro.conf.Positional]
    """The config file: lines such as `n_layer = 6` with the keys of nanoGPT's train.py. It is read, never executed."""
    out: Path
    """The folder of the model; it must be new, or hold this same run."""
    overrides: Annotated[Pairs, tyro.conf.arg(name="set", metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = ()
    """Settings that win over those of the config file, as max_iters=2000 batch_size=32."""
    tokenizer: str = "bpe"
    """bpe (byte pairs learnt from the text), char (one token per character), gpt2, or any on the hub or in a folder."""
    vocab_size: int | None = None
    """Tokens in the vocabulary that bpe learns; 2048 if not given. A large one makes a small model mostly embedding."""
    text: str = PYTHON_DOCS
    """python-docs (comes with Python), a file or folder of text, or a data set on the hub as name or name@revision."""
    text_config: str | None = None
    """Configuration of the data set, as wikitext-103-raw-v1."""
    text_split: str = "train"
    """Split of the data set to read; held-out documents are taken from it."""
    text_column: str | None = None
    """Column that holds the text, if it is not `text` or the only column of strings."""
    max_documents: int | None = None
    """Read only so many documents."""
    held_out: float = 0.05
    """Share of the documents kept for evaluation."""


def main(args: list[str]) -> None:
    """`python -m sparse_coding train-lm ARGS`."""
    with reported():
        asked = tyro.cli(TrainLM, args=args, prog="python -m sparse_coding train-lm")
        text = TextSettings(
            source=asked.text,
            config=asked.text_config,
            split=asked.text_split,
            column=asked.text_column,
            max_documents=asked.max_documents,
            held_out=asked.held_out,
        )
        command = f"python -m sparse_coding train-lm {shlex.join(args)}"
        overrides = parse_overrides([pair for pairs in asked.overrides for pair in pairs])
        train_lm(asked.config, overrides, text, asked.out, asked.tokenizer, asked.vocab_size, command)

"""Train a small GPT on the CPU, one GPU or several from a nanoGPT-style config file.

The model is the Hugging Face `GPT2LMHeadModel` with nanoGPT's initial weights, optimiser groups and schedule. A run is
a pure function of its settings and its text: batches and dropout depend on (seed, update) alone, so a run that was
killed and started again gives the same weights, bit for bit, as one that never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch
import tyro

from sparse_coding.activations.text import TextSettings
from sparse_coding.config import parse
from sparse_coding.device import bf16_pays, pick_device
from sparse_coding.errors import UserError, near, reported
from sparse_coding.formats.nanogpt_data import is_data_folder
from sparse_coding.language_models import card
from sparse_coding.language_models.config_file import TrainConfig, Value, load_config, parse_overrides
from sparse_coding.language_models.corpus import Corpus, corpus_of, source_of
from sparse_coding.language_models.gpt import adopt, build, derive, held_out_loss
from sparse_coding.language_models.loop import fit
from sparse_coding.language_models.ngrams import baselines
from sparse_coding.language_models.processes import Processes, processes
from sparse_coding.language_models.trainer import Trainer, rows_per_pass
from sparse_coding.language_models.training_state import (
    LOG,
    STATE,
    STATE_FILE,
    Progress,
    begun_from,
    load_state,
    own_folder,
    refuse_other_run,
)

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

SCORED = 5_000_000
"""Held-out tokens that the card's losses are measured on, at most."""


def train_lm(
    config_path: Path,
    overrides: Mapping[str, Value],
    text: TextSettings | None = None,
    out: Path | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    command: str | None = None,
) -> card.Facts | None:
    """Train the GPT of a config file on a text, or go on with it; `out` becomes a Hugging Face model folder.

    text: None is the config's data set, or python-docs. out: None is the config's out_dir, or outputs/<its name>.
    tokenizer: `bpe` (None) and `char` are made from the text, anything else is a tokenizer on the hub or in a
    folder; a data folder has its own. vocab_size: of `bpe`, 2048 if None. command: what to write into the README.
    Leaves config.json, model.safetensors, the tokenizer's files, README.md, loss_curve.png, training.json (the returned
    facts; None for `eval_only` and for all processes of `torchrun` but the first) and train_log.jsonl.
    Raises `UserError` for wrong settings and `Interrupted` when stopped.
    """
    config, notes = load_config(config_path, overrides)
    if text is None:
        text = TextSettings(source=source_of(None, config.dataset))
    out = out or Path(config.out_dir or Path("outputs") / config_path.stem)
    call = f"train_lm({str(config_path)!r}, {dict(overrides)!r}, {text!r}, out={str(out)!r}, tokenizer={tokenizer!r})"
    with processes(device_for(config), config.backend) as (everyone, device), contextlib.ExitStack() as held:
        with everyone.first_goes_ahead():
            if everyone.first:
                for note in notes:
                    print(f"note: {note}")
                held.enter_context(own_folder(out))
            rows_per_pass(config, everyone.size)  # a mistake is an error before the text is read
            config = dataclasses.replace(config, init_from=begun_from(config, out))
            corpus = corpus_of(text, tokenizer, vocab_size, config, out)
        return _Run(config, text, corpus, out, tokenizer, vocab_size, command or call, everyone, device).go()


@dataclass
class _Run:
    """One call of `train_lm` in one process."""

    config: TrainConfig
    text: TextSettings
    corpus: Corpus
    out: Path
    tokenizer: str | None
    vocab_size: int | None
    command: str
    everyone: Processes
    device: torch.device

    def go(self) -> card.Facts | None:
        corpus = self.corpus
        model, config = starting_model(self.config, corpus)
        asked = {"tokenizer": self.tokenizer, "vocab_size": self.vocab_size}
        identity = {**config.decisive(), **asked, "text": corpus.sha256}
        if (self.out / card.FACTS).exists():
            return self.finished(identity)
        dtype = precision(config, self.device)
        trainer = Trainer(config, model, corpus.train, corpus.held_out, self.device, dtype, self.everyone)
        self.say(self.plan(trainer))
        if config.eval_only:
            return self.only_evaluate(trainer, identity)
        mirror = self.mirror(trainer) if self.everyone.first else None
        progress = fit(trainer, self.out, identity, mirror=mirror.log if mirror else None)
        if not self.everyone.first:
            return None
        facts = self.facts(trainer, progress)
        card.publish(self.out, self.out / STATE / "finished", model, corpus, facts, self.out / LOG)
        shutil.rmtree(self.out / STATE)
        if mirror:
            mirror.finish({"held_out_loss": facts.validation_loss, "pair_counts": facts.bigram})
        print(f"{self.out}: {facts.result()}")
        return facts

    def say(self, line: str) -> None:
        if self.everyone.first:
            print(line, flush=True)

    def finished(self, identity: Mapping[str, Any]) -> card.Facts | None:
        """The facts of a run that ended before, if it is this one."""
        facts = card.read(self.out)
        asked = {"tokenizer": facts.tokenizer_asked, "vocab_size": facts.vocab_size_asked}
        refuse_other_run(self.out, {**facts.config, **asked, "text": facts.text_sha256}, identity)
        if not self.everyone.first:
            return None
        shutil.rmtree(self.out / STATE, ignore_errors=True)
        print(f"{self.out} is trained already: {facts.result()}")
        return facts

    def plan(self, trainer: Trainer) -> str:
        config, corpus = trainer.config, self.corpus
        return (
            f"{parameters(trainer.model):,} parameters, {corpus.vocab_size:,} tokens in the vocabulary; "
            f"{len(corpus.train):,} tokens of {self.text.source}, {len(corpus.held_out):,} held out; "
            f"{config.max_iters:,} updates of {config.tokens_per_iteration:,} tokens "
            f"on {card.hardware(self.device, self.everyone.size)}, {dtype_name(trainer.dtype)}"
        )

    def only_evaluate(self, trainer: Trainer, identity: Mapping[str, Any]) -> None:
        state = self.out / STATE / STATE_FILE
        iteration = load_state(state, trainer, identity).iteration if state.exists() else 0
        losses = trainer.evaluate() or {}
        said = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.say(f"after {iteration} updates: {said} (eval_only: nothing is trained)")

    def mirror(self, trainer: Trainer) -> Any:
        """The Weights & Biases run, if `wandb_log` asks for one; WANDB_MODE decides whether it is sent or kept."""
        if not self.config.wandb_log:
            return None
        from sparse_coding.training.wandb_mirror import Mirror

        config = trainer.config
        return Mirror("auto", config.wandb_project, config.wandb_run_name, self.out, config.decisive())

    def facts(self, trainer: Trainer, progress: Progress) -> card.Facts:
        """All that the card says, measured on the weights that are kept."""
        config, model, corpus = trainer.config, trainer.model, self.corpus
        scored = corpus.held_out[:SCORED]
        counting = baselines(corpus.train, scored, corpus.vocab_size)
        words = corpus.tokenizer
        return card.Facts(
            command=self.command,
            config=config.decisive(),
            text=text_facts(self.text),
            text_sha256=corpus.sha256,
            tokenizer_asked=self.tokenizer,
            vocab_size=model.config.vocab_size,
            vocab_size_asked=self.vocab_size,
            train_tokens=len(corpus.train),
            held_out_tokens=len(corpus.held_out),
            tokens_seen=config.max_iters * config.tokens_per_iteration,
            seconds=progress.seconds,
            hardware=card.hardware(self.device, self.everyone.size),
            dtype=dtype_name(trainer.dtype),
            python=platform.python_version(),
            torch=torch.__version__.partition("+")[0],
            parameters=parameters(model),
            iterations=config.max_iters,
            kept_iteration=config.max_iters if config.always_save_checkpoint else progress.best_iteration,
            validation_loss=held_out_loss(model, scored),
            scored_tokens=len(scored),
            unigram=counting.unigram,
            bigram=counting.bigram,
            bigram_weight=counting.bigram_weight,
            trigram=counting.trigram,
            trigram_weight=counting.trigram_weight,
            counted_tokens=counting.counted,
            samples=[] if words is None else card.samples(model.eval(), words, scored, derive(config.seed, "samples")),
        )


def starting_model(config: TrainConfig, corpus: Corpus) -> tuple[GPT2LMHeadModel, TrainConfig]:
    """The model before its first update, and the config with its shape: fresh, or the weights that `init_from` names.

    Raises `UserError` where those are no GPT-2, or too small for the block size or the vocabulary.
    """
    if config.init_from == "scratch":
        return build(config, corpus.vocab_size, corpus.end_of_text), config
    from sparse_coding.activations.models import load_model

    try:
        found = load_model(config.init_from, device="cpu", dtype="float32")
    except UserError as error:
        hint = near(config.init_from, ("scratch", "resume"))
        raise UserError(f"init_from = {config.init_from!r} is neither scratch nor resume{hint}, and {error}") from None
    if found.vocab_size < corpus.vocab_size:
        raise UserError(
            f"init_from = {config.init_from!r} knows {found.vocab_size} tokens and the text has {corpus.vocab_size}: "
            f"tokenize it with the model's own tokenizer (--tokenizer {found.path})"
        )
    return adopt(found.hf, config)


def parameters(model: GPT2LMHeadModel) -> int:
    """How many numbers are learnt; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def device_for(config: TrainConfig) -> torch.device:
    """The device asked for; raises `UserError` if this machine has none such."""
    try:
        return torch.device(pick_device(config.device))
    except UserError:
        raise UserError(f"device = {config.device!r} is not on this machine: set device=auto or device=cpu") from None


def precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The type of the matrix products; auto takes bfloat16 where the hardware has it and it pays (`bf16_pays`)."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if bf16_pays(device, config.n_embd) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def text_facts(text: TextSettings) -> dict[str, Any]:
    """What the card says of the text; a data folder is its name alone, the other settings are not for it."""
    if is_data_folder(Path(text.source)):
        return {"source": text.source}
    return {key: value for key, value in dataclasses.asdict(text).items() if value is not None}


Pairs: TypeAlias = tuple[tuple[str, ...], ...]  # one tuple for each time that --set is given


@dataclass(frozen=True)
class TrainLM:
    """Train a small GPT from a nanoGPT-style config file, on text that is on disk or in a data set.

    The folder it leaves is a Hugging Face model: everything here that takes a model takes it by its path. A stopped or
    killed run goes on when the same command is started again, and ends with the same weights as one never stopped.
    `torchrun --standalone --nproc_per_node=N -m sparse_coding train-lm ...` shares each update among N processes.

    Example: train-lm nanogpt_configs/supertiny.py --set max_iters=2000 batch_size=32 --text python-docs --out my-gpt
    """

    config: Annotated[Path, tyro.conf.Positional]
    """The config file: lines such as `n_layer = 6` with the keys of nanoGPT's train.py. It is read, never executed."""
    out: Path | None = None
    """The folder of the model, new or with this same run; by default the config's out_dir, or outputs/ and its name."""
    overrides: Annotated[Pairs, tyro.conf.arg(name="set", metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = ()
    """Settings that win over those of the config file, as max_iters=2000 batch_size=32."""
    tokenizer: str | None = None
    """bpe (byte pairs learnt from the text, the default), char (one token per character), gpt2, or any on the hub or in
    a folder."""
    vocab_size: int | None = None
    """Tokens in the vocabulary that bpe learns; 2048 if not given. A large one makes a small model mostly embedding."""
    text: str | None = None
    """python-docs (comes with Python), a file or folder of text, a folder with train.bin and val.bin (see
    prepare-text), or a data set on the hub. By default the config's `dataset` below data/, or python-docs."""
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
        asked = parse(TrainLM, args, "python -m sparse_coding train-lm", TrainLM.__doc__ or "")
        if not all(asked.overrides):
            raise UserError("--set without a value: write key=value, for example --set max_iters=2000 batch_size=32")
        overrides = parse_overrides([pair for pairs in asked.overrides for pair in pairs])
        config, _ = load_config(asked.config, overrides)
        text = TextSettings(
            source=source_of(asked.text, config.dataset),
            config=asked.text_config,
            split=asked.text_split,
            column=asked.text_column,
            max_documents=asked.max_documents,
            held_out=asked.held_out,
        )
        command = f"python -m sparse_coding train-lm {shlex.join(args)}"
        train_lm(asked.config, overrides, text, asked.out, asked.tokenizer, asked.vocab_size, command)

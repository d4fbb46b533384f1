"""Train a small GPT on the CPU or one GPU from a nanoGPT-style config file.

The model is the Hugging Face `GPT2LMHeadModel` with nanoGPT's initial weights, optimiser groups and schedule. A run is
a pure function of its settings and its text: batches and dropout depend on (seed, update) alone, so a run that was
killed and started again gives the same weights, bit for bit, as one that never stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Int, Integer, UInt
from torch import Tensor

from sparse_coding.activations.text import PYTHON_DOCS, TextSettings, documents, text_identity
from sparse_coding.activations.tokens import contexts, flat
from sparse_coding.errors import Interrupted, UserError, reported
from sparse_coding.language_models import card
from sparse_coding.language_models.config_file import TrainConfig, Value, load_config, parse_overrides
from sparse_coding.language_models.ngrams import baselines

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

LOG = "train_log.jsonl"
STATE = "training_state"


# --- the model -------------------------------------------------------------------------------------------------------


def derive(seed: int, *parts: int | str) -> int:
    """A seed of its own for each use of `seed`: the first 63 bits of a hash."""
    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def build(config: TrainConfig, vocab_size: int, end_of_text: int | None = None) -> GPT2LMHeadModel:
    """A fresh model on the CPU: normal .02, both output projections .02 / sqrt(2 n_layer), biases 0 (nanoGPT, GPT-2).

    With `bias=False` the biases, LayerNorm's included, are zeros without gradient.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function="gelu",
        layer_norm_epsilon=1e-5,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor's own draws are replaced below
        model = GPT2LMHeadModel(shape)
    generator = torch.Generator().manual_seed(derive(config.seed, "weights"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_().requires_grad_(config.bias)
            elif parameter.dim() >= 2:
                narrower = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                parameter.normal_(0.0, 0.02 / narrower, generator=generator)
    return model


def cross_entropy(
    model: GPT2LMHeadModel, windows: Int[Tensor, "B T+1"], reduction: Literal["mean", "sum"] = "mean"
) -> Float[Tensor, ""]:
    """Nats per token of each window's last T tokens (or their sum), each given those before it."""
    hidden = model.transformer(windows[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).flatten(0, 1).float()
    return F.cross_entropy(logits, windows[:, 1:].flatten(), reduction=reduction)


def held_out_loss(model: GPT2LMHeadModel, tokens: Integer[np.ndarray, "N"], batch_size: int = 32) -> float:
    """Nats per token on all of `tokens` but the first: float32, no dropout, windows side by side, each token once.

    The model keeps its mode. A window starts with an empty context, as the model was trained.
    """
    width, total, training = model.config.n_positions, 0.0, model.training
    whole = (len(tokens) - 1) // width * width
    starts = np.arange(0, whole, width)[:, None]
    cuts = range(batch_size, len(starts), batch_size)
    stacks = [tokens[some + np.arange(width + 1)] for some in np.split(starts, cuts)]
    if whole < len(tokens) - 1:
        stacks.append(tokens[None, whole:])
    model.eval()
    with torch.inference_mode():
        for windows in stacks:
            rows = torch.from_numpy(windows.astype(np.int64)).to(model.device)
            total += cross_entropy(model, rows, "sum").item() if len(rows) else 0.0
    model.train(training)
    return total / (len(tokens) - 1)


# --- one update ------------------------------------------------------------------------------------------------------


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """nanoGPT's schedule at update `iteration` (from 0): linear warmup, a cosine down to min_lr, then min_lr."""
    if not config.decay_lr:
        return config.learning_rate
    if iteration < config.warmup_iters:
        return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
    if iteration >= config.decay_until:
        return config.min_lr
    done = (iteration - config.warmup_iters) / (config.decay_until - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)


def optimizer_for(model: GPT2LMHeadModel, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with nanoGPT's two groups: weight decay for tensors of two or more dimensions, none for the rest."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


def windows_at(
    tokens: Integer[np.ndarray, "N"], config: TrainConfig, seed: int, count: int, device: torch.device
) -> Int[Tensor, "count T+1"]:
    """`count` windows at random places of `tokens` (with replacement, as nanoGPT draws them), a function of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - config.block_size, (count, 1), generator=generator).numpy()
    return torch.from_numpy(tokens[starts + np.arange(config.block_size + 1)].astype(np.int64)).to(device)


@contextmanager
def dropout_from(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout inside draws from `seed`; the global generators are as before afterwards."""
    metal = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        if metal is not None:
            torch.mps.set_rng_state(metal)


@dataclass
class Trainer:
    """The model, its optimiser and the text; one call of `update` is one step of AdamW."""

    config: TrainConfig
    model: GPT2LMHeadModel
    tokens: Integer[np.ndarray, "N"]
    held_out: Integer[np.ndarray, "K"]
    device: torch.device
    dtype: torch.dtype  # of the matrix products
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.model.to(self.device)  # type: ignore[arg-type]
        self.model.train()
        self.optimizer = optimizer_for(self.model, self.config, self.device)

    def autocast(self) -> Any:
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if low else nullcontext()

    def update(self, iteration: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Make update `iteration`: accumulate gradients, clip, step. Returns the mean loss and the gradient's norm."""
        config = self.config
        count = config.batch_size * config.gradient_accumulation_steps
        windows = windows_at(self.tokens, config, derive(config.seed, "batch", iteration), count, self.device)
        loss = torch.zeros((), device=self.device)
        for part, rows in enumerate(windows.split(config.batch_size)):
            seed = derive(config.seed, "dropout", iteration, part)
            with dropout_from(seed, self.device) if config.dropout else nullcontext(), self.autocast():
                share = cross_entropy(self.model, rows) / config.gradient_accumulation_steps
            share.backward()
            loss += share.detach()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, iteration)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def evaluate(self) -> dict[str, float]:
        """Mean loss over `eval_iters` random batches of each text, the same batches at every evaluation."""
        self.model.eval()
        losses = {}
        for name, tokens in (("train_loss", self.tokens), ("val_loss", self.held_out)):
            total = torch.zeros((), device=self.device)
            for i in range(self.config.eval_iters):
                seed = derive(self.config.seed, name, i)
                windows = windows_at(tokens, self.config, seed, self.config.batch_size, self.device)
                with torch.inference_mode(), self.autocast():
                    total += cross_entropy(self.model, windows)
            losses[name] = total.item() / self.config.eval_iters
        self.model.train()
        return losses


# --- exact resume ----------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run stands; together with the weights and AdamW's moments it is the whole state."""

    iteration: int = 0  # updates made
    seconds: float = 0.0  # of training, over all starts
    best_loss: float = math.inf
    best_iteration: int = 0


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The file appears whole or not at all: written beside its place, flushed to the disk, then renamed."""
    beside = path.with_name(f".{path.name}.part")
    write(beside)
    with beside.open("rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(beside, path)


def save_weights(path: Path, model: GPT2LMHeadModel) -> None:
    from safetensors.torch import save_file

    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    write_whole(path, lambda beside: save_file(weights, beside))


def load_weights(path: Path, model: GPT2LMHeadModel) -> None:
    from safetensors.torch import load_file

    weights = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def save_state(path: Path, trainer: Trainer, progress: Progress, identity: Mapping[str, Any]) -> None:
    """One safetensors file: weights and moments by parameter name, everything else as JSON in its header.

    One file, so that the tensors and the JSON can never be of different updates.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in trainer.model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.contiguous()
    header = {"progress": json.dumps(dataclasses.asdict(progress)), "identity": json.dumps(identity)}
    write_whole(path, lambda beside: save_file(tensors, beside, metadata=header))


def load_state(path: Path, trainer: Trainer, identity: Mapping[str, Any]) -> Progress:
    """Put a saved state into `trainer`; raises `UserError` if it belongs to other settings or another text."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        refuse_other_run(path.parent.parent, json.loads(header["identity"]), identity)
        saved: dict[str, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            kind, _, name = key.partition("/")
            saved.setdefault(name, {})[kind] = file.get_tensor(key)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(saved[name].pop("weight"))
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    order = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    moments = {i: saved[names[parameter]] for i, parameter in enumerate(order) if saved[names[parameter]]}
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": moments})
    return Progress(**json.loads(header["progress"]))


def refuse_other_run(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """`UserError` naming what differs when `folder` holds a run with other settings or another text."""
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    changed = [f"{key} was {there.get(key)!r}, now {here.get(key)!r}" for key in differing]
    if changed:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): "
            "start it with those, choose another --out, or delete the folder"
        )


def keep_log_until(path: Path, iteration: int) -> None:
    """Drop the lines past `iteration`: a killed run wrote them, the resumed run will write them again."""
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [line for line in lines if line.endswith("}") and json.loads(line)["iteration"] <= iteration]
    write_whole(path, lambda beside: beside.write_text("".join(f"{line}\n" for line in whole)))


# --- the loop --------------------------------------------------------------------------------------------------------


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM only makes the yielded function true; a second one acts as usual."""
    asked = False
    usual: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, usual[number])

    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
        usual.update({number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield lambda: asked
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class Display:
    """A rich progress bar on a terminal; elsewhere a plain line about every ten seconds."""

    def __init__(self, total: int, start: int):
        self.total, self.start, self.begun, self.last_line = total, start, time.monotonic(), time.monotonic()
        self.bar = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}")
            self.bar = Progress(BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
            self.task = self.bar.add_task("", total=total, completed=start)
            self.bar.start()

    def update(self, iteration: int, loss: float, rate: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=iteration, description=f"loss {loss:.4f}  {rate:,.0f} tokens/s")
        elif time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            left = (self.last_line - self.begun) / max(1, iteration - self.start) * (self.total - iteration)
            self.say(f"{iteration}/{self.total}  loss {loss:.4f}  {rate:,.0f} tokens/s  {left / 60:.1f} minutes left")

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class Run:
    """A trainer with its folder: knows where training stands, and writes the log, the best weights and the state."""

    def __init__(self, trainer: Trainer, folder: Path, identity: Mapping[str, Any]):
        self.trainer, self.config, self.folder, self.identity = trainer, trainer.config, folder, identity
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        self.state, self.best = folder / STATE / "state.safetensors", folder / STATE / "best.safetensors"
        self.resumed = self.state.exists()
        self.progress = load_state(self.state, trainer, identity) if self.resumed else Progress()
        keep_log_until(folder / LOG, self.progress.iteration if self.resumed else -1)
        self.display = Display(self.config.max_iters, self.progress.iteration)
        self.begun = time.monotonic() - self.progress.seconds
        self.saved_at, self.save_cost = time.monotonic(), 0.0
        self.mark, self.mark_iteration = time.monotonic(), self.progress.iteration  # since when speed is measured

    def log(self, loss: Float[Tensor, ""], norm: Float[Tensor, ""]) -> None:
        """The line of an update."""
        iteration, now, value = self.progress.iteration, time.monotonic(), loss.item()
        rate = (iteration - self.mark_iteration) * self.config.tokens_per_iteration / (now - self.mark)
        self.mark, self.mark_iteration = now, iteration
        lr = learning_rate(self.config, iteration - 1)
        self._write({"tokens_per_second": rate, "lr": lr, "loss": value, "grad_norm": norm.item()}, value)
        self.display.update(iteration, value, rate)

    def evaluate(self) -> None:
        """Log the losses on both texts; keep the weights if they are the best so far (fresh ones never are)."""
        losses, iteration = self.trainer.evaluate(), self.progress.iteration
        self._write(losses, losses["val_loss"])
        said = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.display.say(f"{iteration}/{self.config.max_iters}  {said}")
        if iteration and losses["val_loss"] < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_iteration = losses["val_loss"], iteration
            save_weights(self.best, self.trainer.model)

    def save(self) -> None:
        start = time.monotonic()
        self.progress.seconds = start - self.begun
        save_state(self.state, self.trainer, self.progress, self.identity)
        self.saved_at, self.save_cost = time.monotonic(), time.monotonic() - start
        self.mark, self.mark_iteration = self.saved_at, self.progress.iteration

    def save_is_late(self) -> bool:
        """Whether the last save is a minute old, or so old that saving stays below a twentieth of the time."""
        return time.monotonic() - self.saved_at > max(60.0, 20 * self.save_cost)

    def _write(self, facts: Mapping[str, float], loss: float) -> None:
        """Append a line to the log; raises `UserError` if the loss is not finite."""
        iteration, config = self.progress.iteration, self.config
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at update {iteration}: lower learning_rate (now {config.learning_rate:g}), "
                f"raise warmup_iters (now {config.warmup_iters}) or set grad_clip (now {config.grad_clip:g})"
            )
        line = {"iteration": iteration, "tokens": iteration * config.tokens_per_iteration}
        with (self.folder / LOG).open("a") as log:
            log.write(json.dumps({**line, "seconds": time.monotonic() - self.begun, **facts}) + "\n")


def fit(trainer: Trainer, folder: Path, identity: Mapping[str, Any], stop_at: int | None = None) -> Progress:
    """Train to `max_iters`, going on from `folder`'s state if it has one; the model ends with the weights to keep.

    Every `eval_interval` updates: evaluate, keep the best weights, save the state. Raises `Interrupted` once the state
    is saved after Ctrl-C, SIGTERM or, for tests, after update `stop_at`; `UserError` if the loss is not finite.
    """
    config, run = trainer.config, Run(trainer, folder, identity)
    progress = run.progress
    with stop_requests() as asked:
        try:
            if not run.resumed:
                run.evaluate()
            while progress.iteration < config.max_iters:
                loss, norm = trainer.update(progress.iteration)
                progress.iteration += 1
                if progress.iteration % config.log_interval == 0:
                    run.log(loss, norm)
                due = progress.iteration % config.eval_interval == 0 or progress.iteration == config.max_iters
                stop = asked() or progress.iteration == stop_at
                if due:
                    run.evaluate()
                if due or stop or run.save_is_late():
                    run.save()
                if stop and progress.iteration < config.max_iters:
                    raise Interrupted(
                        f"training is saved after update {progress.iteration} of {config.max_iters} in {folder}; "
                        "start the same command again to go on"
                    )
        finally:
            run.display.close()
    if not config.always_save_checkpoint:
        load_weights(run.best, trainer.model)
    return progress


# --- from text to folder ---------------------------------------------------------------------------------------------


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
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if config.device == "auto":
        return torch.device(next(name for name, found in there.items() if found))
    device = torch.device(config.device)
    if not there[device.type] or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UserError(f"device = {config.device!r} is not on this machine: set device=auto or device=cpu")
    return device


def precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The type of the matrix products; auto takes bfloat16 on GPUs that have it, and on CPUs that do if it pays there.

    On CPUs with bfloat16 units a width of 96 ran a third faster; at 64 the conversions cost more than they saved.
    """
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        units = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        quick = device.type == "cpu" and config.n_embd >= 96 and units()
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
    from sparse_coding.language_models.tokenizers import character_tokenizer, load_tokenizer, train_byte_bpe

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

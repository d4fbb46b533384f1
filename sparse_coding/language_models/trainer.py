"""One update of a GPT: batches, accumulated gradients, clipping, AdamW; nanoGPT's schedule and parameter groups.

Batches and dropout depend on (seed, update) alone and never on the global generators.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.language_models.config_file import TrainConfig
from sparse_coding.language_models.gpt import cross_entropy, derive
from sparse_coding.language_models.processes import ALONE, Processes
from sparse_coding.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


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


def rows_per_pass(config: TrainConfig, processes: int) -> int:
    """Windows in one forward pass: `batch_size`, or a share of it where there are more processes than passes.

    Raises `UserError` where neither can be shared evenly.
    """
    if config.gradient_accumulation_steps % processes == 0:
        return config.batch_size
    if config.batch_size % processes == 0:
        return config.batch_size // processes
    raise UserError(
        f"{processes} processes cannot share an update evenly: gradient_accumulation_steps = "
        f"{config.gradient_accumulation_steps} or batch_size = {config.batch_size} must be a multiple of {processes}"
    )


@dataclass
class Trainer:
    """The model, its optimiser and the text; one call of `update` is one step of AdamW.

    Several processes share the windows of an update and sum their gradients, so each makes the step that one process
    alone would make; what differs is the order of the sums. (Dropout differs too where `batch_size` had to be split.)
    """

    config: TrainConfig
    model: GPT2LMHeadModel
    tokens: Integer[np.ndarray, "N"]
    held_out: Integer[np.ndarray, "K"]
    device: torch.device
    dtype: torch.dtype  # of the matrix products
    processes: Processes = ALONE
    rows: int = field(init=False)  # windows in one forward pass
    optimizer: torch.optim.AdamW = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)  # float16 only
    body: Callable[..., Any] = field(init=False)  # the model without its head, compiled if asked for

    def __post_init__(self) -> None:
        keep_freed_memory()
        self.rows = rows_per_pass(self.config, self.processes.size)
        self.model.to(self.device)  # type: ignore[arg-type]
        self.model.train()
        self.optimizer = optimizer_for(self.model, self.config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.body = compiled(self.model, self.device) if self.config.compile else self.model.transformer

    def autocast(self) -> Any:
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if low else nullcontext()

    def windows(self, iteration: int) -> Int[Tensor, "N T+1"]:
        """All windows of an update, the same in every process."""
        config, count = self.config, self.config.batch_size * self.config.gradient_accumulation_steps
        return windows_at(self.tokens, config, derive(config.seed, "batch", iteration), count, self.device)

    def update(self, iteration: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Make update `iteration`: accumulate gradients, clip, step. Returns the mean loss and the gradient's norm."""
        config = self.config
        parts = self.windows(iteration).split(self.rows)
        loss = torch.zeros((), device=self.device)
        for part in range(self.processes.rank, len(parts), self.processes.size):
            seed = derive(config.seed, "dropout", iteration, part)
            with dropout_from(seed, self.device) if config.dropout else nullcontext(), self.autocast():
                share = cross_entropy(self.model, parts[part], body=self.body) / len(parts)
            self.scaler.scale(share).backward()
            loss += share.detach()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.processes.sum_([loss, *(p.grad for p in trained if p.grad is not None)])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, iteration)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Mean loss over `eval_iters` random batches of each text, the same batches at every evaluation.

        None if `stop` became true in between, in any process.
        """
        self.model.eval()
        names, texts = ("train_loss", "val_loss"), (self.tokens, self.held_out)
        total = torch.zeros(2, device=self.device)
        for i in range(self.config.eval_iters):
            if self.processes.any(stop()):
                self.model.train()
                return None
            if i % self.processes.size != self.processes.rank:
                continue
            for which, (name, tokens) in enumerate(zip(names, texts, strict=True)):
                seed = derive(self.config.seed, name, i)
                windows = windows_at(tokens, self.config, seed, self.config.batch_size, self.device)
                with torch.inference_mode(), self.autocast():
                    total[which] += cross_entropy(self.model, windows)
        self.model.train()
        self.processes.sum_([total])
        return dict(zip(names, (total / self.config.eval_iters).tolist(), strict=True))


def compiled(model: GPT2LMHeadModel, device: torch.device) -> Callable[..., Any]:
    """`model.transformer` under torch.compile; raises `UserError` where there is no compiler for the device."""
    if device.type == "cpu":
        names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
        missing = "C++ compiler" if not any(shutil.which(name) for name in names if name) else None
    else:
        missing = None if importlib.util.find_spec("triton") else "triton package"
    if missing:
        raise UserError(f"compile = True needs a {missing}, and there is none: install one or set compile=False")
    return torch.compile(model.transformer)

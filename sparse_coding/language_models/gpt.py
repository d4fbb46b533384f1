"""The model, its losses and one update: GPT-2 with nanoGPT's initial weights, optimiser groups and schedule.

Batches and dropout depend on (seed, update) alone and never on the global generators.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from sparse_coding.language_models.config_file import TrainConfig

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


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

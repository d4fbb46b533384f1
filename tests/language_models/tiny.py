"""A tiny GPT, a text in which counting pairs is not enough, and what the tests ask of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from sparse_coding.language_models import gpt, train, training_state
from sparse_coding.language_models import trainer as updates
from sparse_coding.language_models.config_file import TrainConfig

CPU = torch.device("cpu")
VOCAB = 12
TINY = TrainConfig(
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=8,
    batch_size=8,
    gradient_accumulation_steps=1,
    max_iters=20,
    learning_rate=1e-2,
    min_lr=1e-3,
    warmup_iters=4,
    eval_interval=8,
    eval_iters=2,
    device="cpu",
    dtype="float32",
    bias=True,
)
# a period of 24 tokens in which one token does not tell the next, but a few do
PERIOD = np.array([1, 2, 3, 1, 4, 5, 2, 1, 6, 3, 2, 7, 1, 8, 4, 9, 2, 6, 1, 10, 3, 11, 2, 0])
IDENTITY = {**TINY.decisive(), "text": "a hash"}


def trainer(config: TrainConfig = TINY, held_out=None) -> updates.Trainer:
    tokens = np.tile(PERIOD, 40).astype(np.uint16)
    held_out = tokens[:240] if held_out is None else held_out
    return updates.Trainer(config, gpt.build(config, VOCAB), tokens, held_out, CPU, train.precision(config, CPU))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def log_of(folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / training_state.LOG).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

"""The model and its loss: GPT-2 with nanoGPT's initial weights, in the hands of `transformers`."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.language_models.config_file import TrainConfig
from sparse_coding.language_models.vocabulary_loss import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedModel

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


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
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        **dict.fromkeys(DROPOUTS, config.dropout),
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


def adopt(found: PreTrainedModel, config: TrainConfig) -> tuple[GPT2LMHeadModel, TrainConfig]:
    """A copy of a GPT-2 to go on training, and `config` with its shape; its context is cut to `block_size`.

    Raises `UserError` for another kind of model and for a block longer than its context.
    """
    from transformers import GPT2LMHeadModel

    if not isinstance(found, GPT2LMHeadModel) or found.config.n_inner not in (None, 4 * found.config.n_embd):
        raise UserError(f"init_from = {config.init_from!r} is a {type(found).__name__}: training starts from a GPT-2")
    if config.block_size > found.config.n_positions:
        raise UserError(
            f"block_size = {config.block_size}: {config.init_from!r} takes at most {found.config.n_positions} tokens: "
            f"set block_size={found.config.n_positions}"
        )
    shape = copy.deepcopy(found.config)
    shape.update({"n_positions": config.block_size, **dict.fromkeys(DROPOUTS, config.dropout)})
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(shape)
    weights = dict(found.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name][: config.block_size] if name.endswith("wpe.weight") else weights[name])
    bias = any(bool(value.any()) for name, value in weights.items() if name.endswith(".bias"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bias or not name.endswith(".bias"))
    sizes = {key: getattr(shape, key) for key in ("n_layer", "n_head", "n_embd")}
    return model, dataclasses.replace(config, bias=bias, **sizes)


def cross_entropy(
    model: GPT2LMHeadModel,
    windows: Int[Tensor, "B T+1"],
    reduction: Literal["mean", "sum"] = "mean",
    body: Callable[..., Any] | None = None,
) -> Float[Tensor, ""]:
    """Nats per token of each window's last T tokens (or their sum), each given those before it.

    body: `model.transformer`, perhaps compiled.
    """
    run = model.transformer if body is None else body
    hidden = run(windows[:, :-1], use_cache=False).last_hidden_state
    targets = windows[:, 1:].flatten()
    return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets, reduction)


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

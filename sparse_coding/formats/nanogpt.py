"""nanoGPT's checkpoints (`ckpt.pt`): read into a `GPT2LMHeadModel`, and written as nanoGPT itself loads them.

The two models are the same function. Names of the weights are equal; nanoGPT's linear weights are [out, in], GPT-2's
[in, out]; where nanoGPT has no biases, GPT-2 has zeros. What nanoGPT records and GPT-2's config has no word for is
remembered there as `nanogpt`, which `save_pretrained` keeps, so that a checkpoint comes back as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.formats.nanogpt_file import (
    EMBEDDING,
    UNEMBEDDING,
    Facts,
    Gelu,
    open_checkpoint,
    plain,
    save_checkpoint,
)

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

ACTIVATIONS: dict[Gelu, str] = {"exact": "gelu", "tanh": "gelu_new"}  # in GPT-2's words
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GPT2_END_OF_TEXT = 50256
NEVER_EVALUATED = 1e9  # nanoGPT's best_val_loss before the first evaluation


@dataclass(frozen=True)
class Checkpoint(Facts):
    """A checkpoint as a model; `model.config.nanogpt` remembers its facts."""

    model: GPT2LMHeadModel


def read_checkpoint(path: Path, gelu: Gelu | None = None) -> Checkpoint:
    """Read a checkpoint into a float32 GPT-2 on the CPU, in eval mode.

    gelu: the form its MLPs compute; None is what its config says, else exact. The oldest checkpoints, whose
    unembedding was not tied to the embedding, give a model with `tie_word_embeddings=False`.
    Raises `UserError`, in one line, for anything that is no checkpoint of nanoGPT; nothing in the file is run.
    """
    from transformers import GPT2LMHeadModel

    facts, state = open_checkpoint(path)
    tied = torch.equal(state[EMBEDDING], state[UNEMBEDDING])
    config = _gpt2_config(facts, gelu or facts.gelu, tied)
    with torch.device("meta"):  # no weights are drawn, and the global generator stays as it is
        model = GPT2LMHeadModel(config)
    weights = {
        name: _turned(name, state[name]) if name in state else torch.zeros(missing_bias.shape)
        for name, missing_bias in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return Checkpoint(**vars(facts), model=model.eval())


def write_checkpoint(
    path: Path,
    model: GPT2LMHeadModel,
    *,
    bias: bool | None = None,
    iter_num: int | None = None,
    best_val_loss: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> Facts:
    """Write a model as a checkpoint that nanoGPT samples from and resumes; returns what it says beside the weights.

    What is None is what the model's config remembers of the checkpoint it came from. bias: write the biases even if
    all are zero. The optimiser is as new: right groups, no moments. The vocabulary is written as it is, padding too.
    Raises `UserError`, in one line, for a model that nanoGPT has no words for.
    """
    known = getattr(model.config, "nanogpt", None) or {}
    gelu = _check_expressible(model)
    state = _nanogpt_state(model)
    bias = known.get("bias", False) if bias is None else bias
    biases = [name for name in state if name.endswith(".bias")]
    bias = bool(bias) or any(state[name].any().item() for name in biases)
    if not bias:
        state = {name: value for name, value in state.items() if name not in biases}
    best_val_loss = known.get("best_val_loss") if best_val_loss is None else best_val_loss
    sizes = model.config
    facts = Facts(
        model_args={
            "n_layer": sizes.n_layer,
            "n_head": sizes.n_head,
            "n_embd": sizes.n_embd,
            "block_size": sizes.n_positions,
            "bias": bias,
            "vocab_size": sizes.vocab_size,
            "dropout": sizes.resid_pdrop,
        },
        iter_num=known.get("iter_num", 0) if iter_num is None else iter_num,
        best_val_loss=best_val_loss,
        config={**plain(known.get("config", {}) if config is None else config), "gelu": gelu},
    )
    data = {
        "model": state,
        "optimizer": _new_optimizer(state, facts.config),
        "model_args": facts.model_args,
        "iter_num": facts.iter_num,
        "best_val_loss": torch.tensor(NEVER_EVALUATED if best_val_loss is None else best_val_loss),
        "config": facts.config,
    }
    save_checkpoint(path, data)
    return facts


def _turned(name: str, value: Tensor) -> Tensor:
    """A weight in the other model's layout: float32, on the CPU, in memory of its own."""
    value = value.detach().to("cpu", torch.float32)
    return (value.t() if name.endswith(TRANSPOSED) else value).clone(memory_format=torch.contiguous_format)


def _gpt2_config(facts: Facts, gelu: Gelu, tied: bool) -> Any:
    from transformers import GPT2Config

    args = facts.model_args
    end = GPT2_END_OF_TEXT if args["vocab_size"] > GPT2_END_OF_TEXT else None
    config = GPT2Config(
        vocab_size=args["vocab_size"],
        n_positions=args["block_size"],
        n_embd=args["n_embd"],
        n_layer=args["n_layer"],
        n_head=args["n_head"],
        activation_function=ACTIVATIONS[gelu],
        layer_norm_epsilon=1e-5,
        resid_pdrop=args["dropout"],
        embd_pdrop=args["dropout"],
        attn_pdrop=args["dropout"],
        tie_word_embeddings=tied,
        bos_token_id=end,
        eos_token_id=end,
        architectures=["GPT2LMHeadModel"],
    )
    remembered = {
        "bias": args["bias"],
        "iter_num": facts.iter_num,
        "best_val_loss": facts.best_val_loss,
        "config": {name: value for name, value in facts.config.items() if name != "gelu"},
    }
    config.update({"nanogpt": remembered})
    return config


# ---- writing


def _check_expressible(model: GPT2LMHeadModel) -> Gelu:
    """The form of GELU of a model that nanoGPT has words for; raises `UserError` for any other model."""
    from transformers import GPT2LMHeadModel

    if not isinstance(model, GPT2LMHeadModel):
        raise UserError(
            f"the model is a {type(model).__name__}: nanoGPT has GPT-2 with its head (GPT2LMHeadModel) only"
        )
    config = model.config
    allowed: dict[str, tuple[Any, ...]] = {
        "activation_function": tuple(ACTIVATIONS.values()),
        "n_inner": (None, 4 * config.n_embd),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "embd_pdrop": (config.resid_pdrop,),
        "attn_pdrop": (config.resid_pdrop,),
    }
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            words = " or ".join(repr(value) for value in values)
            raise UserError(f"the model has {name} = {getattr(config, name)!r}: nanoGPT has only {words}")
    if not torch.equal(model.transformer.wte.weight, model.lm_head.weight):
        raise UserError("the model's unembedding (lm_head) is not tied to its embedding: nanoGPT has only tied ones")
    return next(form for form, name in ACTIVATIONS.items() if name == config.activation_function)


def _nanogpt_state(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Every weight under nanoGPT's name, in its order and layout, each in memory of its own but for the tied pair."""
    state = {name: _turned(name, value) for name, value in model.state_dict().items()}
    state[UNEMBEDDING] = state[EMBEDDING]
    return state


def _new_optimizer(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The state of nanoGPT's AdamW before its first step: tensors of two or more dimensions, then the rest.

    Resuming takes weight decay and betas from here, so they are those of the config, else nanoGPT's own.
    """
    trained = [torch.nn.Parameter(value) for name, value in state.items() if name != UNEMBEDDING]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.get("weight_decay", 0.1)},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = config.get("beta1", 0.9), config.get("beta2", 0.95)
    return torch.optim.AdamW(groups, lr=config.get("learning_rate", 6e-4), betas=betas).state_dict()

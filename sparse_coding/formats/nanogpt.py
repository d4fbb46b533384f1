"""nanoGPT's checkpoints (`ckpt.pt`): read into a `GPT2LMHeadModel`, and written as nanoGPT itself loads them.

The two models are the same function. Names of the weights are equal; nanoGPT's linear weights are [out, in], GPT-2's
[in, out]; where nanoGPT has no biases, GPT-2 has zeros. What nanoGPT records and GPT-2's config has no word for is
remembered there as `nanogpt`, which `save_pretrained` keeps, so that a checkpoint comes back as it was.
A file is read by torch's restricted unpickler alone, and the optimiser's state, two thirds of it, is not read at all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparse_coding.errors import UserError, near

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

Gelu = Literal["exact", "tanh"]

ACTIVATIONS: dict[Gelu, str] = {"exact": "gelu", "tanh": "gelu_new"}  # in GPT-2's words
SUFFIXES = (".pt", ".pth", ".ckpt")
COMPILED = "_orig_mod."  # torch.compile puts this before every name
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of old versions; `c_attn.bias`, without the dot, is a weight
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
EMBEDDING, UNEMBEDDING = "transformer.wte.weight", "lm_head.weight"
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
GPT2_END_OF_TEXT = 50256
NEVER_EVALUATED = 1e9  # nanoGPT's best_val_loss before the first evaluation


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says beside its weights."""

    model_args: dict[str, Any]  # SIZES, bias, dropout: what defines the model
    iter_num: int
    best_val_loss: float | None
    config: dict[str, Any]  # every number, string and flag of the training script; empty in the oldest files

    @property
    def gelu(self) -> Gelu:
        """The form of GELU that our exports name; nanoGPT itself does not, and computes the exact one since 2023-06."""
        form = self.config.get("gelu", "exact")
        if form not in ACTIVATIONS:
            raise UserError(f"the checkpoint's config says gelu = {form!r}: give --gelu exact or --gelu tanh")
        return form


@dataclass(frozen=True)
class Checkpoint(Facts):
    """A checkpoint as a model; `model.config.nanogpt` remembers its facts."""

    model: GPT2LMHeadModel


def checkpoint_file(name: str | Path) -> Path | None:
    """The file that a name means if it means a checkpoint: it ends in .pt, .pth or .ckpt, and is no folder."""
    path = Path(name).expanduser()
    return path if path.suffix in SUFFIXES and not path.is_dir() else None


def read_facts(path: Path) -> Facts:
    """What the checkpoint says beside its weights; raises `UserError` as `read_checkpoint` does."""
    return _open(path)[0]


def read_checkpoint(path: Path, gelu: Gelu | None = None) -> Checkpoint:
    """Read a checkpoint into a float32 GPT-2 on the CPU, in eval mode.

    gelu: the form its MLPs compute; None is what its config says, else exact. The oldest checkpoints, whose
    unembedding was not tied to the embedding, give a model with `tie_word_embeddings=False`.
    Raises `UserError`, in one line, for anything that is no checkpoint of nanoGPT; nothing in the file is run.
    """
    from transformers import GPT2LMHeadModel

    facts, state = _open(path)
    tied = torch.equal(state[EMBEDDING], state[UNEMBEDDING])
    config = _gpt2_config(facts, gelu or facts.gelu, tied)
    with torch.device("meta"):  # no weights are drawn, and the global generator stays as it is
        model = GPT2LMHeadModel(config)
    weights = {}
    for name, meta in model.state_dict().items():
        if name in state:
            weights[name] = (
                (state[name].t() if name.endswith(TRANSPOSED) else state[name])
                .float()
                .clone(memory_format=torch.contiguous_format)
            )
        else:
            weights[name] = torch.zeros(meta.shape)  # a bias
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
        config={**_plain(known.get("config", {}) if config is None else config), "gelu": gelu},
    )
    data = {
        "model": state,
        "optimizer": _new_optimizer(state, facts.config),
        "model_args": facts.model_args,
        "iter_num": facts.iter_num,
        "best_val_loss": torch.tensor(NEVER_EVALUATED if best_val_loss is None else best_val_loss),
        "config": facts.config,
    }
    _save(path, data)
    return facts


# ---- reading


def _open(path: Path) -> tuple[Facts, dict[str, Tensor]]:
    """The facts, and the weights under nanoGPT's own names, still on disk; all checked against each other."""
    what = f"checkpoint {str(path)!r}"
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        known = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{what}: no such file{near(path.name, known)}") from None
    except UnpicklingError:
        raise UserError(
            f"{what} holds more than tensors, numbers and texts, or is damaged: it is not opened, because such a file "
            "can run code"
        ) from None
    except Exception:  # a damaged file raises nearly anything
        raise UserError(
            f"{what} cannot be read: it is cut short or damaged, or was not written by torch.save"
        ) from None
    if not (
        isinstance(data, dict) and isinstance(data.get("model"), dict) and isinstance(data.get("model_args"), dict)
    ):
        raise UserError(f"{what} is no checkpoint of nanoGPT: it lacks `model` or `model_args`")
    state = _weights(what, data["model"])
    args = _model_args(what, data["model_args"], state)
    _check_weights(what, state, _shapes(args))
    iter_num, loss, config = data.get("iter_num", 0), data.get("best_val_loss"), data.get("config", {})
    if type(iter_num) is not int or not isinstance(config, dict):
        raise UserError(f"{what} is no checkpoint of nanoGPT: its iter_num is no number, or its config no table")
    known = isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1)
    return Facts(args, iter_num, float(loss) if known else None, _plain(config)), state


def _weights(what: str, model: dict[Any, Any]) -> dict[str, Tensor]:
    state = {}
    for name, value in model.items():
        if not (isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()):
            raise UserError(f"{what} is no checkpoint of nanoGPT: {str(name)[:80]!r} among its weights is no weight")
        name = name.removeprefix(COMPILED)
        if name in state:
            raise UserError(f"{what} holds {name} twice, with and without {COMPILED} before it")
        if not name.endswith(MASKS):
            state[name] = value
    return state


def _model_args(what: str, given: dict[Any, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """nanoGPT's seven words for a model, in its order; what old versions did not write is read off the weights."""
    unknown = [str(name) for name in given if name not in (*SIZES, "bias", "dropout")]
    if unknown:
        raise UserError(
            f"{what} names {', '.join(sorted(unknown))[:200]} in its model_args, which nanoGPT does not have: it comes "
            "from a changed copy, whose models this reader does not know"
        )
    args = {name: value for name, value in given.items() if value is not None}
    if EMBEDDING in state and state[EMBEDDING].ndim == 2:
        args.setdefault("vocab_size", len(state[EMBEDDING]))
    args.setdefault("bias", "transformer.ln_f.bias" in state)
    args.setdefault("dropout", 0.0)
    for name in SIZES:
        if type(args.get(name)) is not int or args[name] < 1:
            raise UserError(f"{what}: {name} in its model_args is {args.get(name)!r}, not a number from 1")
    if type(args["bias"]) is not bool or type(args["dropout"]) not in (int, float) or not 0 <= args["dropout"] < 1:
        raise UserError(f"{what}: its model_args say bias={args['bias']!r} and dropout={args['dropout']!r}")
    if args["n_embd"] % args["n_head"]:
        raise UserError(f"{what}: {args['n_head']} heads do not divide a width of {args['n_embd']}")
    layers = sum(name.startswith("transformer.h.") and name.endswith(".ln_1.weight") for name in state)
    if args["n_layer"] != layers:  # before anything as large as they say is made
        raise UserError(f"{what}: its model_args say {args['n_layer']} layers, its weights have {layers}")
    return {name: args[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")}


def _shapes(args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of nanoGPT's model."""
    d, shapes = args["n_embd"], {EMBEDDING: (args["vocab_size"], args["n_embd"])}
    shapes["transformer.wpe.weight"] = (args["block_size"], d)
    for i in range(args["n_layer"]):
        linear = {"attn.c_attn": (3 * d, d), "attn.c_proj": (d, d), "mlp.c_fc": (4 * d, d), "mlp.c_proj": (d, 4 * d)}
        for name, shape in {"ln_1": (d,), "ln_2": (d,), **linear}.items():
            shapes[f"transformer.h.{i}.{name}.weight"] = shape
            shapes[f"transformer.h.{i}.{name}.bias"] = shape[:1]
    shapes |= {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    if not args["bias"]:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(".bias")}
    return {**shapes, UNEMBEDDING: (args["vocab_size"], d)}


def _check_weights(what: str, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing, unknown = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    if missing:
        raise UserError(f"{what} lacks {len(missing)} of the weights that its model_args name, such as {missing[0]}")
    if unknown:
        raise UserError(f"{what}: {len(unknown)} of its weights are none of nanoGPT's, such as {unknown[0][:80]}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise UserError(f"{what}: {name} has shape {list(state[name].shape)}, its model_args say {list(shape)}")


def _gpt2_config(facts: Facts, gelu: Gelu, tied: bool) -> Any:
    from transformers import GPT2Config

    args = facts.model_args
    end = GPT2_END_OF_TEXT if args["vocab_size"] > GPT2_END_OF_TEXT else None
    return GPT2Config(
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
        nanogpt={
            "bias": args["bias"],
            "iter_num": facts.iter_num,
            "best_val_loss": facts.best_val_loss,
            "config": {name: value for name, value in facts.config.items() if name != "gelu"},
        },
    )


def _plain(config: Mapping[Any, Any]) -> dict[str, Any]:
    """What nanoGPT records of its settings: numbers, strings and flags by name, nothing else."""
    kinds = (bool, int, float, str)
    return {name: value for name, value in config.items() if isinstance(name, str) and type(value) in kinds}


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
    state = {}
    for name, value in model.state_dict().items():
        value = value.detach().to("cpu", torch.float32)
        value = value.t() if name.endswith(TRANSPOSED) else value
        state[name] = value.clone(memory_format=torch.contiguous_format)
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


def _save(path: Path, data: dict[str, Any]) -> None:
    """`torch.save`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

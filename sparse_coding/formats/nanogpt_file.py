"""nanoGPT's checkpoint as a file: opened, checked against itself, saved; what the weights compute is not known here.

It is read by torch's restricted unpickler alone. The optimiser's state, two thirds of the file, stays on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparse_coding.errors import UserError, near
from sparse_coding.files import written_whole

Gelu = Literal["exact", "tanh"]

SUFFIXES = (".pt", ".pth", ".ckpt")
COMPILED = "_orig_mod."  # torch.compile puts this before every name
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of old versions; `c_attn.bias`, without the dot, is a weight
EMBEDDING, UNEMBEDDING = "transformer.wte.weight", "lm_head.weight"
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")  # in nanoGPT's order


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
        if form not in get_args(Gelu):
            raise UserError(f"the checkpoint's config says gelu = {form!r}: give --gelu exact or --gelu tanh")
        return form


def checkpoint_file(name: str | Path) -> Path | None:
    """The file that a name means if it means a checkpoint: it ends in .pt, .pth or .ckpt, and is no folder."""
    path = Path(name).expanduser()
    return path if path.suffix in SUFFIXES and not path.is_dir() else None


def read_facts(path: Path) -> Facts:
    """What the checkpoint says beside its weights; raises `UserError` as `read_checkpoint` does."""
    return open_checkpoint(path)[0]


def open_checkpoint(path: Path) -> tuple[Facts, dict[str, Tensor]]:
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
    if isinstance(loss, Tensor) and loss.numel() == 1:
        loss = loss.item()
    return Facts(args, iter_num, float(loss) if isinstance(loss, (int, float)) else None, plain(config)), state


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
    unknown = [str(name) for name in given if name not in ARGUMENTS]
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
    return {name: args[name] for name in ARGUMENTS}


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


def plain(config: Mapping[Any, Any]) -> dict[str, Any]:
    """What nanoGPT records of its settings: numbers, strings and flags by name, nothing else."""
    kinds = (bool, int, float, str)
    return {name: value for name, value in config.items() if isinstance(name, str) and type(value) in kinds}


def save_checkpoint(path: Path, data: dict[str, Any]) -> None:
    """`torch.save`, whole or not at all."""
    with written_whole(path, "wb") as file:
        torch.save(data, file)

"""Language models to study: anything `transformers` loads from safe files, and nanoGPT's checkpoints, frozen and in
eval mode.

Code that comes with a model is never run (`trust_remote_code` stays off), and pickled weights are read by torch's
restricted unpickler alone. Attention is SDPA wherever the architecture has it, which is the library's own default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from sparse_coding.activations.fused import fuse_gelu
from sparse_coding.device import bf16_pays, has_bf16, pick_device
from sparse_coding.errors import UserError, near
from sparse_coding.formats.nanogpt import read_checkpoint
from sparse_coding.formats.nanogpt_file import Gelu, checkpoint_file
from sparse_coding.hub import offline_if_unreachable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Kind = Literal["causal", "masked"]

ASSETS = Path(__file__).parents[1] / "language_models" / "assets"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # one of them makes a folder with a model
WAYS_OUT = "give a local folder that holds a model, or leave the model away for the bundled one, which needs no network"


@dataclass(frozen=True)
class LanguageModel:
    """A frozen Hugging Face model and what the rest of the project asks of it."""

    hf: PreTrainedModel  # eval mode, no gradients
    name: str  # as the user gave it
    path: str  # where it was loaded from: a folder, a hub name or a checkpoint; `load_tokenizer` takes it too
    kind: Kind | None  # how it predicts tokens; None: it has no head that does, or not a trained one

    @classmethod
    def of(cls, hf: PreTrainedModel, name: str = "in memory", path: str | None = None) -> LanguageModel:
        """Take a model that is already in memory; it is frozen and put into eval mode in place."""
        from transformers.models.auto import modeling_auto

        masked = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
        masked |= set(modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES.values()) - set(
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        )
        if hf.config.is_encoder_decoder:
            raise UserError(f"model {name!r} has an encoder and a decoder: only models with one stack of layers work")
        if hf.get_output_embeddings() is None:
            kind = None
        else:
            kind = "masked" if type(hf).__name__ in masked else "causal"
        return cls(hf.eval().requires_grad_(False), name, path or name, kind)

    @property
    def config(self) -> PretrainedConfig:
        return self.hf.config

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def runs_on(self) -> str:
        """Device and dtype, for the log."""
        dtype = str(self.dtype).removeprefix("torch.")
        slow = self.device.type == "cpu" and self.dtype == torch.float32 and not has_bf16(self.device)
        return f"{self.device} in {dtype}{' (no bf16 instructions here: bfloat16 would be slower)' if slow else ''}"

    @property
    def causal(self) -> bool:
        return self.kind == "causal"

    @property
    def from_nanogpt(self) -> bool:
        """Whether it is a checkpoint of nanoGPT, or a folder that was imported from one."""
        return getattr(self.config, "nanogpt", None) is not None

    @property
    def vocab_size(self) -> int:
        """How many tokens the model takes, read from the embedding itself."""
        return self.hf.get_input_embeddings().num_embeddings  # type: ignore[union-attr]

    @cached_property
    def max_positions(self) -> int | None:
        """The longest context the model takes, None where nothing limits it."""
        for name, module in self.hf.named_modules():
            if name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding):
                # RoBERTa and its kin count positions from padding_idx + 1.
                return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        return getattr(self.config, "max_position_embeddings", None)


def bundled_models() -> dict[str, Path]:
    """Name and folder of every model that comes with the project."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/config.json"))}


def load_model(
    name: str | Path, *, device: str = "auto", dtype: Dtype = "auto", gelu: Gelu | None = None
) -> LanguageModel:
    """Load a bundled model, a local folder in Hugging Face layout, a model of the hub by name, or nanoGPT's `ckpt.pt`.

    dtype "auto" is bfloat16 where the hardware multiplies it and it pays (`bf16_pays`), float32 elsewhere. A model in
    the hub's local cache loads with no network. gelu: the form of GELU in a checkpoint of nanoGPT, which does not say
    it; None is what our exports say, else exact. Raises UserError, in one line, when there is no such model or it is
    of a kind that does not work here.
    """
    if dtype not in get_args(Dtype):
        raise UserError(f"the model's dtype is {dtype!r}: allowed are {', '.join(get_args(Dtype))}")
    from safetensors import SafetensorError

    where = pick_device(device)
    file = checkpoint_file(name)
    if file:
        hf = read_checkpoint(file, gelu).model
        hf = hf.to(where, _torch_dtype(dtype, where, hf.config))  # type: ignore[arg-type]
        fuse_gelu(hf)
        return LanguageModel.of(hf, str(name), str(file.resolve()))
    if gelu is not None:
        raise UserError(f"--gelu {gelu} is for checkpoints of nanoGPT (.pt): model {str(name)!r} says its own form")
    folder = _folder(str(name))
    path = str(folder or name)
    with _quiet(), nullcontext() if folder else offline_if_unreachable():
        try:
            hf = _read(str(name), path, dtype, where)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, UnpicklingError, SafetensorError) as error:
            raise UserError(_reason(str(name), folder, error)) from None
    fuse_gelu(hf)
    return LanguageModel.of(hf.to(where), str(name), path)  # type: ignore[arg-type]


def tokens_given(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids a tokenizer gives; raises `UserError` where the model takes fewer."""
    given = max(tokenizer.get_vocab().values()) + 1
    if given > model.vocab_size:
        raise UserError(
            f"the tokenizer has {given:,} tokens, model {model.name!r} has {model.vocab_size:,}: it was trained with "
            "another tokenizer; name that with --tokenizer"
        )
    return given


def cut_padding(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Cut the ids that no token has off a model that comes from nanoGPT, in place: they would take probability.

    nanoGPT rounds GPT-2's 50,257 tokens up to 50,304. Models from elsewhere stay as they are. Raises `UserError` where
    the tokenizer has more tokens than the model.
    """
    known, given = model.vocab_size, tokens_given(model, tokenizer)
    if given == known or not model.from_nanogpt:
        return
    print(f"model {model.name}: {known - given:,} of its {known:,} tokens are padding, and left out")
    embedding: Any = model.hf.get_input_embeddings()
    unembedding: Any = model.hf.get_output_embeddings()
    tied = unembedding.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight[:given].clone(), requires_grad=False)
    cut = embedding.weight if tied else nn.Parameter(unembedding.weight[:given].clone(), requires_grad=False)
    unembedding.weight = cut
    embedding.num_embeddings = unembedding.out_features = model.config.vocab_size = given


def _folder(name: str) -> Path | None:
    """The folder of a bundled or local model, None where it must be a name of the hub."""
    bundled = bundled_models()
    if name in bundled:
        return bundled[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return folder.resolve()
    if folder.is_file():
        raise UserError(f"model {name!r} is a file: give the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        known = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"model {name!r}: no such folder{near(folder.name, known)}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"model {name!r} is neither a folder nor a possible name on the hub, such as gpt2 or owner/name"
        )
    return None


def _check_folder(folder: Path) -> None:
    what = f"model folder {str(folder)!r}"
    if not (folder / "config.json").is_file():
        inside = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
        hint = f": did you mean one of its folders {', '.join(inside[:5])}?" if inside else ""
        raise UserError(f"{what} holds no config.json, so it is no model in Hugging Face layout{hint}")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise UserError(f"{what} holds a config.json but no weights: none of {', '.join(WEIGHTS)}")


def _torch_dtype(dtype: Dtype, device: str, config: PretrainedConfig) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if bf16_pays(device, getattr(config, "hidden_size", 0)) else torch.float32


def _read(name: str, path: str, dtype: Dtype, device: str) -> PreTrainedModel:
    """The model with its head, or without where the files hold none: a head of random numbers predicts nothing."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    missing: set[str] = set()
    for auto in (_class_with_head(config), AutoModel):
        if auto is None:
            continue
        hf, report = auto.from_pretrained(
            path,
            config=config,
            dtype=_torch_dtype(dtype, device, config),
            trust_remote_code=False,
            output_loading_info=True,
        )
        missing = {key for key in report["missing_keys"] if "pooler" not in key.split(".")}
        if not missing:
            return hf
    raise UserError(
        f"model {name!r}: its files lack {len(missing)} of its weights, such as {min(missing)}; "
        "they were saved from another kind of model or not completely"
    )


def _class_with_head(config: Any) -> Any:
    """The Auto class that predicts tokens. BERT and its kin are in both lists; they are masked unless the config says
    otherwise."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto import modeling_auto

    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if causal and masked:
        saved_as = " ".join(config.architectures or ())
        causal = getattr(config, "is_decoder", False) or "CausalLM" in saved_as or "LMHead" in saved_as
    return AutoModelForCausalLM if causal else AutoModelForMaskedLM if masked else None


def _reason(name: str, folder: Path | None, error: Exception) -> str:
    """One line for what went wrong, with the way out."""
    from huggingface_hub import constants

    detail = " ".join(str(error).split())
    if len(detail) > 300:
        detail = detail[:300] + " ..."
    if isinstance(error, UnpicklingError):
        return (
            f"model {name!r}: its weights are a pickle that holds more than tensors, which is never opened here "
            "because it can run code: use a copy in safetensors"
        )
    if "trust_remote_code" in detail or "custom code" in detail:
        return f"model {name!r} comes with code of its own, which is never run here: choose another model"
    if folder:
        return f"the model in {str(folder)!r} cannot be read: {detail}"
    if constants.HF_HUB_OFFLINE:  # also where `offline_if_unreachable` found no hub
        return (
            f"model {name!r} is neither a local folder nor in the local cache, and the Hugging Face hub cannot be "
            f"reached: {WAYS_OUT}{near(name, bundled_models())}"
        )
    return f"model {name!r} is no local folder and cannot be had from the Hugging Face hub ({detail}): {WAYS_OUT}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars and load reports: what they say ends up in our own messages."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

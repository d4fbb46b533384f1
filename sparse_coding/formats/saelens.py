"""The project's own folder, which is the SAELens v6 layout: `cfg.json` + `sae_weights.safetensors`.

SAELens reads what is written here as it is; our facts (settings, seed, scale) stand under `metadata.sparse_coding`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from sparse_coding.config import from_dict, to_dict
from sparse_coding.dictionaries import TrainableDictionary, architecture
from sparse_coding.errors import UserError
from sparse_coding.files import write_tensors, write_text

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def save_dictionary(
    dictionary: TrainableDictionary,
    architecture_name: str,
    folder: Path,
    scale: float = 1.0,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write one dictionary; `scale` (what the training stream multiplied rows with) is folded into the weights."""
    if dictionary.atoms.ndim != 2:
        raise ValueError("save one member at a time: dictionary.member(index, settings)")
    tensors = dictionary.to_inference(scale)
    own = {"architecture": architecture_name, "settings": to_dict(dictionary.settings), "folded_scale": scale}
    config = {
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        **dictionary.saelens_config(),
        "metadata": {"sae_lens_version": "6.0.0", **(metadata or {}), "sparse_coding": own},
    }
    write_tensors(folder / WEIGHTS, tensors)
    write_text(folder / CONFIG, json.dumps(config, indent=1))


def load_dictionary(folder: Path, device: str = "cpu") -> TrainableDictionary:
    """Read a dictionary this project wrote, for inference. Nothing is unpickled."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        own = config["metadata"]["sparse_coding"]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {CONFIG}: give the folder of one dictionary") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / CONFIG} was not written by this project") from None
    kind = architecture(own["architecture"])
    settings = from_dict(kind.Settings, own["settings"])
    try:
        tensors = load_file(folder / WEIGHTS, device=device)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    shape = tuple(tensors["W_dec"].shape) if "W_dec" in tensors else None
    if shape != (settings.d_sae, settings.d_in):
        raise UserError(
            f"{folder / WEIGHTS} holds W_dec of shape {shape}, {CONFIG} says {settings.d_sae, settings.d_in}"
        )
    return kind.from_inference(settings, tensors).requires_grad_(False)

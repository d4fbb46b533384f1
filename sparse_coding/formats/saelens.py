"""The project's own folder, which is the SAELens v6 layout: `cfg.json` + `sae_weights.safetensors`.

SAELens reads what is written here as it is wherever its formulas can say it; what it does not have (GroupMax,
crosscoders, some transcoders) gets a name it refuses. Our facts (settings, seed, scale) stand under
`metadata.sparse_coding`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from sparse_coding.config import from_dict, to_dict
from sparse_coding.dictionaries import Dictionary, TrainableDictionary, architecture
from sparse_coding.dictionaries.normalise import Affine, RowNorm
from sparse_coding.dictionaries.row_normalised import RowNormalised
from sparse_coding.errors import UserError
from sparse_coding.files import write_tensors, write_text

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ROW_NORMS: dict[RowNorm | None, str] = {None: "none", "unit-norm": "constant_norm_rescale", "layer-norm": "layer_norm"}
"""Our names of row-wise normalisation and SAELens's."""


@dataclass(frozen=True)
class Normalised:
    """What training did to activations: what is folded into the weights, and what is done again row by row."""

    before: Affine | None = None
    after: Affine | None = None
    row_norm: RowNorm | None = None

    def at_inference(self, trained: TrainableDictionary) -> Dictionary:
        """The dictionary as it is used on raw activations."""
        folded = trained.to_inference(self.before, self.after)
        return folded if self.row_norm is None else RowNormalised(folded, self.row_norm, parts_of(folded))


def parts_of(dictionary: TrainableDictionary) -> tuple[int, ...]:
    """Widths of the sites a crosscoder holds side by side, none for others."""
    return tuple(getattr(dictionary.settings, "parts", ()))


def save_dictionary(
    dictionary: TrainableDictionary,
    architecture_name: str,
    folder: Path,
    normalised: Normalised | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write one dictionary as it is used on raw activations; `normalised` is what training did to them."""
    if dictionary.atoms.ndim != 2:
        raise ValueError("save one member at a time: dictionary.member(index, settings)")
    normalised = normalised or Normalised()
    folded = dictionary.to_inference(normalised.before, normalised.after)
    own = {
        "architecture": architecture_name,
        "settings": to_dict(dictionary.settings),
        "inference_settings": to_dict(folded.settings),
        "row_norm": normalised.row_norm,
    }
    config = {
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": ROW_NORMS[normalised.row_norm],
        "reshape_activations": "none",
        **folded.saelens_config(),
        "metadata": {"sae_lens_version": "6.0.0", **(metadata or {}), "sparse_coding": own},
    }
    write_tensors(folder / WEIGHTS, {**folded.tensors(), **folded.state()})
    write_text(folder / CONFIG, json.dumps(config, indent=1))


def load_dictionary(folder: Path, device: str = "cpu") -> Dictionary:
    """Read a dictionary this project wrote, for raw activations. Nothing is unpickled."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        own = config["metadata"]["sparse_coding"]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {CONFIG}: give the folder of one dictionary") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / CONFIG} was not written by this project") from None
    kind = architecture(own["architecture"])
    settings = from_dict(kind.Settings, own.get("inference_settings", own["settings"]))
    try:
        tensors = load_file(folder / WEIGHTS, device=device)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    shape = tuple(tensors["W_dec"].shape) if "W_dec" in tensors else None
    expected = settings.d_sae, settings.target_width
    if shape != expected:
        raise UserError(f"{folder / WEIGHTS} holds W_dec of shape {shape}, {CONFIG} says {expected}")
    dictionary = kind.single(settings, tensors).requires_grad_(False)
    row_norm = own.get("row_norm")
    return RowNormalised(dictionary, row_norm, parts_of(dictionary)) if row_norm else dictionary

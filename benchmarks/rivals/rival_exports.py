"""Ours, saved for SAELens to open: every architecture it knows, trained on raw and on normalised activations.

What SAELens should give is worked out from the dictionary as training had it, not from what was saved: rows are
normalised, encoded, decoded, and the normalisation is undone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparse_coding.dictionaries import architecture
from sparse_coding.dictionaries.normalise import Affine, row_statistics, scaling, whitening
from sparse_coding.formats.saelens import Normalised, save_dictionary

D_IN, D_SAE, D_OUT = 6, 12, 5
FREE, TRANSCODER = {"decoder": "free"}, {"d_out": D_OUT, "decoder": "free"}
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {}),
    "relu_tied": ("relu", {"tied": True}),
    "relu_unbiased": ("relu", {"decoder_bias": False}),
    "relu_april": ("relu-april", {}),
    "lp": ("lp", {}),
    "gated": ("gated", {}),
    "gated_unsubtracted": ("gated", {"subtract_b_dec": False, **FREE}),
    "topk": ("topk", {"k": 3}),
    "topk_free": ("topk", {"k": 3, **FREE}),
    "abstopk_free": ("topk", {"k": 3, "selection": "abs", **FREE}),
    "batchtopk": ("batchtopk", {"k": 2.5}),
    "batchtopk_free": ("batchtopk", {"k": 2.5, **FREE}),
    "matryoshka_free": ("matryoshka", {"k": 2.5, "group_fractions": (0.25, 0.25, 0.5), **FREE}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu_unsubtracted": ("jumprelu", {"subtract_b_dec": False, **FREE}),
    "matching_pursuit": ("matching-pursuit", {"k": 4, "residual_threshold": 0.6}),
    "transcoder": ("relu-april", TRANSCODER),
    "skip_transcoder": ("relu-april", {**TRANSCODER, "skip": True}),
    "jumprelu_transcoder": ("jumprelu", TRANSCODER),
    "jumprelu_skip_transcoder": ("jumprelu", {**TRANSCODER, "skip": True}),
}


def build(name: str, changes: dict[str, Any], generator: torch.Generator) -> Any:
    """A dictionary off its starting point."""
    kind = architecture(name)
    settings = kind.Settings(D_IN, D_SAE, **changes)
    dictionary = kind.single(settings, kind.initial(settings, generator))
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        if hasattr(dictionary, "threshold"):
            dictionary.threshold.fill_(0.4)
    dictionary.constrain_(dictionary.tensors())
    return dictionary


def expected(dictionary: Any, normalised: Normalised, x: Tensor) -> tuple[Tensor, Tensor]:
    """(f, x_hat) of raw rows, by way of what training saw. Codes are in the unit that inference gives them."""
    rows = x if normalised.before is None else normalised.before(x)
    if normalised.row_norm:
        shift, scale = row_statistics(x, normalised.row_norm)
        rows = (x - shift) / scale
    f = dictionary.encode(rows)
    x_hat = dictionary.decode(f, rows)
    if normalised.after is not None:
        x_hat = normalised.after.undo(x_hat)
    if normalised.row_norm:
        x_hat = x_hat * scale + shift
    settings = dictionary.settings
    if getattr(settings, "decoder", "unit") == "free" and getattr(dictionary, "compares_latents", False):
        f = f * dictionary.norms
    if settings.__class__.__name__.startswith("MatchingPursuit") and normalised.before is not None:
        f = f / normalised.before.factor[0]
    return f, x_hat


@torch.no_grad()
def save(folder: Path) -> None:
    """One folder each, with `expected.safetensors` beside it."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D_IN, D_IN, generator=generator) + torch.eye(D_IN)
    x = torch.randn(64, D_IN, generator=generator) @ mixing + torch.randn(D_IN, generator=generator)
    targets = 3 * torch.randn(64, D_OUT, generator=generator) + 1
    skipped = []
    for label, (name, changes) in SAVED.items():
        dictionary = build(name, changes, generator)
        after: dict[str, Affine] = {"mean-norm": scaling(0.4, D_IN), "whiten": whitening(x)}
        before = dict(after)
        if dictionary.settings.target_width != D_IN:
            after = {"mean-norm": scaling(0.7, D_OUT), "whiten": whitening(targets)}
        ways = {"none": Normalised()} | {way: Normalised(before[way], after[way]) for way in before}
        if dictionary.settings.target_width == D_IN:
            ways |= {"layer-norm": Normalised(row_norm="layer-norm"), "unit-norm": Normalised(row_norm="unit-norm")}
        for way, normalised in ways.items():
            if name == "matching-pursuit" and way == "whiten":  # refused: the atoms encode
                skipped.append(f"{label}.{way}")
                continue
            f, x_hat = expected(dictionary, normalised, x)
            here = folder / f"{label}.{way}"
            save_dictionary(dictionary, name, here, normalised)
            save_file({"x": x, "f": f.contiguous(), "x_hat": x_hat.contiguous()}, here / "expected.safetensors")
    print(f"{sum(1 for _ in folder.iterdir())} dictionaries in {folder}; left out: {', '.join(skipped)}")

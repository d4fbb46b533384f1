"""mats_sae_training of February 2024, where SAELens comes from: ghost gradients in their original form."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch
from rival_record import D_IN, D_SAE, DEAD, Leaf, Record, fill

COMMIT = "6754e650e032efbc85b0dd11db480c96640bd0b6"


def record(folder: Path) -> None:
    """The ghost term of `SparseAutoencoder.forward` and its gradients, from a checkout of the repository."""
    sys.path.insert(0, str(folder))
    from sae_training.sparse_autoencoder import SparseAutoencoder

    settings = {"d_in": D_IN, "d_sae": D_SAE, "l1_coefficient": 0.7, "use_ghost_grads": True}
    coder = SparseAutoencoder(types.SimpleNamespace(**settings, dtype=torch.float32, device="cpu"))
    leaves = {name: Leaf(parameter) for name, parameter in coder.named_parameters()}
    found = Record("mats_sae_training", COMMIT)
    fill(leaves, found.values, unit=True)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[DEAD] = True
    x_hat, f, _, _, _, ghost = coder(found.values["x"], dead)
    found.add("ghost", leaves, ghost, {}, settings, f=f, x_hat=x_hat)
    found.write()

"""sparsify (EleutherAI): `SparseCoder.forward`, and the sum its trainer makes of what comes out (trainer.py:480)."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from rival_record import D_IN, D_SAE, DEAD, GROUPS, K, Leaf, Record, fill
from sparsify.config import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder

ALPHA = 0.5
"""auxk_alpha, the weight of AuxK."""


def ask(record: Record, case: str, dead: slice | None = None, unit: bool = True, **settings: Any) -> None:
    """One case: its losses and gradients. A transcoder is given the world's target."""
    settings = {"k": K, **settings}
    coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, **settings))
    leaves = {
        "W_enc": Leaf(coder.encoder.weight, turned=True),
        "b_enc": Leaf(coder.encoder.bias),
        "W_dec": Leaf(coder.W_dec),
        "b_dec": Leaf(coder.b_dec),
    }
    if coder.W_skip is not None:
        leaves["W_skip"] = Leaf(coder.W_skip)
    fill(leaves, record.values, unit)
    mask = None
    if dead is not None:
        mask = torch.zeros(D_SAE, dtype=torch.bool)
        mask[dead] = True
    x = record.values["x"]
    out = coder(x, record.values["target"] if coder.cfg.transcode else None, dead_mask=mask)
    loss = out.fvu + ALPHA * out.auxk_loss + out.multi_topk_fvu / 8
    terms = {"fvu": out.fvu, "auxk": out.auxk_loss, "multi_topk_fvu": out.multi_topk_fvu}
    tensors = {}
    if not coder.cfg.multi_topk:  # with it, what comes out is the reconstruction of 4k latents
        f = torch.zeros(len(x), D_SAE).scatter(1, out.latent_indices, out.latent_acts)
        tensors = {"f": f, "x_hat": out.sae_out}
    record.add(case, leaves, loss, terms, {**settings, "auxk_alpha": ALPHA}, **tensors)


def record() -> None:
    found = Record("sparsify", importlib.metadata.version("eai-sparsify"))
    ask(found, "topk")
    ask(found, "multi_topk", multi_topk=True)
    ask(found, "topk_auxk", dead=DEAD)
    ask(found, "topk_auxk_few", dead=slice(8, 10))
    ask(found, "groupmax", activation="groupmax", k=GROUPS)
    ask(found, "transcoder", transcode=True)
    ask(found, "skip_transcoder", transcode=True, skip_connection=True)
    found.write()

"""SAELens: its training classes, asked through `training_forward_pass`; and its reader of saved dictionaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sae_lens
import torch
from rival_record import D_IN, D_SAE, DEAD, K, Leaf, Record, fill
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitTrainingSAE, MatchingPursuitTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

Kind = tuple[type, type]
STANDARD: Kind = (StandardTrainingSAE, StandardTrainingSAEConfig)
GATED: Kind = (GatedTrainingSAE, GatedTrainingSAEConfig)
TOPK: Kind = (TopKTrainingSAE, TopKTrainingSAEConfig)
ABSTOPK: Kind = (AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig)
BATCHTOPK: Kind = (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig)
MATRYOSHKA: Kind = (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig)
JUMPRELU: Kind = (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig)
PURSUIT: Kind = (MatchingPursuitTrainingSAE, MatchingPursuitTrainingSAEConfig)
BATCHES = (1.0, 0.6, 1.7)
"""What the rows are multiplied by in the batches that a threshold is averaged over."""


def build(record: Record, kind: Kind, unit: bool, settings: dict[str, Any]) -> tuple[Any, dict[str, Leaf]]:
    """A dictionary of SAELens with the world's weights."""
    module, config = kind
    sae = module(config(d_in=D_IN, d_sae=D_SAE, **settings))
    leaves = {name: Leaf(parameter) for name, parameter in sae.named_parameters()}
    fill(leaves, record.values, unit)
    return sae, leaves


def step(sae: Any, x: Tensor, dead: Tensor | None) -> Any:
    """One training forward pass, every warm-up over."""
    coefficients = {name: found.value for name, found in sae.get_coefficients().items()}
    return sae.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, False))


def ask(
    record: Record,
    case: str,
    kind: Kind,
    unit: bool = False,
    dead: slice | None = None,
    rows: int | None = None,
    **settings: Any,
) -> None:
    """One case: its losses and gradients."""
    sae, leaves = build(record, kind, unit, settings)
    mask = None
    if dead is not None:
        mask = torch.zeros(D_SAE, dtype=torch.bool)
        mask[dead] = True
    out = step(sae, record.values["x"][:rows], mask)
    record.add(case, leaves, out.loss, out.losses, settings, f=out.feature_acts, x_hat=out.sae_out)


def threshold(record: Record, case: str, unit: bool) -> None:
    """The running threshold of BatchTopK after each of a few batches."""
    settings = {"k": 2.3}
    sae, leaves = build(record, BATCHTOPK, unit, settings)
    found = []
    for scale in BATCHES:
        out = step(sae, scale * record.values["x"], None)
        found.append(sae.topk_threshold.float())
    record.add(case, leaves, out.loss, out.losses, settings, thresholds=torch.stack(found))


def record() -> None:
    found = Record("saelens", sae_lens.__version__)
    few = slice(8, 10)
    ask(found, "standard", STANDARD, l1_coefficient=0.7)
    ask(found, "standard_unsubtracted", STANDARD, l1_coefficient=0.7, apply_b_dec_to_input=False)
    ask(found, "standard_lp", STANDARD, unit=True, l1_coefficient=0.7, lp_norm=0.5)
    ask(found, "gated", GATED, l1_coefficient=0.7)
    ask(found, "topk", TOPK, k=K)
    ask(found, "topk_auxk", TOPK, unit=True, dead=DEAD, k=K, aux_loss_coefficient=0.5)
    ask(found, "topk_auxk_few", TOPK, dead=few, k=K, aux_loss_coefficient=0.5)
    ask(found, "topk_auxk_free", TOPK, dead=DEAD, k=K, aux_loss_coefficient=0.5)
    ask(found, "abstopk", ABSTOPK, k=K)
    ask(found, "abstopk_auxk", ABSTOPK, unit=True, dead=slice(0, 5), k=K, aux_loss_coefficient=0.5)
    ask(found, "batchtopk", BATCHTOPK, k=2.3)
    ask(found, "batchtopk_auxk", BATCHTOPK, unit=True, dead=DEAD, k=2.3, aux_loss_coefficient=0.5)
    threshold(found, "batchtopk_threshold", unit=True)
    threshold(found, "batchtopk_threshold_free", unit=False)
    ask(found, "matryoshka", MATRYOSHKA, k=K, matryoshka_widths=[2, 5, D_SAE])
    ask(found, "matryoshka_auxk", MATRYOSHKA, unit=True, dead=DEAD, k=K, matryoshka_widths=[2, 5, D_SAE])
    jump = {"l0_coefficient": 0.7, "jumprelu_bandwidth": 0.8}
    ask(found, "jumprelu_step", JUMPRELU, **jump)
    ask(found, "jumprelu_tanh", JUMPRELU, jumprelu_sparsity_loss_mode="tanh", **jump)
    ask(found, "jumprelu_quadratic", JUMPRELU, rows=1, jumprelu_sparsity_loss_mode="quadratic", target_l0=3.0, **jump)
    pursuit = {"max_iterations": 4, "residual_threshold": 0.6, "stop_on_duplicate_support": False}
    ask(found, "matching_pursuit", PURSUIT, unit=True, decoder_init_norm=1.0, **pursuit)
    found.write()


def read(folder: Path) -> str:
    """What SAELens makes of the dictionary in `folder`, on the rows that lie there: how far it is from ours.

    `expected.safetensors` beside the dictionary holds rows x, and the codes f and reconstructions x_hat of ours.
    """
    from safetensors.torch import load_file

    sae, ours = sae_lens.SAE.load_from_disk(str(folder)), load_file(folder / "expected.safetensors")
    with torch.no_grad():
        f = sae.encode(ours["x"])
        x_hat = sae(ours["x"])
    away = [float((found - ours[name]).abs().max()) for name, found in (("f", f), ("x_hat", x_hat))]
    return f"{type(sae).__name__:24s} codes within {away[0]:.1e}, x_hat within {away[1]:.1e}"

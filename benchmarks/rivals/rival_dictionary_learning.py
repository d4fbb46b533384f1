"""dictionary_learning: the `loss` of its trainers, and what they do to gradients."""

from __future__ import annotations

import importlib.metadata
import math
import sys
import types
from typing import Any

import torch
from rival_record import D_IN, D_SAE, DEAD, K, Leaf, Record, fill
from torch import Tensor

# The package imports nnsight for its buffer of activations. Trainers do not need it, and it may not import here.
sys.modules["nnsight"] = types.ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.gdm import GatedSAETrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.p_anneal import PAnnealTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.trainers.top_k import TopKTrainer, geometric_median  # noqa: E402
from dictionary_learning.trainers.trainer import remove_gradient_parallel_to_decoder_directions  # noqa: E402

NAMES = {  # theirs -> ours, and whether it is stored the other way round
    "encoder.weight": ("W_enc", True),
    "encoder.bias": ("b_enc", False),
    "decoder.weight": ("W_dec", True),
    "bias": ("b_dec", False),
    "decoder_bias": ("b_dec", False),
    "gate_bias": ("b_gate", False),
    "mag_bias": ("b_mag", False),
}
ANNEALED_STEPS, SHOWN_STEP = 51, 35
"""Steps of the annealed run, and the one whose gradients are kept."""


def build(record: Record, kind: type, unit: bool, settings: dict[str, Any]) -> tuple[Any, dict[str, Leaf]]:
    """A trainer whose dictionary has the world's weights."""
    trainer = kind(
        **{"steps": 10_000, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 0, "lm_name": "", "device": "cpu"}
        | settings
    )
    leaves = {}
    for name, parameter in trainer.ae.named_parameters():
        ours, turned = NAMES.get(name, (name, False))
        leaves[ours] = Leaf(parameter, turned)
    fill(leaves, record.values, unit)
    return trainer, leaves


def ask(
    record: Record, case: str, kind: type, unit: bool = True, dead: bool = False, step: int = 0, **settings: Any
) -> None:
    """One case: its losses and gradients at a step."""
    trainer, leaves = build(record, kind, unit, settings)
    if dead:
        trainer.num_tokens_since_fired[DEAD] = trainer.dead_feature_threshold
    x = record.values["x"]
    shown, loss = trainer.loss(x, step=step, logging=True), trainer.loss(x, step=step)
    if dead:
        assert trainer.dead_features == len(range(D_SAE)[DEAD])
    x_hat = shown.recon if kind is JumpReluTrainer else shown.x_hat
    tensors = {"f": shown.f, "x_hat": x_hat}
    if unit:
        weight, turned = leaves["W_dec"]
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        weight, gradient = (weight, gradient) if turned else (weight.T, gradient.T)
        project = remove_gradient_parallel_to_decoder_directions
        tensors["projected_gradient"] = project(weight, gradient, D_IN, D_SAE).T
    record.add(case, leaves, loss, shown.losses, {**settings, "step": step}, **tensors)


def lp(record: Record, case: str, **settings: Any) -> None:
    """The penalty of PAnneal at one p."""
    trainer, leaves = build(record, PAnnealTrainer, True, {"sparsity_warmup_steps": None, **settings})
    x = record.values["x"]
    x_hat, f = trainer.ae(x, output_features=True)
    loss = trainer.loss(x, step=0)
    record.add(case, leaves, loss, {"lp_loss": trainer.lp_loss}, settings, f=f, x_hat=x_hat)


def annealed(record: Record, case: str, **settings: Any) -> None:
    """A run in which p falls four times: the loss of every step with weights held, gradients at one."""
    trainer, leaves = build(
        record, PAnnealTrainer, True,
        {"steps": ANNEALED_STEPS, "warmup_steps": 0, "sparsity_warmup_steps": None, "anneal_start": 0,
         "anneal_end": 40, "n_sparsity_updates": 5, "p_end": 0.2, **settings},
    )  # fmt: skip
    losses: list[Tensor] = []
    for step in range(ANNEALED_STEPS):
        losses.append(trainer.loss((1 + 0.5 * math.sin(step)) * record.values["x"], step=step))
    record.add(case, leaves, losses[SHOWN_STEP], {}, settings, losses=torch.stack(losses).detach())


def threshold(record: Record) -> None:
    """The threshold of BatchTopK after the first batch that it counts."""
    trainer, leaves = build(record, BatchTopKTrainer, True, {"k": K})
    loss = trainer.loss(record.values["x"], step=trainer.threshold_start_step + 1)
    record.add("batchtopk_threshold", leaves, loss, {}, {"k": K}, thresholds=trainer.ae.threshold.reshape(1))


def record() -> None:
    found = Record("dictionary_learning", importlib.metadata.version("dictionary-learning"))
    ask(found, "standard", StandardTrainer, l1_penalty=0.1, sparsity_warmup_steps=None)
    ask(found, "standard_april", StandardTrainerAprilUpdate, unit=False, step=500, l1_penalty=0.7)
    ask(found, "gated", GatedSAETrainer, l1_penalty=0.7, sparsity_warmup_steps=None)
    ask(found, "topk", TopKTrainer, k=K)
    ask(found, "topk_auxk", TopKTrainer, dead=True, k=K, auxk_alpha=0.5)
    ask(found, "batchtopk", BatchTopKTrainer, k=K)
    ask(found, "batchtopk_auxk", BatchTopKTrainer, dead=True, k=K, auxk_alpha=0.5)
    threshold(found)
    fractions = {"k": K, "group_fractions": [0.25, 0.25, 0.5]}
    ask(found, "matryoshka", MatryoshkaBatchTopKTrainer, **fractions)
    ask(found, "matryoshka_auxk", MatryoshkaBatchTopKTrainer, dead=True, auxk_alpha=0.5, **fractions)
    jump = {"bandwidth": 0.8, "target_l0": 3.0, "sparsity_warmup_steps": None}
    ask(found, "jumprelu", JumpReluTrainer, sparsity_penalty=0.7, **jump)
    ask(found, "jumprelu_error_alone", JumpReluTrainer, sparsity_penalty=0.0, **jump)
    for form in ("Lp", "Lp^p"):
        lp(found, f"p_anneal_{form}", sparsity_function=form, p_start=0.5, initial_sparsity_penalty=0.7)
        annealed(found, f"p_anneal_run_{form}", sparsity_function=form, initial_sparsity_penalty=0.7)
    median = geometric_median(found.values["x"], max_iter=1000, tol=1e-9)
    found.tensors["dictionary_learning/geometric_median"] = median
    found.write()

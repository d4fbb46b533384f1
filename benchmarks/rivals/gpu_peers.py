"""The peers' own trainers and optimisers on a GPU, for benchmarks/gpu.py, each at its defaults and with its switches.

Each maker takes (kind, d_in, d_sae, batch, k, device) and gives update(step, x [B d_in] fp32). They are imported when
made, in this environment; speed.py has the same on a CPU. sparsify's trainer only reads a language model, so what it
does in the model's hook is done here, in its order.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("sae_lens", "dictionary_learning", "sparsify")
STEPS = 100_000
Update = Callable[[int, Tensor], None]
Make = Callable[..., Update]


def contenders(kind: str) -> list[tuple[str, str, Make]]:
    """(label, package, maker) of those that train this kind, the fastest switches last."""
    found: list[tuple[str, str, Make]] = [
        ("SAELens", "sae_lens", saelens),
        ("SAELens, autocast", "sae_lens", partial(saelens, autocast=True)),
        ("SAELens, autocast and compiled", "sae_lens", partial(saelens, autocast=True, compiled=True)),
        ("dictionary_learning", "dictionary_learning", dictionary_learning),
        ("dictionary_learning, bf16", "dictionary_learning", partial(dictionary_learning, autocast=True)),
    ]
    if kind == "topk":
        found += [
            ("sparsify", "sparsify", sparsify),
            ("sparsify, fused Adam", "sparsify", partial(sparsify, adam=True)),
        ]
    return found


def installed(package: str) -> bool:
    return find_spec(package) is not None


def saelens(
    kind: str, d_in: int, d_sae: int, batch: int, k: int, device: str, autocast: bool = False, compiled: bool = False
) -> Update:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    common: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "device": device}
    if kind == "topk":
        sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=k))
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**common, l1_coefficient=1.0))
    settings = SAETrainerConfig(
        total_training_samples=STEPS * batch, train_batch_size_samples=batch, lr_end=3e-5, device=device,
        autocast=autocast,
    )  # fmt: skip
    trainer = SAETrainer(settings, sae, data_provider=iter(()))
    if compiled:  # as its runner does with compile_sae
        sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="inductor")

    def update(step: int, x: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    return update


def dictionary_learning(
    kind: str, d_in: int, d_sae: int, batch: int, k: int, device: str, autocast: bool = False
) -> Update:
    if "nnsight" not in sys.modules:  # for its buffer of activations, which trainers do not need
        sys.modules["nnsight"] = types.ModuleType("nnsight")
        sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    common = {"steps": STEPS, "activation_dim": d_in, "dict_size": d_sae, "layer": 0, "lm_name": "none"}
    if kind == "topk":
        trainer: Any = TopKTrainer(**common, k=k, device=device, seed=0)
    else:
        trainer = StandardTrainer(**common, l1_penalty=1.0, device=device, seed=0)

    def update(step: int, x: Tensor) -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16) if autocast else nullcontext():
            trainer.update(step, x.bfloat16() if autocast else x)  # as its own loop hands them over

    return update


def sparsify(kind: str, d_in: int, d_sae: int, batch: int, k: int, device: str, adam: bool = False) -> Update:
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from transformers import get_linear_schedule_with_warmup

    torch.set_float32_matmul_precision("high")
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device, dtype=torch.float32)
    scale, parameters = (d_sae / 2**14) ** 0.5, list(coder.parameters())
    schedule: Any = None
    if adam:
        optimizer: Any = torch.optim.Adam(parameters, lr=2e-4 / scale, fused=True)
        schedule = get_linear_schedule_with_warmup(optimizer, 1000, STEPS)
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(parameters, lr=5e-3 / scale), momentum=0.95)
        optimizer.train()
    since_fired = torch.zeros(d_sae, dtype=torch.long, device=device)
    metrics = {"fvu": 0.0}

    def update(step: int, x: Tensor) -> None:
        if step == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x=x, y=x, dead_mask=None)
        fired = torch.zeros(d_sae, dtype=torch.bool, device=device)
        fired[out.latent_indices.flatten()] = True
        metrics["fvu"] += float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        since_fired.add_(len(x))
        since_fired[fired] = 0

    return update

"""dictionary_learning: its trainers in a loop, as its trainSAE drives them. Switch: autocast.

trainSAE turns autocast off on a CPU; the switch turns it on around the same call of `update`.
"""

from __future__ import annotations

import sys
import types
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

# The package imports nnsight for its buffer of activations. Trainers do not need it, and it may not import here.
sys.modules["nnsight"] = types.ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainer  # noqa: E402
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402


class Contender:
    def __init__(self, job: dict[str, Any]):
        kind, more = {
            "topk": (TopKTrainer, {"k": job["k"]}),
            "batchtopk": (BatchTopKTrainer, {"k": job["k"]}),
            "relu": (StandardTrainer, {"l1_penalty": job["l1"]}),
        }[job["kind"]]
        # its warm-ups are 1000 and 2000 steps and may not be longer than a run
        steps = max(job["steps"], 4000)
        same = {"steps": steps, "activation_dim": job["d_in"], "dict_size": job["d_sae"], "layer": 0, "lm_name": "none"}
        self.kind = job["kind"]
        self.trainers = [kind(**same, **more, device="cpu", seed=seed) for seed in range(job["members"])]
        self.autocast = "autocast" in job["switches"]

    def update(self, step: int, x: Tensor) -> None:
        for trainer in self.trainers:
            with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
                trainer.update(step, x)

    def reconstruct(self, member: int, x: Tensor) -> tuple[Tensor, Tensor]:
        ae = self.trainers[member].ae
        f = ae.encode(x) if self.kind == "relu" else ae.encode(x, use_threshold=False)
        return ae.decode(f), f

"""sparsify: its SparseCoder, and the lines of its Trainer.fit that train one on rows that are there already.

Its trainer only reads a language model, so what it does in the model's hook is done here, in its order, with its
optimiser and at its defaults. Switches: "adam" (its other optimiser), "fused" (Adam with torch's fused kernel),
"autocast" (its own is for CUDA alone; this is the same on a CPU).
"""

from __future__ import annotations

from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from torch import Tensor
from transformers import get_linear_schedule_with_warmup


class Contender:
    def __init__(self, job: dict[str, Any]):
        torch.set_float32_matmul_precision("high")
        settings = SparseCoderConfig(num_latents=job["d_sae"], k=job["k"])
        self.coders = []
        for seed in range(job["members"]):
            torch.manual_seed(seed)
            self.coders.append(SparseCoder(job["d_in"], settings, "cpu", dtype=torch.float32))
        scale = (job["d_sae"] / 2**14) ** 0.5
        groups = [list(coder.parameters()) for coder in self.coders]
        if "adam" in job["switches"]:
            self.optimizer = torch.optim.Adam(
                [{"params": group, "lr": 2e-4 / scale} for group in groups], fused="fused" in job["switches"] or None
            )
            self.schedule = get_linear_schedule_with_warmup(self.optimizer, 1000, max(job["steps"], 2000))
        else:
            sign = SignSGD([{"params": group, "lr": 5e-3 / scale} for group in groups])
            self.optimizer = ScheduleFreeWrapper(sign, momentum=0.95)
            self.optimizer.train()
            self.schedule = None
        self.since_fired = [torch.zeros(job["d_sae"], dtype=torch.long) for _ in self.coders]
        self.fvu = [0.0] * len(self.coders)
        self.autocast = "autocast" in job["switches"]

    def update(self, step: int, x: Tensor) -> None:
        fired = [torch.zeros(len(since), dtype=torch.bool) for since in self.since_fired]
        for index, coder in enumerate(self.coders):
            if step == 0:
                coder.b_dec.data = x.mean(0)
            coder.set_decoder_norm_to_unit_norm()
            total_variance = (x - x.mean(0)).pow(2).sum()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                out = coder(x=x, y=x, dead_mask=None, total_variance=total_variance)
            fired[index][out.latent_indices.flatten()] = True
            self.fvu[index] += float(out.fvu.detach())
            (out.fvu + out.multi_topk_fvu / 8).backward()
        for coder in self.coders:
            coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        for since, did in zip(self.since_fired, fired, strict=True):
            since += len(x)
            since[did] = 0

    def reconstruct(self, member: int, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.optimizer, ScheduleFreeWrapper):
            self.optimizer.eval()
        coder = self.coders[member]
        out = coder(x=x, y=x)
        f = torch.zeros(len(x), coder.num_latents).scatter_(1, out.latent_indices, out.latent_acts.float())
        return out.sae_out.float(), f

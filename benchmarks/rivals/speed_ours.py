"""Ours: `Trainer.advance`, with all that a run does at every step. Switches: "fp32", "definition" (plain autograd)."""

from __future__ import annotations

from typing import Any

import sparse_coding  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
from torch import Tensor

from sparse_coding.dictionaries import architecture
from sparse_coding.training.sweep import Member
from sparse_coding.training.trainer import Trainer, TrainingSettings


class OneBatch:
    """The stream of a trainer that is handed its next batch."""

    def __init__(self, job: dict[str, Any]):
        self.batch_size, self.widths, self.job = job["batch"], {"synthetic": job["d_in"]}, job
        self.x: Tensor | None = None

    def batch(self, step: int) -> dict[str, Tensor]:
        if self.x is None:  # rows that initial values are taken from
            import speed
            import torch

            return {"synthetic": speed.rows(self.job, torch, step)}
        return {"synthetic": self.x}


class Contender:
    def __init__(self, job: dict[str, Any]):
        kind = architecture(job["kind"])
        own = {"l1_coefficient": job["l1"]} if job["kind"] == "relu" else {"k": job["k"]}
        settings = kind.Settings(d_in=job["d_in"], d_sae=job["d_sae"], **own)
        members = [Member(job["kind"], settings, seed=seed) for seed in range(job["members"])]
        precision = "fp32" if "fp32" in job["switches"] else "auto"
        self.stream = OneBatch(job)
        self.trainer = Trainer(members, self.stream, TrainingSettings(job["steps"], precision=precision))
        if "definition" in job["switches"]:
            for stack in self.trainer.stacks:
                stack.dictionary.fused_gradients = lambda *_: None

    def update(self, step: int, x: Tensor) -> None:
        self.stream.x = x
        self.trainer.advance()

    def reconstruct(self, member: int, x: Tensor) -> tuple[Tensor, Tensor]:
        one = self.trainer.dictionary(member)
        f = one.encode(x)
        return one.decode(f, x), f

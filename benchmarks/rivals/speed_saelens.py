"""SAELens: one SAETrainer for each member, as its MultiSAETrainer drives them. Switch: autocast."""

from __future__ import annotations

from typing import Any

from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor


class Contender:
    def __init__(self, job: dict[str, Any]):
        kind, config, more = {
            "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": job["k"]}),
            "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": job["k"]}),
            "relu": (StandardTrainingSAE, StandardTrainingSAEConfig, {"l1_coefficient": job["l1"]}),
        }[job["kind"]]
        self.trainers = []
        for _ in range(job["members"]):
            sae = kind(config(d_in=job["d_in"], d_sae=job["d_sae"], **more))
            settings = SAETrainerConfig(
                total_training_samples=job["steps"] * job["batch"],
                train_batch_size_samples=job["batch"],
                lr_end=3e-5,  # its runner's default: a tenth of lr
                autocast="autocast" in job["switches"],
            )
            self.trainers.append(SAETrainer(settings, sae, data_provider=iter(())))

    def update(self, step: int, x: Tensor) -> None:
        for trainer in self.trainers:
            trainer.maybe_reset_sparsity()
            trainer.step(x)
            trainer.n_training_steps += 1

    def reconstruct(self, member: int, x: Tensor) -> tuple[Tensor, Tensor]:
        sae = self.trainers[member].sae
        f = sae.encode(x)
        return sae.decode(f), f

"""sparsify's own Trainer on a model in a folder and tokens in a data set: python run_sparsify.py JOB (a JSON file)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from finish import finish
from sparsify import SaeConfig, TrainConfig, Trainer
from transformers import AutoModel


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    settings = TrainConfig(
        SaeConfig(num_latents=job["d_sae"], k=job["k"]),
        batch_size=job["batch"] // job["context"],
        hookpoints=[f"h.{job['layer']}"],
        log_to_wandb=False,
        save_dir=job["out"],
        run_name="run",
    )
    dtype = {"dtype": torch.bfloat16} if "bfloat16" in job["switches"] else {}
    model = AutoModel.from_pretrained(job["model"], **dtype)
    trainer = Trainer(settings, load_from_disk(job["data"]).with_format("torch"), model)
    trainer.fit()
    (coder,) = trainer.saes.values()
    finish(job, lambda x: coder(x=x, y=x).sae_out.float())


if __name__ == "__main__":
    main()

"""SAELens's own runner on a model in memory and tokens in a data set: python run_saelens.py JOB (a JSON file)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from finish import finish
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformers import AutoModelForCausalLM, AutoTokenizer


def hooked(folder: str) -> HookedTransformer:
    """Its default class, with the weights of a folder: by name it would ask the hub."""
    hf = AutoModelForCausalLM.from_pretrained(folder)
    known = hf.config
    config = HookedTransformerConfig(
        n_layers=known.n_layer,
        d_model=known.n_embd,
        n_ctx=known.n_positions,
        n_heads=known.n_head,
        d_head=known.n_embd // known.n_head,
        d_vocab=known.vocab_size,
        act_fn=known.activation_function,
        normalization_type="LN",
        eps=known.layer_norm_epsilon,
        default_prepend_bos=False,
    )
    model = HookedTransformer(config, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_state_dict(convert_gpt2_weights(hf, config), strict=False)
    return model


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    fast = "autocast" in job["switches"]
    settings = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=job["d_in"], d_sae=job["d_sae"], k=job["k"]),
        model_name=job["model"],
        hook_name=f"blocks.{job['layer']}.hook_resid_post",
        streaming=False,
        context_size=job["context"],
        training_tokens=job["tokens"],
        train_batch_size_tokens=job["batch"],
        store_batch_size_prompts=job["batch"] // job["context"],
        prepend_bos=False,
        autocast=fast,
        autocast_lm=fast,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=job["out"],
        verbose=False,
    )
    tokens = load_from_disk(job["data"])
    runner = LanguageModelSAETrainingRunner(settings, override_dataset=tokens, override_model=hooked(job["model"]))
    sae = runner.run()
    finish(job, lambda x: sae.decode(sae.encode(x)))


if __name__ == "__main__":
    main()

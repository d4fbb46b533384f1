"""The bundled models: what their cards say of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_coding.activations.models import bundled_models
from sparse_coding.language_models import card, gpt
from sparse_coding.language_models.config_file import load_config

CONFIGS = Path(__file__).parents[2] / "nanogpt_configs"
MEGABYTES = {"python-gpt": 3, "python-gpt-large": 10}
PROSE = """The method returns a copy of the string in which each character has been mapped through the given
translation table. If the optional argument is omitted or None, the default encoding is used. Raises ValueError if the
object is not a string; otherwise the result is a list of the values in the dictionary."""


def test_every_bundled_model_is_tested_here():
    assert set(bundled_models()) == set(MEGABYTES)


@pytest.mark.parametrize("name", MEGABYTES)
def test_it_is_small_is_what_its_config_says_and_beats_counting(name):
    folder = bundled_models()[name]
    facts = card.read(folder)
    config, _ = load_config(CONFIGS / f"{name.replace('-', '_')}.py")
    assert facts.config == config.decisive()
    assert f"nanogpt_configs/{name.replace('-', '_')}.py " in facts.command
    assert sum(path.stat().st_size for path in folder.iterdir()) < MEGABYTES[name] * 1_000_000
    assert facts.validation_loss < facts.trigram - 0.4 < facts.bigram - 0.8
    assert 0 < facts.kept_iteration <= config.max_iters
    assert facts.tokens_seen == config.max_iters * config.tokens_per_iteration
    assert f"| **this model** | {facts.validation_loss:.4f} |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", MEGABYTES)
def test_it_predicts_prose_about_python_as_its_card_promises(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bundled_models()[name]
    facts = card.read(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts.parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size == facts.vocab_size
    tokens = np.array(tokenizer(PROSE)["input_ids"])
    assert tokenizer.decode(tokens.tolist()) == PROSE
    assert gpt.held_out_loss(model, tokens) < facts.validation_loss + 0.5

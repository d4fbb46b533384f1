"""The bundled model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from sparse_coding.language_models import card, gpt, train
from sparse_coding.language_models.config_file import load_config

BUNDLED = Path(train.__file__).parent / "assets" / "python-gpt"
PROSE = """The method returns a copy of the string in which each character has been mapped through the given
translation table. If the optional argument is omitted or None, the default encoding is used. Raises ValueError if the
object is not a string; otherwise the result is a list of the values in the dictionary."""


def test_the_bundled_model_is_small_is_what_its_config_says_and_beats_counting():
    facts = card.read(BUNDLED)
    config, _ = load_config(Path(__file__).parents[2] / "nanogpt_configs" / "python_gpt.py")
    assert facts.config == dataclasses.asdict(config)
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 3_000_000
    assert facts.validation_loss < facts.bigram - 0.8
    assert (facts.kept_iteration, facts.tokens_seen) == (
        config.max_iters,
        config.max_iters * config.tokens_per_iteration,
    )


def test_the_bundled_model_predicts_prose_about_python_as_its_card_promises():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = card.read(BUNDLED)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts.parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size == facts.vocab_size
    tokens = np.array(tokenizer(PROSE)["input_ids"])
    assert tokenizer.decode(tokens.tolist()) == PROSE
    assert gpt.held_out_loss(model, tokens) < facts.validation_loss + 0.5

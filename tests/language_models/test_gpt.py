"""The model is nanoGPT's, and its losses score what they say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.language_models import gpt
from tests.language_models.tiny import PERIOD, TINY, VOCAB, same, trainer, weights


def test_the_model_is_gpt2_with_nanogpts_initial_weights():
    config = dataclasses.replace(TINY, n_embd=64, n_layer=8, block_size=256, dropout=0.25)
    state = torch.random.get_rng_state()
    model = gpt.build(config, 500)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was touched"
    assert (model.config.activation_function, model.config.layer_norm_epsilon) == ("gelu", 1e-5)
    assert model.config.n_positions == 256
    assert (model.config.embd_pdrop, model.config.attn_pdrop, model.config.resid_pdrop) == (0.25, 0.25, 0.25)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8 layers) = 4
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    assert same(weights(model), weights(gpt.build(config, 500)))
    assert not same(weights(model), weights(gpt.build(dataclasses.replace(config, seed=1), 500)))


def test_without_bias_every_bias_is_exactly_zero_after_training_and_with_it_they_move():
    for bias in (False, True):
        made = trainer(dataclasses.replace(TINY, bias=bias))
        for i in range(5):
            made.update(i)
        moved = {name: bool((value != 0).any()) for name, value in weights(made.model).items() if ".bias" in name}
        assert len(moved) == 13, "six biases per layer, and ln_f's"
        assert set(moved.values()) == {bias}


@pytest.mark.parametrize("length", [2, 5, 8, 9, 10, 17, 24, 30])
def test_held_out_loss_scores_every_token_but_the_first_once(length):
    made = trainer(dataclasses.replace(TINY, dropout=0.5))
    for i in range(3):
        made.update(i)
    tokens = np.tile(PERIOD, 2)[:length]
    found = gpt.held_out_loss(made.model, tokens, batch_size=2)
    assert made.model.training
    made.model.eval()
    total = 0.0
    for position in range(1, length):  # one token at a time, its context back to the last multiple of the block size
        context = tokens[(position - 1) // 8 * 8 : position]
        logits = made.model(torch.from_numpy(context)[None]).logits[0, -1]
        total -= logits.log_softmax(-1)[tokens[position]].item()
    assert found == pytest.approx(total / (length - 1), abs=1e-5)


def test_a_gpt2_to_start_from_keeps_its_weights_and_gives_its_shape():
    from transformers import GPT2Config, GPT2LMHeadModel

    found = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=20, n_embd=8, n_layer=3, n_head=2)).eval()
    config = dataclasses.replace(TINY, block_size=12, dropout=0.3, init_from="somewhere", bias=False)
    model, shaped = gpt.adopt(found, config)
    assert (shaped.n_layer, shaped.n_head, shaped.n_embd, shaped.block_size) == (3, 2, 8, 12)
    assert not shaped.bias, "its biases are all zero"
    assert model.config.activation_function == "gelu_new"
    assert (model.config.n_positions, model.config.attn_pdrop, found.config.attn_pdrop) == (12, 0.3, 0.1)
    tokens = torch.tensor([[1, 5, 3, 2, 7, 7, 0, 1, 4, 9, 11, 2]])
    torch.testing.assert_close(model.eval()(tokens).logits, found(tokens).logits, rtol=0, atol=0)
    found.transformer.h[0].ln_1.bias.data += 1
    model, shaped = gpt.adopt(found, config)
    assert shaped.bias
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="block_size = 21: 'somewhere' takes at most 20 tokens"):
        gpt.adopt(found, dataclasses.replace(config, block_size=21))
    with pytest.raises(UserError, match="is a Linear: training starts from a GPT-2"):
        gpt.adopt(torch.nn.Linear(1, 1), config)

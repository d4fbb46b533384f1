from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from sparse_coding.activations.capture import attended, capture, rows, rows_per_context, splice
from sparse_coding.activations.models import LanguageModel
from sparse_coding.activations.tokens import Contexts
from sparse_coding.errors import UserError

SMALL = {
    "vocab_size": 96,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
TOKENS = torch.arange(1, 25).reshape(2, 12)
EMBEDDING = {"gpt2": "transformer.wte", "llama": "model.embed_tokens", "bert": "bert.embeddings.word_embeddings"}
LAST_BLOCK = {
    "gpt2": "transformer.h.2",
    "llama": "model.layers.2",
    "neox": "gpt_neox.layers.2",
    "bert": "bert.encoder.layer.2",
}


def model_of(name: str) -> LanguageModel:
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=3, n_head=4, bos_token_id=0)
        hf = GPT2LMHeadModel(config)
    elif name == "llama":
        hf = LlamaForCausalLM(LlamaConfig(**SMALL))
    elif name == "neox":
        hf = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, use_parallel_residual=False))
    else:
        hf = BertForMaskedLM(BertConfig(**SMALL))
    for parameter in hf.parameters():  # large enough that what is changed in one place is seen in another
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return LanguageModel.of(hf, name)


def contexts_of(n: int, length: int = 12, padding: int = 0, excluded: float = 0.0) -> Contexts:
    random = np.random.default_rng(0)
    tokens = random.integers(1, 96, (n, length)).astype(np.uint16)
    mask = random.random((n, length)) >= excluded
    if padding:
        tokens[-1, -padding:] = 0
        mask[-1, -padding:] = False
    return Contexts(tokens, None if mask.all() else mask, n, 0, n * length - padding, 0, padding, {}, Path())


def hooks(model: LanguageModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules())


# ---- capture


def test_activations_are_those_of_a_whole_forward_pass():
    model = model_of("gpt2")
    hidden = model.hf(TOKENS, output_hidden_states=True).hidden_states
    found = capture(model, TOKENS, ["blocks.1.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.2.hook_resid_mid"])
    assert list(found) == ["blocks.1.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.2.hook_resid_mid"]
    torch.testing.assert_close(found["blocks.0.hook_resid_pre"], hidden[0])
    torch.testing.assert_close(found["blocks.1.hook_resid_post"], hidden[2])
    block = model.hf.transformer.h[2]
    by_hand = block.mlp.act(block.mlp.c_fc(block.ln_2(found["blocks.2.hook_resid_mid"])))
    post = capture(model, TOKENS, ["blocks.2.mlp.hook_post"])["blocks.2.mlp.hook_post"]
    torch.testing.assert_close(post, by_hand)


@pytest.mark.parametrize(
    ("sites", "ran"),
    [
        (["blocks.1.mlp.hook_post", "blocks.0.hook_resid_post"], ["h.0", "h.1"]),
        (["blocks.1.hook_resid_pre"], ["h.0"]),
        (["hook_embed"], []),
        (["ln_final.hook_out", "hook_embed"], ["h.0", "h.1", "h.2"]),
        (["lm_head"], ["h.0", "h.1", "h.2", "head"]),
    ],
)
def test_the_forward_pass_stops_at_the_deepest_site(sites, ran):
    model, seen = model_of("gpt2"), []
    for index, block in enumerate(model.hf.transformer.h):
        # On a part of the block, which a site at the block's own input never reaches.
        block.ln_1.register_forward_hook(lambda *_, index=index: seen.append(f"h.{index}"))
    model.hf.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    capture(model, TOKENS, sites)
    assert seen == ran


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_hooks_are_removed_whatever_happens(name):
    model = model_of(name)
    capture(model, TOKENS, ["blocks.1.mlp.hook_post", "blocks.1.hook_resid_pre"])
    assert hooks(model) == 0

    def failing(x: Tensor) -> Tensor:
        raise ValueError

    for run in (
        lambda: capture(model, TOKENS, ["blocks.1.hook_resid_pre", EMBEDDING[name] + ":in"]),
        lambda: splice(model, TOKENS, "blocks.1.hook_resid_post", failing),
        lambda: splice(model, TOKENS, "blocks.1.hook_resid_mid", failing),
        lambda: splice(model, TOKENS, "blocks.1.hook_mlp_out", lambda x: x[..., :3]),
    ):
        with pytest.raises((UserError, ValueError)):
            run()
        assert hooks(model) == 0


def test_what_is_no_activation_is_refused():
    model = model_of("llama")
    with pytest.raises(UserError, match=r"'model\.embed_tokens:in' gives \(2, 12\) of torch\.int64"):
        capture(model, TOKENS, ["model.embed_tokens:in"])
    with pytest.raises(UserError, match=r"'model\.rotary_emb' gives \(1, 12, 8\)"):
        capture(model, TOKENS, ["model.rotary_emb"])
    unused = model_of("gpt2")
    unused.hf.transformer.h[1].spare = nn.Linear(3, 3)
    with pytest.raises(UserError, match=r"h\.1\.spare': the model does not run that module"):
        capture(unused, TOKENS, ["transformer.h.1.spare"])


def test_a_trainer_can_use_the_rows_under_autograd():
    x = capture(model_of("gpt2"), TOKENS, ["blocks.1.mlp.hook_post"])["blocks.1.mlp.hook_post"]
    assert not x.requires_grad
    weight = torch.ones(x.shape[-1], requires_grad=True)
    (x @ weight).square().sum().backward()  # an inference tensor would raise here
    torch.testing.assert_close(weight.grad, 2 * torch.einsum("bs,bsd->d", x.sum(-1), x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_give_activations_in_it(dtype):
    site = "blocks.1.mlp.hook_post"
    exact = capture(model_of("gpt2"), TOKENS, [site])[site]
    model = LanguageModel.of(model_of("gpt2").hf.to(dtype))
    rough = capture(model, TOKENS, [site])[site]
    assert rough.dtype == dtype
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05)
    assert splice(model, TOKENS, site, lambda x: x.float() * 0).dtype == dtype


def test_tokens_the_model_cannot_take_are_refused():
    model = model_of("gpt2")
    with pytest.raises(UserError, match=r"token 96 .* knows 96 tokens"):
        capture(model, np.full((1, 4), 96, np.uint16), ["hook_embed"])
    with pytest.raises(UserError, match=r"contexts of 33 tokens.*at most 32"):
        splice(model, torch.ones(1, 33, dtype=torch.long), "hook_embed", None)


# ---- rows


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_padding_gives_no_rows_and_is_not_attended_to(name):
    model, contexts, site = model_of(name), contexts_of(4, padding=5), "blocks.2.mlp.hook_post"
    found = rows(model, contexts, slice(None), [site])[site]
    assert len(found) == 4 * 12 - 5
    short = capture(model, contexts.tokens[3:, :7], [site])[site][0]
    torch.testing.assert_close(found[3 * 12 :], short, rtol=1e-5, atol=1e-5)


def test_a_token_that_is_only_excluded_is_still_read_by_the_model():
    model, contexts, site = model_of("bert"), contexts_of(4, excluded=0.3), "blocks.2.mlp.hook_post"
    found = rows(model, contexts, slice(None), [site])[site]
    everything = capture(model, contexts.tokens, [site])[site]
    torch.testing.assert_close(found, everything[torch.from_numpy(contexts.mask)])


@pytest.mark.parametrize("contexts", [contexts_of(7), contexts_of(7, padding=5, excluded=0.2)])
def test_rows_come_in_the_order_asked_for_however_many_contexts_are_read_at_once(contexts):
    model, sites = model_of("gpt2"), ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"]
    which = [6, 0, 3, 5, 1]
    expected = {name: [] for name in sites}
    for context in which:
        for name, x in capture(model, contexts.tokens[[context]], sites).items():
            expected[name].append(x[0] if contexts.mask is None else x[0][torch.from_numpy(contexts.mask[context])])
    for at_once in (1, 2, 5, None):
        found = rows(model, contexts, which, sites, contexts_per_forward=at_once)
        for name in sites:
            torch.testing.assert_close(found[name], torch.cat(expected[name]), rtol=1e-5, atol=1e-5)
    assert rows_per_context(contexts, np.array(which)).tolist() == [len(x) for x in expected[sites[0]]]


def test_only_the_padding_of_the_last_context_is_hidden_from_the_model():
    contexts = contexts_of(3, length=6, padding=2, excluded=0.3)
    assert attended(contexts, np.array([0, 1])) is None
    mask = attended(contexts, np.array([1, 2]))
    assert mask.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert attended(contexts_of(3), np.array([2])) is None


def test_no_context_is_a_mistake():
    with pytest.raises(UserError, match="no context"):
        rows(model_of("gpt2"), contexts_of(3), slice(3, 9), ["hook_embed"])


# ---- splice

SPLICED = [
    *(f"blocks.1.{word}" for word in ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid")),
    *(f"blocks.1.{word}" for word in ("mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post")),
    "hook_embed",
]


@pytest.mark.parametrize("site", SPLICED)
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "bert"])
def test_activations_spliced_in_for_themselves_change_nothing_and_zeros_do(name, site):
    model = model_of(name)
    clean = splice(model, TOKENS, site, None)
    torch.testing.assert_close(clean, model.hf(TOKENS).logits)
    assert torch.equal(splice(model, TOKENS, site, lambda x: x), clean)
    assert (splice(model, TOKENS, site, torch.zeros_like) - clean).abs().max() > 1e-2
    assert hooks(model) == 0


@pytest.mark.parametrize("name", LAST_BLOCK)
def test_what_is_spliced_in_after_one_block_is_what_the_next_one_reads(name):
    model, changed = model_of(name), torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    read: list[Tensor] = []
    block = model.hf.get_submodule(LAST_BLOCK[name])
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: read.append(args[0]), with_kwargs=True)
    splice(model, TOKENS, "blocks.1.hook_resid_post", lambda x: changed)
    handle.remove()
    assert torch.equal(read[0], changed)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_the_middle_of_a_block_is_replaced_in_the_residual_stream_too(name):
    """The same change made at the output of the attention, by hand."""
    model = model_of(name)
    before = capture(model, TOKENS, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]

    def change(x: Tensor) -> Tensor:
        return 0.5 * x.flip(0) + 1

    middle = splice(model, TOKENS, "blocks.1.hook_resid_mid", change)
    attention = splice(model, TOKENS, "blocks.1.hook_attn_out", lambda x: change(before + x) - before)
    torch.testing.assert_close(middle, attention, rtol=1e-4, atol=1e-4)


def test_zeros_for_the_output_of_the_mlp_are_a_model_without_it():
    model = model_of("gpt2")
    spliced = splice(model, TOKENS, "blocks.1.hook_mlp_out", torch.zeros_like)
    for parameter in model.hf.transformer.h[1].mlp.c_proj.parameters():
        parameter.zero_()
    torch.testing.assert_close(spliced, model.hf(TOKENS).logits)


def test_the_first_of_a_tuple_is_replaced_and_the_rest_kept():
    model = model_of("gpt2")
    by_tuple = splice(model, TOKENS, "transformer.h.1.attn", lambda x: 2 * x)  # its output is a tuple
    assert torch.equal(by_tuple, splice(model, TOKENS, "blocks.1.hook_attn_out", lambda x: 2 * x))
    model = model_of("llama")  # which passes its attention its input by keyword
    by_keyword = splice(model, TOKENS, "model.layers.1.self_attn:in", lambda x: 2 * x)
    assert torch.equal(by_keyword, splice(model, TOKENS, "blocks.1.ln1.hook_out", lambda x: 2 * x))
    whole = splice(model, TOKENS, "model", lambda x: 2 * x)  # a Hugging Face output
    torch.testing.assert_close(whole, 2 * model.hf(TOKENS).logits)


@pytest.mark.parametrize("given", ["mask", "attention_mask"])
@pytest.mark.parametrize("site", ["blocks.2.hook_resid_post", "blocks.2.mlp.hook_post"])
def test_only_unmasked_positions_are_replaced(given, site):
    model, mask = model_of("bert"), np.ones((2, 12), bool)
    mask[1, 8:] = False
    attention = mask if given == "attention_mask" else None
    clean = splice(model, TOKENS, site, None, attention_mask=attention)
    changed = splice(model, TOKENS, site, lambda x: x + 1, **{given: mask})
    # The last block's output goes nowhere else than to the head, position by position.
    differs = (changed - clean).abs().amax(-1) > 1e-6
    assert differs.numpy().tolist() == mask.tolist()


@pytest.mark.parametrize("site", SPLICED)
@pytest.mark.parametrize(
    ("name", "size", "tolerance"),
    [("gpt2", 1e-5, 1e-5), ("neox", 1e-5, 1e-5), ("bert", 1e-5, 1e-5), ("llama", 1e-3, 5e-3)],
)
def test_gradients_reach_what_is_put_in_and_nothing_else(name, size, tolerance, site):
    """Against the difference that a small step makes, in float64 (but Llama's norms compute in float32 always)."""
    model = LanguageModel.of(model_of(name).hf.double(), name)
    x = capture(model, TOKENS, [site])[site]
    new = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    assert not splice(model, TOKENS, site, lambda _: new.requires_grad_()).requires_grad
    seen: list[Tensor] = []

    def replacement(old: Tensor) -> Tensor:
        seen.append(old)
        return new

    logits = splice(model, TOKENS, site, replacement, with_gradient=True)
    (gradient,) = torch.autograd.grad(logits.square().sum(), new)
    assert not seen[0].requires_grad
    assert all(p.grad is None for p in model.hf.parameters())
    up, down = (
        splice(model, TOKENS, site, lambda _, s=s: new + s * gradient.sign()).square().sum() for s in (size, -size)
    )
    torch.testing.assert_close(gradient.abs().sum(), (up - down) / (2 * size), rtol=tolerance, atol=1e-7)
    assert hooks(model) == 0


def test_a_model_without_a_head_has_nothing_to_splice_for():
    model = LanguageModel.of(BertModel(BertConfig(**SMALL)))
    with pytest.raises(UserError, match="no trained head"):
        splice(model, TOKENS, "blocks.1.mlp.hook_post", None)

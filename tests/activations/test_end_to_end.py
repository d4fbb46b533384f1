from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from sparse_coding.activations import end_to_end as module
from sparse_coding.activations.capture import rows, splice
from sparse_coding.activations.end_to_end import EndToEndStream
from sparse_coding.activations.models import LanguageModel, load_model
from sparse_coding.activations.tokens import Contexts
from sparse_coding.dictionaries.normalise import Affine, row_statistics
from sparse_coding.errors import UserError
from sparse_coding.metrics.behaviour import behaviour
from sparse_coding.training.stream import Stream

SMALL = {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
LENGTH = 8
SITE, INPUT = "blocks.1.hook_resid_mid", "blocks.0.mlp.hook_post"  # the first goes on beside its module too


def build(name: str = "gpt2", dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0)
        hf = GPT2LMHeadModel(config)
    elif name == "llama":
        hf = LlamaForCausalLM(LlamaConfig(**SMALL))
    else:
        hf = BertForMaskedLM(BertConfig(**SMALL))
    for parameter in hf.parameters():  # large enough that what is changed in one place is seen in another
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return LanguageModel.of(hf.to(dtype), name)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build()


def contexts_of(n: int = 7, length: int = LENGTH, padding: int = 0) -> Contexts:
    tokens = np.random.default_rng(0).integers(1, 96, (n, length)).astype(np.uint16)
    mask = None
    if padding:
        mask = np.ones((n, length), bool)
        mask[-1, -padding:] = False
    return Contexts(tokens, mask, n, 0, n * length - padding, 0, padding, {}, Path())


def stream_of(model: LanguageModel, contexts: Contexts | None = None, **changes) -> EndToEndStream:
    given = {"loss": "kl", "contexts_per_batch": 3, "seed": 3, "contexts_per_forward": 2}
    return EndToEndStream(model, contexts or contexts_of(), [SITE, INPUT], **{**given, **changes})


def noisy(stream: EndToEndStream, step: int, *leading: int, site: str = SITE, dtype=torch.float32) -> Tensor:
    x = stream.batch(step)[site].to(dtype)
    noise = torch.randn(*leading, *x.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return (x + 0.3 * noise).requires_grad_()


def gradient_of(error, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    value = error(x_hat)
    return value.detach(), torch.autograd.grad(value.sum(), x_hat)[0]


def tokens_of(stream: EndToEndStream, step: int) -> Tensor:
    return torch.from_numpy(stream._at(step).tokens)


def by_hand(stream: EndToEndStream, step: int, site: str, x_hat: Tensor) -> Tensor:
    """Plain autograd through the whole model, all contexts at once."""
    tokens = tokens_of(stream, step)
    shape = (*tokens.shape, -1)
    logits = splice(stream.model, tokens, site, lambda _: x_hat.reshape(shape), with_gradient=True)
    last = -1 if stream.model.causal else None
    if stream.loss == "ce":
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    log_p = splice(stream.model, tokens, site, None)[:, :last].log_softmax(-1)
    log_q = logits[:, :last].log_softmax(-1)
    return F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="batchmean")


# ---- the loss


@pytest.mark.parametrize("site", [SITE, INPUT, "hook_embed", "blocks.1.attn.hook_z", "ln_final.hook_out"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_value_is_that_of_the_evaluation(loss, name, site):
    stream = EndToEndStream(build(name), contexts_of(), [site], loss=loss, contexts_per_batch=3, contexts_per_forward=2)
    x_hat = noisy(stream, 1, site=site)
    tokens = tokens_of(stream, 1)
    scores = behaviour(
        lambda tokens, replace: splice(stream.model, tokens, site, replace),
        [tokens],
        {"one": lambda x: x_hat.detach().reshape(x.shape)},
        torch.zeros(x_hat.shape[-1]),
    )["one"]
    value = stream.error(1, site)(x_hat)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(scores[f"{loss}_spliced"], rel=1e-5)
    assert abs(value.item() - (scores["ce_clean"] if loss == "ce" else 0.0)) > 1e-3, "the noise is felt"


def test_a_masked_model_has_kl_at_every_position():
    stream = EndToEndStream(build("bert"), contexts_of(), ["blocks.0.hook_mlp_out"], loss="kl", contexts_per_batch=3)
    x_hat = noisy(stream, 0, site="blocks.0.hook_mlp_out")
    scores = behaviour(
        lambda tokens, replace: splice(stream.model, tokens, "blocks.0.hook_mlp_out", replace),
        [tokens_of(stream, 0)],
        {"one": lambda x: x_hat.detach().reshape(x.shape)},
        torch.zeros(x_hat.shape[-1]),
        "masked",
    )["one"]
    value, gradient = gradient_of(stream.error(0, "blocks.0.hook_mlp_out"), x_hat)
    assert value.item() == pytest.approx(scores["kl_spliced"], rel=1e-5)
    assert (gradient.abs().amax(1) > 0).all()


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("site", [SITE, INPUT])
def test_the_gradient_is_that_of_finite_differences(loss, site):
    """Central differences in random directions, in float64."""
    stream = stream_of(build(dtype=torch.float64), loss=loss, dtype=torch.float64)
    x_hat = noisy(stream, 0, site=site, dtype=torch.float64)
    error = stream.error(0, site)
    value, gradient = gradient_of(error, x_hat)
    assert value.dtype == torch.float64
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction = torch.randn(x_hat.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = error(x_hat + 1e-4 * direction), error(x_hat - 1e-4 * direction)
        torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-4, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("loss", "name"), [("ce", "gpt2"), ("ce", "llama"), ("kl", "gpt2"), ("kl", "llama"), ("kl", "bert")]
)
def test_the_gradient_is_that_of_autograd_through_everything(loss, name):
    stream = stream_of(build(name), loss=loss)
    x_hat = noisy(stream, 0)
    value, gradient = gradient_of(stream.error(0, SITE), x_hat)
    plain = by_hand(stream, 0, SITE, x_hat)
    torch.testing.assert_close(value, plain.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, x_hat)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_activations_themselves_change_nothing(loss, model):
    stream = stream_of(model, loss=loss)
    x_hat = stream.batch(2)[SITE].requires_grad_()
    value, gradient = gradient_of(stream.error(2, SITE), x_hat)
    if loss == "kl":
        assert value.item() == 0
        assert gradient.abs().max() < 1e-8
    else:
        tokens = tokens_of(stream, 2)
        clean = F.cross_entropy(splice(model, tokens, SITE, None)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(value, clean)
        assert gradient.abs().max() > 1e-5


def test_the_last_position_of_a_context_is_not_judged(model):
    stream = stream_of(model)
    _, gradient = gradient_of(stream.error(0, SITE), noisy(stream, 0))
    assert ((gradient.reshape(3, LENGTH, -1).abs().amax(-1) > 0) == (torch.arange(LENGTH) < LENGTH - 1)).all()


def test_a_token_that_the_model_excludes_does_no_harm():
    """-inf in the logits, of the untouched model and of the changed one."""
    model = build()
    model.hf.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([5]), -torch.inf))
    stream = stream_of(model)
    value, gradient = gradient_of(stream.error(0, SITE), noisy(stream, 0))
    assert value > 0
    assert gradient.isfinite().all()


# ---- members


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_member_in_a_stack_is_the_member_alone(loss, model):
    stream = stream_of(model, loss=loss)
    x_hat = noisy(stream, 1, 2, 3)
    weights = torch.arange(1.0, 7.0).reshape(2, 3)
    error = stream.error(1, SITE)
    together = error(x_hat)
    assert together.shape == (2, 3)
    (gradient,) = torch.autograd.grad((weights * together).sum(), x_hat)
    for index in np.ndindex(2, 3):
        one = x_hat[index].detach().requires_grad_()
        value, alone = gradient_of(error, one)
        assert value.shape == ()
        assert torch.equal(value, together[index].detach())
        torch.testing.assert_close(gradient[index], weights[index] * alone, rtol=1e-6, atol=0)


def test_how_many_contexts_the_model_reads_at_once_does_not_matter(model):
    found = []
    for at_once in (1, 2, 3, None):
        stream = stream_of(model, contexts_per_forward=at_once)
        found.append(gradient_of(stream.error(0, SITE), noisy(stream, 0)))
    assert stream.contexts_per_forward > 3
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-7)


def test_logits_of_a_large_vocabulary_are_made_for_few_contexts_at_once(model, monkeypatch):
    monkeypatch.setattr(module, "LOGIT_BYTES", 4 * 96 * LENGTH * 2 + 1)
    assert stream_of(model, contexts_per_forward=None).contexts_per_forward == 2


@pytest.mark.parametrize("kind", ["affine", "row"])
def test_reconstructions_in_normalised_space_are_brought_back(kind, model):
    stream = stream_of(model)
    x = stream.batch(0)[SITE]
    generator = torch.Generator().manual_seed(2)
    if kind == "affine":
        factor = torch.randn(16, 16, generator=generator)
        undo = Affine(factor, factor.inverse(), torch.randn(16, generator=generator)).undo
    else:  # values of its own for each row
        shift, scale = row_statistics(x, "layer-norm")
        undo = lambda x_hat: x_hat * scale + shift  # noqa: E731
    x_hat = torch.randn(2, *x.shape, generator=generator).requires_grad_()
    value, gradient = gradient_of(stream.error(0, SITE, undo), x_hat)
    for member in range(2):
        plain = by_hand(stream, 0, SITE, undo(x_hat[member]))
        torch.testing.assert_close(value[member], plain.detach())
        expected = torch.autograd.grad(plain, x_hat)[0][member]
        torch.testing.assert_close(gradient[member], expected, rtol=1e-4, atol=1e-7)


def test_memory_does_not_grow_with_the_members(model):
    """What is kept for the backward pass is one gradient of the shape of x_hat."""
    stream = stream_of(model)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x_hat = noisy(stream, 0, 4)
        error = stream.error(0, SITE)
        kept.clear()
        value = error(x_hat)
    assert value.requires_grad
    kept = [x for x in kept if x.grad_fn is None and x.shape == x_hat.shape]
    assert len(kept) == 1
    (gradient,) = torch.autograd.grad(value.sum(), x_hat)
    assert torch.equal(gradient, kept[0] * (1 / torch.tensor(3.0 * (LENGTH - 1))))


def test_there_is_no_second_derivative(model):
    stream = stream_of(model)
    x_hat = noisy(stream, 0)
    weight = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(weight * stream.error(0, SITE)(x_hat), x_hat, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ---- the model


def test_the_model_gets_no_gradient_and_no_graph_lies_below_the_site():
    model = build()
    stream = stream_of(model)
    below: list[Tensor] = []
    handle = model.hf.transformer.h[1].attn.register_forward_hook(lambda _, __, output: below.append(output[0]))
    x_hat = noisy(stream, 0)
    below.clear()
    stream.error(0, SITE)(x_hat).backward()
    assert x_hat.grad is not None
    assert below
    assert not any(x.requires_grad for x in below)
    assert all(p.grad is None and not p.requires_grad for p in model.hf.parameters())
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_models_that_are_loaded_are_frozen(tmp_path):
    build().hf.requires_grad_(True).save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert not any(p.requires_grad for p in model.hf.parameters())


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_without_gradients_only_the_value_is_computed(loss, model, monkeypatch):
    stream = stream_of(model, loss=loss)
    x_hat = noisy(stream, 0)
    expected, _ = gradient_of(stream.error(0, SITE), x_hat)
    given = []
    monkeypatch.setattr(module, "splice", lambda *a, with_gradient=False: given.append(with_gradient) or splice(*a))
    for value in (stream.error(0, SITE)(x_hat.detach()), torch.no_grad()(stream.error(0, SITE))(x_hat)):
        assert torch.equal(value, expected)
        assert not value.requires_grad
    assert given
    assert not any(given)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_autocast_does_not_reach_the_model(loss, model):
    stream = stream_of(model, loss=loss)
    x_hat = noisy(stream, 0, 2)
    expected = gradient_of(stream.error(0, SITE), x_hat)
    seen: list[torch.dtype] = []
    handle = model.hf.transformer.h[1].mlp.c_fc.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient_of(stream.error(0, SITE), x_hat)
    handle.remove()
    assert set(seen) == {torch.float32}
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_reconstruction_in_half_precision_gets_its_gradient_in_it(model):
    stream = stream_of(model)
    exact = noisy(stream, 0, 2).detach().bfloat16()
    value, gradient = gradient_of(stream.error(0, SITE), exact.requires_grad_())
    expected = gradient_of(stream.error(0, SITE), exact.detach().float().requires_grad_())
    assert value.dtype == torch.float32
    assert torch.equal(value, expected[0])
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), expected[1], rtol=0.02, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_model_in_half_precision_stays_in_it(loss, dtype, model):
    exact = stream_of(model, loss=loss)
    x_hat = noisy(exact, 0)
    expected = gradient_of(exact.error(0, SITE), x_hat)
    half = stream_of(build(dtype=dtype), loss=loss)
    value, gradient = gradient_of(half.error(0, SITE), x_hat)
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value, expected[0], rtol=0.05, atol=0.01)
    assert F.cosine_similarity(gradient.flatten(), expected[1].flatten(), dim=0) > 0.99
    if loss == "kl":
        value, _ = gradient_of(half.error(0, SITE), half.batch(0)[SITE].requires_grad_())
        assert value == 0


def test_gradients_do_not_vanish_in_a_float16_model_that_reads_many_tokens():
    """A mean over positions would be divided by their number before it goes back through the model, in float16."""
    contexts, found = contexts_of(100, 30), []
    for dtype in (torch.float32, torch.float16):
        model = build(dtype=dtype)
        model.hf.transformer.ln_f.weight.mul_(1e-3)  # small gradients, as in a large model
        stream = stream_of(model, contexts, loss="ce", contexts_per_batch=100, contexts_per_forward=None)
        found.append(gradient_of(stream.error(0, SITE), noisy(stream, 0))[1])
    judged = found[0].reshape(100, 30, -1)[:, :-1]
    assert judged.abs().median() < 6e-8, "less than float16 can hold"
    assert F.cosine_similarity(found[1].flatten(), found[0].flatten(), dim=0) > 0.98


def test_the_untouched_model_runs_once_per_step(model, monkeypatch):
    replaced: list[bool] = []

    def counting(model, tokens, site, replacement, **options):
        replaced.append(replacement is not None)
        return splice(model, tokens, site, replacement, **options)

    monkeypatch.setattr(module, "splice", counting)
    stream = stream_of(model)
    for site in (SITE, INPUT, SITE):
        stream.error(0, site)(noisy(stream, 0, 2, site=site))
    assert (replaced.count(False), replaced.count(True)) == (2, 3 * 2 * 2)  # two forward passes of 2 + 1 contexts
    stream.error(1, SITE)(noisy(stream, 1))
    assert replaced.count(False) == 4
    replaced.clear()
    ce = stream_of(model, loss="ce")
    ce.error(0, SITE)(noisy(ce, 0))
    assert all(replaced)


def test_an_error_stays_with_its_step(model):
    stream = stream_of(model)
    x_hat = noisy(stream, 0)
    error = stream.error(0, SITE)
    expected = error(x_hat)
    stream.batch(1)
    stream.error(1, SITE)(x_hat)
    assert torch.equal(error(x_hat), expected)
    assert torch.equal(stream.error(0, SITE)(x_hat), expected)


# ---- the stream


def test_it_is_a_stream_for_the_trainer(model):
    stream: Stream = stream_of(model)
    assert stream.batch_size == 3 * LENGTH
    assert dict(stream.widths) == {SITE: 16, INPUT: 64}
    assert {site: x.shape for site, x in stream.batch(0).items()} == {SITE: (24, 16), INPUT: (24, 64)}


@pytest.mark.parametrize("padding", [0, 3])
def test_a_batch_is_whole_contexts_in_order_and_each_comes_once_per_epoch(padding, model):
    contexts = contexts_of(7, padding=padding)
    stream = stream_of(model, contexts)
    full = 6 if padding else 7
    assert stream.rows_per_epoch == full * LENGTH
    orders = []
    for step in range(full):  # three epochs
        chosen = stream._at(step).chosen
        for site, x in rows(model, contexts, chosen, [SITE, INPUT]).items():
            torch.testing.assert_close(stream.batch(step)[site], x)
        orders += chosen.tolist()
    epochs = [orders[i * full : (i + 1) * full] for i in range(3)]
    assert all(sorted(epoch) == list(range(full)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_batch_asked_for_alone_is_bit_for_bit_the_one_in_order(model):
    in_order = stream_of(model)
    batches = [in_order.batch(step) for step in range(9)]
    for step in (8, 2, 4, 0):
        alone = stream_of(model)
        x_hat = noisy(alone, step, 2)
        for site in (SITE, INPUT):
            assert torch.equal(alone.batch(step)[site], batches[step][site])
            assert torch.equal(in_order.batch(step)[site], batches[step][site])
        first = stream_of(model).error(step, SITE)(x_hat)  # with no batch asked for before
        assert torch.equal(first, in_order.error(step, SITE)(x_hat))


def test_another_seed_is_another_order_and_the_same_seed_the_same(model):
    first, same, other, negative = (stream_of(model, seed=seed)._at(0).chosen.tolist() for seed in (3, 3, 4, -1))
    assert first == same != other
    assert sorted(set(negative)) == sorted(negative)


def test_rows_of_a_step_are_captured_once_and_the_time_is_counted(model):
    stream = stream_of(model)
    assert stream.seconds_capturing == stream.rows_captured == 0
    stream.batch(0)
    spent = stream.seconds_capturing
    assert spent > 0
    stream.error(0, SITE)(stream.batch(0)[SITE])
    assert (stream.seconds_capturing, stream.rows_captured) == (spent, 24)
    stream.batch(1)
    assert stream.rows_captured == 48


def test_rows_are_served_in_the_dtype_asked_for():
    half = build(dtype=torch.bfloat16)
    assert stream_of(half).batch(0)[SITE].dtype == torch.float32
    assert stream_of(half, dtype=torch.bfloat16).batch(0)[SITE].dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float32, "another model"), (torch.float16, "load it in float32")])
def test_activations_that_are_not_finite_are_located(dtype, advice):
    broken, contexts = build(dtype=dtype), contexts_of(3)
    contexts.tokens[contexts.tokens == 95] = 1
    contexts.tokens[2, 5] = 95
    broken.hf.transformer.wte.weight[95] = float("nan")
    stream = EndToEndStream(broken, contexts, ["hook_embed"], loss="kl", contexts_per_batch=3)
    with pytest.raises(UserError, match=f"in 1 of 24 rows, first in context 2 at position 5: .*{advice}"):
        stream.batch(0)


# ---- mistakes


def test_settings_that_cannot_work_say_what_to_set(model):
    with pytest.raises(UserError, match="gives 2 full contexts of 8 tokens, fewer than one batch of 3"):
        stream_of(model, contexts_of(3, padding=1))
    with pytest.raises(UserError, match="contexts_per_batch is 0"):
        stream_of(model, contexts_per_batch=0)
    with pytest.raises(UserError, match=r"loss 'ck': allowed are ce, kl; did you mean"):
        stream_of(model, loss="ck")
    with pytest.raises(UserError, match="contexts of 1 token"):
        stream_of(model, contexts_of(length=1))
    with pytest.raises(UserError, match="given twice"):
        EndToEndStream(model, contexts_of(), [SITE, SITE], loss="ce", contexts_per_batch=3)


def test_special_tokens_cannot_be_left_out(model):
    contexts = contexts_of(padding=2)
    contexts.mask[3, 0] = False
    with pytest.raises(UserError, match="leave exclude_special off"):
        stream_of(model, contexts)


def test_a_model_without_the_loss_is_refused():
    with pytest.raises(UserError, match="predicts masked tokens, not the next one: use kl"):
        stream_of(build("bert"), loss="ce")
    headless = LanguageModel.of(BertModel(BertConfig(**SMALL)))
    for loss in ("ce", "kl"):
        with pytest.raises(UserError, match="no trained head"):
            stream_of(headless, loss=loss)


def test_an_error_at_another_site_or_of_another_width_is_refused(model):
    stream = stream_of(model)
    with pytest.raises(UserError, match=r"'blocks\.1\.hook_mlp_out' is not in the stream: it has blocks"):
        stream.error(0, "blocks.1.hook_mlp_out")
    with pytest.raises(UserError, match="keep the shape"):
        stream.error(0, SITE)(torch.zeros(24, 15))

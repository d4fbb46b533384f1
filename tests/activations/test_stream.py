from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_coding.activations import stream as module
from sparse_coding.activations.capture import rows
from sparse_coding.activations.models import LanguageModel
from sparse_coding.activations.stream import ActivationStream
from sparse_coding.activations.tokens import Contexts
from sparse_coding.errors import UserError
from sparse_coding.training.stream import Stream

LENGTH, BATCH = 12, 7
SITES = ["blocks.1.mlp.hook_post", "blocks.0.hook_resid_post"]


def build(dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=3, n_head=4, bos_token_id=0)
    hf = GPT2LMHeadModel(config)
    for parameter in hf.parameters():  # large, so that no two rows are nearly the same
        torch.nn.init.normal_(parameter, std=0.2)
    return LanguageModel.of(hf.to(dtype))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build()


def contexts_of(n: int = 10, padding: int = 0, excluded: float = 0.0) -> Contexts:
    random = np.random.default_rng(1)
    tokens = random.integers(1, 96, (n, LENGTH)).astype(np.uint16)
    tokens[:, 0] = 1 + np.arange(n)  # contexts that began alike would have equal rows in a causal model
    mask = random.random((n, LENGTH)) >= excluded
    if padding:
        mask[-1, -padding:] = False
    return Contexts(tokens, None if mask.all() else mask, n, 0, n * LENGTH - padding, 0, padding, {}, Path())


def stream_of(model: LanguageModel, contexts: Contexts, **changes) -> ActivationStream:
    given = {"batch_size": BATCH, "buffer_rows": 3 * LENGTH, "seed": 3, "contexts_per_forward": 2}
    return ActivationStream(model, contexts, SITES, **{**given, **changes})


def served(stream: ActivationStream, n_rows: int) -> dict[str, Tensor]:
    """The first rows of the endless sequence."""
    batches = [stream.batch(step) for step in range(-(-n_rows // stream.batch_size))]
    return {site: torch.cat([batch[site] for batch in batches])[:n_rows] for site in SITES}


def origins(x: Tensor, of: Tensor) -> list[int]:
    """Which row of the second each row of the first is, up to rounding."""
    distance = torch.cdist(x, of, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.amin(1).max() < 1e-3
    assert distance.topk(2, largest=False).values[:, 1].min() > 1e-2, "the rows can be told apart"
    return distance.argmin(1).tolist()


TEXTS = [contexts_of(), contexts_of(padding=5), contexts_of(excluded=0.3), contexts_of(padding=5, excluded=0.5)]


@pytest.mark.parametrize("contexts", TEXTS)
def test_every_row_comes_exactly_once_per_epoch(contexts, model):
    stream = stream_of(model, contexts)
    total = stream.rows_per_epoch
    assert total == (120 if contexts.mask is None else contexts.mask.sum())
    assert stream.n_batches == total // BATCH
    text = rows(model, contexts, slice(None), SITES)
    found = served(stream, 3 * total)
    orders = []
    for site in SITES:
        for epoch in range(3):
            order = origins(found[site][epoch * total : (epoch + 1) * total], text[site])
            assert sorted(order) == list(range(total))
            orders.append(order)
    assert orders[:3] == orders[3:], "the sites stay side by side"
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("contexts", TEXTS)
@pytest.mark.parametrize("buffer_rows", [BATCH, 3 * LENGTH, 1000])
def test_a_batch_asked_for_alone_is_bit_for_bit_the_one_in_order(contexts, buffer_rows, model):
    in_order = stream_of(model, contexts, buffer_rows=buffer_rows)
    batches = [in_order.batch(step) for step in range(2 * in_order.n_batches + 3)]
    for step in (len(batches) - 1, 7, in_order.n_batches, 0):
        alone = stream_of(model, contexts, buffer_rows=buffer_rows).batch(step)
        back = in_order.batch(step)
        for site in SITES:
            assert alone[site].shape == (BATCH, in_order.widths[site])
            assert torch.equal(alone[site], batches[step][site])
            assert torch.equal(back[site], batches[step][site])


def test_the_sequence_of_rows_does_not_depend_on_the_size_of_the_batches(model):
    contexts = contexts_of(padding=5)
    small, large = (served(stream_of(model, contexts, batch_size=size), 200) for size in (7, 30))
    for site in SITES:
        assert torch.equal(small[site], large[site])


def test_a_batch_may_be_larger_than_a_block_of_masked_contexts(model):
    contexts = contexts_of(20, excluded=0.5)
    stream = stream_of(model, contexts, batch_size=LENGTH, buffer_rows=LENGTH)
    smallest = np.diff(stream._epoch_at(0).starts).min()
    assert smallest < LENGTH
    text = rows(model, contexts, slice(None), SITES)[SITES[0]]
    found = served(stream, stream.rows_per_epoch)[SITES[0]]
    assert sorted(origins(found, text)) == list(range(len(text)))


def test_another_seed_is_another_order_and_the_same_seed_the_same(model):
    first, same, other = (stream_of(model, contexts_of(), seed=seed).batch(1)[SITES[0]] for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_rows_of_all_contexts_of_a_block_are_mixed(model):
    contexts = contexts_of(40)
    stream = stream_of(model, contexts, batch_size=40, buffer_rows=40 * LENGTH)
    text = rows(model, contexts, slice(None), SITES)[SITES[0]]
    found = origins(stream.batch(0)[SITES[0]], text)
    # 40 of 480 rows at random touch 1 - (39/40)^40 = 64% of the 40 contexts on average, with a deviation of 6%.
    assert len({row // LENGTH for row in found}) >= 18
    assert len({row % LENGTH for row in found}) >= 9


def test_a_text_of_one_block_comes_in_another_order_every_epoch(model):
    stream = stream_of(model, contexts_of(), batch_size=120, buffer_rows=120)
    first, second = stream.batch(0)[SITES[0]], stream.batch(1)[SITES[0]]
    assert origins(first, second) != list(range(120))


def test_in_order_each_block_is_captured_once_and_only_one_is_held(model, monkeypatch):
    captured: list[list[int]] = []
    original = module.rows

    def counting(model, contexts, which, *arguments, **options):
        captured.append(list(which))
        return original(model, contexts, which, *arguments, **options)

    monkeypatch.setattr(module, "rows", counting)
    stream = stream_of(model, contexts_of())
    for step in range(stream.n_batches):
        stream.batch(step)
    assert len(captured) == 3  # 120 rows in blocks of about 36
    assert sorted(context for block in captured for context in block) == list(range(10))
    assert {len(block) for block in captured} == {3, 4}
    stream.batch(stream.n_batches - 1)
    assert len(captured) == 3, "a batch within the block at hand costs nothing"
    for step in range(stream.n_batches, 2 * stream.n_batches):
        stream.batch(step)
    first, second = ({tuple(block) for block in blocks} for blocks in (captured[:3], captured[3:]))
    assert not first & second, "each epoch puts other contexts together"


def test_rows_are_served_in_the_dtype_asked_for_and_held_in_that_of_the_model():
    half = build(torch.bfloat16)
    stream = stream_of(half, contexts_of())
    assert stream.batch(0)[SITES[0]].dtype == torch.float32
    assert stream._block.rows[SITES[0]].dtype == torch.bfloat16
    same = stream_of(half, contexts_of(), dtype=torch.bfloat16).batch(0)[SITES[0]]
    assert same.dtype == torch.bfloat16
    assert torch.equal(same.float(), stream.batch(0)[SITES[0]])


def test_it_is_a_stream_for_the_trainer(model):
    stream: Stream = stream_of(model, contexts_of())
    assert dict(stream.widths) == {SITES[0]: 128, SITES[1]: 32}
    assert stream.batch_size == BATCH
    x = stream.batch(0)[SITES[0]]
    weight = torch.ones(128, requires_grad=True)
    (x @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0))


def test_the_time_in_the_language_model_is_counted_where_it_is_spent(model):
    stream = stream_of(model, contexts_of())
    assert stream.seconds_capturing == 0
    stream.batch(0)
    spent = stream.seconds_capturing
    assert spent > 0
    stream.batch(1)
    assert stream.seconds_capturing == spent


@pytest.mark.parametrize("excluded", [0.0, 0.3])
def test_activations_that_are_not_finite_are_located(excluded):
    contexts = contexts_of(excluded=excluded)
    broken = build()
    token = int(contexts.tokens[6, 4])
    contexts.tokens[contexts.tokens == token] = 0
    contexts.tokens[6, 4] = token  # in this place only
    broken.hf.transformer.wte.weight[token] = float("inf")
    if contexts.mask is not None:
        contexts.mask[6, 4] = True
    # At the embedding, because attention carries NaN to every position, the earlier ones too (0 * NaN).
    stream = ActivationStream(broken, contexts, ["hook_embed"], batch_size=BATCH, buffer_rows=36)
    where = r"at hook_embed.*in 1 of \d+ rows, first in context 6 at position 4: .*damaged"
    with pytest.raises(UserError, match=where):
        [stream.batch(step) for step in range(stream.n_batches + 1)]
    with pytest.raises(UserError, match=r"at blocks\.1\.mlp\.hook_post.*first in context 6 "):
        served(stream_of(broken, contexts), stream.rows_per_epoch)


def test_a_model_that_overflows_in_half_precision_is_told_to_use_float32():
    broken = build(torch.float16)
    broken.hf.transformer.h[0].mlp.c_fc.weight *= 1e4
    broken.hf.transformer.h[0].mlp.c_proj.weight *= 1e4
    with pytest.raises(UserError, match="overflows in float16: load it in float32"):
        stream_of(broken, contexts_of()).batch(0)


def test_large_values_whose_sum_overflows_are_no_mistake(model):
    stream = stream_of(model, contexts_of())
    large = torch.full((2 * LENGTH, 3), 3e38)
    stream._refuse_not_finite(SITES[0], large, np.array([0, 1]))
    large[17, 2] = float("nan")
    with pytest.raises(UserError, match="1 of 24 rows, first in context 1 at position 5"):
        stream._refuse_not_finite(SITES[0], large, np.array([0, 1]))


def test_settings_that_cannot_work_say_what_to_set(model):
    with pytest.raises(
        UserError, match="gives 12 activations, fewer than one batch of 13: give more text or a smaller"
    ):
        stream_of(model, contexts_of(1), batch_size=13)
    with pytest.raises(UserError, match="buffer_rows is 6, less than one batch of 7"):
        stream_of(model, contexts_of(), buffer_rows=6)
    with pytest.raises(UserError, match="batch_size is 0"):
        stream_of(model, contexts_of(), batch_size=0)
    with pytest.raises(UserError, match="given twice"):
        ActivationStream(model, contexts_of(), [SITES[0]] * 2, batch_size=7, buffer_rows=36)

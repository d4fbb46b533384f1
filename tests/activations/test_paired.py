from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparse_coding.activations.capture import rows
from sparse_coding.activations.models import LanguageModel
from sparse_coding.activations.paired import JoinedStream, PairedStream
from sparse_coding.activations.stream import ActivationStream
from sparse_coding.activations.tokens import Contexts
from sparse_coding.errors import UserError
from sparse_coding.training.stream import Stream, TensorStream

LENGTH = 12
SITES = {"small": ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"], "org/large": ["blocks.1.hook_resid_mid"]}
KEYS = ["small/blocks.0.hook_resid_post", "small/blocks.1.mlp.hook_post", "org/large/blocks.1.hook_resid_mid"]


def build(name: str, vocab_size: int = 96) -> LanguageModel:
    torch.manual_seed(len(name))
    if name == "small":
        hf = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    else:
        hf = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                num_hidden_layers=2,
                hidden_size=24,
                num_attention_heads=2,
                intermediate_size=48,
                max_position_embeddings=32,
            )
        )
    for parameter in hf.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return LanguageModel.of(hf, name)


MODELS = {name: build(name) for name in SITES}


def contexts_of(n: int = 10, padding: int = 0, excluded: float = 0.0, tokenizer: str | None = None) -> Contexts:
    random = np.random.default_rng(1)
    tokens = random.integers(1, 96, (n, LENGTH)).astype(np.uint16)
    tokens[:, 0] = 1 + np.arange(n)  # contexts that began alike would have equal rows
    mask = random.random((n, LENGTH)) >= excluded
    if padding:
        mask[-1, -padding:] = False
    identity = {} if tokenizer is None else {"tokenizer": tokenizer}
    return Contexts(tokens, None if mask.all() else mask, n, 0, n * LENGTH - padding, 0, padding, identity, Path())


def stream_of(name: str, contexts: Contexts, model: LanguageModel | None = None, **changes) -> ActivationStream:
    given = {"batch_size": 7, "buffer_rows": 3 * LENGTH, "seed": 3}
    return ActivationStream(model or MODELS[name], contexts, SITES[name], **{**given, **changes})


def paired(contexts: Contexts, **changes) -> PairedStream:
    return PairedStream({name: stream_of(name, contexts, **changes) for name in SITES})


# ---- several models


@pytest.mark.parametrize("contexts", [contexts_of(), contexts_of(padding=5, excluded=0.3)])
def test_each_row_is_the_same_token_in_every_model(contexts):
    stream = paired(contexts)
    direct = {
        f"{name}/{site}": x
        for name, sites in SITES.items()
        for site, x in rows(MODELS[name], contexts, slice(None), sites).items()
    }
    seen: list[int] = []
    for step in range(2 * stream.rows_per_epoch // 7):
        batch = stream.batch(step)
        assert list(batch) == KEYS
        tokens = []
        for key, x in batch.items():
            distance = torch.cdist(x, direct[key], compute_mode="donot_use_mm_for_euclid_dist")
            assert distance.amin(1).max() < 1e-3
            assert distance.topk(2, largest=False).values[:, 1].min() > 5e-3, "the rows can be told apart"
            tokens.append(distance.argmin(1).tolist())
        assert tokens[0] == tokens[1] == tokens[2]
        seen += tokens[0]
    assert sorted(seen[: stream.rows_per_epoch]) == list(range(stream.rows_per_epoch))


def test_it_is_a_stream_with_what_the_pipeline_asks_for():
    stream: Stream = paired(contexts_of())
    assert isinstance(stream, PairedStream)
    assert (stream.batch_size, stream.rows_per_epoch) == (7, 120)
    assert dict(stream.widths) == dict(zip(KEYS, (16, 64, 24), strict=True))
    assert stream.seconds_capturing == stream.rows_captured == 0
    stream.batch(0)
    parts = stream.streams.values()
    assert stream.seconds_capturing == sum(one.seconds_capturing for one in parts) > 0
    assert {one.rows_captured for one in parts} == {stream.rows_captured}
    alone = stream_of("small", contexts_of())
    for site in SITES["small"]:
        assert torch.equal(stream.batch(5)[f"small/{site}"], alone.batch(5)[site])


def test_texts_that_are_equal_need_not_be_one_object():
    contexts = contexts_of(padding=5, excluded=0.3, tokenizer="abc")
    PairedStream({"small": stream_of("small", contexts), "org/large": stream_of("org/large", replace(contexts))})


def pair(a: Contexts, b: Contexts, vocab_size: int = 96, **changes) -> PairedStream:
    other = stream_of("org/large", b, build("org/large", vocab_size), **changes)
    return PairedStream({"small": stream_of("small", a), "org/large": other})


def test_streams_that_do_not_correspond_are_refused():
    contexts = contexts_of()
    other = contexts_of()
    other.tokens[3, 4] += 1
    for b in (other, contexts_of(11), contexts_of(padding=5), contexts_of(excluded=0.2)):
        with pytest.raises(UserError, match="'small' and 'org/large' read different contexts"):
            pair(contexts, b)
    a, b = contexts_of(excluded=0.2), contexts_of(excluded=0.2)
    a.mask[0, :2], b.mask[0, :2] = [False, True], [True, False]
    with pytest.raises(UserError, match="different contexts"):
        pair(a, b)
    with pytest.raises(UserError, match="have different tokenizers"):
        pair(contexts_of(tokenizer="abc"), contexts_of(tokenizer="xyz"))
    with pytest.raises(UserError, match="batch_size is 7 for 'small' and 8 for 'org/large'"):
        pair(contexts, contexts, batch_size=8)
    with pytest.raises(UserError, match="seed is 3 for 'small' and 4"):
        pair(contexts, contexts, seed=4)
    with pytest.raises(UserError, match="buffer_rows differs"):
        pair(contexts, contexts, buffer_rows=2 * LENGTH)
    with pytest.raises(UserError, match="1 models are given"):
        PairedStream({"small": stream_of("small", contexts)})


def test_vocabularies_may_differ_only_in_padding():
    """Which is known where the text was tokenized for each model, with equal tokenizers."""
    contexts = contexts_of(tokenizer="abc")
    for a, b in ((contexts, contexts), (contexts_of(), contexts_of())):
        with pytest.raises(UserError, match="know 96 and 128 tokens"):
            pair(a, b, vocab_size=128)
    pair(contexts, contexts_of(tokenizer="abc"), vocab_size=128)


# ---- sites side by side


def test_joined_sites_lie_side_by_side():
    stream = paired(contexts_of())
    chosen = [KEYS[2], KEYS[0]]
    joined: Stream = JoinedStream(stream, "both", chosen)
    assert joined.batch_size == 7
    assert joined.widths == {**stream.widths, "both": 24 + 16}
    batch, found = stream.batch(4), joined.batch(4)
    assert list(found) == [*KEYS, "both"]
    assert all(torch.equal(found[key], batch[key]) for key in KEYS)
    assert torch.equal(found["both"], torch.cat([batch[key] for key in chosen], dim=1))


def test_sites_that_cannot_be_joined_are_refused():
    stream = TensorStream({"a": torch.zeros(4, 2), "b": torch.zeros(4, 3)}, 4)
    for sites, name, message in (
        ([], "ab", "no site is given to join: the stream has a, b"),
        (["a", "c"], "ab", "site 'c' is not in the stream: it has a, b"),
        (["a", "a"], "ab", "give each site once"),
        (["a", "b"], "b", "called 'b', as a site of the stream is"),
    ):
        with pytest.raises(UserError, match=message):
            JoinedStream(stream, name, sites)

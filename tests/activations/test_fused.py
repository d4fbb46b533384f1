from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_coding import captured
from sparse_coding.activations.capture import capture, splice
from sparse_coding.activations.fused import compile_blocks, fuse_gelu
from sparse_coding.activations.models import LanguageModel
from sparse_coding.kernels.compiled import CannotCompile, find_compiler
from sparse_coding.run_flags import SourceFlags

SITES = ["blocks.0.hook_resid_post", "blocks.2.mlp.hook_post"]
TOKENS = torch.arange(1, 25).reshape(2, 12)


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    )


def has_compiler() -> bool:
    try:
        return bool(find_compiler())
    except CannotCompile:
        return False


def test_gelu_as_one_operator_is_the_gelu_it_replaces():
    plain = gpt2()
    fused = copy.deepcopy(plain)
    fuse_gelu(fused)
    assert [type(block.mlp.act) for block in fused.transformer.h] == [torch.nn.GELU] * 3
    found = [capture(LanguageModel.of(model), TOKENS, SITES) for model in (plain, fused)]
    for site in SITES:
        torch.testing.assert_close(found[1][site], found[0][site], atol=1e-6, rtol=1e-5)
    other: Any = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, activation_function="gelu"))
    before = type(other.transformer.h[0].mlp.act)
    fuse_gelu(other)
    assert type(other.transformer.h[0].mlp.act) is before


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiled_blocks_give_the_same_activations_and_logits():
    plain, model = LanguageModel.of(gpt2()), LanguageModel.of(gpt2())
    counters.clear()
    compile_blocks(model.hf)
    for tokens in (TOKENS, TOKENS[:, :7]):  # another length runs the same code
        expected, found = capture(plain, tokens, SITES), capture(model, tokens, SITES)
        for site in SITES:
            torch.testing.assert_close(found[site], expected[site])
    assert counters["frames"]["ok"] == 1, "compiled once, for every block and shape"

    def half(x: Tensor) -> Tensor:
        return x / 2

    for site in ("blocks.1.mlp.hook_post", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"):
        torch.testing.assert_close(splice(model, TOKENS, site, half), splice(plain, TOKENS, site, half))


def test_where_compiling_fails_the_model_runs_as_it_is_and_says_so_once(capsys, monkeypatch):
    def failing(*_, **__):
        raise TorchDynamoException("\nno compiler\nlong advice")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: failing)
    plain, model = LanguageModel.of(gpt2()), LanguageModel.of(gpt2())
    compile_blocks(model.hf)
    for _ in range(2):
        assert torch.equal(capture(model, TOKENS, SITES)[SITES[1]], capture(plain, TOKENS, SITES)[SITES[1]])
    assert capsys.readouterr().err == "--compile-model fails (no compiler): the model runs uncompiled\n"


@pytest.mark.parametrize("asked", [True, False])
def test_the_flag_compiles_the_model_of_a_run(monkeypatch, asked):
    compiled: list[Any] = []
    monkeypatch.setattr(captured, "compile_blocks", compiled.append)
    model, _ = captured.open_model(SourceFlags(model="python-gpt", device="cpu", compile_model=asked))
    assert compiled == ([model.hf] if asked else [])

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sparse_coding import device
from sparse_coding.activations import models as module
from sparse_coding.activations.models import LanguageModel, bundled_models, cut_padding, load_model
from sparse_coding.activations.tokenizers import tokenizer_from_characters
from sparse_coding.device import BF16_WIDTH
from sparse_coding.errors import UserError
from sparse_coding.formats.nanogpt import write_checkpoint
from tests.formats import nanogpt_oracle
from tests.formats.nanogpt_oracle import NanoGPT, tokens_for

SMALL = {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
GPT2 = GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("build", "kind", "positions"),
    [
        (lambda: GPT2LMHeadModel(GPT2), "causal", 32),
        (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)), "causal", 32),
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), "causal", 32),
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), "masked", 32),
        # Positions of RoBERTa start at 2, behind the padding's.
        (lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, pad_token_id=1)), "masked", 30),
    ],
)
def test_a_saved_model_loads_frozen_with_its_head_and_gives_the_same_logits(build, kind, positions, tmp_path):
    torch.manual_seed(0)
    original = build().eval()
    model = load_model(saved(original, tmp_path), device="cpu")
    assert (model.kind, model.max_positions, model.vocab_size) == (kind, positions, 96)
    assert model.causal == (kind == "causal")
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.hf.config._attn_implementation == "sdpa"
    assert not model.hf.training
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())
    tokens = torch.randint(2, 96, (2, positions))
    with torch.no_grad():
        torch.testing.assert_close(model.hf(tokens).logits, original(tokens).logits)


def test_a_model_saved_without_its_head_gets_no_head_of_random_numbers(tmp_path):
    model = load_model(saved(BertModel(BertConfig(**SMALL)), tmp_path / "bert"), device="cpu")
    assert model.kind is None
    assert type(model.hf) is BertModel
    model = load_model(saved(LlamaModel(LlamaConfig(**SMALL)), tmp_path / "llama"), device="cpu")
    assert model.kind is None


def test_a_head_that_is_tied_to_the_embedding_needs_no_weights_of_its_own(tmp_path):
    model = load_model(saved(GPT2Model(GPT2), tmp_path), device="cpu")
    assert model.kind == "causal"
    assert torch.equal(model.hf.lm_head.weight, model.hf.transformer.wte.weight)


def test_the_dtype_is_the_one_asked_for(tmp_path):
    name = saved(GPT2LMHeadModel(GPT2).to(torch.float16), tmp_path)
    assert load_model(name, device="cpu").dtype == torch.float32
    assert load_model(name, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(name, device="cpu", dtype="float16").dtype == torch.float16
    with pytest.raises(UserError, match=r"'float8'.*auto, float32, bfloat16, float16"):
        load_model(name, device="cpu", dtype="float8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"'gpu'.*cuda"):
        load_model(name, device="gpu")


def test_the_automatic_dtype_is_bfloat16_where_the_cpu_multiplies_it_and_the_model_is_wide_enough(
    tmp_path, monkeypatch
):
    wide = saved(GPT2LMHeadModel(GPT2Config(**{**GPT2.to_dict(), "n_embd": BF16_WIDTH})), tmp_path / "wide")
    narrow = saved(GPT2LMHeadModel(GPT2), tmp_path / "narrow")
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        for place in (device, module):
            monkeypatch.setattr(place, "has_bf16", lambda _, has=has: has)
        assert load_model(wide, device="cpu").dtype == dtype
        assert load_model(narrow, device="cpu").dtype == torch.float32
        assert load_model(wide, device="cpu", dtype="float32").dtype == torch.float32
        words = "cpu in bfloat16" if has else "cpu in float32 (no bf16 instructions here: bfloat16 would be slower)"
        assert load_model(wide, device="cpu").runs_on == words


def test_bfloat16_moves_activations_little(tmp_path):
    from sparse_coding.activations.capture import capture

    name, tokens, site = "python-gpt-large", torch.arange(1, 257).reshape(2, 128), "blocks.5.mlp.hook_post"
    exact, rounded = (
        capture(load_model(name, device="cpu", dtype=dtype), tokens, [site])[site].float().flatten(0, 1)
        for dtype in ("float32", "bfloat16")
    )
    moved = (rounded - exact).square().sum() / (exact - exact.mean(0)).square().sum()
    assert 1e-6 < moved < 2e-4  # 8e-5 on the held-out text of the Python documentation


def test_a_folder_without_all_weights_is_refused_and_says_which_is_missing(tmp_path):
    from safetensors.torch import load_file, save_file

    saved(GPT2LMHeadModel(GPT2), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 of its weights, such as h\.1\.mlp\.c_fc\.weight"):
        load_model(str(tmp_path), device="cpu")


def test_weights_of_another_shape_or_not_readable_are_one_line(tmp_path):
    name = saved(GPT2LMHeadModel(GPT2), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_embd": 32}))
    with pytest.raises(UserError, match="cannot be read") as error:
        load_model(name, device="cpu")
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (b"nothing", weights[:100], weights[:-100]):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            load_model(name, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(UserError, match="cannot be read"):
        load_model(name, device="cpu")


def test_pickled_weights_that_hold_tensors_alone_load(tmp_path):
    torch.manual_seed(0)
    original = GPT2LMHeadModel(GPT2)
    name = saved(original, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(load_model(name, device="cpu").hf.transformer.wte.weight, original.transformer.wte.weight)


def test_pickled_weights_that_run_code_are_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    name = saved(GPT2LMHeadModel(GPT2), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"a pickle that holds more than tensors.*safetensors"):
        load_model(name, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    name = saved(GPT2LMHeadModel(GPT2), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    with pytest.raises(UserError, match="code of its own"):
        load_model(name, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_model_is_told_apart(tmp_path):
    (tmp_path / "runs" / "gpt-a").mkdir(parents=True)
    (tmp_path / "runs" / "gpt-a" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no config\.json.*did you mean one of its folders gpt-a\?"):
        load_model(str(tmp_path / "runs"), device="cpu")
    with pytest.raises(UserError, match="no weights"):
        load_model(str(tmp_path / "runs" / "gpt-a"), device="cpu")
    with pytest.raises(UserError, match="no such folder; did you mean 'gpt-a'"):
        load_model(str(tmp_path / "runs" / "gpt-b"), device="cpu")
    with pytest.raises(UserError, match="is a file"):
        load_model(str(tmp_path / "runs" / "gpt-a" / "config.json"), device="cpu")
    with pytest.raises(UserError, match="neither a folder nor a possible name"):
        load_model("my model", device="cpu")


def test_a_model_with_encoder_and_decoder_is_refused():
    config = T5Config(vocab_size=96, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0)
    with pytest.raises(UserError, match="encoder and a decoder"):
        LanguageModel.of(T5ForConditionalGeneration(config))


def test_bundled_models_are_the_folders_with_a_config_and_load_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    saved(GPT2LMHeadModel(GPT2), tmp_path / "some-gpt")
    (tmp_path / "not-a-model").mkdir()
    assert bundled_models() == {"some-gpt": tmp_path / "some-gpt"}
    model = load_model("some-gpt", device="cpu")
    assert (model.name, model.path) == ("some-gpt", str(tmp_path / "some-gpt"))
    with pytest.raises(UserError, match="did you mean 'some-gpt'"):
        load_model("sone-gpt", device="cpu")


def test_what_comes_with_the_project_loads():
    assert "python-gpt" in bundled_models()
    for name in bundled_models():
        assert load_model(name, device="cpu").causal


def hub_cache(folder: Path, name: str, model: PreTrainedModel) -> None:
    """A local cache of the hub as its library lays it out."""
    top = folder / f"models--{name.replace('/', '--')}"
    revision = "0" * 40
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(revision)
    saved(model, top / "snapshots" / revision)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_hub_a_cached_model_loads_and_another_gives_the_ways_out_at_once(offline, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub_cache(tmp_path, "some-lab/small-gpt", GPT2LMHeadModel(GPT2))
    model = load_model("some-lab/small-gpt", device="cpu")
    assert (model.kind, model.path) == ("causal", "some-lab/small-gpt")
    shutil.rmtree(tmp_path / "models--some-lab--small-gpt")
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"cannot be reached: give a local folder.*leave the model away") as error:
        load_model("some-lab/small-gpt", device="cpu")
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 5
    assert constants.HF_HUB_OFFLINE is offline


# ---- checkpoints of nanoGPT

LETTERS = [chr(ord("a") + index) for index in range(26)]


def nanogpt_checkpoint(path: Path, oracle: NanoGPT) -> str:
    return str(nanogpt_oracle.saved(path, nanogpt_oracle.checkpoint(oracle, prefix="_orig_mod.")))


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_a_checkpoint_of_nanogpt_is_a_model_like_any_other(bias, tmp_path):
    oracle = NanoGPT(bias)
    name = nanogpt_checkpoint(tmp_path / "ckpt.pt", oracle)
    model, tokens = load_model(name, device="cpu"), tokens_for(oracle)
    assert (model.kind, model.max_positions, model.vocab_size) == ("causal", 12, 50)
    assert (model.name, model.path, model.from_nanogpt) == (name, name, True)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.hf.config._attn_implementation == "sdpa"
    assert not model.hf.training
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())
    torch.testing.assert_close(model.hf(tokens).logits, oracle(tokens), rtol=0, atol=1e-5)
    assert load_model(name, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    tanh = load_model(name, device="cpu", gelu="tanh").hf(tokens).logits
    torch.testing.assert_close(tanh, oracle(tokens, tanh=True), rtol=0, atol=1e-5)


def test_activations_of_a_checkpoint_are_those_of_the_bridge_at_every_site(tmp_path):
    pytest.importorskip("transformer_lens", reason="transformer-lens is not installed (an extra)")
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    from sparse_coding.activations.capture import capture
    from sparse_coding.activations.sites import list_sites

    oracle = NanoGPT(False)
    name, tokens = nanogpt_checkpoint(tmp_path / "ckpt.pt", oracle), tokens_for(oracle)
    hf = load_model(name, device="cpu").hf  # bridging changes it in place
    bridge = build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=hf.config, model_name="nanogpt")
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens)
    torch.testing.assert_close(logits, oracle(tokens), rtol=1e-5, atol=2e-5)
    model = load_model(name, device="cpu")
    names = [site for site in list_sites(model) if site.startswith(("blocks.", "hook_", "ln_final."))]
    assert {f"blocks.{i}.mlp.hook_post" for i in range(3)} | {"hook_embed"} <= set(names)
    assert len(names) > 3 * 8
    for site, x in capture(model, tokens, names).items():
        expected = cache[site].flatten(2)
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=2e-5, msg=lambda m, s=site: f"{s}: {m}")


def test_the_form_of_gelu_is_for_checkpoints_alone(tmp_path):
    name = saved(GPT2LMHeadModel(GPT2), tmp_path / "folder.pt")
    assert not load_model(name, device="cpu").from_nanogpt
    for given in (name, "python-gpt", "gpt2"):
        with pytest.raises(UserError, match=f"--gelu tanh is for checkpoints of nanoGPT.*{Path(given).name}"):
            load_model(given, device="cpu", gelu="tanh")


def test_a_checkpoint_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    nanogpt_checkpoint(tmp_path / "out" / "ckpt.pt", NanoGPT(True))
    monkeypatch.chdir(tmp_path)
    assert load_model("out/ckpt.pt", device="cpu").path == str(tmp_path / "out" / "ckpt.pt")
    with pytest.raises(UserError, match=r"'out/ckpr\.pt': no such file; did you mean 'ckpt\.pt'"):
        load_model("out/ckpr.pt", device="cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_takes_no_probability(tied, tmp_path):
    oracle = NanoGPT(True)
    if not tied:
        oracle.lm_head.weight = torch.nn.Parameter(torch.randn(50, 16, generator=torch.Generator().manual_seed(5)))
    model = load_model(nanogpt_checkpoint(tmp_path / "ckpt.pt", oracle), device="cpu")
    tokens = tokens_for(oracle) % 26
    before = torch.get_rng_state()
    cut_padding(model, tokenizer_from_characters(LETTERS))
    assert torch.equal(torch.get_rng_state(), before)
    logits = model.hf(tokens).logits
    torch.testing.assert_close(logits, oracle(tokens)[..., :26], rtol=0, atol=1e-5)
    full = oracle(tokens).log_softmax(-1)[..., :26]
    assert (logits.log_softmax(-1) > full).all(), "masked loss is below the unmasked"
    assert model.vocab_size == model.config.vocab_size == 26
    assert (model.hf.lm_head.weight is model.hf.transformer.wte.weight) == tied
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())
    cut_padding(model, tokenizer_from_characters(LETTERS))  # nothing left to cut
    assert model.vocab_size == 26


def test_an_imported_folder_is_cut_too_and_other_models_are_not(tmp_path):
    hf = GPT2LMHeadModel(GPT2)
    plain = load_model(saved(hf, tmp_path / "plain"), device="cpu")
    cut_padding(plain, tokenizer_from_characters(LETTERS))
    assert plain.vocab_size == 96
    write_checkpoint(tmp_path / "ckpt.pt", hf)
    read = load_model(tmp_path / "ckpt.pt", device="cpu").hf
    imported = load_model(saved(read, tmp_path / "imported"), device="cpu")
    cut_padding(imported, tokenizer_from_characters(LETTERS))
    assert imported.vocab_size == 26


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    model = load_model(nanogpt_checkpoint(tmp_path / "ckpt.pt", NanoGPT(True, vocab=25)), device="cpu")
    with pytest.raises(UserError, match=r"tokenizer has 26 tokens, model .*ckpt\.pt' has 25:.*--tokenizer"):
        cut_padding(model, tokenizer_from_characters(LETTERS))
    assert model.vocab_size == 25

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from sparse_coding.activations.capture import capture, widths
from sparse_coding.activations.families import LOCATIONS
from sparse_coding.activations.models import LanguageModel
from sparse_coding.activations.sites import (
    Site,
    family_of,
    list_sites,
    n_layers,
    resolve,
    resolve_all,
    site_name,
)
from sparse_coding.errors import UserError

LAYERS = 3
SMALL = {
    "vocab_size": 96,
    "num_hidden_layers": LAYERS,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
SEPARATOR = {"bos_token_id": 0, "eos_token_id": 0}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=LAYERS, n_head=4, **SEPARATOR))


def gpt_neo() -> PreTrainedModel:
    sizes = {"vocab_size": 96, "max_position_embeddings": 32, "hidden_size": 32, "intermediate_size": 64}
    kinds = [[["global", "local", "global"], 1]]
    return GPTNeoForCausalLM(
        GPTNeoConfig(**sizes, num_layers=LAYERS, num_heads=4, attention_types=kinds, window_size=4, **SEPARATOR)
    )


MODELS = {
    "gpt2": ("GPT-2", gpt2),
    "gpt-neo": ("GPT-Neo", gpt_neo),
    "pythia": ("GPT-NeoX", lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))),
    "neox-sequential": (
        "GPT-NeoX",
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, use_parallel_residual=False)),
    ),
    "llama": ("Llama", lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2))),
    "qwen2": ("Llama", lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2))),
    "bert": ("BERT", lambda: BertForMaskedLM(BertConfig(**SMALL))),
}


def random_model(name: str) -> PreTrainedModel:
    """All weights random, biases and norms too: as they are made, many different sites would be equal."""
    generator = torch.Generator().manual_seed(0)
    model = MODELS[name][1]().eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.15 if parameter.ndim > 1 else 0.7 + 0.3 * noise
    return model


def lens_names(model: LanguageModel) -> list[str]:
    return [name for name in list_sites(model) if name.startswith(("blocks.", "hook_", "ln_final."))]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 96, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bridged(tokens: Tensor):
    """For each model what the Bridge of transformer-lens, which takes seconds to import, finds at its hooks."""
    pytest.importorskip("transformer_lens", reason="transformer-lens is not installed (an extra)")
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    def activations(name: str) -> tuple[LanguageModel, dict[str, Tensor]]:
        hf = random_model(name)
        # A copy, because bridging changes the module in place.
        bridge = build_bridge_from_module(copy.deepcopy(hf), type(hf).__name__, hf_config=hf.config, model_name=name)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens)
        return LanguageModel.of(hf), cache

    return activations


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_what_the_bridge_of_transformer_lens_has_under_that_name(name, bridged, tokens):
    model, cache = bridged(name)
    names = lens_names(model)
    found = capture(model, tokens, names)
    for site in names:
        expected = cache[site].flatten(2)
        torch.testing.assert_close(found[site], expected, rtol=1e-5, atol=2e-5, msg=lambda m, s=site: f"{s}: {m}")
    usual = {f"blocks.{layer}.{hook}" for layer in range(LAYERS) for hook in LOCATIONS.values()}
    usual |= {f"blocks.{layer}.mlp.hook_pre" for layer in range(LAYERS)} | {"hook_embed"}
    lacking = {site for site in usual if site not in cache}
    if name == "bert":  # there ln2 lies behind the MLP: what it gives is no mlp_in, and has the name hook_resid_post
        lacking |= {f"blocks.{layer}.ln2.hook_out" for layer in range(LAYERS)}
    assert usual - set(names) == lacking, "we have all that the Bridge has"


@pytest.mark.parametrize("name", MODELS)
def test_aliases_are_those_of_the_bridge(name, bridged, tokens):
    model, cache = bridged(name)
    names = [f"blocks.1.{word}" for word in ("hook_in", "hook_out", "attn.hook_out", "mlp.hook_out")]
    for site, x in capture(model, tokens, names).items():
        torch.testing.assert_close(x, cache[site], rtol=1e-5, atol=2e-5, msg=lambda m, s=site: f"{s}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_no_two_sites_of_a_block_are_the_same(name, tokens):
    """Otherwise the comparison with the Bridge could not tell them apart."""
    model = LanguageModel.of(random_model(name))
    assert family_of(model).name == MODELS[name][0]
    found = list(capture(model, tokens, [site for site in lens_names(model) if site.startswith("blocks.1.")]).values())
    for index, x in enumerate(found):
        for other in found[:index]:
            assert x.shape != other.shape or not torch.allclose(x, other, atol=1e-3)


def test_parallel_attention_and_mlp_leave_no_residual_stream_between_them():
    parallel, sequential = (LanguageModel.of(random_model(name)) for name in ("pythia", "neox-sequential"))
    assert "blocks.1.hook_resid_mid" not in list_sites(parallel)
    assert "blocks.1.hook_resid_mid" in list_sites(sequential)
    with pytest.raises(UserError, match="attention and MLP read the same residual stream"):
        site_name(parallel, 1, "resid_mid")


def test_widths_are_those_of_the_tensors_found_by_running():
    model = LanguageModel.of(random_model("llama"))
    expected = {"blocks.1.attn.hook_k": 16, "blocks.1.attn.hook_z": 32, "blocks.2.mlp.hook_post": 64, "lm_head": 96}
    assert widths(model, list(expected)) == expected


def test_module_names_mean_the_output_or_with_a_suffix_the_input(tokens):
    model = LanguageModel.of(random_model("gpt2"))
    act = "transformer.h.1.mlp.act"
    assert resolve(model, act) == Site(act, act, "out")
    pairs = {
        act: "blocks.1.mlp.hook_post",
        f"{act}:out": "blocks.1.mlp.hook_post",
        f"{act}:in": "blocks.1.mlp.hook_pre",
        "transformer.h.1:in": "blocks.1.hook_resid_pre",
        "transformer.h.1.attn": "blocks.1.hook_attn_out",  # the first of a tuple
    }
    found = capture(model, tokens, [*pairs, *set(pairs.values())])
    for module, site in pairs.items():
        assert torch.equal(found[module], found[site]), module


def test_models_are_known_by_their_modules_with_or_without_a_head():
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, **SEPARATOR)
    model = LanguageModel.of(GPT2Model(config))
    assert resolve(model, "blocks.1.mlp.hook_post").module == "h.1.mlp.c_proj"
    model = LanguageModel.of(RobertaForMaskedLM(RobertaConfig(**SMALL)))
    assert resolve(model, "blocks.1.mlp.hook_post").module == "roberta.encoder.layer.1.output.dense"


def test_models_of_no_known_family_have_module_names_alone():
    model = LanguageModel.of(BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)))
    assert family_of(model) is None
    assert n_layers(model) == 0
    assert "transformer.h.1.mlp.dense_h_to_4h" in list_sites(model)
    assert not lens_names(model)
    with pytest.raises(UserError, match=r"GPT-2.*BERT.*module name.*python -m sparse_coding sites"):
        site_name(model, 1, "mlp")
    # Norms behind each half make post_attention_layernorm another place than in Llama.
    assert family_of(LanguageModel.of(Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8)))) is None


@pytest.mark.parametrize("location", LOCATIONS)
def test_locations_are_short_words_for_sites_that_exist(location):
    model = LanguageModel.of(random_model("gpt2"))
    assert site_name(model, 2, location) == f"blocks.2.{LOCATIONS[location]}"
    assert site_name(model, 2, location) in list_sites(model)


def test_what_does_not_exist_is_named_with_what_does():
    model = LanguageModel.of(random_model("gpt2"), "some-gpt")
    for layer in (3, 999, -1):
        with pytest.raises(UserError, match=f"layer {layer}: this model has layers 0 to 2"):
            site_name(model, layer, "mlp")
    with pytest.raises(UserError, match="layer 7: this model has layers 0 to 2"):
        resolve(model, "blocks.7.mlp.hook_post")
    with pytest.raises(UserError, match=r"location 'mpl'.*did you mean 'mlp'"):
        site_name(model, 0, "mpl")
    with pytest.raises(UserError, match=r"sites --model some-gpt`; did you mean 'blocks\.1\.mlp\.hook_post'"):
        resolve(model, "blocks.1.mlp.hook_pots")
    with pytest.raises(UserError, match="'in' or 'out'"):
        resolve(model, "transformer.h.1:middle")
    with pytest.raises(UserError, match="no site is given"):
        resolve_all(model, [])
    with pytest.raises(UserError, match=r"'blocks\.1\.hook_resid_pre' is given twice"):
        resolve_all(model, ["blocks.1.hook_resid_pre"] * 2)


@pytest.mark.parametrize("name", MODELS)
def test_every_listed_name_resolves_to_itself_and_stands_once(name):
    model = LanguageModel.of(random_model(name))
    names = list_sites(model)
    assert len(set(names)) == len(names)
    assert [resolve(model, site).name for site in names] == names

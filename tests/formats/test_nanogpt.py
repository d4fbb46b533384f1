from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparse_coding.errors import UserError
from sparse_coding.formats.nanogpt import read_checkpoint, write_checkpoint
from sparse_coding.formats.nanogpt_file import checkpoint_file, read_facts
from tests.formats.nanogpt_oracle import CONFIG, NanoGPT, checkpoint, saved, tokens_for

BIAS = pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
SIZES = {"vocab_size": 50, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 4, "activation_function": "gelu"}


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    """A random GPT-2 in the words that nanoGPT has, but for the changes; its biases are not zero."""
    torch.manual_seed(0)
    dropout = {name: changes.pop("dropout", 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, "bos_token_id": 0, "eos_token_id": 0, **dropout, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


# ---- reading


@BIAS
@pytest.mark.parametrize(("prefix", "masks"), [("", False), ("_orig_mod.", False), ("", True), ("_orig_mod.", True)])
def test_logits_are_those_of_nanogpt_to_the_last_bit(bias, prefix, masks, tmp_path):
    oracle = NanoGPT(bias)
    path = saved(tmp_path / "ckpt.pt", checkpoint(oracle, prefix=prefix, masks=masks))
    model, tokens = read_checkpoint(path).model, tokens_for(oracle)
    torch.testing.assert_close(logits(model, tokens), oracle(tokens), rtol=0, atol=1e-5)
    # With the memory layout of its own, a library may sum the same products in another order.
    for length in (1, 2, 12):
        assert torch.equal(logits(model, tokens[:, :length]), oracle.laid_out_as_gpt2()(tokens[:, :length])), length
    assert not model.training
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("name", ["attn.c_proj.weight", "ln_1.bias", "attn.c_attn.bias", "mlp.c_proj.bias"])
def test_one_weight_wrong_in_one_layer_is_seen(name, tmp_path):
    """The comparison above can fail: transposing a square weight or losing a bias changes the logits."""
    oracle = NanoGPT(True)
    data = checkpoint(oracle)
    name = f"transformer.h.1.{name}"
    data["model"][name] = data["model"][name].t().clone() if name.endswith("weight") else data["model"][name] * 0
    model, tokens = read_checkpoint(saved(tmp_path / "ckpt.pt", data)).model, tokens_for(oracle)
    assert (logits(model, tokens) - oracle(tokens)).abs().max() > 1e-2


def test_the_form_of_gelu_is_the_one_asked_for_then_the_one_our_exports_name_then_exact(tmp_path):
    oracle = NanoGPT(True).laid_out_as_gpt2()
    tokens, data = tokens_for(oracle), checkpoint(oracle)
    exact, tanh = oracle(tokens), oracle(tokens, tanh=True)
    assert (exact - tanh).abs().max() > 1e-4
    plain = saved(tmp_path / "plain.pt", data)
    named = saved(tmp_path / "named.pt", {**data, "config": {"gelu": "tanh"}})
    for path, option, expected in (
        (plain, None, exact),
        (plain, "exact", exact),
        (plain, "tanh", tanh),
        (named, None, tanh),
        (named, "exact", exact),
    ):
        found = logits(read_checkpoint(path, option).model, tokens)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    wrong = saved(tmp_path / "wrong.pt", {**data, "config": {"gelu": "quick"}})
    with pytest.raises(UserError, match="gelu = 'quick': give --gelu exact or --gelu tanh"):
        read_checkpoint(wrong)
    assert read_checkpoint(wrong, "tanh").model.config.activation_function == "gelu_new"


@BIAS
def test_what_the_first_versions_did_not_write_is_read_off_the_weights(bias, tmp_path):
    oracle = NanoGPT(bias)
    data = checkpoint(oracle, masks=True)
    for name in ("bias", "vocab_size", "dropout"):
        del data["model_args"][name]
    for name in ("config", "best_val_loss", "optimizer"):
        del data[name]
    read = read_checkpoint(saved(tmp_path / "ckpt.pt", data))
    assert read.model_args == {**oracle.args, "dropout": 0.0}
    assert (read.iter_num, read.best_val_loss, read.config, read.gelu) == (1000, None, {}, "exact")
    tokens = tokens_for(oracle)
    torch.testing.assert_close(logits(read.model, tokens), oracle(tokens), rtol=0, atol=1e-5)


def test_an_unembedding_that_is_not_tied_stays_its_own(tmp_path):
    oracle = NanoGPT(True)
    oracle.lm_head.weight = torch.nn.Parameter(torch.randn(50, 16, generator=torch.Generator().manual_seed(5)))
    model = read_checkpoint(saved(tmp_path / "ckpt.pt", checkpoint(oracle))).model
    tokens = tokens_for(oracle)
    torch.testing.assert_close(logits(model, tokens), oracle(tokens), rtol=0, atol=1e-5)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "folder")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "folder")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    with pytest.raises(UserError, match="not tied"):
        write_checkpoint(tmp_path / "out.pt", model)


def test_facts_are_read_without_a_model_and_are_the_same(tmp_path):
    data = checkpoint(NanoGPT(False))
    data["config"] |= {"odd": None, "list": [1], 3: 4}  # train.py records numbers, strings and flags
    path = saved(tmp_path / "ckpt.pt", data)
    facts, read = read_facts(path), read_checkpoint(path)
    assert facts.model_args == read.model_args == NanoGPT(False).args
    assert facts.config == read.config == CONFIG
    assert facts.iter_num == read.iter_num == 1000
    assert facts.best_val_loss == read.best_val_loss == torch.tensor(1.4697).item()


def test_a_model_does_not_change_with_its_file_and_reading_draws_nothing(tmp_path):
    path = saved(tmp_path / "ckpt.pt", checkpoint(NanoGPT(True)))
    before = torch.get_rng_state()
    model = read_checkpoint(path).model
    assert torch.equal(torch.get_rng_state(), before)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_less_precision_are_taken_as_they_are(dtype, tmp_path):
    data = checkpoint(NanoGPT(True))
    data["model"] = {name: value.to(dtype) for name, value in data["model"].items()}
    model = read_checkpoint(saved(tmp_path / "ckpt.pt", data)).model
    assert model.dtype == torch.float32
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(model.state_dict()[name], data["model"][name].float().t())


def test_a_checkpoint_is_told_by_its_suffix(tmp_path):
    for name in ("out/ckpt.pt", "a.pth", "last.ckpt"):
        assert checkpoint_file(name) == Path(name)
    (tmp_path / "folder.pt").mkdir()
    for name in ("gpt2", "owner/name", tmp_path / "folder.pt", "model.safetensors"):
        assert checkpoint_file(name) is None


# ---- refusing to read


def change(section: str, name: str, value: Any) -> Any:
    def changed(data: dict[str, Any]) -> None:
        data[section][name] = value

    return changed


def remove(section: str, name: str) -> Any:
    return lambda data: data[section].pop(name)


WPE, SQUARE = "transformer.wpe.weight", "transformer.h.1.attn.c_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data.pop("model"), "no checkpoint of nanoGPT: it lacks `model` or `model_args`"),
        (lambda data: data.pop("model_args"), "no checkpoint of nanoGPT: it lacks `model` or `model_args`"),
        (lambda data: data.update(model=[1]), "it lacks `model` or `model_args`"),
        (lambda data: data.update(iter_num="ten"), "iter_num is no number"),
        (lambda data: data.update(config=3), "config no table"),
        (remove("model", SQUARE), rf"lacks 1 of the weights .* such as {SQUARE}"),
        (remove("model", "lm_head.weight"), r"lacks 1 of the weights .* such as lm_head\.weight"),
        (remove("model", "transformer.wte.weight"), r"lacks 1 of the weights .* such as transformer\.wte\.weight"),
        (remove("model", "transformer.ln_f.bias"), r"such as transformer\.ln_f\.bias"),
        (change("model", "router.weight", torch.ones(2)), r"1 of its weights are none of nanoGPT's, such as router"),
        (change("model_args", "bias", False), r"19 of its weights are none of nanoGPT's, such as transformer"),
        (change("model", SQUARE, torch.ones(16, 17)), r"has shape \[16, 17\], its model_args say \[16, 16\]"),
        (change("model", WPE, torch.ones(())), r"wpe\.weight has shape \[\], its model_args say \[12, 16\]"),
        (change("model_args", "block_size", 24), r"wpe\.weight has shape \[12, 16\], its model_args say \[24, 16\]"),
        (change("model_args", "vocab_size", 51), r"wte\.weight has shape \[50, 16\], its model_args say \[51, 16\]"),
        (change("model_args", "n_layer", 10**12), "say 1000000000000 layers, its weights have 3"),
        (change("model_args", "n_layer", 2), "say 2 layers, its weights have 3"),
        (change("model_args", "n_head", 3), "3 heads do not divide a width of 16"),
        (change("model_args", "n_head", 0), "n_head in its model_args is 0, not a number from 1"),
        (change("model_args", "n_embd", True), "n_embd in its model_args is True"),
        (remove("model_args", "n_embd"), "n_embd in its model_args is None"),
        (change("model_args", "bias", "no"), "bias='no'"),
        (change("model_args", "dropout", 1.5), "dropout=1.5"),
        (change("model_args", "rotary", True), "names rotary in its model_args, which nanoGPT does not have"),
        (change("model", 3, torch.ones(2)), "'3' among its weights is no weight"),
        (change("model", WPE, "text"), "among its weights is no weight"),
        (change("model", WPE, torch.ones(12, 16, dtype=torch.int64)), "among its weights is no weight"),
        (change("model", "_orig_mod." + WPE, torch.ones(12, 16)), "holds transformer.wpe.weight twice"),
        (change("model", "x._orig_mod." + WPE, torch.ones(12, 16)), r"none of nanoGPT's, such as x\._orig_mod"),
        (change("model", "my.attn.masked_biases", torch.ones(1)), "such as my.attn.masked_biases"),
    ],
)
def test_what_is_no_checkpoint_of_nanogpt_is_one_line_that_says_why(spoil, reason, tmp_path):
    data = checkpoint(NanoGPT(True))
    spoil(data)
    path = saved(tmp_path / "ckpt.pt", data)
    for read in (read_checkpoint, read_facts):
        with pytest.raises(UserError, match=reason) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(torch.ones(3), path)
    with pytest.raises(UserError, match="no checkpoint of nanoGPT"):
        read_checkpoint(path)
    for content in (b"", b"some text\n", b"PK\3\4", pickle.dumps({"model": {}}), b"\x80\x02}q\0."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read|not opened") as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no such file; did you mean 'ckpt\.pt'"):
        read_checkpoint(tmp_path / "ckpr.pt")
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "nowhere" / "ckpt.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    path = saved(tmp_path / "ckpt.pt", checkpoint(NanoGPT(False)))
    whole = path.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cannot be read|not opened"):
            read_checkpoint(path)


@pytest.mark.parametrize("section", ["optimizer", "config", "model", "model_args", None])
def test_code_in_a_checkpoint_is_never_run(section, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    data: Any = checkpoint(NanoGPT(True))
    if section is None:
        data = Evil()
    else:
        data[section]["evil"] = Evil()
    path = saved(tmp_path / "ckpt.pt", data)
    with pytest.raises(UserError, match="not opened, because such a file can run code"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would have run it"


# ---- writing


@BIAS
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_a_checkpoint_comes_back_as_it_was(bias, gelu, tmp_path):
    """nanoGPT -> a Hugging Face folder -> nanoGPT: tensors to the last bit, order, arguments, counts and settings."""
    oracle = NanoGPT(bias)
    data = checkpoint(oracle, prefix="_orig_mod.", masks=True)
    read_checkpoint(saved(tmp_path / "ckpt.pt", data), gelu).model.save_pretrained(tmp_path / "folder")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "folder")
    write_checkpoint(tmp_path / "out" / "ckpt.pt", model)
    again = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert list(again) == list(data)
    assert list(again["model"]) == list(oracle.state_dict())
    for name, value in oracle.state_dict().items():
        assert again["model"][name].dtype == value.dtype
        assert torch.equal(again["model"][name], value), name
    assert list(again["model_args"].items()) == list(data["model_args"].items())
    assert again["iter_num"] == 1000
    assert again["config"] == {**CONFIG, "gelu": gelu}
    assert torch.equal(again["best_val_loss"], data["best_val_loss"])
    assert again["best_val_loss"].dtype == torch.float32
    NanoGPT(bias).load_state_dict(again["model"])  # strict
    assert read_facts(tmp_path / "out" / "ckpt.pt").gelu == gelu


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_a_gpt2_comes_back_as_it_was(activation, tmp_path):
    model = gpt2(activation_function=activation)
    write_checkpoint(tmp_path / "ckpt.pt", model)
    again = read_checkpoint(tmp_path / "ckpt.pt").model
    assert list(again.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    known, found = model.config.to_dict(), again.config.to_dict()
    differing = {name for name in found if found[name] != known.get(name)}
    # The separator's id is the tokenizer's affair; what was saved where is the library's.
    assert differing <= {"nanogpt", "bos_token_id", "eos_token_id", "architectures", "dtype"}


def test_the_optimiser_is_one_that_nanogpt_goes_on_with(tmp_path):
    for bias in (True, False):
        oracle, path = NanoGPT(bias), tmp_path / f"{bias}.pt"
        write_checkpoint(path, read_checkpoint(saved(path, checkpoint(oracle))).model)
        data = torch.load(path, weights_only=True)
        optimizer, fresh = oracle.groups(), oracle.groups().state_dict()
        given = data["optimizer"]
        assert given["state"] == {}
        for mine, theirs in zip(given["param_groups"], fresh["param_groups"], strict=True):
            assert mine["params"] == theirs["params"]
            assert mine.keys() == theirs.keys()
        matrices, vectors = given["param_groups"]
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)  # CONFIG's, or nanoGPT's default
        assert (matrices["lr"], tuple(matrices["betas"])) == (1e-3, (0.9, 0.99))
        optimizer.load_state_dict(given)
        for parameter in oracle.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = oracle.lm_head.weight.detach().clone()
        optimizer.step()
        expected = before * (1 - 1e-3 * 0.05) - 1e-3  # AdamW's first step with gradient 1
        torch.testing.assert_close(oracle.lm_head.weight.detach(), expected)


def test_tied_weights_share_their_memory_in_the_file_and_nothing_else_does(tmp_path):
    write_checkpoint(tmp_path / "ckpt.pt", gpt2())
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    assert len({value.data_ptr() for value in state.values()}) == len(state) - 1
    assert all(value.is_contiguous() for value in state.values())
    assert (tmp_path / "ckpt.pt").stat().st_size < 4 * sum(p.numel() for p in gpt2().parameters()) + 40_000


def test_biases_are_written_where_they_are_known_or_not_zero(tmp_path):
    path, model = tmp_path / "ckpt.pt", gpt2()
    assert write_checkpoint(path, model).model_args["bias"] is True
    assert write_checkpoint(path, model, bias=False).model_args["bias"] is True  # nothing is lost on someone's word
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    assert write_checkpoint(path, model).model_args["bias"] is False
    assert read_facts(path).model_args["bias"] is False
    assert write_checkpoint(path, model, bias=True).model_args["bias"] is True
    assert read_checkpoint(path).model.config.nanogpt["bias"] is True
    assert write_checkpoint(path, read_checkpoint(path).model).model_args["bias"] is True


def test_what_is_said_of_the_training_is_written_and_without_a_word_it_is_nanogpts_beginning(tmp_path):
    path = tmp_path / "ckpt.pt"
    write_checkpoint(path, gpt2())
    data = torch.load(path, weights_only=True)
    assert (data["iter_num"], data["best_val_loss"].item(), data["config"]) == (0, 1e9, {"gelu": "exact"})
    write_checkpoint(path, gpt2(), iter_num=7, best_val_loss=2.5, config={"dataset": "mine", "gelu": "tanh"})
    facts = read_facts(path)
    assert (facts.iter_num, facts.best_val_loss) == (7, 2.5)
    assert facts.config == {"dataset": "mine", "gelu": "exact"}  # the model's own form, not the config's word


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_inner": 32}, "n_inner = 32: nanoGPT has only None or 64"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06: nanoGPT has only 1e-05"),
        ({"activation_function": "relu"}, "activation_function = 'relu': nanoGPT has only 'gelu' or 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"attn_pdrop": 0.3}, "attn_pdrop = 0.3: nanoGPT has only 0.1"),
        ({"tie_word_embeddings": False}, "not tied"),
    ],
)
def test_models_that_nanogpt_has_no_words_for_are_refused(changes, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        write_checkpoint(tmp_path / "ckpt.pt", gpt2(**changes))
    assert list(tmp_path.iterdir()) == []


def test_models_of_other_kinds_are_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match="is a LlamaForCausalLM: nanoGPT has GPT-2"):
        write_checkpoint(tmp_path / "ckpt.pt", LlamaForCausalLM(config))  # type: ignore[arg-type]


def test_a_width_given_as_four_times_itself_is_nanogpts(tmp_path):
    write_checkpoint(tmp_path / "ckpt.pt", gpt2(n_inner=64))
    assert read_checkpoint(tmp_path / "ckpt.pt").model.config.n_inner is None


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "ckpt.pt", gpt2())
    before = (tmp_path / "ckpt.pt").read_bytes()

    def fail(data: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path / "ckpt.pt", gpt2(), iter_num=3)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from sparse_coding.dictionaries import ReLU, ReLUSettings
from sparse_coding.dictionaries.normalise import scaling
from sparse_coding.errors import UserError
from sparse_coding.formats.saelens import Normalised, load_dictionary, save_dictionary


@pytest.fixture(params=[{}, {"tied": True}, {"decoder_bias": False}], ids=["untied", "tied", "no bias"])
def dictionary(request, generator):
    settings = ReLUSettings(4, 6, **request.param)
    one = ReLU.single(settings, ReLU.initial(settings, generator))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return one


def test_a_saved_dictionary_opens_again_with_the_scale_folded_in(dictionary, tmp_path, generator):
    save_dictionary(dictionary, "relu", tmp_path / "one", Normalised(scaling(3.0, 4), scaling(3.0, 4)))
    loaded = load_dictionary(tmp_path / "one")
    x = torch.randn(5, 4, generator=generator)
    assert_close(loaded.encode(x), dictionary.encode(3.0 * x))
    assert not loaded.encode(x).requires_grad
    assert_close(loaded(x), dictionary(3.0 * x) / 3.0)


def test_the_files_say_what_saelens_v6_reads(dictionary, tmp_path):
    save_dictionary(
        dictionary, "relu", tmp_path, metadata={"model_name": "gpt2", "hook_name": "blocks.2.mlp.hook_post"}
    )
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "standard"
    assert (config["d_in"], config["d_sae"], config["dtype"]) == (4, 6, "float32")
    assert config["apply_b_dec_to_input"] is dictionary.settings.decoder_bias
    assert config["metadata"]["hook_name"] == "blocks.2.mlp.hook_post"
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "W_enc": (4, 6),
        "b_enc": (6,),
        "W_dec": (6, 4),
        "b_dec": (4,),
    }
    x = torch.ones(1, 4)  # SAELens's own formula for architecture "standard"
    centred = x - tensors["b_dec"] * config["apply_b_dec_to_input"]
    f = torch.relu(centred @ tensors["W_enc"] + tensors["b_enc"])
    assert_close(f @ tensors["W_dec"] + tensors["b_dec"], dictionary(x))


def test_damaged_and_foreign_folders_are_one_clear_error(dictionary, tmp_path):
    with pytest.raises(UserError, match=r"no cfg\.json"):
        load_dictionary(tmp_path)
    save_dictionary(dictionary, "relu", tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        load_dictionary(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(UserError, match="not written by this project"):
        load_dictionary(tmp_path)

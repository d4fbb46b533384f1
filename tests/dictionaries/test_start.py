from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import (
    BatchTopK,
    BatchTopKSettings,
    Gated,
    GatedSettings,
    JumpReLU,
    JumpReLUSettings,
    MatchingPursuit,
    MatchingPursuitSettings,
    ReLU,
    ReLUSettings,
    Sample,
    TopK,
    TopKSettings,
)
from sparse_coding.dictionaries.geometric_median import geometric_median
from sparse_coding.dictionaries.start import MEDIAN_ROWS, initial_bias

D_IN, D_SAE, D_OUT = 8, 20, 5


def rows(n=30, d=D_IN, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


X = rows(shift=1.0)
TARGET = rows(d=D_OUT, seed=1, shift=-2.0)
SAME, OTHER = Sample(X, X), Sample(X, TARGET)


def start(settings=None, sample=None, seed=0, **changes):
    settings = settings or ReLUSettings(**{"d_in": D_IN, "d_sae": D_SAE, **changes})
    return ReLU.initial(settings, torch.Generator().manual_seed(seed), sample)


def unit(values, dim=-1):
    return values / values.norm(dim=dim, keepdim=True)


@pytest.mark.parametrize("init", ["transpose", "orthogonal"])
@pytest.mark.parametrize("norm", [1.0, 0.1])
def test_the_encoder_is_the_transposed_decoder_of_the_asked_length(init, norm):
    unit_decoder = start(init=init, init_norm=norm)
    assert_close(unit_decoder["W_dec"].norm(dim=1), torch.ones(D_SAE))
    assert_close(unit_decoder["W_enc"], norm * unit_decoder["W_dec"].T)
    free = start(init=init, init_norm=norm, decoder="free")
    assert_close(free["W_dec"].norm(dim=1), torch.full((D_SAE,), norm))
    assert torch.equal(free["W_enc"], free["W_dec"].T)
    for values in (unit_decoder, free):
        assert not values["b_enc"].any()
        assert not values["b_dec"].any()


@pytest.mark.parametrize("decoder", ["unit", "free"])
@pytest.mark.parametrize("ratio", [1, 4, 16])
def test_without_a_length_x_hat_starts_as_long_as_x(decoder, ratio):
    """Half the latents are active: x_hat = n d_sae / (2 d_in) x, as far as random atoms are evenly spread."""
    values = start(init_norm=None, decoder=decoder, d_in=64, d_sae=64 * ratio)
    x = rows(200, d=64, seed=1)
    x_hat = torch.relu(x @ values["W_enc"]) @ values["W_dec"]
    along = float((x_hat * x).sum() / (x * x).sum())
    assert along == pytest.approx(min(1, ratio / 2), rel=0.05)


@pytest.mark.parametrize("init", ["transpose", "orthogonal"])
def test_the_encoder_shares_no_memory_with_the_decoder(init):
    values = start(init=init, decoder="free")
    before = values["W_dec"].clone()
    values["W_enc"].zero_()
    assert torch.equal(values["W_dec"], before)


def test_orthogonal_atoms_are_orthogonal_as_far_as_they_can_be():
    few = start(init="orthogonal", d_sae=6)["W_dec"]
    assert_close(few @ few.T, torch.eye(6), atol=1e-5, rtol=0)
    square = start(init="orthogonal", d_sae=D_IN)["W_dec"]
    assert_close(square @ square.T, torch.eye(D_IN), atol=1e-5, rtol=0)
    many, random = start(init="orthogonal")["W_dec"], start()["W_dec"]
    spread = [float(torch.linalg.cond(atoms)) for atoms in (many, random)]
    assert spread[0] < spread[1]


@pytest.mark.parametrize("init", ["transpose", "orthogonal", "data"])
def test_a_transcoder_draws_its_two_halves_apart_each_in_its_width(init):
    values = start(init=init, d_out=D_OUT, init_norm=0.5, sample=OTHER)
    assert values["W_enc"].shape == (D_IN, D_SAE)
    assert values["W_dec"].shape == (D_SAE, D_OUT)
    assert_close(values["W_enc"].norm(dim=0), torch.full((D_SAE,), 0.5))
    assert_close(values["W_dec"].norm(dim=1), torch.ones(D_SAE))
    same_width = start(init=init, d_out=D_IN, sample=Sample(X, rows(seed=4)))
    assert (same_width["W_enc"] - same_width["W_dec"].T).norm() > 1
    if init != "data":  # there the two come from one row
        cosines = (unit(same_width["W_enc"].T) * same_width["W_dec"]).sum(1)
        assert cosines.abs().mean() < 0.6


def test_kaiming_draws_uniformly_within_the_bound_of_the_fan_in():
    values = start(init="kaiming", decoder="free", d_in=30, d_sae=200)
    for name, fan_in in (("W_enc", 30), ("W_dec", 200)):
        bound = (6 / fan_in) ** 0.5
        assert values[name].abs().max() <= bound
        assert values[name].abs().max() > 0.95 * bound
        assert_close(values[name].std(), torch.tensor(bound / 3**0.5), rtol=0.05, atol=0)
    assert_close(start(init="kaiming")["W_dec"].norm(dim=1), torch.ones(D_SAE))


def test_data_gives_directions_of_rows_less_the_bias():
    values = start(init="data", b_dec_init="mean", init_norm=0.3, sample=SAME)
    assert_close(values["b_dec"], X.mean(0))
    cosines = values["W_dec"] @ unit(X - X.mean(0)).T
    assert_close(cosines.max(1).values, torch.ones(D_SAE))
    assert len(set(cosines.argmax(1).tolist())) > D_SAE / 3
    assert_close(values["W_enc"], 0.3 * values["W_dec"].T)
    plain = start(init="data", sample=SAME)["W_dec"]  # no bias: the rows as they are
    assert_close((plain @ unit(X).T).max(1).values, torch.ones(D_SAE))


def test_data_for_a_transcoder_pairs_input_and_target_of_one_row():
    values = start(init="data", d_out=D_OUT, sample=OTHER)
    from_target = (values["W_dec"] @ unit(TARGET).T).max(1)
    from_input = (unit(values["W_enc"].T) @ unit(X - X.mean(0)).T).max(1)
    assert_close(from_target.values, torch.ones(D_SAE))
    assert_close(from_input.values, torch.ones(D_SAE))
    assert torch.equal(from_target.indices, from_input.indices)


def test_data_that_is_zero_gives_random_directions():
    values = start(init="data", sample=Sample(torch.zeros(4, D_IN), torch.zeros(4, D_IN)))
    assert_close(values["W_dec"].norm(dim=1), torch.ones(D_SAE))
    assert torch.linalg.matrix_rank(values["W_dec"]) == D_IN


def test_sparsifys_start_gives_the_mean_target_and_centred_codes():
    settings = TopKSettings(D_IN, D_SAE, k=4, d_out=D_OUT, skip=True, decoder="free", init="zero", b_dec_init="mean")
    dictionary = TopK.init([settings], [torch.Generator().manual_seed(0)], sample=OTHER)
    assert not dictionary.W_dec.any()
    assert not dictionary.W_skip.any()
    assert_close(dictionary.b_dec[0], TARGET.mean(0))
    assert_close(dictionary.W_enc.norm(dim=1), torch.ones(1, D_SAE))
    assert_close(dictionary.pre_activations(X).mean(-2), torch.zeros(1, D_SAE), atol=1e-5, rtol=0)
    assert_close(dictionary(X), TARGET.mean(0).expand(1, 30, D_OUT))
    assert_close(dictionary.loss(X, TARGET).total, (TARGET - TARGET.mean(0)).square().sum(1).mean().unsqueeze(0))


@pytest.mark.parametrize("b_dec_init", ["zero", "mean"])
@pytest.mark.parametrize("subtract_b_dec", [True, False])
def test_the_zero_start_centres_the_codes_of_an_autoencoder_too(b_dec_init, subtract_b_dec):
    """Once: where b_dec is the mean and subtracted, the bias of the encoder has nothing left to do."""
    settings = ReLUSettings(
        D_IN, D_SAE, decoder="free", init="zero", b_dec_init=b_dec_init, subtract_b_dec=subtract_b_dec
    )
    dictionary = ReLU.init([settings], [torch.Generator().manual_seed(0)], sample=SAME)
    assert_close(dictionary.pre_activations(X).mean(-2), torch.zeros(1, D_SAE), atol=1e-5, rtol=0)


def test_the_start_of_2023_draws_encoder_and_decoder_apart():
    """Bounds and orthogonality: test_relu.py."""
    values = start(init="toy-2023")
    cosines = (unit(values["W_enc"].T) * values["W_dec"]).sum(1)
    assert cosines.abs().mean() < 0.6
    assert start(init="toy-2023", d_out=D_OUT)["W_dec"].shape == (D_SAE, D_OUT)


def test_biases_from_data():
    assert_close(start(b_dec_init="zero", sample=SAME)["b_dec"], torch.zeros(D_IN))
    assert_close(start(b_dec_init="mean", sample=SAME)["b_dec"], X.mean(0))
    found = start(b_dec_init="geometric-median", sample=SAME)["b_dec"]
    assert_close(found, geometric_median(X).float())
    assert found.dtype == torch.float32
    assert (found - X.mean(0)).norm() > 0.01
    assert_close(start(b_dec_init="mean", d_out=D_OUT, sample=OTHER)["b_dec"], TARGET.mean(0))
    assert_close(
        start(b_dec_init="geometric-median", d_out=D_OUT, sample=OTHER)["b_dec"], geometric_median(TARGET).float()
    )


def test_the_median_is_taken_of_the_first_rows_alone():
    target = torch.zeros(3 * MEDIAN_ROWS, 1)
    target[MEDIAN_ROWS:] = 1e9
    assert initial_bias("geometric-median", target, 1).abs().max() < 1e-6


def test_what_is_left_out_is_not_there():
    assert set(start(tied=True)) == {"W_dec", "b_enc", "b_dec"}
    assert set(start(decoder_bias=False)) == {"W_enc", "W_dec", "b_enc"}
    assert set(start(d_out=D_OUT, skip=True)) == {"W_enc", "W_dec", "b_enc", "b_dec", "W_skip"}
    assert start(d_out=D_OUT, skip=True)["W_skip"].shape == (D_OUT, D_IN)


def test_only_what_is_taken_from_data_needs_a_sample():
    def needs(**changes):
        return ReLU.needs_sample(ReLUSettings(D_IN, D_SAE, **changes))

    assert not any(needs(init=init) for init in ("transpose", "orthogonal", "kaiming", "toy-2023"))
    assert needs(init="data")
    assert needs(init="zero", decoder="free")
    assert needs(b_dec_init="mean")
    assert needs(b_dec_init="geometric-median")


def test_what_architectures_add():
    generator = torch.Generator().manual_seed(0)
    gated = Gated.initial(GatedSettings(D_IN, D_SAE), generator)
    assert "b_enc" not in gated
    assert all(not gated[name].any() and gated[name].shape == (D_SAE,) for name in ("b_gate", "b_mag", "r_mag"))
    jump = JumpReLU.initial(JumpReLUSettings(D_IN, D_SAE, initial_threshold=0.3), generator)
    assert_close(jump["threshold"], torch.full((D_SAE,), 0.3))
    assert not BatchTopK.initial(BatchTopKSettings(D_IN, D_SAE, k=2), generator)["threshold"].any()


@pytest.mark.parametrize("init", ["transpose", "orthogonal", "data"])
def test_matching_pursuit_starts_with_unit_atoms(init):
    settings = MatchingPursuitSettings(D_IN, D_SAE, k=2, init=init, b_dec_init="mean")
    values = MatchingPursuit.initial(settings, torch.Generator().manual_seed(0), SAME)
    assert set(values) == {"W_dec", "b_dec"}
    assert_close(values["W_dec"].norm(dim=1), torch.ones(D_SAE))
    assert_close(values["b_dec"], X.mean(0))
    if init == "data":
        assert_close((values["W_dec"] @ unit(X - X.mean(0)).T).max(1).values, torch.ones(D_SAE))
    without = MatchingPursuitSettings(D_IN, D_SAE, k=2, decoder_bias=False)
    assert set(MatchingPursuit.initial(without, torch.Generator())) == {"W_dec"}


def test_rows_of_the_data_are_taken_once_each():
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    one = ReLU.initial(ReLUSettings(6, 40, init="data"), torch.Generator().manual_seed(1), Sample(rows, rows))
    cosines = one["W_dec"] @ one["W_dec"].T - 2 * torch.eye(40)
    assert cosines.max() < 0.9999  # no twins

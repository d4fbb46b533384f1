from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import Moment, ReLU, ReLUSettings, convert_l1
from sparse_coding.dictionaries.relu import loss_weights
from sparse_coding.errors import UserError


def by_hand(**changes):
    """Two dims, three latents, weights small enough to follow with a pencil."""
    settings = ReLUSettings(2, 3, l1_coefficient=0.5, **changes)
    weights = {
        "W_enc": torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]]),
        "b_enc": torch.tensor([0.5, -1.0, 0.0]),
        "W_dec": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]),
    }
    if settings.decoder_bias:
        weights["b_dec"] = torch.tensor([1.0, 0.0])
    return ReLU.single(settings, weights)


def test_encode_decode_and_loss_by_hand():
    dictionary, x = by_hand(), torch.tensor([[2.0, 1.0]])
    # x - b_dec = (1, 1); z = (1 + .5, 2 - 1, -1 + 1 + 0) = (1.5, 1, 0); x_hat = (1 + 1.5, 1)
    assert_close(dictionary.encode(x), torch.tensor([[1.5, 1.0, 0.0]]))
    assert_close(dictionary(x), torch.tensor([[2.5, 1.0]]))
    losses = dictionary.loss(x)
    assert_close(losses.terms["squared_error"], torch.tensor(0.25))
    assert_close(losses.total, torch.tensor(0.25 + 0.5 * 2.5))


def test_the_three_scalings_of_the_l1_term_by_hand():
    x = torch.tensor([[2.0, 1.0]])
    assert_close(by_hand(l1_scaling="mean").loss(x).total, torch.tensor(0.25 / 2 + 0.5 * 2.5))
    assert_close(by_hand(l1_scaling="toy-2023").loss(x).total, torch.tensor(0.25 / 2 + 0.5 * 2.5 / 3))


def test_warm_up_of_sparsity_multiplies_the_l1_term_alone():
    losses = by_hand().loss(torch.tensor([[2.0, 1.0]]), moment=Moment(sparsity=0.2))
    assert_close(losses.total, torch.tensor(0.25 + 0.2 * 0.5 * 2.5))
    assert_close(losses.terms["l1"], torch.tensor(2.5))


def test_another_error_takes_the_place_of_the_settings_own():
    losses = by_hand().loss(torch.tensor([[2.0, 1.0]]), moment=Moment(error=lambda x_hat: x_hat.sum((-2, -1))))
    assert_close(losses.total, torch.tensor(3.5 + 0.5 * 2.5))
    assert_close(losses.terms["squared_error"], torch.tensor(0.25))


def test_a_skip_transcoder_by_hand():
    settings = ReLUSettings(2, 1, d_out=1, skip=True, l1_coefficient=0.5, l1_scaling="mean")
    values = {"W_enc": [[1.0], [-1.0]], "b_enc": [0.5], "W_dec": [[2.0]], "b_dec": [3.0], "W_skip": [[0.0, 0.25]]}
    dictionary = ReLU.single(settings, {name: torch.tensor(value) for name, value in values.items()})
    x, target = torch.tensor([[2.0, 1.0], [0.0, 4.0]]), torch.tensor([[6.0], [5.0]])
    # b_dec, of the output's width, is not subtracted: pre = (2 - 1 + .5, 0 - 4 + .5), f = (1.5, 0)
    # x_hat = (1.5 * 2 + 3 + .25, 0 + 3 + 1) = (6.25, 4); the mean over the one output dim divides by 1
    losses = dictionary.loss(x, target)
    assert_close(losses.f, torch.tensor([[1.5], [0.0]]))
    assert_close(losses.x_hat, torch.tensor([[6.25], [4.0]]))
    assert_close(losses.total, torch.tensor((0.0625 + 1) / 2 + 0.5 * 0.75))
    with pytest.raises(ValueError, match="needs the activations"):
        dictionary.decode(losses.f)


PLAIN = Moment(step=3, steps=10, sparsity=0.5)


def fused(settings, moment=PLAIN):
    stack = ReLU.init([settings], [torch.Generator().manual_seed(0)])
    x = torch.randn(5, settings.d_in, generator=torch.Generator().manual_seed(1))
    target = None if settings.d_out is None else torch.ones(5, settings.d_out)
    return stack.fused_gradients(x, target, moment, torch.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_out": 3, "skip": True},
        {"error": "fvu"},
        {"error": "l2"},
    ],
    ids=str,
)
def test_what_the_fused_step_cannot_say_falls_back_to_autograd(changes):
    assert fused(ReLUSettings(4, 6, **changes)) is None


def test_moments_that_the_fused_step_cannot_say_fall_back_to_autograd():
    dead = torch.zeros(1, 6, dtype=torch.bool)
    for revival in ("auxk", "ghost"):
        assert fused(ReLUSettings(4, 6, dead_latents=revival), PLAIN._replace(dead=dead)) is None
        assert fused(ReLUSettings(4, 6, dead_latents=revival)) is not None
    assert fused(ReLUSettings(4, 6), PLAIN._replace(error=lambda x_hat: x_hat.sum())) is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True},
        {"decoder_bias": False},
        {"decoder_bias": False, "subtract_b_dec": False},
        {"l1_scaling": "mean"},
        {"parts": (1, 3)},
        {"d_out": 3},
        {"d_out": 4},
        {"subtract_b_dec": False},
        {"decoder": "free"},
    ],
    ids=str,
)
def test_plain_settings_have_a_fused_step(changes):
    assert fused(ReLUSettings(4, 6, **changes)) is not None


def test_a_converted_coefficient_gives_a_proportional_loss():
    d_in, d_sae = 256, 512
    # stated in the reference: alpha here <-> alpha/n with the mean <-> alpha * d / n with the sum over dims
    assert convert_l1(1.0, "toy-2023", "mean", d_in, d_sae) == pytest.approx(1 / 512)
    assert convert_l1(1.0, "toy-2023", "sum", d_in, d_sae) == pytest.approx(256 / 512)
    assert convert_l1(8.6e-4, "mean", "sum", 512, 1024) == pytest.approx(0.44, rel=0.01)
    for source in ("sum", "mean", "toy-2023"):
        for target in ("sum", "mean", "toy-2023"):
            error_a, l1_a = loss_weights(source, d_in, d_sae)
            error_b, l1_b = loss_weights(target, d_in, d_sae)
            beta = convert_l1(0.3, source, target, d_in, d_sae)
            assert 0.3 * l1_a / error_a == pytest.approx(beta * l1_b / error_b)


def test_the_parallel_part_of_the_decoder_gradient_is_removed(generator):
    dictionary = ReLU.init([ReLUSettings(4, 6)], [generator])
    gradients = {"W_dec": torch.randn(1, 6, 4, generator=generator)}
    before = gradients["W_dec"].clone()
    dictionary.constrain_gradients_(gradients)
    along = (gradients["W_dec"] * dictionary.W_dec).sum(-1)
    assert_close(along, torch.zeros_like(along), atol=1e-6, rtol=0)
    removed = before - gradients["W_dec"]
    assert_close(removed, (removed * dictionary.W_dec).sum(-1, keepdim=True) * dictionary.W_dec)


def test_the_option_to_keep_the_parallel_part_keeps_it(generator):
    dictionary = ReLU.init([ReLUSettings(4, 6, remove_parallel_gradient=False)], [generator])
    gradients = {"W_dec": torch.randn(1, 6, 4, generator=generator)}
    before = gradients["W_dec"].clone()
    dictionary.constrain_gradients_(gradients)
    assert torch.equal(before, gradients["W_dec"])


def test_atoms_have_unit_norm_after_a_step(generator):
    dictionary = ReLU.init([ReLUSettings(4, 6)] * 2, [generator, generator])
    with torch.no_grad():
        dictionary.W_dec.mul_(3)
    dictionary.constrain_(dictionary.tensors())
    assert_close(dictionary.W_dec.norm(dim=-1), torch.ones(2, 6))


def test_tied_weights_have_no_encoder_of_their_own(generator):
    dictionary = ReLU.init([ReLUSettings(4, 6, tied=True)], [generator])
    assert {name for name, _ in dictionary.named_parameters()} == {"W_dec", "b_enc", "b_dec"}
    assert torch.equal(dictionary.encoder, dictionary.W_dec.mT)


def test_the_2023_start_is_torchs_linear_and_an_orthogonal_decoder(generator):
    start = ReLU.initial(ReLUSettings(8, 32, init="toy-2023", decoder_bias=False), generator)
    assert start["W_enc"].abs().max() <= 8**-0.5
    assert start["b_enc"].abs().max() <= 8**-0.5
    assert start["b_enc"].abs().max() > 0
    assert_close(start["W_dec"].norm(dim=1), torch.ones(32))
    narrow = ReLU.initial(ReLUSettings(8, 4, init="toy-2023", decoder_bias=False), generator)["W_dec"]
    assert_close(narrow @ narrow.T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_an_l1_coefficient_that_is_no_penalty_is_refused(value):
    with pytest.raises(UserError, match="L1 coefficient"):
        ReLUSettings(4, 4, l1_coefficient=value)


def test_tied_weights_with_the_2023_start_are_refused():
    with pytest.raises(UserError, match="tied"):
        ReLUSettings(4, 4, tied=True, init="toy-2023")

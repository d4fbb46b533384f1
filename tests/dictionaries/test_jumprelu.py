from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import JumpReLU, JumpReLUSettings, Moment
from tests.dictionaries.variants import gradients

X = torch.tensor([[1.0], [0.45], [0.55], [0.2]])
"""With threshold .5 and bandwidth .2 the second and third row lie in the window (.4, .6); first and third are on."""


def by_hand(**changes):
    settings = JumpReLUSettings(1, 1, bandwidth=0.2, l0_coefficient=0.3, decoder="free", decoder_bias=False, **changes)
    values = {"W_enc": [[1.0]], "b_enc": [0.0], "W_dec": [[2.0]], "threshold": [0.5]}
    return JumpReLU.single(settings, {name: torch.tensor(value) for name, value in values.items()})


def test_codes_and_loss_by_hand():
    dictionary = by_hand()
    losses = dictionary.loss(X)
    assert_close(losses.f, torch.tensor([[1.0], [0.0], [0.55], [0.0]]))
    assert_close(dictionary.encode(X), losses.f)
    # x_hat - x = 1, -.45, .55, -.2
    error = (1 + 0.45**2 + 0.55**2 + 0.2**2) / 4
    assert_close(losses.terms["squared_error"], torch.tensor(error))
    assert_close(losses.terms["penalty"], torch.tensor(0.5))
    assert_close(losses.total, torch.tensor(error + 0.3 * 0.5))
    assert_close(dictionary.loss(X, moment=Moment(sparsity=0.5)).total, torch.tensor(error + 0.15 * 0.5))


def test_gradients_by_hand_inside_the_window():
    dictionary = by_hand()
    found = gradients(dictionary, dictionary.loss(X))
    # d loss/d f = 2 (x_hat - x) 2 / 4 = 1, -.45, .55, -.2; d f/d threshold = -(.5 / .2) inside the window
    through_codes = -2.5 * (-0.45 + 0.55)
    # d L0/d threshold = -(1 / .2) for two rows of four
    through_count = 0.3 * (2 / 4) * -5
    assert_close(found["threshold"], torch.tensor([through_codes + through_count]))
    # pre gets H alone, and nothing from the count: rows 1 and 3
    assert_close(found["b_enc"], torch.tensor([1 + 0.55]))
    assert_close(found["W_enc"], torch.tensor([[1 * 1 + 0.55 * 0.55]]))
    assert_close(found["W_dec"], torch.tensor([[(1 * 2 * 1 + 0.55 * 2 * 0.55) / 4]]))


def test_a_target_for_l0_by_hand():
    dictionary = by_hand(target_l0=1.0)
    losses = dictionary.loss(X)
    assert_close(losses.terms["penalty"], torch.tensor((0.5 / 1 - 1) ** 2))
    # d penalty/d L0 = 2 (.5 - 1): too few are active, so the threshold is drawn down
    assert_close(gradients(dictionary, losses)["threshold"], torch.tensor([-0.25 + 0.3 * -1 * (2 / 4) * -5]))


def test_the_tanh_penalty_by_hand():
    dictionary = by_hand(penalty="tanh")
    losses = dictionary.loss(X)
    # 4 f ||atom|| = 8 f
    assert_close(losses.terms["penalty"], torch.tensor((math.tanh(8) + math.tanh(4.4)) / 4))
    # its slope goes to the codes: 8 at f = 0, 8 (1 - tanh(4.4)^2) at f = .55; both then through d f/d threshold
    slopes = 0.3 / 4 * (8 + 8 * (1 - math.tanh(4.4) ** 2))
    assert_close(gradients(dictionary, losses)["threshold"], torch.tensor([-0.25 - 2.5 * slopes]))


@pytest.mark.parametrize("pre", [0.39, 0.61, -0.5])
def test_thresholds_get_nothing_from_outside_the_window(pre):
    dictionary = by_hand()
    found = gradients(dictionary, dictionary.loss(torch.tensor([[pre]])))
    assert float(found["threshold"]) == 0


def test_a_threshold_that_is_met_is_not_passed():
    dictionary = by_hand()
    assert not dictionary.encode(torch.tensor([[0.5]])).any()
    assert not dictionary.loss(torch.tensor([[0.5]])).f.any()


def test_each_latent_and_member_has_its_own_window():
    members = [JumpReLUSettings(1, 2, bandwidth=width, l0_coefficient=1.0, decoder_bias=False) for width in (0.2, 0.4)]
    stack = JumpReLU.init(members, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    with torch.no_grad():
        stack.W_enc.fill_(1.0)
        stack.W_dec.fill_(0.0)
        stack.threshold.copy_(torch.tensor([[0.5, 1.0], [0.5, 1.0]]))
    # pre = .65 in both latents: .15 over the first threshold, inside half of .4 but not of .2; .35 under the second
    found = gradients(stack, stack.loss(torch.tensor([[0.65]])))
    assert_close(found["threshold"], torch.tensor([[0.0, 0.0], [-1 / 0.4, 0.0]]))

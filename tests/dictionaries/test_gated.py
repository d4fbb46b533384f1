from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import Gated, GatedSettings, Moment
from tests.dictionaries.variants import gradients

X = torch.tensor([[2.0, 1.0]])


def by_hand(stretch=1.0, **changes):
    """x - b_dec = (1, 1) and e = (1, 2, -1), so pi = (.5, -1, 1), magnitudes (2 * 1 + .5, 2 + 1, relu(-1 + .5))."""
    values = {
        "W_enc": [[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]],
        "b_gate": [-0.5, -3.0, 2.0],
        "r_mag": [math.log(2), 0.0, 0.0],
        "b_mag": [0.5, 1.0, 0.5],
        "W_dec": [[1.0, 0.0], [0.0, 1.0], [0.6 * stretch, 0.8 * stretch]],
        "b_dec": [1.0, 0.0],
    }
    settings = GatedSettings(2, 3, l1_coefficient=0.5, **changes)
    return Gated.single(settings, {name: torch.tensor(value) for name, value in values.items()})


def test_codes_need_an_open_gate_and_a_magnitude():
    dictionary = by_hand()
    assert_close(dictionary.encode(X), torch.tensor([[2.5, 0.0, 0.0]]))
    assert_close(dictionary(X), torch.tensor([[3.5, 0.0]]))


def test_loss_and_its_auxiliary_term_by_hand():
    # error (-1.5)^2 + 1; relu(pi) = (.5, 0, 1), so L1 1.5 and the gates alone give (1 + .5 + .6, .8)
    losses = by_hand().loss(X)
    assert_close(losses.terms["squared_error"], torch.tensor(3.25))
    assert_close(losses.terms["l1_gate"], torch.tensor(1.5))
    assert_close(losses.terms["auxiliary"], torch.tensor(0.01 + 0.04))
    assert_close(losses.total, torch.tensor(3.25 + 0.5 * 1.5 + 0.05))
    assert_close(by_hand().loss(X, moment=Moment(sparsity=0.5)).total, torch.tensor(3.25 + 0.25 * 1.5 + 0.05))


def test_gradients_by_hand():
    dictionary = by_hand()
    found = gradients(dictionary, dictionary.loss(X))
    # the decoder learns from the reconstruction alone: f times 2 (x_hat - x) = 2 (1.5, -1)
    assert_close(found["W_dec"], torch.tensor([[7.5, -5.0], [0.0, 0.0], [0.0, 0.0]]))
    # gates learn from L1 (.5 each where open) and the auxiliary error 2 (.1, -.2) along their atoms
    assert_close(found["b_gate"], torch.tensor([0.5 + 0.2, 0.0, 0.5 + 0.2 * 0.6 - 0.4 * 0.8]))
    # magnitudes learn from the reconstruction; r_mag through exp(r_mag) e = 2
    assert_close(found["b_mag"], torch.tensor([3.0, 0.0, 0.0]))
    assert_close(found["r_mag"], torch.tensor([6.0, 0.0, 0.0]))
    # b_dec: directly, through the magnitude of latent 0, and through both open gates, but not inside the auxiliary
    # term. d/dx of latent 0: 3 * 2 + .7 by column (1, 0); of latent 2: .3 by column (-1, 0); minus both.
    assert_close(found["b_dec"], torch.tensor([3.0 - 6.7 + 0.3, -2.0]))


def test_an_auxiliary_term_that_is_not_frozen_trains_the_decoder():
    dictionary = by_hand(frozen_auxiliary=False)
    found = gradients(dictionary, dictionary.loss(X))
    assert_close(found["W_dec"], torch.tensor([[7.5 + 0.1, -5.0 - 0.2], [0.0, 0.0], [0.2, -0.4]]))
    assert_close(found["b_dec"], torch.tensor([3.0 - 6.7 + 0.3 + 0.2, -2.0 - 0.4]))


@pytest.mark.parametrize("frozen", [True, False])
def test_the_skip_of_a_transcoder_is_frozen_in_the_auxiliary_term_too(frozen):
    """One latent, x = 2: pi = 1, f = 3, x_hat = 3 + 1 - 2 = 2, and from the gate 1 + 1 - 2 = 0; the target is 1."""
    settings = GatedSettings(1, 1, d_out=1, skip=True, frozen_auxiliary=frozen)
    values = {"W_enc": 1.0, "b_gate": -1.0, "r_mag": 0.0, "b_mag": 1.0, "W_dec": 1.0, "b_dec": 1.0, "W_skip": -1.0}
    shaped = {name: torch.full((1, 1) if name.startswith("W") else (1,), value) for name, value in values.items()}
    dictionary = Gated.single(settings, shaped)
    losses = dictionary.loss(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    assert_close((losses.x_hat, losses.terms["auxiliary"]), (torch.tensor([[2.0]]), torch.tensor(1.0)))
    found = gradients(dictionary, losses)
    # x_hat - target is 1 and, from the gate, -1: times two, and times what multiplies each parameter
    for name, multiplier, from_gate in (("W_skip", 2, 2), ("b_dec", 1, 1), ("W_dec", 3, 1)):
        assert float(found[name]) == pytest.approx(2 * multiplier - (0 if frozen else 2 * from_gate)), name


def test_with_free_atoms_l1_counts_their_norms():
    assert_close(by_hand(3.0, decoder="free").loss(X).terms["l1_gate"], torch.tensor(0.5 * 1 + 1 * 3.0))
    assert_close(by_hand(3.0).loss(X).terms["l1_gate"], torch.tensor(1.5))


def test_the_auxiliary_term_is_measured_as_the_settings_say():
    assert_close(by_hand(error="l2").loss(X).terms["auxiliary"], torch.tensor(0.05**0.5))

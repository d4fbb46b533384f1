from __future__ import annotations

import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import Moment, ReLUApril, ReLUAprilSettings

X = torch.tensor([[2.0, 1.0], [0.0, 3.0]])


def by_hand(W_dec, **changes):
    settings = ReLUAprilSettings(2, 2, **{"l1_coefficient": 0.5, **changes})
    values = {"W_enc": [[1.0, 0.0], [0.0, 1.0]], "b_enc": [0.5, -2.0], "W_dec": W_dec, "b_dec": [1.0, 0.0]}
    return ReLUApril.single(settings, {name: torch.tensor(value) for name, value in values.items()})


def test_loss_by_hand_with_the_penalty_weighted_by_norms():
    # b_dec is not subtracted: pre = (2.5, -1), (.5, 1). Norms 2 and .5.
    # x_hat = (1, 5), (1.5, 1): errors 1 + 16, 2.25 + 4. Penalties 2.5 * 2, .5 * 2 + 1 * .5.
    dictionary = by_hand([[0.0, 2.0], [0.5, 0.0]])
    losses = dictionary.loss(X)
    assert_close(losses.f, torch.tensor([[2.5, 0.0], [0.5, 1.0]]))
    assert_close(losses.x_hat, torch.tensor([[1.0, 5.0], [1.5, 1.0]]))
    assert_close(losses.terms["squared_error"], torch.tensor((17 + 6.25) / 2))
    assert_close(losses.terms["penalty"], torch.tensor((5 + 1.5) / 2))
    assert_close(losses.total, torch.tensor(11.625 + 0.5 * 3.25))
    assert_close(dictionary.loss(X, moment=Moment(sparsity=0.1)).total, torch.tensor(11.625 + 0.1 * 0.5 * 3.25))


def test_the_norm_of_a_crosscoders_atom_is_the_sum_over_its_sites():
    # |3| + |4| = 7, not 5; the other atom 0.5
    losses = by_hand([[3.0, -4.0], [0.5, 0.0]], parts=(1, 1)).loss(X)
    assert_close(losses.terms["penalty"], torch.tensor((2.5 * 7 + 0.5 * 7 + 1 * 0.5) / 2))


def test_a_longer_atom_with_a_smaller_code_costs_the_same():
    one, other = by_hand([[0.0, 2.0], [0.5, 0.0]]), by_hand([[0.0, 2.0], [0.5, 0.0]])
    factors = torch.tensor([4.0, 0.25])
    with torch.no_grad():
        other.W_dec *= factors.unsqueeze(-1)
        other.W_enc /= factors
        other.b_enc /= factors
    assert_close(other.loss(X).total, one.loss(X).total)


def test_atoms_keep_their_norms_after_a_step_and_start_at_a_tenth():
    dictionary = by_hand([[0.0, 2.0], [0.5, 0.0]])
    dictionary.constrain_(dictionary.tensors())
    assert_close(dictionary.W_dec.norm(dim=1), torch.tensor([2.0, 0.5]))
    start = ReLUApril.initial(ReLUAprilSettings(8, 16), torch.Generator().manual_seed(0))
    assert_close(start["W_dec"].norm(dim=1), torch.full((16,), 0.1))
    assert torch.equal(start["W_enc"], start["W_dec"].T)
    assert not start["b_enc"].any()
    assert not start["b_dec"].any()

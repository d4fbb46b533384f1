from __future__ import annotations

import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import MatchingPursuit, MatchingPursuitSettings, TopK, TopKSettings


def by_hand(atoms, *ks, bias=None, residual_threshold=0.0):
    atoms = torch.tensor(atoms)
    members = [
        MatchingPursuitSettings(
            atoms.shape[1], len(atoms), k=k, residual_threshold=residual_threshold, decoder_bias=bias is not None
        )
        for k in ks
    ]
    stack = MatchingPursuit.init(members, [torch.Generator().manual_seed(0)] * len(ks))
    with torch.no_grad():
        stack.W_dec.copy_(atoms)
        if bias is not None:
            stack.b_dec.copy_(torch.tensor(bias))
    return stack


OBTUSE = [[1.0, 0.0], [-0.6, 0.8]]
"""x = (1, 1): takes 1 of the first, leaving (0, 1); .8 of the second, leaving (.48, .36); .48 of the first again."""


def test_codes_and_loss_by_hand_and_an_atom_may_be_chosen_twice():
    stack = by_hand(OBTUSE, 1, 2, 2)
    losses = stack.loss(torch.tensor([[1.0, 1.0]]))
    assert_close(losses.f, torch.tensor([[[1.0, 0.0]], [[1.0, 0.8]], [[1.0, 0.8]]]))
    assert_close(losses.total, torch.tensor([1.0, 0.6**2, 0.6**2]))
    assert_close(losses.x_hat[1], torch.tensor([[1 - 0.48, 1 - 0.36]]))
    three = by_hand([*OBTUSE, [0.0, -1.0]], 3)
    assert_close(three.encode(torch.tensor([[1.0, 1.0]])), torch.tensor([[[1.48, 0.8, 0.0]]]))


def test_the_bias_is_taken_off_first():
    stack = by_hand(OBTUSE, 2, bias=(1.0, -1.0))
    assert_close(stack.encode(torch.tensor([[2.0, 0.0]])), torch.tensor([[[1.0, 0.8]]]))
    assert_close(stack(torch.tensor([[2.0, 0.0]])), torch.tensor([[[2 - 0.48, 0 - 0.36]]]))


def test_a_row_stops_when_its_residual_is_short():
    stack = by_hand([*OBTUSE, [0.0, -1.0]], 3, residual_threshold=0.7)
    rows = torch.tensor([[1.0, 1.0], [2.0, 2.0]])  # residuals 1, .6; and twice that
    assert_close(stack.encode(rows), torch.tensor([[[1.0, 0.8, 0.0], [2.96, 1.6, 0.0]]]))


def test_nothing_is_chosen_where_no_atom_helps():
    stack = by_hand([[1.0, 0.0], [0.0, 1.0]], 2)
    losses = stack.loss(torch.tensor([[-1.0, -2.0]]))
    assert not losses.f.any()
    assert_close(losses.total, torch.tensor([5.0]))


def test_two_correlated_atoms_are_told_from_a_third_that_only_looks_like_one():
    """x = 5.12 a + .8 b, cos(a, b) = .6. The third has a product of 4.48 with x, b of 3.712, but once a is taken off
    nothing is left along the third. One product and a choice of the largest cannot know that."""
    atoms = [[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.8, 0.0, 0.6]]
    x = torch.tensor([[5.6, 0.64, 0.0]])
    f = by_hand(atoms, 2).encode(x)
    assert_close(f, torch.tensor([[[5.6, 0.512, 0.0]]]))
    encoder = TopK.init([TopKSettings(3, 3, k=2, tied=True)], [torch.Generator().manual_seed(0)])
    with torch.no_grad():
        encoder.W_dec.copy_(torch.tensor(atoms))
    assert (encoder.encode(x) != 0).tolist() == [[[True, False, True]]]


def test_gradients_run_through_all_rounds():
    """x_hat of two rounds by the first atom: by finite differences, off the sphere too."""
    stack, x = by_hand(OBTUSE, 2).double(), torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    stack.loss(x).total.sum().backward()
    step = torch.zeros_like(stack.W_dec)
    step[0, 0, 1] = 1e-6
    with torch.no_grad():
        base = stack.W_dec.clone()
        stack.W_dec.copy_(base + step)
        above = stack.loss(x).total
        stack.W_dec.copy_(base - step)
        below = stack.loss(x).total
    assert_close(stack.W_dec.grad[0, 0, 1], ((above - below) / 2e-6).squeeze(), rtol=1e-6, atol=1e-8)

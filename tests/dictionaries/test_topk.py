from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import Moment, TopK, TopKSettings
from tests.dictionaries.variants import gradients

X = torch.tensor([[3.0, -4.0, 1.0, 2.0]])


def by_hand(*ks, norms=(1.0, 1.0, 1.0, 1.0), **changes):
    """pre = x; x_hat = f where the norms are 1."""
    members = [TopKSettings(4, 4, k=k, decoder_bias=False, **changes) for k in ks]
    stack = TopK.init(members, [torch.Generator().manual_seed(0)] * len(ks))
    with torch.no_grad():
        stack.W_enc.copy_(torch.eye(4))
        stack.W_dec.copy_(torch.diag(torch.tensor(norms)))
    return stack


def test_the_k_largest_are_kept():
    losses = by_hand(2).loss(X)
    assert_close(losses.f, torch.tensor([[[3.0, 0.0, 0.0, 2.0]]]))
    assert_close(losses.total, torch.tensor([16.0 + 1]))


def test_members_of_different_k_share_a_stack():
    losses = by_hand(1, 3, 2).loss(X)
    kept = torch.tensor([[[3.0, 0, 0, 0]], [[3.0, 0, 1, 2]], [[3.0, 0, 0, 2]]])
    assert_close(losses.f, kept)
    assert_close(losses.total, torch.tensor([16.0 + 1 + 4, 16, 17]))


def test_a_negative_value_is_no_code_though_it_is_among_the_largest():
    f = by_hand(3).encode(torch.tensor([[-1.0, -2.0, -3.0, 5.0]]))
    assert_close(f, torch.tensor([[[0.0, 0.0, 0.0, 5.0]]]))


def test_the_largest_in_absolute_value_keep_their_sign():
    stack = by_hand(2, selection="abs")
    losses = stack.loss(X)
    assert_close(losses.f, torch.tensor([[[3.0, -4.0, 0.0, 0.0]]]))
    assert_close(losses.total, torch.tensor([1.0 + 4]))
    # a negative code learns: d loss / d x_hat = 2 (0 - ..) is zero there, so put the atom off first
    with torch.no_grad():
        stack.W_dec[0, 1, 1] = 0.5
    found = gradients(stack, stack.loss(X))  # x_hat_1 = -2, error 2
    assert_close(found["b_enc"], torch.tensor([[0.0, 2 * 2 * 0.5, 0.0, 0.0]]))


def test_the_largest_of_each_group():
    assert_close(by_hand(2, selection="group").encode(X), torch.tensor([[[3.0, 0.0, 0.0, 2.0]]]))
    # three groups of four latents: {0, 1}, {2}, {3}
    assert_close(by_hand(3, selection="group").encode(X), torch.tensor([[[3.0, 0.0, 1.0, 2.0]]]))
    assert_close(by_hand(1, 4, selection="group").encode(X), torch.tensor([[[3.0, 0, 0, 0]], [[3.0, 0, 1, 2]]]))
    low = torch.tensor([[-3.0, -4.0, 1.0, 2.0]])  # the best of a group may still be no code
    assert_close(by_hand(2, selection="group").encode(low), torch.tensor([[[0.0, 0.0, 0.0, 2.0]]]))


def test_free_atoms_count_by_what_they_would_add():
    norms = (1.0, 1.0, 10.0, 1.0)
    assert_close(by_hand(1, norms=norms, decoder="free").encode(X), torch.tensor([[[0.0, 0.0, 1.0, 0.0]]]))
    assert_close(by_hand(1, norms=norms).encode(X), torch.tensor([[[3.0, 0.0, 0.0, 0.0]]]))
    norms = (1.0, 0.5, 10.0, 1.0)
    both = by_hand(2, norms=norms, decoder="free", selection="abs").encode(X)
    assert_close(both, torch.tensor([[[3.0, 0.0, 1.0, 0.0]]]))


def test_multi_topk_adds_an_eighth_of_the_error_with_4k_latents():
    stack = by_hand(1, multi_topk=True, norms=(1.0, 1.0, 0.0, 1.0))
    losses = stack.loss(X.abs())  # (3, 4, 1, 2): the third is kept of four, not of three, but its atom is zero
    with torch.no_grad():
        stack.W_dec[0, 2, 2] = 1.0
    exact = stack.loss(X.abs())
    assert_close(losses.terms["multi_topk"], torch.tensor([1.0 / 8]))
    assert_close(exact.terms["multi_topk"], torch.tensor([0.0]))
    assert_close(losses.total, torch.tensor([9 + 1 + 4 + 1 / 8]))
    assert_close(losses.f, torch.tensor([[[0.0, 4.0, 0.0, 0.0]]]))


def test_k_comes_down_with_the_warm_up():
    """From min(d_sae, 10 d_in) = 4."""
    stack = by_hand(1, 3)
    x = torch.tensor([[4.0, 3.0, 2.0, 1.0]])

    def l0(sparsity):
        return (stack.loss(x, moment=Moment(sparsity=sparsity)).f != 0).sum((-2, -1)).tolist()

    assert l0(0.0) == [4, 4]
    assert l0(0.5) == [2, 4]  # 2.5 and 3.5, rounded to even
    assert l0(0.9) == [1, 3]
    assert l0(1.0) == [1, 3]
    assert (stack.encode(x) != 0).sum((-2, -1)).tolist() == [1, 3]


def test_auxk_is_on_and_half_of_the_width_takes_part():
    assert TopKSettings(4, 4, k=1).dead_latents == "auxk"
    stack = by_hand(1, auxk_coefficient=0.5)
    dead = torch.tensor([[False, True, True, True]])
    losses = stack.loss(X, moment=Moment(dead=dead))
    # f = (3, 0, 0, 0), e = (0, -4, 1, 2); the two largest dead ones give (0, 0, 1, 2), which leaves 16
    assert_close(losses.terms["auxk"], torch.tensor([16.0]))
    assert_close(losses.total, torch.tensor([21 + 0.5 * 16]))
    one = by_hand(1, auxk_coefficient=0.5, k_aux=1).loss(X, moment=Moment(dead=dead))
    assert_close(one.terms["auxk"], torch.tensor([16.0 + 1]))


def test_dead_latents_of_abs_topk_compete_by_size_and_keep_their_sign():
    stack = by_hand(1, selection="abs", k_aux=1)
    x = torch.tensor([[5.0, -4.0, 1.0, 2.0]])
    losses = stack.loss(x, moment=Moment(dead=torch.tensor([[False, True, True, True]])))
    assert_close(losses.terms["auxk"], torch.tensor([1.0 + 4]))  # -4 alone explains the first of (-4, 1, 2)


def test_dead_latents_compete_by_what_they_would_add():
    stack = by_hand(1, k_aux=1, decoder="free", norms=(1.0, 1.0, 10.0, 1.0))
    x = torch.tensor([[50.0, -4.0, 1.0, 2.0]])
    losses = stack.loss(x, moment=Moment(dead=torch.tensor([[False, True, True, True]])))
    assert_close(losses.terms["auxk"], torch.tensor([16.0 + 81 + 4]))  # (0, 0, 10, 0) for (-4, 1, 2)


@pytest.mark.parametrize("selection", ["topk", "abs", "group"])
def test_what_is_not_kept_gets_no_gradient(selection):
    stack = by_hand(2, selection=selection)
    with torch.no_grad():
        stack.W_dec.mul_(0.5)
    losses = stack.loss(X)
    found = gradients(stack, losses)
    assert_close(found["b_enc"] != 0, (losses.f != 0).any(-2))


def test_atoms_that_are_still_zero_are_ranked_by_their_pre_activations():
    """Else all would tie at 0, and the few that win the tie would win every later choice."""
    stack = by_hand(1, decoder="free", norms=(0.0, 0.0, 0.0, 0.0))
    pre = torch.tensor([[0.1, 3.0, 2.0, 0.5]])
    assert_close(stack.ranked(pre), pre.expand_as(stack.ranked(pre)))

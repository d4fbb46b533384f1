from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import Matryoshka, MatryoshkaSettings, Moment
from tests.dictionaries.variants import gradients

X = torch.tensor([[1.0, 2.0, 3.0, 4.0]])


def by_hand(k=4, bias=(0.0, 0.0, 0.0, 0.0), **changes):
    """pre = x - bias; x_hat = f + bias."""
    changes = {"group_fractions": (0.25, 0.25, 0.5), **changes}
    stack = Matryoshka.init([MatryoshkaSettings(4, 4, k=k, **changes)], [torch.Generator().manual_seed(0)])
    with torch.no_grad():
        stack.W_enc.copy_(torch.eye(4))
        stack.W_dec.copy_(torch.eye(4))
        stack.b_dec.copy_(torch.tensor(bias))
    return stack


def test_the_loss_is_the_sum_over_prefixes():
    # prefixes of 1, 2 and 4 latents leave (0 2 3 4), (0 0 3 4), nothing
    losses = by_hand().loss(X)
    assert_close(losses.total, torch.tensor([29.0 + 25 + 0]))
    assert_close(losses.terms["shortest_prefix"], torch.tensor([29.0]))
    assert_close(losses.terms["squared_error"], torch.tensor([0.0]))
    assert_close(losses.x_hat, X.unsqueeze(0))


def test_every_prefix_has_the_bias_once():
    losses = by_hand(bias=(0.0, 0.0, 1.0, 1.0)).loss(X)
    assert_close(losses.total, torch.tensor([4 + 4 + 9 + 4 + 9.0 + 0]))


def test_latents_are_chosen_once_over_all_prefixes():
    losses = by_hand(k=2).loss(X)  # the last two: the short prefixes have nothing
    assert_close(losses.f, torch.tensor([[[0.0, 0.0, 3.0, 4.0]]]))
    assert_close(losses.total, torch.tensor([30.0 + 30 + 5]))


def test_early_latents_learn_from_every_prefix_that_holds_them():
    stack = by_hand()
    found = gradients(stack, stack.loss(X))
    # d/d atom 0 = f_0 times 2 (x_hat - x) summed over all three prefixes; atom 2 is in the last alone, which is exact
    assert_close(found["W_dec"][0, 0], -2 * torch.tensor([0.0, 2, 3 + 3, 4 + 4]))
    assert_close(found["W_dec"][0, 1], -2 * 2 * torch.tensor([0.0, 0, 3, 4]))
    assert not found["W_dec"][0, 2:].any()


def test_one_prefix_is_batch_topk():
    from sparse_coding.dictionaries import BatchTopK, BatchTopKSettings

    generator = torch.Generator().manual_seed(3)
    nested = Matryoshka.init([MatryoshkaSettings(5, 9, k=2.5, group_fractions=(1.0,))], [generator])
    plain = BatchTopK(BatchTopKSettings(5, 9, k=2.5), {**nested.tensors(), **nested.state()}, {
        name: getattr(nested, name) for name in ("k", "auxk_coefficient")
    })  # fmt: skip
    x, dead = torch.randn(8, 5, generator=generator), torch.arange(9) > 6
    moment = Moment(step=2, steps=9, sparsity=0.5, dead=dead.unsqueeze(0))
    ours, theirs = nested.loss(x, moment=moment), plain.loss(x, moment=moment)
    assert_close(ours.total, theirs.total)
    assert_close(dict(ours.state), dict(theirs.state))


def test_fixed_prefixes_end_where_the_fractions_add_up_to():
    assert by_hand().ends(0) == by_hand().ends(7) == [1, 2, 4]
    assert Matryoshka.init([MatryoshkaSettings(4, 32, k=2)], [torch.Generator()]).ends(0) == [2, 4, 8, 16, 32]


def test_random_prefixes_are_a_function_of_the_step():
    settings = MatryoshkaSettings(4, 200, k=2, prefixes="random", n_prefixes=6)
    first, other = (Matryoshka.init([settings], [torch.Generator().manual_seed(seed)]) for seed in (0, 1))
    torch.manual_seed(1)
    drawn = [first.ends(step) for step in range(20)]
    torch.manual_seed(2)
    assert drawn == [other.ends(step) for step in range(20)]
    assert len({tuple(ends) for ends in drawn}) > 15
    for ends in drawn:
        assert len(ends) == 6
        assert ends == sorted(set(ends))
        assert ends[0] >= 1
        assert ends[-1] == 200


@pytest.mark.parametrize(("d_sae", "n_prefixes"), [(1, 1), (1, 5), (8, 1), (3, 10)])
def test_few_latents_or_one_random_prefix(d_sae, n_prefixes):
    settings = MatryoshkaSettings(4, d_sae, k=1, prefixes="random", n_prefixes=n_prefixes)
    stack = Matryoshka.init([settings], [torch.Generator().manual_seed(0)])
    assert stack.ends(3) == list(range(d_sae - min(n_prefixes, d_sae) + 1, d_sae + 1))
    assert stack.loss(X).total.isfinite().all()

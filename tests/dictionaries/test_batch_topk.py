from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import BatchTopK, BatchTopKSettings, Moment

X = torch.tensor([[3.0, 1.0], [2.0, 4.0]])


def by_hand(*ks, norms=(1.0, 1.0), **changes):
    """pre = x; x_hat = f where the norms are 1."""
    members = [BatchTopKSettings(2, 2, k=k, decoder_bias=False, **changes) for k in ks]
    stack = BatchTopK.init(members, [torch.Generator().manual_seed(0)] * len(ks))
    with torch.no_grad():
        stack.W_enc.copy_(torch.eye(2))
        stack.W_dec.copy_(torch.diag(torch.tensor(norms)))
    return stack


def advanced(stack, batches):
    """The thresholds after each batch."""
    found = []
    for step, x in enumerate(batches):
        for name, value in stack.loss(torch.tensor(x), moment=Moment(step, 10)).state.items():
            getattr(stack, name).copy_(value)
        found.append(stack.threshold.clone())
    return torch.stack(found)


def test_the_largest_of_the_whole_batch_are_kept():
    losses = by_hand(1.5).loss(X)  # three of the four
    assert_close(losses.f, torch.tensor([[[3.0, 0.0], [2.0, 4.0]]]))
    assert_close(losses.total, torch.tensor([(1.0 + 0) / 2]))


def test_members_of_different_k_share_a_stack():
    losses = by_hand(1, 2, 1.5, 1.25).loss(X)  # two, four, three, int(2.5)
    kept = [[[3.0, 0], [0, 4]], [[3.0, 1], [2, 4]], [[3.0, 0], [2, 4]], [[3.0, 0], [0, 4]]]
    assert_close(losses.f, torch.tensor(kept))
    assert_close(losses.total, torch.tensor([(1 + 4) / 2, 0, 1 / 2, (1 + 4) / 2]))
    assert_close(losses.state["threshold"], torch.tensor([[3.0] * 2, [1.0] * 2, [2.0] * 2, [3.0] * 2]))


def test_negative_values_are_no_codes():
    losses = by_hand(2).loss(torch.tensor([[3.0, -1.0], [-2.0, -4.0]]))
    assert_close(losses.f, torch.tensor([[[3.0, 0.0], [0.0, 0.0]]]))


def test_the_threshold_is_the_running_mean_of_the_smallest_code_kept():
    # k = 1 keeps two of each batch: the smaller of them are 3, 1, 5
    batches = [[[3.0, 1.0], [2.0, 4.0]], [[1.0, 0.0], [0.0, 6.0]], [[5.0, 7.0], [0.0, 0.0]]]
    found = advanced(by_hand(1), batches)
    means = [3.0, (0.99 * 3 + 1) / 1.99, (0.9801 * 3 + 0.99 * 1 + 5) / (0.9801 + 0.99 + 1)]
    assert_close(found[:, 0], torch.tensor(means).unsqueeze(1).expand(3, 2))


def test_a_batch_without_codes_leaves_the_threshold():
    found = advanced(by_hand(1), [[[3.0, 1.0], [2.0, 4.0]], [[-1.0, 0.0], [0.0, -6.0]]])
    assert_close(found[1], found[0])


def test_encoding_uses_the_threshold_and_so_no_other_row():
    stack = by_hand(1, 1)
    stack.threshold.copy_(torch.tensor([[2.0, 2.0], [0.5, 0.5]]))
    assert_close(stack.encode(X), torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[3.0, 1.0], [2.0, 4.0]]]))
    assert_close(stack.encode(X[:1]), torch.tensor([[[3.0, 0.0]], [[3.0, 1.0]]]))


def test_free_atoms_are_compared_with_the_threshold_by_what_they_would_add():
    """Chosen by pre times norm, so the threshold is a value of that too: else latents with long atoms, chosen in
    training for small codes, would drag the threshold of all others down."""
    stack = by_hand(1, norms=(0.5, 2.0), decoder="free")
    losses = stack.loss(X)  # (1.5, 2), (1, 8): the second of each row
    assert_close(losses.f, torch.tensor([[[0.0, 1.0], [0.0, 4.0]]]))
    assert_close(losses.state["threshold"], torch.tensor([[2.0, 2.0]]))
    stack.threshold.copy_(torch.tensor([[1.9, 1.9]]))
    assert_close(stack.encode(X), losses.f)


def test_k_comes_down_with_the_warm_up():
    stack = by_hand(1)

    def l0(sparsity):
        return int((stack.loss(X, moment=Moment(sparsity=sparsity)).f != 0).sum())

    assert [l0(sparsity) for sparsity in (0.0, 0.5, 0.8, 1.0)] == [4, 3, 2, 2]  # int(2 k), k = 2, 1.5, 1.2, 1


@pytest.mark.parametrize("k", [2.3, 4.6, 1.1])
def test_a_k_that_float32_rounds_does_not_run_over(k):
    """2.3 in float32 is a little less than 2.3, but times ten it is rounded up to 23."""
    settings = BatchTopKSettings(5, 8, k=k, decoder_bias=False)
    stack = BatchTopK.init([settings], [torch.Generator().manual_seed(0)])
    f = stack.loss(torch.randn(10, 5, generator=torch.Generator().manual_seed(1)).abs()).f
    assert 0 < int((f != 0).sum()) <= round(10 * k)

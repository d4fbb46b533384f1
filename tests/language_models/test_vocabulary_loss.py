"""The loss in pieces equals torch's own in one, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_coding.language_models import vocabulary_loss
from sparse_coding.language_models.vocabulary_loss import linear_cross_entropy


def case(rows: int = 50, width: int = 6, vocabulary: int = 31, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("rows_at_once", [1, 7, 49, 50, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradients_are_those_of_the_whole(monkeypatch, rows_at_once, reduction):
    monkeypatch.setattr(vocabulary_loss, "CPU_BYTES", 4 * 31 * rows_at_once)
    hidden, weight, targets = case(dtype=torch.float32)
    (3 * linear_cross_entropy(hidden, weight, targets, reduction)).backward()
    found = hidden.grad, weight.grad
    whole_hidden, whole_weight = (x.detach().requires_grad_() for x in (hidden, weight))
    expected = F.cross_entropy(whole_hidden @ whole_weight.T, targets, reduction=reduction)
    (3 * expected).backward()
    assert linear_cross_entropy(hidden, weight, targets, reduction).item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(found, (whole_hidden.grad, whole_weight.grad), rtol=1e-5, atol=1e-6)


def test_by_hand():
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [torch.log(torch.tensor(3.0)), 1.0]])
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))  # logits 0 and log 3: p = 1/4, 3/4
    assert loss.item() == pytest.approx(0.287682, abs=1e-6)
    loss.backward()
    torch.testing.assert_close(hidden.grad, (0.25 * weight[0] - 0.25 * weight[1])[None])


def test_nothing_is_computed_for_what_learns_nothing():
    hidden, weight, targets = case(dtype=torch.float32)
    for unlearning in (torch.no_grad(), torch.inference_mode()):
        with unlearning, torch.profiler.profile() as profile:
            loss = linear_cross_entropy(hidden, weight, targets)
        assert not loss.requires_grad
        assert sum(event.count for event in profile.key_averages() if event.key == "aten::mm") == 1, "the logits alone"
    frozen = linear_cross_entropy(hidden, weight.detach(), targets)
    frozen.backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_under_autocast_products_are_low_and_gradients_keep_their_type():
    hidden, weight, targets = case(width=64, dtype=torch.float32)
    exact = linear_cross_entropy(hidden, weight, targets).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = linear_cross_entropy(hidden, weight, targets)
    low.backward()
    assert low.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert low.item() != exact
    assert low.item() == pytest.approx(exact, rel=0.01)


def test_a_token_of_no_probability_costs_its_logit_and_not_infinity():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [500.0]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([0])).item() == pytest.approx(500.0)

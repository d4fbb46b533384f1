from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import Lp, LpSettings, Moment


def by_hand(members=1, **changes):
    """f = x where x is positive."""
    settings = LpSettings(3, 3, **{"decoder_bias": False, "l1_coefficient": 0.5, "smoothing": 0.0, **changes})
    stack = Lp.init([settings] * members, [torch.Generator().manual_seed(0)] * members)
    with torch.no_grad():
        for parameter in (stack.W_enc, stack.W_dec):
            parameter.copy_(torch.eye(3))
    return stack


def penalty_of(rows, **changes):
    return by_hand(p_end=changes["p"], **changes).loss(torch.tensor(rows)).terms["penalty"]


def test_penalties_by_hand():
    rows = [[4.0, 1.0, 0.0], [9.0, 0.0, -5.0]]
    assert_close(penalty_of(rows, p=1.0), torch.tensor([(5 + 9) / 2]))
    assert_close(penalty_of(rows, p=0.5), torch.tensor([(2 + 1 + 3) / 2]))
    assert_close(penalty_of(rows, p=0.5, form="norm"), torch.tensor([(3**2 + 3**2) / 2]))
    # (2 + .25)^.5 - .25^.5 = 1.5 - .5; a code of zero costs nothing
    assert_close(penalty_of([[2.0, 0.0, 2.0]], p=0.5, smoothing=0.25), torch.tensor([2.0]))
    assert_close(penalty_of([[2.0, 0.0, 2.0]], p=0.5, smoothing=0.25, form="norm"), torch.tensor([4.0]))
    assert_close(penalty_of([[0.0, 0.0, -1.0]], p=0.5, form="norm"), torch.tensor([0.0]))


def test_loss_by_hand():
    dictionary = by_hand(p=0.5, p_end=0.5)
    rows = torch.tensor([[4.0, 1.0, 0.0], [9.0, 0.0, -5.0]])
    assert_close(dictionary.loss(rows).total, torch.tensor([25 / 2 + 0.5 * 3]))
    dictionary.penalty_scale.fill_(4.0)
    assert_close(dictionary.loss(rows).total, torch.tensor([25 / 2 + 4 * 0.5 * 3]))
    assert_close(dictionary.loss(rows, moment=Moment(sparsity=0.5)).total, torch.tensor([25 / 2 + 0.5 * 4 * 0.5 * 3]))


@pytest.mark.parametrize("form", ["sum", "norm"])
def test_gradients_are_finite_where_codes_are_zero(form):
    dictionary = by_hand(p=0.5, p_end=0.5, form=form)
    dictionary.loss(torch.tensor([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])).total.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in dictionary.parameters())


@pytest.mark.parametrize("form", ["sum", "norm"])
def test_the_slope_of_the_penalty_itself_is_0_at_0(form):
    """Else it would be infinite, and safe only behind a ReLU that masks rather than multiplies."""
    f = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 1.0]], requires_grad=True)
    by_hand(p=0.5, p_end=0.5, form=form).penalty(f, 0.5).backward()
    # d/df of sqrt(f) is 1/4 and 1/2; of (sqrt(4) + sqrt(1))^2 2 * 3 times that; both halved by the batch mean
    slope = torch.tensor([0.25, 0.0, 0.5]) / 2 * (6 if form == "norm" else 1)
    assert_close(f.grad, torch.stack([torch.zeros(3), slope]))


def test_the_schedule_by_hand():
    settings = LpSettings(2, 2, p=1.0, p_end=0.2, anneal_start=0.5, anneal_steps=4)
    # twenty steps: p = 1 for ten, then four stages of two and a half
    stages = [settings.stage(step, 20) for step in range(20)]
    assert stages == [0] * 10 + [1] * 3 + [2] * 2 + [3] * 3 + [4] * 2
    assert [settings.exponent(stage) for stage in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert settings.stage(20, 20) == 4
    fixed = LpSettings(2, 2, p=0.5, p_end=0.5)
    assert {fixed.stage(step, 20) for step in range(20)} == {0}
    assert fixed.exponent(0) == 0.5


def trained(stack, batches):
    """(penalty times its scale at each step, as it stands in the loss; the exponent at each step)."""
    steps, weighted, exponents = len(batches), [], []
    for step, x in enumerate(batches):
        losses = stack.loss(x, moment=Moment(step, steps))
        weighted.append(stack.penalty_scale * losses.terms["penalty"].detach())
        exponents.append(stack.settings.exponent(stack.settings.stage(step, steps)))
        for name, value in losses.state.items():
            getattr(stack, name).copy_(value)
    return torch.stack(weighted), exponents


@pytest.mark.parametrize("form", ["sum", "norm"])
@pytest.mark.parametrize(("steps", "stages"), [(100, 4), (60, 10), (12, 10), (5, 10)])
def test_the_penalty_is_continuous_when_p_changes(form, steps, stages):
    """On one batch again and again the penalty would stay as it is, so a jump could only come from p. Also where a
    stage is shorter than the ten steps of the comparison, and where it is shorter than one step."""
    stack = by_hand(form=form, smoothing=1e-3, anneal_start=0.3, anneal_steps=stages)
    x = torch.tensor([[4.0, 1.0, 0.0], [9.0, 0.1, -5.0]])
    weighted, exponents = trained(stack, [x] * steps)
    assert len(set(exponents)) > 2
    assert_close(weighted, weighted[:1].expand_as(weighted), rtol=1e-4, atol=0)


def test_the_scale_compares_the_ten_steps_before_the_change():
    stack = by_hand(members=2, p_end=0.5, anneal_start=0.5, anneal_steps=1)
    with torch.no_grad():
        stack.W_enc[1] *= 4  # codes four times as large
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(4, 3, generator=generator) for _ in range(40)]
    trained(stack, batches)
    assert stack.settings.stage(19, 40) == 0
    assert stack.settings.stage(20, 40) == 1
    seen = torch.stack(batches[10:20])
    at_one, at_half = seen.sum((-2, -1)).sum(), seen.sqrt().sum((-2, -1)).sum()
    assert_close(stack.penalty_scale, torch.stack([at_one / at_half, 2 * at_one / at_half]))
    assert not stack.compared.any()


def test_a_member_without_codes_keeps_its_scale():
    stack = by_hand(members=2, p_end=0.5, anneal_start=0.5, anneal_steps=1)
    with torch.no_grad():
        stack.b_enc[1] = -100
    trained(stack, [torch.ones(2, 3)] * 10)
    assert_close(stack.penalty_scale, torch.ones(2))
    trained(by_hand(), [torch.ones(2, 3)])  # a run of one step


def test_a_fixed_exponent_leaves_the_state_alone():
    stack = by_hand(p=0.5, p_end=0.5)
    assert all(not stack.loss(torch.ones(2, 3), moment=Moment(step, 30)).state for step in range(30))

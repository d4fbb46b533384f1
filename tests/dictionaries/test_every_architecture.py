"""One suite over the registry: a new architecture is tested on arrival (its settings go to variants.py)."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sparse_coding.dictionaries import ARCHITECTURES, Moment, architecture
from sparse_coding.errors import UserError
from sparse_coding.kernels.result import StepResult
from tests.dictionaries.variants import CASES, D_SAE, Case, gradients, moments, of_member

AUTOENCODERS = [case for case in CASES if case.settings.target_width == case.settings.d_in]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_architecture_is_covered_here():
    assert {case.name for case in CASES} == set(ARCHITECTURES)


# ---- a stack is its members


@every_case
@pytest.mark.parametrize("place", list(moments()))
def test_a_stack_computes_what_its_members_compute_alone(case, place):
    stack, (x, target), moment = case.stack(), case.data(), moments()[place]
    together = stack.loss(x, target, moment)
    together_gradients = gradients(stack, together)
    for index, settings in enumerate(case.members):
        single = stack.member(index, settings)
        alone = single.loss(x, target, of_member(moment, index))
        for field in ("total", "f", "x_hat"):
            assert_close(getattr(together, field)[index], getattr(alone, field), msg=lambda m, f=field: f"{f}: {m}")
        for field in ("terms", "state"):
            ours, theirs = getattr(together, field), getattr(alone, field)
            assert_close({name: value[index] for name, value in ours.items()}, dict(theirs))
        ours = {name: value[index] for name, value in together_gradients.items()}
        assert_close(ours, gradients(single, alone), rtol=1e-5, atol=1e-6)


@every_case
def test_the_settings_that_differ_matter(case):
    """Else the test above would not notice a hyperparameter that is read from the first member for all."""
    stack, (x, target) = case.stack(), case.data()
    ours = stack.member(2, case.members[2]).loss(x, target).total.item()
    as_first = stack.member(2, case.members[0]).loss(x, target).total.item()
    assert ours != pytest.approx(as_first, rel=1e-4)


@every_case
@pytest.mark.parametrize("place", ["settled", "warming"])
def test_losses_agree_with_the_maps_and_leave_the_dictionary_alone(case, place):
    stack, (x, target), moment = case.stack(), case.data(), moments()[place]
    before = {name: value.clone() for name, value in {**stack.tensors(), **stack.state()}.items()}
    losses = stack.loss(x, target, moment)
    assert losses.total.shape == (3,)
    assert all(value.shape == (3,) for value in losses.terms.values())
    assert_close(losses.x_hat, stack.decode(losses.f, x), rtol=1e-5, atol=1e-6)
    meant = x if target is None else target
    assert_close(losses.terms["squared_error"], (losses.x_hat - meant).square().sum(-1).mean(-1))
    assert set(losses.state) <= set(stack.state_names)
    for name, value in losses.state.items():
        assert value.shape == getattr(stack, name).shape
        assert not value.requires_grad
    after = {**stack.tensors(), **stack.state()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    if place == "settled" and case.name not in ("batchtopk", "matryoshka"):  # those choose over the whole batch
        assert_close(losses.f, stack.encode(x))


@pytest.mark.parametrize("case", [case for case in AUTOENCODERS if case.name != "matching-pursuit"], ids=str)
def test_an_autoencoder_may_be_given_its_input_as_target(case):
    stack, (x, _) = case.stack(), case.data()
    assert_close(stack.loss(x, x).total, stack.loss(x).total)


@every_case
def test_no_dead_latents_and_none_known_are_the_same(case):
    stack, (x, target) = case.stack(), case.data()
    none = torch.zeros(3, D_SAE, dtype=torch.bool)
    ours, theirs = stack.loss(x, target, Moment(dead=none)), stack.loss(x, target)
    assert_close(ours.total, theirs.total)
    assert_close(gradients(stack, ours), gradients(stack, theirs))


# ---- gradients


class HeldFixed:
    """Stands in for `stop_gradient`: notes what was stopped at the first evaluation, gives that back at every other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.values: list[Tensor] = []
        self.next: int | None = None
        for name, module in list(sys.modules.items()):
            if name.startswith("sparse_coding.dictionaries.") and hasattr(module, "stop_gradient"):
                monkeypatch.setattr(module, "stop_gradient", self)

    def __call__(self, values: Tensor) -> Tensor:
        if self.next is None:
            self.values.append(values.detach().clone())
            return self.values[-1]
        self.next += 1
        return self.values[self.next - 1]


@every_case
@pytest.mark.parametrize("place", list(moments()))
def test_gradcheck_of_the_loss_in_float64(case, place, monkeypatch):
    stack, (x, target), moment = case.stack(torch.float64), case.data(torch.float64), moments()[place]
    if hasattr(stack, "bandwidth"):
        stack.bandwidth.fill_(1e-9)  # nothing lies inside the window, so the straight-through estimate is the truth
    weights = torch.tensor([1.0, 0.7, 1.3], dtype=torch.float64)
    names, values = zip(*stack.named_parameters(), strict=True)
    stack.forward = lambda: (stack.loss(x, target, moment).total * weights).sum()
    ours = torch.autograd.grad(stack.forward(), values)

    held = HeldFixed(monkeypatch)
    stack.forward()

    def loss(*parameters: Tensor) -> Tensor:
        held.next = 0
        return torch.func.functional_call(stack, dict(zip(names, parameters, strict=True)), ())

    copies = tuple(value.detach().clone().requires_grad_() for value in values)
    assert_close(torch.autograd.grad(loss(*copies), copies), ours)  # the real stop_gradient holds fixed as this one
    assert torch.autograd.gradcheck(loss, copies, fast_mode=True, rtol=1e-5, atol=1e-8)


WARMING = Moment(step=4, steps=20, sparsity=0.4)


def fused(case: Case, dtype: torch.dtype = torch.float32) -> StepResult | None:
    return case.stack().fused_gradients(*case.data(), WARMING, dtype)


@pytest.mark.parametrize("case", [case for case in CASES if fused(case) is not None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_step_equals_autograd_of_the_loss(case, dtype):
    stack, (x, target), fast = case.stack(), case.data(), fused(case, dtype)
    losses = stack.loss(x, target, WARMING)
    slow, f = gradients(stack, losses), losses.f
    assert fast.gradients.keys() == slow.keys()
    l1, active = f.abs().sum(-1).mean(-1), (f != 0).sum(-2).float()
    if dtype == torch.float32:
        assert_close(fast.gradients, slow, rtol=1e-5, atol=1e-6)
        assert_close((fast.loss, fast.squared_error), (losses.total, losses.terms["squared_error"]))
        assert_close((fast.l1, fast.active), (l1, active))
        return
    for name, value in slow.items():
        error = (fast.gradients[name] - value).norm() / value.norm()
        assert error < 0.04, f"{name} is off by {error:.2%}"
    assert_close(fast.loss, losses.total, rtol=0.01, atol=0)


# ---- symmetry


def ordered(case: Case) -> bool:
    """Whether the order of latents has a meaning."""
    return case.name == "matryoshka" or getattr(case.settings, "selection", "") == "group"


@pytest.mark.parametrize("case", [case for case in CASES if not ordered(case)], ids=str)
@pytest.mark.parametrize("place", list(moments()))
def test_latents_may_be_renamed(case, place):
    stack, (x, target), moment = case.stack(), case.data(), moments()[place]
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(5))
    renamed = case.stack()
    with torch.no_grad():
        for name, value in renamed.named_parameters():
            assert (name in stack.latent_axes) == (D_SAE in value.shape), f"latent_axes: {name}"
            if name in stack.latent_axes:
                value.copy_(value.index_select(value.ndim + stack.latent_axes[name], order))
    ours = stack.loss(x, target, moment)
    if moment.dead is not None:
        moment = moment._replace(dead=moment.dead[:, order])
    theirs = renamed.loss(x, target, moment)
    assert_close(theirs.total, ours.total)
    assert_close(theirs.f, ours.f[..., order])


# ---- the registry


def test_an_unknown_architecture_names_the_near_one():
    with pytest.raises(UserError, match="did you mean 'relu'"):
        architecture("relo")

"""Every architecture: where training starts, what holds after each step, and what a restarted latent gets."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.dictionaries.variants import CASES, D_SAE, Case, sample

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_initial_values_come_from_the_generator_alone(case):
    settings, rows = case.settings, sample(case.settings)
    state = torch.get_rng_state()
    first = case.kind.initial(settings, torch.Generator().manual_seed(3), rows)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)  # the global state must not matter
    again = case.kind.initial(settings, torch.Generator().manual_seed(3), rows)
    other = case.kind.initial(settings, torch.Generator().manual_seed(4), rows)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in ("W_enc", "W_dec") if name in first)
    assert all(value.dtype == torch.float32 for value in first.values())
    if not case.kind.needs_sample(settings):
        without = case.kind.initial(settings, torch.Generator().manual_seed(3))
        assert all(torch.equal(first[name], without[name]) for name in first)


@every_case
def test_a_fresh_stack_holds_what_its_members_start_with(case):
    rows = sample(case.settings)
    stack = case.kind.init(case.members, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)], sample=rows)
    alone = case.kind.initial(case.members[1], torch.Generator().manual_seed(6), rows)
    values = {**stack.tensors(), **stack.state()}
    assert values.keys() == alone.keys()
    assert all(torch.equal(values[name][1], alone[name]) for name in alone)
    assert all(value.is_contiguous() for value in values.values())


def is_unit(case: Case) -> bool:
    return getattr(case.settings, "decoder", "unit") == "unit"


@every_case
def test_after_a_step_unit_atoms_are_of_norm_one_and_thresholds_are_not_negative(case):
    stack = case.stack()
    generator = torch.Generator().manual_seed(1)
    values = {name: 3 * torch.randn(value.shape, generator=generator) for name, value in stack.tensors().items()}
    before = {name: value.clone() for name, value in values.items()}
    stack.constrain_(values)
    for name, value in values.items():
        if name == "W_dec" and is_unit(case):
            assert_close(value.norm(dim=-1), torch.ones(3, D_SAE))
            assert_close(value * before[name].norm(dim=-1, keepdim=True), before[name])
        elif name == "threshold":
            assert torch.equal(value, before[name].clamp(min=0))
        else:
            assert torch.equal(value, before[name]), name
    zero = {name: torch.zeros_like(value) for name, value in values.items()}
    stack.constrain_(zero)
    assert all(not value.any() for value in zero.values())


@every_case
def test_only_the_part_of_a_gradient_along_a_unit_atom_is_removed(case):
    stack = case.stack()
    generator = torch.Generator().manual_seed(1)
    found = {name: torch.randn(value.shape, generator=generator) for name, value in stack.tensors().items()}
    before = {name: value.clone() for name, value in found.items()}
    stack.constrain_gradients_(found)
    atoms = stack.W_dec.detach()
    for name, value in found.items():
        if name == "W_dec" and is_unit(case):
            removed = before[name] - value
            assert_close((value * atoms).sum(-1), torch.zeros(3, D_SAE), atol=1e-5, rtol=0)
            assert_close(removed, (removed * atoms).sum(-1, keepdim=True) * atoms, atol=1e-5, rtol=0)
        else:
            assert torch.equal(value, before[name]), name


# ---- restarting latents


@every_case
def test_restarted_latents_point_along_the_rows_and_the_others_stay(case):
    single = case.stack().member(0, case.members[0])
    x, target = case.data()
    target = x if target is None else target
    latents = torch.tensor([7, 2])
    before = {name: value.clone() for name, value in single.tensors().items()}
    single.restart_(latents, x[:2], target[:2])
    others = [latent for latent in range(D_SAE) if latent not in (2, 7)]
    start = case.kind.initial(case.settings, torch.Generator().manual_seed(0), sample(case.settings))
    for name, value in single.tensors().items():
        if name not in single.latent_axes:
            assert torch.equal(value, before[name])
            continue
        axis = value.ndim + single.latent_axes[name]
        assert torch.equal(
            value.index_select(axis, torch.tensor(others)), before[name].index_select(axis, torch.tensor(others))
        )
        new = value.index_select(axis, latents)
        if name == "W_dec":
            length = 1.0 if is_unit(case) else before[name][others].norm(dim=1).mean()
            assert_close(new, length * target[:2] / target[:2].norm(dim=1, keepdim=True))
        elif name == "W_enc":
            length = 0.2 * before[name][:, others].norm(dim=0).mean()
            assert_close(new, length * (x[:2] / x[:2].norm(dim=1, keepdim=True)).T)
        elif name == "b_enc":
            assert not new.any()
        else:
            assert torch.equal(new, start[name][latents]), name


@every_case
def test_all_latents_may_be_restarted_at_once(case):
    single = case.stack().member(0, case.members[0])
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(D_SAE, case.settings.d_in, generator=generator)
    target = torch.randn(D_SAE, case.settings.target_width, generator=generator)
    single.restart_(torch.arange(D_SAE), x, x if case.settings.target_width == case.settings.d_in else target)
    assert all(value.isfinite().all() for value in single.tensors().values())
    assert (single.atoms.norm(dim=1) > 0).all()

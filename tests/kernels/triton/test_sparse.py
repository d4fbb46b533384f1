"""The sparse step in Triton against autograd of the loss: the cases of tests/kernels/test_sparse.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import Moment
from sparse_coding.training.stack import gradients_by_autograd
from tests.dictionaries.variants import CASES
from tests.dictionaries.variants import moments as all_moments
from tests.kernels.test_sparse import SETTINGS, assert_same_step, covered, stack_of

pytest.importorskip("triton")

from sparse_coding.kernels.triton import rows as rows_
from sparse_coding.kernels.triton import step

SPARSE = ("topk", "batchtopk", "matryoshka", "jumprelu", "relu")


@pytest.fixture(autouse=True)
def at_any_density(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "DENSEST", 1.0)


def put(stack: Any, device: str, *tensors: torch.Tensor | None) -> list[Any]:
    return [stack.to(device), *(one if one is None else one.to(device) for one in tensors)]


CASES = [case for case in CASES if case.name in SPARSE]
FIRST = {case.name: case for case in reversed(CASES)}


@pytest.mark.parametrize(
    ("case", "place"),
    [
        (case, place)
        for case in CASES
        for place in ("warming", "settled")
        if place == "warming" or case in FIRST.values()
    ],
    ids=str,
)
def test_every_case_equals_autograd_of_the_loss(case, place, device):
    stack, x, target = put(case.stack(), device, *case.data())
    if case.name == "relu":
        stack.fused_gradients = stack._sparse  # without the dense step behind it
    moment = all_moments()[place]
    moment = moment if moment.dead is None else moment._replace(dead=moment.dead.to(device))
    fast = stack.fused_gradients(x, target, moment, torch.float32)
    assert (fast is not None) == covered(case, moment)
    if fast is not None:
        assert_same_step(fast, gradients_by_autograd(stack, x, target, moment))


shapes = pytest.mark.parametrize(
    ("rows", "d_in", "d_sae", "n_members"),
    [(1, 3, 17, 1), (9, 5, 65, 2), (21, 33, 200, 1), (3, 20, 64, 4), (2, 9, 1100, 1)],
    ids=str,
)


@pytest.mark.parametrize("name", SPARSE)
@shapes
def test_odd_shapes_equal_autograd_of_the_loss(name, rows, d_in, d_sae, n_members, device, generator):
    """Remainders of every tile, several members; widths that are no power of two."""
    stack, x = put(
        stack_of(name, d_in, d_sae, n_members, **SETTINGS[name]), device, torch.randn(rows, d_in, generator=generator)
    )
    fast, slow = stack.fused_gradients(x, None, Moment(), torch.float32), gradients_by_autograd(stack, x)
    scale = max(1.0, slow.gradients["W_dec"].abs().max().item())
    assert_same_step(fast, slow, rtol=1e-5, atol=1e-6 * scale + 1e-5)


@pytest.mark.parametrize(("name", "tied"), [*((name, False) for name in SPARSE), ("topk", True)])
def test_bf16_is_no_farther_from_fp32_than_the_definitions_own_bf16(name, tied, device, generator):
    """What is off is mostly which latents are chosen, among those that are nearly equal: a matter of luck in each."""
    stack = put(stack_of(name, 24, 128, 1, tied=tied, **SETTINGS[name]), device)[0]
    moment = Moment(dead=torch.arange(128, device=device).remainder(3).eq(0).expand(1, -1))
    off = {name_: [0.0, 0.0] for name_ in stack.tensors()}
    for _ in range(3):
        x = torch.randn(64, 24, generator=generator).to(device)
        fast = stack.fused_gradients(x, None, moment, torch.bfloat16)
        assert fast is not None
        exact, rounded = (
            gradients_by_autograd(stack, x, None, moment, dtype) for dtype in (torch.float32, torch.bfloat16)
        )
        for name_, value in exact.gradients.items():
            for i, one in enumerate((fast, rounded)):
                off[name_][i] += ((one.gradients[name_] - value).norm() / value.norm()).item() / 3
        assert_close(fast.loss, exact.loss, rtol=1e-2, atol=0)
    for name_, (ours, theirs) in off.items():
        assert ours < 1.1 * theirs + 0.01, f"{name_} is off by {ours:.2%}, the definition in bf16 by {theirs:.2%}"
        assert ours < 0.2


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("bias", [-100.0, 0.0, 100.0])
def test_rows_without_any_active_latent_and_rows_where_all_could_be(name, bias, device, generator):
    stack = stack_of(name, 8, 40, 1, **SETTINGS[name])
    with torch.no_grad():
        stack.b_enc.copy_(bias + 0.1 * torch.randn(stack.b_enc.shape, generator=generator))
    stack, x = put(stack, device, torch.zeros(9, 8) if bias == 0 else torch.randn(9, 8, generator=generator))
    fast, slow = stack.fused_gradients(x, None, Moment(), torch.float32), gradients_by_autograd(stack, x)
    scale = max(1.0, slow.gradients["W_dec"].abs().max().item())
    assert_same_step(fast, slow, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", [name for name in SPARSE if name != "jumprelu"])  # by its definition NaN is not above
@pytest.mark.parametrize("broken", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_weight_that_is_no_number_makes_the_loss_of_its_own_member_none_either(name, broken, device, generator):
    stack = stack_of(name, 8, 40, **SETTINGS[name])
    with torch.no_grad():
        getattr(stack, broken)[0] = torch.nan
    stack, x = put(stack, device, torch.randn(6, 8, generator=generator))
    assert stack.fused_gradients(x, None, Moment(), torch.float32).loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", SPARSE)
def test_a_member_of_a_stack_is_what_it_is_alone(name, device, generator):
    stack, x = put(stack_of(name, 8, 72, 3, **SETTINGS[name]), device, torch.randn(20, 8, generator=generator))
    together = stack.fused_gradients(x, None, Moment(), torch.float32)
    values = {**stack.tensors(), **stack.state()}
    hyper = {n: v[1:2] for n, v in stack.named_buffers() if n not in stack.state_names}
    alone = type(stack)(stack.settings, {n: v[1:2].clone() for n, v in values.items()}, hyper)
    for name_, value in alone.fused_gradients(x, None, Moment(), torch.float32).gradients.items():
        assert torch.equal(together.gradients[name_][1], value[0]) or name_ == "b_dec"  # summed by torch
        assert_close(together.gradients[name_][1], value[0])


def test_a_topk_of_one_latent_and_a_latent_that_fires_on_every_row(device, generator):
    """k = 1; the hot latent has more entries than a segment holds."""
    stack = stack_of("topk", 6, 40, 1, k=1)
    with torch.no_grad():
        stack.b_enc[0, 7] = 100.0
    rows = 2 * rows_.SEGMENT + 5
    stack, x = put(stack, device, torch.randn(rows, 6, generator=generator))
    fast = stack.fused_gradients(x, None, Moment(), torch.float32)
    assert fast.active[0, 7] == rows
    assert_same_step(fast, gradients_by_autograd(stack, x), rtol=1e-4, atol=1e-4)

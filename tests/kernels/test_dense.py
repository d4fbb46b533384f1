"""The dense step, in C++ and in torch's operators: equal to autograd of the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import architecture
from sparse_coding.dictionaries.base import Moment
from sparse_coding.kernels import dense_native
from sparse_coding.kernels.dense import DenseProblem, dense_step
from sparse_coding.kernels.dense_operators import column_sums
from sparse_coding.metrics.reconstruction import evaluate_reconstruction
from sparse_coding.synthetic import World, WorldStream, preset
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.stack import Stack, gradients_by_autograd
from sparse_coding.training.sweep import grid

NAMES = ("relu", "relu-april", "gated")
BF16 = 0.04
"""Distance of bf16 gradients from those in fp32, over the latters' norm."""


@pytest.fixture(params=["native", "operators"])
def path(request, monkeypatch) -> str:
    """Both implementations in turn."""
    if request.param == "operators":
        monkeypatch.setattr(dense_native, "serves", lambda *_: False)
    elif dense_native.loaded() is None:
        pytest.skip("no C++ compiler")
    return request.param


@pytest.fixture
def dense_alone(monkeypatch):
    """ReLU takes the dense step however few latents are active."""
    kind = architecture("relu")
    monkeypatch.setattr(kind, "fused_gradients", kind._dense)  # pyright: ignore[reportAttributeAccessIssue]


def small(**more: Any) -> DenseProblem:
    """One row, one dim, two latents: e = (2, -1); x_hat = 2 of x = 1; the penalty is .5 on each."""
    values: dict[str, Any] = {
        "W_enc": torch.tensor([[[2.0, -1.0]]]),
        "b_enc": torch.zeros(1, 2),
        "W_dec": torch.ones(1, 2, 1),
    }
    x = torch.tensor([[1.0]])
    return DenseProblem(x, x, b_dec=None, subtracts=False, penalty=torch.tensor([[0.5, 0.5]]), **(values | more))


def test_a_relu_step_by_hand(path):
    result = dense_step(small(), torch.float32)
    assert_close(result.squared_error, torch.tensor([1.0]))
    assert_close(result.codes, torch.tensor([[2.0, 0.0]]))
    assert_close(result.active, torch.tensor([[1.0, 0.0]]))
    assert_close(result.gradients["W_dec"], torch.tensor([[[4.0], [0.0]]]))  # f * 2 * error
    assert_close(result.gradients["W_enc"], torch.tensor([[[2.5, 0.0]]]))  # x * (2 * error * W_dec + .5)
    assert_close(result.gradients["b_enc"], torch.tensor([[2.5, 0.0]]))


def test_a_gated_step_by_hand(path):
    """g = (2, 0), f = (relu(.5 * 2 + .25), 0): x_hat = 1.25, error .25; the gates' own x_hat = 2, error 1."""
    own = {"b_mag": torch.full((1, 2), 0.25), "r_mag": torch.full((1, 2), 0.5).log()}
    result = dense_step(small(**own), torch.float32)
    assert_close(result.squared_error, torch.tensor([0.0625]))
    assert_close(result.auxiliary, torch.tensor([1.0]))
    assert_close(result.gates, torch.tensor([[2.0, 0.0]]))
    assert_close(result.gradients["W_dec"], torch.tensor([[[0.625], [0.0]]]))  # f * 2 * error: sg in the other
    assert_close(result.gradients["b_enc"], torch.tensor([[2.5, 0.0]]))  # 2 * 1 * W_dec + .5
    assert_close(result.gradients["b_mag"], torch.tensor([[0.5, 0.0]]))  # 2 * .25 * W_dec
    assert_close(result.gradients["r_mag"], torch.tensor([[0.5, 0.0]]))  # .5 * exp(r_mag) e
    assert_close(result.gradients["W_enc"], torch.tensor([[[2.75, 0.0]]]))  # x * (2.5 + exp(r_mag) .5)


@pytest.mark.parametrize("n_rows", [128, 384, 100])
def test_column_sums_of_bf16_are_exact_for_counts_and_close_for_values(n_rows, generator):
    values = torch.rand(2, n_rows, 5, generator=generator).bfloat16()
    ones = (values > 0.5).bfloat16()
    assert torch.equal(column_sums(ones), ones.double().sum(1).float())
    assert_close(column_sums(values), values.double().sum(1).float(), rtol=5e-3, atol=0)
    assert column_sums(values).dtype == torch.float32


def made(name: str, members: int = 5, d_in: int = 20, d_sae: int = 70, **settings: Any) -> Any:
    """A stack whose parameters are all off their starting values."""
    kind, generator = architecture(name), torch.Generator().manual_seed(1)
    varied: list[dict[str, Any]] = [{"l1_coefficient": 0.1 + i, **settings} for i in range(members)]
    each = [kind.Settings(d_in, d_sae, **own) for own in varied]
    stack = kind.init(each, [torch.Generator().manual_seed(i) for i in range(members)])
    for value in stack.tensors().values():
        value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    return stack


def assert_near(fast, slow, bound: float) -> None:
    """Every number of a step: its distance from the definition's, over the latter's norm, at most `bound`."""
    assert fast.gradients.keys() == slow.gradients.keys()
    assert fast.terms.keys() == slow.terms.keys()
    pairs = {name: (fast.gradients[name], value) for name, value in slow.gradients.items()}
    pairs |= {name: (fast.terms[name], value) for name, value in slow.terms.items()}
    pairs |= {name: (getattr(fast, name), getattr(slow, name)) for name in ("loss", "squared_error", "l1", "active")}
    for name, (found, expected) in pairs.items():
        assert (found - expected).norm() <= bound * expected.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tied": True},
        {"tied": True, "decoder": "free", "subtract_b_dec": True},
        {"decoder": "unit"},
        {"decoder": "free", "parts": (8, 12)},
        {"decoder_bias": False},
        {"subtract_b_dec": False},
        {"d_out": 9},
        {"frozen_auxiliary": False},
        {"frozen_auxiliary": False, "tied": True},
    ],
    ids=str,
)
def test_loss_and_gradients_equal_those_of_the_definition(name, settings, dtype, path, dense_alone, generator):
    if "frozen_auxiliary" in settings and name != "gated":
        pytest.skip("a setting of gated alone")
    stack = made(name, **settings)
    x = torch.randn(131, 20, generator=generator)
    target = torch.randn(131, 9, generator=generator) if "d_out" in settings else None
    moment = Moment(sparsity=0.5)
    fast, slow = stack.fused_gradients(x, target, moment, dtype), gradients_by_autograd(stack, x, target, moment)
    assert_near(fast, slow, 2e-6 if dtype == torch.float32 else BF16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "tied"), [*((name, False) for name in NAMES), ("relu", True)])
def test_parameters_after_twenty_steps_equal_those_of_the_definition(
    name, tied, dtype, path, dense_alone, generator, monkeypatch
):
    members = grid(name, {"synthetic": 16}, [2], varied={"l1_coefficient": [0.1, 1.0]}, tied=tied)
    batches = torch.randn(20, 128, 16, generator=generator)
    fast = Stack(members, OptimizerSettings(), "cpu", dtype)
    slow = Stack(members, OptimizerSettings(), "cpu", torch.float32)
    for x in batches:
        fast.step({"synthetic": x}, 1.0)
    monkeypatch.setattr(architecture(name), "fused_gradients", lambda *_: None)
    for x in batches:
        slow.step({"synthetic": x}, 1.0)
    # Adam moves each weight by at most 20 * lr = .02; bf16 may turn the sign of gradients near zero
    tolerance = 2e-5 if dtype == torch.float32 else 8e-3
    for parameter, value in slow.dictionary.tensors().items():
        found = fast.dictionary.tensors()[parameter]
        assert_close(found, value, atol=tolerance, rtol=0)
        assert (found - value).norm() < (2e-5 if dtype == torch.float32 else 0.05) * value.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2, 97])
def test_a_few_rows_and_a_stack_of_one_member_work(name, rows, path, dense_alone, generator):
    stack = made(name, members=1, d_in=5, d_sae=7)
    x = torch.randn(rows, 5, generator=generator)
    fast, slow = stack.fused_gradients(x, None, Moment(), torch.float32), gradients_by_autograd(stack, x)
    for parameter, value in slow.gradients.items():
        assert_close(fast.gradients[parameter], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_neither_threads_nor_other_members_change_a_bit(name, dtype, dense_alone, generator):
    """Some members are taken whole by a thread, the last ones are shared by all."""
    if dense_native.loaded() is None:
        pytest.skip("no C++ compiler")
    before, stack = torch.get_num_threads(), made(name, d_in=70, d_sae=200)
    x = torch.randn(1000, 70, generator=generator)
    alone = stack.member(3, stack.settings)
    single = type(stack).single(stack.settings, {k: v.unsqueeze(0) for k, v in alone.tensors().items()})
    single.l1_coefficient = stack.l1_coefficient[3:4]
    try:
        found = []
        for threads, one in ((1, stack), (2, stack), (3, stack), (2, single)):
            torch.set_num_threads(threads)
            found.append(one.fused_gradients(x, None, Moment(), dtype))
    finally:
        torch.set_num_threads(before)
    for parameter, value in found[0].gradients.items():
        assert torch.equal(value, found[1].gradients[parameter])
        assert torch.equal(value, found[2].gradients[parameter])
        assert torch.equal(value[3:4], found[3].gradients[parameter])
    assert torch.equal(found[0].loss[3:4], found[3].loss)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_shows_in_the_loss(name, path, dense_alone, generator):
    stack = made(name)
    with torch.no_grad():
        stack.W_enc[2, 3, 4] = torch.nan
    result = stack.fused_gradients(torch.randn(10, 20, generator=generator), None, Moment(), torch.float32)
    assert result.loss.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("name", NAMES)
def test_a_bf16_run_ends_at_the_fvu_and_l0_of_the_definition(name, dense_alone, monkeypatch):
    settings = preset("quick")
    data, unseen = WorldStream(World(settings), 256), WorldStream(World(settings), 4096, split="held-out", noisy=False)

    def ends(dtype: torch.dtype) -> list[Any]:
        varied = {"l1_coefficient": [0.05, 0.2]}
        stack = Stack(grid(name, data.widths, [1], varied=varied), OptimizerSettings(), "cpu", dtype)
        for step in range(200):
            stack.step(data.batch(step), 1.0)
        rows = [unseen.batch(0)["synthetic"]]
        found = [evaluate_reconstruction(stack.trained(index), rows).result() for index in range(2)]
        return [one[key] for one in found for key in ("fvu", "l0")]

    fast = ends(torch.bfloat16)
    monkeypatch.setattr(architecture(name), "fused_gradients", lambda *_: None)
    assert fast == pytest.approx(ends(torch.float32), rel=0.01)


def test_what_only_the_definition_does_is_left_to_it(generator):
    x, dead = torch.randn(10, 20, generator=generator), torch.ones(5, 70, dtype=torch.bool)
    cases: list[tuple[dict[str, Any], Moment]] = [
        ({"error": "l2"}, Moment()),
        ({"dead_latents": "ghost"}, Moment(dead=dead)),
        ({"d_out": 20, "skip": True}, Moment()),
        ({}, Moment(error=lambda x_hat: x_hat.sum((1, 2)))),
    ]
    for settings, moment in cases:
        assert made("gated", **settings).fused_gradients(x, x, moment, torch.float32) is None

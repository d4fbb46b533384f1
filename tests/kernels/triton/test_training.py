"""Whole updates with the kernels beside updates by the definition: the same rows, order and optimiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from sparse_coding.dictionaries import architecture, dense
from sparse_coding.dictionaries.base import Moment
from sparse_coding.kernels import triton
from sparse_coding.kernels.triton import step
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.stack import Stack
from sparse_coding.training.sweep import grid
from tests.kernels.test_training import D_IN, METHODS, world

ROWS, D_SAE, SITE = 8, 24, "synthetic"
EVERY = tuple(METHODS)


@pytest.fixture(autouse=True)
def at_any_density(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "DENSEST", 1.0)
    monkeypatch.setattr(step, "DENSEST_ABOVE", 1.0)


def stack_of(
    name: str,
    device: str,
    clip: float | None = None,
    dtype: torch.dtype = torch.float32,
    varied: dict[str, list[float]] | None = None,
    **own: Any,
) -> Stack:
    known, fixed = METHODS.get(name, ({}, {})) if varied is None else (varied, {})
    members = grid(name, {SITE: D_IN}, [D_SAE / D_IN], varied=known, **{**fixed, **own})
    return Stack(members, OptimizerSettings(clip_norm=clip), device, dtype, DeadSettings(window=4 * ROWS))


def trained(stack: Stack, steps: int, device: str) -> dict[str, torch.Tensor]:
    """Its state after updates with warm-up of sparsity and, from the fifth on, latents that count as dead."""
    rows = world(ROWS * steps).to(device)
    for n in range(steps):
        moment = Moment(n, steps, min(1, (n + 2) / 3))
        stack.step({SITE: rows[ROWS * n : ROWS * (n + 1)]}, 1 / (1 + n), moment)
    return stack.state()


@pytest.mark.parametrize(
    ("name", "steps", "settings"),
    [
        *((name, 6 if name == "batchtopk" else 20, {}) for name in EVERY),  # matryoshka is batchtopk and more
        ("topk", 6, {"tied": True, "decoder": "free"}),
        ("matryoshka", 6, {"clip": 0.1}),
    ],
    ids=str,
)
def test_updates_end_where_the_definition_ends(name, steps, settings, device, monkeypatch):
    """Without clipping the kernels update the weights themselves; with it they hand gradients to the optimiser."""
    ends_where_the_definition_ends(name, steps, settings, device, monkeypatch)


DENSE = [
    ("relu", {"decoder_bias": False, "remove_parallel_gradient": False, "varied": {"l1_coefficient": [0.5, 1.0]}}),
    ("relu-april", {"varied": {"l1_coefficient": [0.5, 1.0]}}),
    ("relu-april", {"tied": True, "decoder": "unit", "subtract_b_dec": True}),
    ("relu-april", {"parts": {SITE: (6, 10)}}),
    ("gated", {"varied": {"l1_coefficient": [0.5, 1.0]}}),
    ("gated", {"tied": True, "decoder": "free", "frozen_auxiliary": False}),
    ("gated", {"clip": 0.1}),
]


@pytest.mark.parametrize(("name", "settings"), DENSE, ids=str)
def test_dense_updates_end_where_the_definition_ends(name, settings, device, monkeypatch):
    """The matrices are left to the kernels, but where gradients are clipped or an atom has a norm for each part."""
    monkeypatch.setattr(step, "DENSEST_ABOVE", 0.0)
    given, real = [], dense.dense_step
    monkeypatch.setattr(dense, "dense_step", lambda *a: given.append(real(*a)) or given[-1])
    ends_where_the_definition_ends(name, 6, settings, device, monkeypatch)
    matrices = {"W_dec"} if "tied" in settings else {"W_dec", "W_enc"}
    handed_out = matrices if "parts" in settings or "clip" in settings else set()
    assert [{"W_dec", "W_enc"} & one.gradients.keys() for one in given] == [handed_out] * 6


def ends_where_the_definition_ends(name, steps, settings, device, monkeypatch):
    fast = stack_of(name, device, **settings)
    assert (fast.learning is None) == ("clip" in settings)
    ours = trained(fast, steps, device)
    monkeypatch.setattr(architecture(name), "fused_gradients", lambda *_: None)
    monkeypatch.setattr(triton, "serves", lambda x: False)
    theirs = trained(stack_of(name, device, **settings), steps, device)
    assert {name.rsplit("/")[-1] for name in ours.keys() - theirs.keys()} == {"density"}
    for key, value in theirs.items():
        # Adam moves a weight by about the learning rate (.001) whatever the size of its gradient
        off, size = (ours[key].double() - value.double()).abs(), max(1, value.double().abs().max().item())
        assert off.quantile(0.95) < 1e-5 * size, key
        assert off.max() < 5e-3 * size, key


@pytest.mark.parametrize("name", ["topk", "jumprelu", "gated"])
def test_updates_in_bf16_end_near_those_in_fp32(name, device):
    """Adam moves a weight by at most about .001 a step; rounding may turn the sign of a gradient near 0."""
    stacks = [stack_of(name, device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    for stack in stacks:
        trained(stack, 6, device)
    ours, theirs = (stack.dictionary.tensors() for stack in stacks)
    for key, value in theirs.items():
        off = (ours[key] - value).abs()
        assert off.max() < 2 * 6 * 0.001, key
        assert off.quantile(0.9) < 1e-4, key


@pytest.mark.parametrize("name", ["topk", "relu-april"])
def test_moments_in_bf16_are_rounded_at_random_here_too(name, device):
    """Means of gradients near 0 are as far off as one of their own size; what counts is that none is left behind."""
    members = grid(
        name, {SITE: D_IN}, [D_SAE / D_IN], varied=METHODS.get(name, ({"l1_coefficient": [1.0, 2.0]}, {}))[0]
    )
    stacks = [
        Stack(members, OptimizerSettings(moments=moments), device, torch.float32, DeadSettings(window=10**9))
        for moments in ("bf16", "fp32")
    ]
    for stack in stacks:
        trained(stack, 12, device)
    (ours, exact), learning = (stack.optimizer.state() for stack in stacks), stacks[0].learning
    assert learning is not None
    for part in ("moment1", "moment2"):
        for matrix in ("W_enc", "W_dec"):
            kept, value = ours[part][matrix], exact[part][matrix]
            assert kept.dtype == torch.bfloat16
            assert ((kept.float() - value).norm() / value.norm()) < 0.01
            assert float(kept.float().sum() / value.sum()) == pytest.approx(1, abs=0.01) or part == "moment1"
    for matrix, value in stacks[1].dictionary.tensors().items():
        assert (stacks[0].dictionary.tensors()[matrix] - value).abs().max() < 2 * 12 * 0.001


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: to read a number, or to learn a shape from the data."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item", "unique", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(func.__name__.split(".")[0].lstrip("_").startswith(one.lstrip("_")) for one in self.WAITS), func
        found = func(*args, **(kwargs or {}))
        if torch.cuda.is_available() and isinstance(found, torch.Tensor) and found.device.type == "cpu":
            assert not any(isinstance(one, torch.Tensor) and one.is_cuda for one in args), func
        return found


@pytest.mark.parametrize("name", [*EVERY, "gated"])
def test_the_host_never_waits_for_the_device(name, device):
    error = "mse" if name == "gated" else "fvu"
    stack = stack_of(name, device, error=error, dead_latents="none" if name == "gated" else "auxk")
    trained(stack, 1, device)  # what is made once
    with NoWaiting():
        trained(stack, 2, device)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        torch.zeros(1).item()


def test_a_gpu_goes_by_the_density_of_the_last_line_of_the_log(device, monkeypatch):
    """ReLU is dense at first; what the log says decides from then on, and a restored stack goes on with that."""
    monkeypatch.setattr(step, "DENSEST_ABOVE", 0.3)
    taken, real = [], step.step
    monkeypatch.setattr(step, "step", lambda *a: taken.append(real(*a)) or taken[-1])
    stack = stack_of("relu", device)
    trained(stack, 1, device)
    assert stack.dictionary.density == 1.0
    assert taken == [None]
    stack.sums["l0"].fill_(stack.steps_summed * 0.2 * D_SAE)
    stack.averages()
    trained(stack, 1, device)
    assert taken[1] is not None
    again = stack_of("relu", device)
    again.load_state({name: value.clone() for name, value in stack.state().items()}, stack.steps_summed)
    assert again.dictionary.density == pytest.approx(0.2)
    trained(again, 1, device)
    assert taken[2] is not None


@pytest.mark.parametrize("name", ["topk", "gated"])
def test_the_copies_that_are_multiplied_are_those_of_the_weights(name, device):
    """Kept up by the kernels, made anew where anything else has changed a weight."""
    stack = stack_of(name, device, dtype=torch.bfloat16)
    weights, learning = stack.dictionary.tensors(), stack.learning
    assert learning is not None

    def copies() -> dict[str, torch.Tensor]:
        found = {name: learning.half(name, torch.bfloat16) for name in ("W_enc", "W_dec")}
        for name, value in found.items():
            assert torch.equal(value, weights[name].bfloat16()), name
        return found

    trained(stack, 1, device)
    before, first = {name: value.clone() for name, value in stack.state().items()}, copies()
    trained(stack, 1, device)
    assert all(value is first[name] for name, value in copies().items())
    stack.load_state(before, 0)
    copies()
    stack.restart_(0, torch.tensor([3], device=device), *(torch.ones(1, D_IN, device=device) for _ in range(2)))
    copies()


@pytest.mark.parametrize("name", ["topk", "gated"])
def test_a_batch_in_pieces_is_learnt_from_once(name, device):
    """Then the kernels give gradients, which are added up, instead of updating the weights at each piece."""
    whole, pieces = stack_of(name, device), stack_of(name, device)
    pieces.micro.pieces = 2
    ours, theirs = trained(pieces, 2, device), trained(whole, 2, device)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("name", [*EVERY, "gated"])
def test_a_step_can_be_captured_as_a_graph(name):
    """Replayed, it does what it does when it is launched."""
    stacks, x = [stack_of(name, "cuda") for _ in range(2)], world(ROWS).to("cuda")
    for stack in stacks:
        stack.dictionary.density = 0.0
    captured, launched = stacks
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step({SITE: x}, 1.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step({SITE: x}, 1.0)
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        launched.step({SITE: x}, 1.0)
    for key, value in launched.dictionary.tensors().items():
        assert torch.equal(captured.dictionary.tensors()[key], value), key

"""Adam in C++ gives the bits of torch's fused kernel."""

from __future__ import annotations

import pytest
import torch

from sparse_coding.kernels import adam_native
from sparse_coding.training.optimizer import OptimizerSettings, make_optimizer

SHAPES = {"W_enc": (48, 1024), "W_dec": (1024, 48), "b_enc": (1024,), "b_dec": (48,)}
LRS = [1e-2, 1e-3, 1e-2]


@pytest.fixture
def native():
    if adam_native.loaded() is None:
        pytest.skip("no C++ compiler, or another torch rounds otherwise")


def trained(settings: OptimizerSettings, shapes=SHAPES, threads: int = 1):
    """Three members after five steps: parameters, then the optimiser's state, in one list."""
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    drawn = [{name: torch.randn(3, *shape, generator=generator) for name, shape in shapes.items()} for _ in range(6)]
    parameters, *gradients = drawn
    optimizer = make_optimizer(parameters, LRS, settings)
    torch.set_num_threads(threads)
    try:
        for step, gradient in enumerate(gradients):
            optimizer.step(gradient, 1 / (1 + step))
    finally:
        torch.set_num_threads(before)
    return [*parameters.values(), *(value for part in optimizer.state().values() for value in part.values())]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_parameters_and_state_are_torchs(name, threads, native, monkeypatch):
    settings = OptimizerSettings(name, clip_norm=100.0)
    called = []
    real = adam_native.step
    monkeypatch.setattr(adam_native, "step", lambda *a: called.append(real(*a)) or called[-1])
    ours = trained(settings, threads=threads)
    assert called == [True] * 5
    monkeypatch.setattr(adam_native, "step", lambda *_: False)
    theirs = trained(settings)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [
        (OptimizerSettings(weight_decay=0.1), SHAPES),
        (OptimizerSettings(beta1=0.4), SHAPES),
        (OptimizerSettings(), {"W": (3, 5)}),
    ],
)
def test_what_torch_alone_does_is_left_to_it(settings, shapes, monkeypatch):
    ours = trained(settings, shapes)
    monkeypatch.setattr(adam_native, "step", lambda *_: False)
    assert all(torch.equal(one, other) for one, other in zip(ours, trained(settings, shapes), strict=True))


def test_a_gradient_that_is_no_number_stays_where_it_is(native):
    value = torch.zeros(2, 32)
    gradient = torch.ones(2, 32)
    gradient[0, 3] = torch.nan
    moments = {name: {"W": torch.zeros(2, 32)} for name in ("moment1", "moment2")}
    assert adam_native.step({"W": value}, {"W": gradient}, moments, {"W": torch.zeros(2)}, [1, 1], (0.9, 0.999), 1e-8)
    assert value.isnan().sum() == 1
    assert value[0, 3].isnan()
    assert torch.allclose(value[1], torch.tensor(-1.0))

"""One suite over the registry: a new architecture is tested on arrival."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import ARCHITECTURES, ReLUSettings, architecture
from sparse_coding.errors import UserError
from sparse_coding.training.stack import gradients_by_autograd

D_IN, D_SAE, ROWS = 6, 10, 12
VARIANTS = {
    "relu": [
        ReLUSettings(D_IN, D_SAE, l1_coefficient=0.1),
        ReLUSettings(D_IN, D_SAE, l1_coefficient=0.1, tied=True),
        ReLUSettings(D_IN, D_SAE, l1_coefficient=0.1, decoder_bias=False, l1_scaling="mean"),
        ReLUSettings(D_IN, D_SAE, l1_coefficient=0.3, decoder_bias=False, l1_scaling="toy-2023", init="toy-2023"),
    ],
}
CASES = [(name, settings) for name, variants in VARIANTS.items() for settings in variants]


def stack_of(name, settings, n_members=3, dtype=torch.float32):
    generators = [torch.Generator().manual_seed(seed) for seed in range(n_members)]
    stack = architecture(name).init([settings] * n_members, generators).to(dtype)
    with torch.no_grad():  # move off the special starting point: biases at zero hide mistakes
        for parameter in stack.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generators[0], dtype=dtype)
    return stack


def rows(dtype=torch.float32):
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(9), dtype=dtype)


def test_every_architecture_is_covered_here():
    assert set(VARIANTS) == set(ARCHITECTURES)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_stack_computes_what_its_members_compute_alone(name, settings):
    stack, x = stack_of(name, settings), rows()
    together = stack.loss(x)
    for index in range(3):
        alone = stack.member(index, settings).loss(x)
        assert_close(together.total[index], alone.total)
        assert_close(together.x_hat[index], alone.x_hat)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_gradcheck_of_the_loss_in_float64(name, settings):
    stack, x = stack_of(name, settings, n_members=2, dtype=torch.float64), rows(torch.float64)
    names, values = zip(*stack.named_parameters(), strict=True)

    def loss(*parameters):
        return torch.func.functional_call(stack, dict(zip(names, parameters, strict=True)), (x,)).sum()

    stack.forward = lambda x: stack.loss(x).total
    assert torch.autograd.gradcheck(loss, tuple(value.detach().requires_grad_() for value in values))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_fast_step_equals_autograd_of_the_loss(name, settings):
    stack, x = stack_of(name, settings), rows()
    if stack.fused_gradients is None:
        pytest.skip("no fast step")
    fast, slow = stack.fused_gradients(x, torch.float32), gradients_by_autograd(stack, x)
    assert fast.gradients.keys() == slow.gradients.keys()
    for key in slow.gradients:
        assert_close(fast.gradients[key], slow.gradients[key], msg=lambda text, key=key: f"{key}: {text}")
    for field in ("loss", "squared_error", "l1", "active"):
        assert_close(getattr(fast, field), getattr(slow, field))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_fast_step_in_bf16_stays_within_one_percent(name, settings):
    stack, x = stack_of(name, settings), rows()
    fast, slow = stack.fused_gradients(x, torch.bfloat16), gradients_by_autograd(stack, x)
    for key, value in slow.gradients.items():
        error = (fast.gradients[key] - value).norm() / value.norm()
        assert error < 0.02, f"{key} is off by {error:.2%}"
    assert_close(fast.loss, slow.loss, rtol=0.01, atol=0)


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_inference_tensors_give_the_same_codes_and_rescaled_reconstructions(name, settings, scale):
    kind, x = architecture(name), rows()
    trained = stack_of(name, settings).member(1, settings)
    inference = kind.from_inference(settings, trained.to_inference(scale))
    assert_close(inference.encode(x / scale), trained.encode(x))
    assert_close(inference(x / scale), trained(x) / scale)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_initial_values_come_from_the_generator_alone(name, settings):
    kind = architecture(name)
    first = kind.initial(settings, torch.Generator().manual_seed(3))
    torch.rand(5)  # the global state must not matter
    again = kind.initial(settings, torch.Generator().manual_seed(3))
    other = kind.initial(settings, torch.Generator().manual_seed(4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["W_dec"], other["W_dec"])


@pytest.mark.parametrize("field", ["d_in", "d_sae"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_widths_below_one_are_refused(name, field):
    with pytest.raises(UserError, match=field):
        architecture(name).Settings(**{"d_in": 4, "d_sae": 4, field: 0})


def test_an_unknown_architecture_names_the_near_one():
    with pytest.raises(UserError, match="did you mean 'relu'"):
        architecture("relo")

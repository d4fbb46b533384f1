"""Both implementations of the sparse step against autograd of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import Moment, architecture
from sparse_coding.kernels import compiled, sparse
from sparse_coding.kernels.result import StepResult
from sparse_coding.training.stack import gradients_by_autograd
from tests.dictionaries.variants import CASES, Case, moments

SPARSE = ("topk", "batchtopk", "matryoshka", "jumprelu", "relu")


def covered(case: Case, moment: Moment) -> bool:
    """What the sparse step is meant to take; the rest is autograd's."""
    settings = case.settings
    if case.name not in SPARSE or settings.skip or moment.error:
        return False
    if moment.dead is not None and settings.dead_latents == "ghost":
        return False
    own = {
        "topk": lambda: settings.selection != "group" and not settings.multi_topk,
        "jumprelu": lambda: settings.penalty == "l0",
        "relu": lambda: settings.decoder == "unit",
    }
    return own.get(case.name, lambda: True)()


def assert_same_step(fast: StepResult | None, slow: StepResult, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    assert fast is not None
    assert fast.gradients.keys() == slow.gradients.keys()
    for name, value in slow.gradients.items():
        assert_close(fast.gradients[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for field in ("loss", "squared_error", "l1", "active"):
        assert_close(getattr(fast, field), getattr(slow, field), msg=lambda m, f=field: f"{f}: {m}")
    for field in ("terms", "state"):
        assert_close(dict(getattr(fast, field)), dict(getattr(slow, field)))


@pytest.mark.parametrize("case", [case for case in CASES if case.name in SPARSE], ids=str)
@pytest.mark.parametrize("place", list(moments()))
def test_every_case_equals_autograd_of_the_loss(case, place, implementation):
    stack, (x, target), moment = case.stack(), case.data(), moments()[place]
    if case.name == "relu":
        stack.fused_gradients = stack._sparse  # without the dense step behind it
    fast = stack.fused_gradients(x, target, moment, torch.float32)
    assert (fast is not None) == covered(case, moment)
    if fast is not None:
        assert_same_step(fast, gradients_by_autograd(stack, x, target, moment))


def stack_of(name: str, d_in: int, d_sae: int, n_members: int = 2, **settings: Any) -> Any:
    """Members of random weights, with biases off zero."""
    kind = architecture(name)
    generators = [torch.Generator().manual_seed(seed) for seed in range(n_members)]
    stack = kind.init([kind.Settings(d_in, d_sae, **settings)] * n_members, generators)
    with torch.no_grad():
        for name_ in ("b_enc", *(["b_dec"] if hasattr(stack, "b_dec") else [])):
            getattr(stack, name_).add_(0.1 * torch.randn(getattr(stack, name_).shape, generator=generators[0]))
    return stack


SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"k": 5},
    "batchtopk": {"k": 4.5},
    "matryoshka": {"k": 4.5, "group_fractions": (0.3, 0.3, 0.4)},
    "jumprelu": {"initial_threshold": 1.2, "bandwidth": 0.3},
    "relu": {"l1_coefficient": 0.2},
}
shapes = pytest.mark.parametrize(
    ("rows", "d_in", "d_sae", "n_members"),
    [(1, 3, 17, 1), (7, 5, 65, 3), (250, 33, 200, 2), (193, 16, 600, 1), (64, 20, 64, 40)],
    ids=str,
)


@pytest.mark.parametrize("name", SPARSE)
@shapes
def test_odd_shapes_equal_autograd_of_the_loss(name, rows, d_in, d_sae, n_members, implementation, generator):
    """Several tiles of rows, several blocks of latents, remainders of both, several groups of members; two threads."""
    stack = stack_of(name, d_in, d_sae, n_members, **SETTINGS[name])
    x = torch.randn(rows, d_in, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fast = stack.fused_gradients(x, None, Moment(), torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert_same_step(fast, gradients_by_autograd(stack, x))


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("tied", [False, True])
def test_bf16_is_no_farther_from_fp32_than_the_definitions_own_bf16(name, tied, implementation, generator):
    """What is off is mostly which latents are chosen, among those that are nearly equal."""
    stack = stack_of(name, 32, 256, tied=tied, **SETTINGS[name])
    x = torch.randn(512, 32, generator=generator)
    moment = Moment(dead=torch.arange(256).remainder(3).eq(0).expand(2, -1))
    fast = stack.fused_gradients(x, None, moment, torch.bfloat16)
    assert fast is not None
    exact, rounded = (gradients_by_autograd(stack, x, None, moment, dtype) for dtype in (torch.float32, torch.bfloat16))
    for name_, value in exact.gradients.items():
        ours, theirs = ((one.gradients[name_] - value).norm() / value.norm() for one in (fast, rounded))
        assert ours < 1.1 * theirs + 0.01, f"{name_} is off by {ours:.2%}, the definition in bf16 by {theirs:.2%}"
        assert ours < 0.15
    assert_close(fast.loss, exact.loss, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_does_not_depend_on_who_computes_which_piece(dtype, implementation, generator):
    stack = stack_of("batchtopk", 32, 300, 3, k=6)
    x = torch.randn(500, 32, generator=generator)
    first = stack.fused_gradients(x, None, Moment(), dtype)
    assert first is not None
    for _ in range(3):
        again = stack.fused_gradients(x, None, Moment(), dtype)
        assert_close(again.gradients, first.gradients, rtol=0, atol=0)


@pytest.mark.parametrize("n_members", [1, 3, 20])  # shared, shared in part, each taken whole
def test_torchs_threads_and_threads_of_its_own_compute_the_same(n_members, generator):
    library = sparse.sparse_native.loaded()
    if library is None:
        pytest.skip("no C++ compiler here")
    stack, x = stack_of("batchtopk", 16, 200, n_members, k=6), torch.randn(300, 16, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pooled = stack.fused_gradients(x, None, Moment(), torch.float32)
        library.use_pool(None, None)
        own = stack.fused_gradients(x, None, Moment(), torch.float32)
    finally:
        torch.set_num_threads(threads)
        compiled.share_threads(library)
    assert pooled is not None
    assert own is not None
    assert_close(own.gradients, pooled.gradients, rtol=0, atol=0)


@pytest.mark.parametrize("name", SPARSE)
def test_a_member_of_a_stack_is_what_it_is_alone(name, implementation, generator):
    stack = stack_of(name, 16, 200, 3, **SETTINGS[name])
    x = torch.randn(128, 16, generator=generator)
    together = stack.fused_gradients(x, None, Moment(), torch.float32)
    kind = architecture(name)
    values = {**stack.tensors(), **stack.state()}
    alone = kind(stack.settings, {n: v[1:2].clone() for n, v in values.items()}, {
        n: v[1:2] for n, v in stack.named_buffers() if n not in stack.state_names
    })  # fmt: skip
    found = alone.fused_gradients(x, None, Moment(), torch.float32)
    assert found is not None
    for name_, value in found.gradients.items():
        # torch multiplies a stack of matrices in another order than one
        tolerance = 0 if implementation == "native" else 1e-5
        assert_close(together.gradients[name_][1], value[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_where_scores_tie_the_value_of_the_loss_is_that_of_the_definition(name, implementation):
    """Latents 2i and 2i + 1 are the same, so that any choice between them gives the same error."""
    stack = stack_of(name, 8, 64, k=3)
    with torch.no_grad():
        for value, axis in ((stack.W_enc, 2), (stack.b_enc, 1), (stack.W_dec, 1)):
            value.copy_(value.index_select(axis, torch.arange(64) // 2 * 2))
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    fast, slow = stack.fused_gradients(x, None, Moment(), torch.float32), gradients_by_autograd(stack, x)
    assert_close(fast.loss, slow.loss)
    assert_close(fast.gradients["b_dec"], slow.gradients["b_dec"], rtol=1e-4, atol=1e-5)
    assert_close(fast.active.sum(1), slow.active.sum(1))


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("bias", [-100.0, 0.0, 100.0])
def test_rows_without_any_active_latent_and_rows_where_all_could_be(name, bias, implementation, generator):
    stack = stack_of(name, 8, 96, **SETTINGS[name])
    with torch.no_grad():
        stack.b_enc.copy_(bias + 0.1 * torch.randn(stack.b_enc.shape, generator=generator))
    x = torch.zeros(30, 8) if bias == 0 else torch.randn(30, 8, generator=generator)
    fast, slow = stack.fused_gradients(x, None, Moment(), torch.float32), gradients_by_autograd(stack, x)
    scale = max(1.0, slow.gradients["W_dec"].abs().max().item())
    assert_same_step(fast, slow, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka", "relu"])
@pytest.mark.parametrize("broken", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_weight_that_is_no_number_makes_the_loss_of_its_own_member_none_either(
    name, broken, implementation, generator
):
    stack = stack_of(name, 8, 96, **SETTINGS[name])
    with torch.no_grad():
        getattr(stack, broken)[0] = torch.nan
    x = torch.randn(60, 8, generator=generator)
    fast = stack.fused_gradients(x, None, Moment(), torch.float32)
    assert fast is not None
    assert fast.loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("implementation_of", ["native", "operators"])
def test_a_dense_step_is_left_to_others(implementation_of, monkeypatch, generator):
    if implementation_of == "operators":
        monkeypatch.setattr(sparse.sparse_native, "loaded", lambda: None)
    elif sparse.sparse_native.loaded() is None:
        pytest.skip("no C++ compiler here")
    most = 24 if implementation_of == "native" else 5  # of 128
    x = torch.randn(200, 16, generator=generator)
    dense, thin = stack_of("jumprelu", 16, 128), stack_of("jumprelu", 16, 128, initial_threshold=2.5)
    relu = stack_of("relu", 16, 128)
    assert relu._sparse(x, None, Moment(), torch.float32) is None
    assert relu.fused_gradients(x, None, Moment(), torch.float32) is not None
    assert dense.fused_gradients(x, None, Moment(), torch.float32) is None
    assert thin.fused_gradients(x, None, Moment(), torch.float32) is not None
    assert stack_of("topk", 16, 128, k=most).fused_gradients(x, None, Moment(), torch.float32) is not None
    assert stack_of("topk", 16, 128, k=most + 1).fused_gradients(x, None, Moment(), torch.float32) is None
    assert stack_of("topk", 16, 128, k=4).fused_gradients(x.double(), None, Moment(), torch.float32) is None
    assert stack_of("topk", 16, 128, k=4).fused_gradients(x, None, Moment(), torch.float16) is None


def test_a_batch_that_its_sample_of_rows_misled_about_is_left_to_the_definition(generator):
    """BatchTopK takes a floor from a sample of 96 rows. With one thread those are every tenth row here; where they hold
    all that is large the floor is far too high, and nobody may be left out for that."""
    if sparse.sparse_native.loaded() is None:
        pytest.skip("no C++ compiler here")
    x = torch.randn(960, 4, generator=generator)
    stack = stack_of("batchtopk", 4, 64, 1, k=2, decoder_bias=False)
    assert_same_step(stack.fused_gradients(x, None, Moment(), torch.float32), gradients_by_autograd(stack, x))
    x[torch.arange(960) % 10 != 0] *= 1e-3
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert stack.fused_gradients(x, None, Moment(), torch.float32) is None
    finally:
        torch.set_num_threads(threads)

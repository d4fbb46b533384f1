from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.errors import UserError
from sparse_coding.training.optimizer import OPTIMIZERS, OptimizerSettings, make_optimizer
from sparse_coding.training.optimizers.muon import orthogonal
from sparse_coding.training.optimizers.rounding import rounded

LRS = [1e-3, 1e-2, 1e-3]
SHAPES = {"W": (5, 4), "b": (4,), "V": (4, 9)}
MATRICES = ("W", "V")


def tensors(generator, shapes=SHAPES):
    return {name: torch.randn(len(LRS), *shape, generator=generator) for name, shape in shapes.items()}


def scale_at(step: int) -> float:
    return 0.5 if step > 2 else 1.0


def trained(settings, start, gradients, lrs=LRS, matrices=MATRICES):
    """The parameters after a step for each of the gradients, and the optimiser."""
    parameters = {name: value.clone() for name, value in start.items()}
    optimizer = make_optimizer(parameters, lrs, settings, matrices)
    for step, gradient in enumerate(gradients):
        optimizer.step(gradient, scale_at(step))
    return parameters, optimizer


def alone_in_torch(make, start, gradients, member, clip_norm=None):
    """One member trained by an optimiser of torch, `make(parameters, lr)`."""
    parameters = {name: torch.nn.Parameter(value[member].clone()) for name, value in start.items()}
    optimizer = make(list(parameters.values()), LRS[member])
    for step, gradient in enumerate(gradients):
        for name, parameter in parameters.items():
            parameter.grad = gradient[name][member].clone()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip_norm)
        optimizer.param_groups[0]["lr"] = LRS[member] * scale_at(step)
        optimizer.step()
    return {name: value.detach() for name, value in parameters.items()}


TORCHS = {
    "adam": lambda decay: lambda p, lr: torch.optim.Adam(p, lr=lr, weight_decay=decay, fused=True),
    "adamw": lambda decay: lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=decay, fused=True),
    "sgd": lambda decay: lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=decay),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", TORCHS)
def test_every_member_is_torchs_own_with_its_own_rate_to_the_bit(name, weight_decay, generator):
    start, gradients = tensors(generator), [tensors(generator) for _ in range(6)]
    ours, _ = trained(OptimizerSettings(name, weight_decay=weight_decay), start, gradients)
    for member in range(3):
        theirs = alone_in_torch(TORCHS[name](weight_decay), start, gradients, member)
        for parameter, value in theirs.items():
            assert torch.equal(ours[parameter][member], value), (parameter, member)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_default_is_torchs_unfused_adam_too(weight_decay, generator):
    start, gradients = tensors(generator), [tensors(generator) for _ in range(6)]
    ours, _ = trained(OptimizerSettings(weight_decay=weight_decay), start, gradients)
    for member in range(3):
        adam = alone_in_torch(
            lambda p, lr: torch.optim.Adam(p, lr=lr, weight_decay=weight_decay), start, gradients, member
        )
        assert_close({name: value[member] for name, value in ours.items()}, adam)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("exact", [True, False])
def test_muon_is_torchs_on_matrices_and_adamw_elsewhere(exact, weight_decay, generator, monkeypatch):
    """torch orthogonalises in bf16 even on a CPU, which costs its updates 1 %; with ours in its place all is equal."""
    if exact:
        inner = "torch.optim._muon._zeropower_via_newtonschulz"
        monkeypatch.setattr(inner, lambda direction, *constants: orthogonal(direction[None])[0])
    start, gradients = tensors(generator), [tensors(generator) for _ in range(6)]
    ours, _ = trained(OptimizerSettings("muon", weight_decay=weight_decay), start, gradients)
    for member in range(3):
        for name in SHAPES:
            one, few = {name: start[name]}, [{name: gradient[name]} for gradient in gradients]
            kind = torch.optim.Muon if name in MATRICES else torch.optim.AdamW
            theirs = alone_in_torch(lambda p, lr, k=kind: k(p, lr=lr, weight_decay=weight_decay), one, few, member)
            moved, expected = ours[name][member] - start[name][member], theirs[name] - start[name][member]
            tolerance = 1e-4 if exact or name not in MATRICES else 0.02
            assert (moved - expected).norm() < tolerance * expected.norm()


RECORD = json.loads((Path(__file__).parent / "schedulefree_values.json").read_text())


@pytest.mark.parametrize("cases", [RECORD["cases"][first : first + 2] for first in (0, 2, 4)])
def test_schedule_free_is_the_package_schedulefree(cases):
    """Recorded by benchmarks/rivals/optimizers.py; the members are the cases of different learning rates."""

    def stacked(values):
        return {name: torch.tensor([value] * len(cases)) for name, value in values.items()}

    common = {name: cases[0][name] for name in ("beta1", "weight_decay", "warmup_steps")}
    settings = OptimizerSettings("schedule-free", **common)
    parameters = stacked(RECORD["start"])
    optimizer = make_optimizer(parameters, [case["lr"] for case in cases], settings)
    for step, gradient in enumerate(RECORD["gradients"]):
        optimizer.step(stacked(gradient), settings.scale(step, len(RECORD["gradients"])) * cases[0]["factors"][step])
        averaged = optimizer.averaged()
        for member, case in enumerate(cases):
            for name in parameters:
                exact = {"atol": 1e-7, "rtol": 1e-6}
                assert_close(parameters[name][member], torch.tensor(case["y"][step][name]), **exact)
                assert_close(averaged[name][member], torch.tensor(case["x"][step][name]), **exact)


def test_first_steps_by_hand():
    gradient = {"w": torch.tensor([[2.0, -3.0, 0.5]])}

    def moved(name, **settings):
        weights = {"w": torch.ones(1, 3)}
        make_optimizer(weights, [0.1], OptimizerSettings(name, **settings)).step(gradient, 1.0)
        return weights["w"]

    assert_close(moved("adam"), torch.tensor([[0.9, 1.1, 0.9]]))
    assert_close(moved("adamw", weight_decay=0.5), torch.tensor([[0.85, 1.05, 0.85]]))
    assert_close(moved("sgd"), torch.tensor([[0.8, 1.3, 0.95]]))
    assert_close(moved("sgd", weight_decay=0.5), torch.tensor([[0.75, 1.25, 0.9]]))
    assert_close(moved("signum"), torch.tensor([[0.9, 1.1, 0.9]]))
    assert_close(moved("signum", weight_decay=0.5), torch.tensor([[0.85, 1.05, 0.85]]))
    # z = x = 1 - 0.1 sign(g) after the first step, so y is the same
    assert_close(moved("schedule-free"), torch.tensor([[0.9, 1.1, 0.9]]))


def test_signum_follows_the_sign_of_the_average():
    weights = {"w": torch.zeros(1, 3)}
    optimizer = make_optimizer(weights, [1.0], OptimizerSettings("signum", momentum=0.75))
    for gradient in ([4.0, 4.0, 0.0], [-4.0, -2.0, 0.0]):  # averages 1, 1, 0 and then -0.25, 0.25, 0
        optimizer.step({"w": torch.tensor([gradient])}, 1.0)
    assert weights["w"].tolist() == [[0.0, -2.0, 0.0]]


def test_muon_by_hand(generator):
    """Of g = u s v^T the update is u v^T times what the quintic makes of the singular value 1."""
    u, v = (torch.nn.functional.normalize(torch.randn(1, n, 1, generator=generator), dim=1) for n in (8, 2))
    weights = {"W": torch.zeros(1, 8, 2)}
    make_optimizer(weights, [0.1], OptimizerSettings("muon"), ["W", "W_skip"]).step({"W": 7 * u @ v.mT}, 1.0)
    value = 1.0
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    assert_close(weights["W"], -0.1 * 2 * value * u @ v.mT)  # 2 = sqrt(8 / 2)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (1, 5)])
def test_orthogonal_brings_singular_values_near_1_and_keeps_the_directions(shape, generator):
    matrices = torch.randn(3, *shape, generator=generator)
    found = orthogonal(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ found @ vh.mT
    assert_close(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)
    assert torch.equal(orthogonal(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_rounding_at_random_is_right_on_average(generator):
    """To one of the two neighbours in bf16, the nearer the likelier; the same draw for the same update."""
    value = (torch.randn(64, 50, generator=generator) * torch.logspace(-8, 3, 50)).requires_grad_(False)
    counts = torch.arange(1.0, 2001.0)
    draws = torch.stack([rounded(value, count, 1).float() for count in counts])
    below = (value.view(torch.int32) & -0x10000).view(torch.float32)
    above = ((value.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((draws == below) | (draws == above)).all()
    share, expected = (draws == above).float().mean(0), ((value - below) / (above - below))
    assert (share - expected).abs().max() < 0.06  # five standard deviations of 2,000 draws
    assert abs(float((share - expected).mean())) < 1e-3
    assert torch.equal(rounded(value, counts[7], 1).float(), draws[7])
    assert not torch.equal(rounded(value, counts[7], 0).float(), draws[7])


def test_moments_in_bf16_follow_those_in_fp32(generator):
    """Rounded to the nearest, the mean of squares would stay where its first steps put it."""
    gradients = torch.randn(3000, 1, 8, 16, generator=generator) * torch.linspace(2, 0.5, 3000).view(-1, 1, 1, 1)
    found = []
    for moments in ("fp32", "bf16"):
        weights = {"W_dec": torch.zeros(1, 8, 16), "b_dec": torch.zeros(1, 16)}
        made = make_optimizer(weights, [1e-3], OptimizerSettings(moments=moments), {"W_dec"})
        for gradient in gradients:
            made.step({"W_dec": gradient, "b_dec": gradient[:, 0]}, 1.0)
        found.append((made.state(), weights))
    (exact, weights), (ours, theirs) = found
    assert ours["moment2"]["W_dec"].dtype == torch.bfloat16
    assert ours["moment2"]["b_dec"].dtype == torch.float32
    torch.testing.assert_close(ours["moment2"]["W_dec"].float(), exact["moment2"]["W_dec"], rtol=0.15, atol=0)
    assert float(ours["moment2"]["W_dec"].float().mean() / exact["moment2"]["W_dec"].mean()) == pytest.approx(
        1, abs=0.01
    )
    assert (theirs["W_dec"] - weights["W_dec"]).abs().max() < 0.02 * weights["W_dec"].abs().max()


@pytest.mark.parametrize("name", ["sgd", "signum", "muon", "schedule-free"])
def test_moments_in_bf16_are_adams(name):
    with pytest.raises(UserError, match="it is for adam, adamw"):
        OptimizerSettings(name, moments="bf16")


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_member_of_a_stack_is_the_member_alone(name, clip_norm, generator):
    shapes = {"W": (37, 53), "b": (53,), "V": (53, 37)}  # odd sizes: the ends of vector registers must not show
    start, gradients = tensors(generator, shapes=shapes), [tensors(generator, shapes=shapes) for _ in range(5)]
    settings = OptimizerSettings(name, weight_decay=0.1, clip_norm=clip_norm)
    together, optimizer = trained(settings, start, gradients)
    for member in range(3):
        own = {key: value[member : member + 1] for key, value in start.items()}
        few = [{key: value[member : member + 1] for key, value in gradient.items()} for gradient in gradients]
        alone, single = trained(settings, own, few, [LRS[member]])
        for key, value in alone.items():
            if name == "muon" and key in MATRICES:
                assert_close(together[key][member], value[0])
            else:
                assert torch.equal(together[key][member], value[0]), key
        if name == "schedule-free":
            for key, value in single.averaged().items():
                assert torch.equal(optimizer.averaged()[key][member], value[0])


def test_clipping_is_torchs_for_each_member(generator):
    start, gradients = tensors(generator), [tensors(generator) for _ in range(5)]
    for gradient in gradients:
        for value in gradient.values():
            value[0] *= 1e6
            value[2] *= 1e-3  # below the norm: not touched
    before = {name: value.clone() for name, value in gradients[0].items()}
    ours, _ = trained(OptimizerSettings("sgd", clip_norm=0.5), start, gradients)
    for member in range(3):
        theirs = alone_in_torch(TORCHS["sgd"](0.0), start, gradients, member, clip_norm=0.5)
        assert_close({name: value[member] for name, value in ours.items()}, theirs)
    assert all(torch.equal(before[name], value) for name, value in gradients[0].items())
    unclipped, _ = trained(OptimizerSettings("sgd"), start, gradients)
    for name in SHAPES:
        assert torch.equal(unclipped[name][2], ours[name][2])
        assert not torch.equal(unclipped[name][1], ours[name][1])


def test_a_gradient_that_is_no_number_stays_in_its_member(generator):
    for name in OPTIMIZERS:
        start, gradients = tensors(generator), [tensors(generator) for _ in range(3)]
        gradients[0]["W"][0, 0, 0] = torch.nan
        ours, _ = trained(OptimizerSettings(name, clip_norm=0.5), start, gradients)
        assert not ours["W"][0].isfinite().all()
        assert all(value[1:].isfinite().all() for value in ours.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_of_any_layout_do(name, generator):
    """torch's fused Adam takes the numbers of a transposed gradient in the wrong order."""
    start, gradients = tensors(generator), [tensors(generator) for _ in range(3)]
    turned = [{k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in g.items()} for g in gradients]
    assert not turned[0]["W"].is_contiguous()
    plain, _ = trained(OptimizerSettings(name), start, gradients)
    other, _ = trained(OptimizerSettings(name), start, turned)
    assert all(torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_resumes_to_the_bit(name, generator):
    start, gradients = tensors(generator), [tensors(generator) for _ in range(8)]
    settings = OptimizerSettings(name, weight_decay=0.1, clip_norm=2.0)
    whole, optimizer = trained(settings, start, gradients)

    parameters, first = trained(settings, start, gradients[:5])
    saved = {part: {k: v.clone() for k, v in named.items()} for part, named in first.state().items()}
    resumed = {key: value.clone() for key, value in parameters.items()}
    second = make_optimizer(resumed, LRS, settings, MATRICES)
    for part, named in second.state().items():
        assert named.keys() == saved[part].keys()
        for key, value in named.items():
            assert len(value) == 3
            value.copy_(saved[part][key])
    for step in range(5, 8):
        second.step(gradients[step], scale_at(step))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    for part, named in optimizer.state().items():
        assert all(torch.equal(value, second.state()[part][key]) for key, value in named.items()), part


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forgetting_resets_the_entries_named_and_nothing_else(name, generator):
    start, gradients = tensors(generator), [tensors(generator) for _ in range(3)]
    parameters, optimizer = trained(OptimizerSettings(name), start, gradients)
    before = {part: {k: v.clone() for k, v in named.items()} for part, named in optimizer.state().items()}
    latents = torch.tensor([[True, False, False, True], [False] * 4, [False, True, False, False]])
    masks = {"W": latents[:, None, :], "b": latents, "V": latents[:, :, None]}
    for key, mask in masks.items():
        parameters[key].masked_fill_(mask, 7.0)
    optimizer.forget_(masks)
    for part, named in optimizer.state().items():
        for key, value in named.items():
            if part in ("steps", "averaging"):
                assert torch.equal(value, before[part][key])
                continue
            mask = masks[key].expand_as(value)
            assert (value[mask] == (7.0 if part == "z" else 0.0)).all()
            assert torch.equal(value[~mask], before[part][key][~mask])
            assert (value[~mask] != 0).any()


def test_entries_that_were_forgotten_start_again(generator):
    """One parameter alone, all of it forgotten: sgd, which counts no steps, goes on as if it were new."""
    start, gradients = tensors(generator), [tensors(generator) for _ in range(6)]
    settings = OptimizerSettings("sgd")
    parameters, optimizer = trained(settings, start, gradients[:3])
    fresh = {key: value.clone() for key, value in parameters.items()}
    optimizer.forget_({key: torch.ones(3, *[1] * len(shape), dtype=torch.bool) for key, shape in SHAPES.items()})
    other = make_optimizer(fresh, LRS, settings)
    for step in range(3, 6):
        optimizer.step(gradients[step], 1.0)
        other.step(gradients[step], 1.0)
    assert all(torch.equal(parameters[key], fresh[key]) for key in fresh)


def test_only_schedule_free_averages(generator):
    start = tensors(generator)
    for name in OPTIMIZERS:
        _, optimizer = trained(OptimizerSettings(name), start, [])
        averaged = optimizer.averaged()
        assert (averaged is None) == (name != "schedule-free")
        if averaged is not None:
            assert all(torch.equal(averaged[key], start[key]) for key in start)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_goes_downhill(name, generator):
    target = tensors(generator)
    parameters = {key: torch.zeros_like(value) for key, value in target.items()}
    optimizer = make_optimizer(parameters, [0.02, 0.05, 0.02], OptimizerSettings(name), MATRICES)

    def distance(weights):
        return sum((weights[key] - target[key]).square().flatten(1).sum(1) for key in target)

    before = distance(parameters)
    for _ in range(100):
        optimizer.step({key: parameters[key] - target[key] for key in target}, 1.0)
    assert (distance(optimizer.averaged() or parameters) < 0.5 * before).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "muom"}, "optimizer is 'muom': allowed are adam, .*did you mean 'muon'"),
        ({"beta1": 1.0}, "beta1 is 1.0: it must be at least 0 and below 1"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"eps": 0.0}, "eps is 0.0: it must be above 0"),
        ({"momentum": 0.9}, "momentum is 0.9, but adam has none: it is for sgd, signum, muon"),
        ({"name": "sgd", "momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0: it must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0: it must be above 0"),
        ({"name": "schedule-free", "beta1": 0.0}, "beta1 is 0"),
    ],
)
def test_wrong_settings_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        OptimizerSettings(**wrong)

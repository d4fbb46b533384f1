from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries import Moment, ReLU, ReLUSettings, TopK, TopKSettings
from sparse_coding.dictionaries.objective import auxk_error, ghost_error, reconstruction_error
from tests.dictionaries.variants import gradients

B, D, F = 7, 4, 9
NONE, ALL = torch.zeros(F, dtype=torch.bool), torch.ones(F, dtype=torch.bool)
SOME = torch.tensor([True, False, False, True, True, False, False, True, False])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PRE, X_HAT, TARGET, W_DEC = drawn(B, F), drawn(B, D, seed=1), drawn(B, D, seed=2), drawn(F, D, seed=3)


# ---- errors


def test_errors_by_hand():
    x_hat, target = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    # squared errors 25 and 1; the mean of the target is (2, 2), its rows are 1 + 4 and 1 + 4 away
    assert_close(reconstruction_error(x_hat, target, "mse"), torch.tensor(13.0))
    assert_close(reconstruction_error(x_hat, target, "fvu"), torch.tensor(26 / 10))
    assert_close(reconstruction_error(x_hat, target, "l2"), torch.tensor((5 + 1) / 2.0))


def test_errors_are_one_value_per_member():
    x_hat = drawn(3, B, D)
    for kind in ("mse", "fvu", "l2"):
        alone = torch.stack([reconstruction_error(one, TARGET, kind) for one in x_hat])
        assert_close(reconstruction_error(x_hat, TARGET, kind), alone)


def test_fvu_does_not_change_with_scale_and_shift_and_is_1_for_the_mean():
    shifted = reconstruction_error(3 * X_HAT + 5, 3 * TARGET + 5, "fvu")
    assert_close(shifted, reconstruction_error(X_HAT, TARGET, "fvu"))
    mean = TARGET.mean(0).expand(B, D)
    assert_close(reconstruction_error(mean, TARGET, "fvu"), torch.tensor(1.0, dtype=torch.float64))


def test_the_slope_of_l2_is_finite_at_a_perfect_row():
    x_hat = TARGET.clone().requires_grad_()
    reconstruction_error(x_hat, TARGET, "l2").backward()
    assert x_hat.grad.isfinite().all()


# ---- brute-force oracles, in plain Python, row by row


def auxk_oracle(pre, residual, W_dec, dead, k_aux, scores=None, signed=False):
    scores = (pre if scores is None else scores).tolist()
    pre, residual, W_dec = pre.tolist(), residual.tolist(), W_dec.tolist()
    dead_latents = [i for i, is_dead in enumerate(dead.tolist()) if is_dead]
    k_aux = min(k_aux, len(W_dec))
    total = 0.0
    for b, (row, e) in enumerate(zip(pre, residual, strict=True)):
        chosen = sorted(dead_latents, key=lambda i, b=b: -scores[b][i])[:k_aux]
        codes = {i: row[i] if signed else max(row[i], 0.0) for i in chosen}
        e_hat = [sum(codes[i] * W_dec[i][d] for i in chosen) for d in range(len(e))]
        total += sum((a - b) ** 2 for a, b in zip(e, e_hat, strict=True))
    return total / len(pre) * min(len(dead_latents) / k_aux, 1.0)


def length(vector):
    return math.sqrt(sum(value * value for value in vector))


def ghost_oracle(pre, x_hat, target, W_dec, dead):
    """As written in mats_sae_training of February 2024, a loop in place of every array."""
    pre, x_hat, target, W_dec = pre.tolist(), x_hat.tolist(), target.tolist(), W_dec.tolist()
    rows, width = len(x_hat), len(x_hat[0])
    dead_latents = [i for i, is_dead in enumerate(dead.tolist()) if is_dead]
    residual = [[target[b][d] - x_hat[b][d] for d in range(width)] for b in range(rows)]
    mean_residual = [sum(row[d] for row in residual) / rows for d in range(width)]
    mean_target = [sum(row[d] for row in target) / rows for d in range(width)]
    total = 0.0
    for b in range(rows):
        ghost = [sum(math.exp(pre[b][i]) * W_dec[i][d] for i in dead_latents) for d in range(width)]
        scale = length(residual[b]) / (1e-6 + 2 * length(ghost))
        spread = length([residual[b][d] - mean_residual[d] for d in range(width)])
        target_spread = length([target[b][d] - mean_target[d] for d in range(width)])
        for d in range(width):
            distance = (ghost[d] * scale - residual[b][d]) ** 2 / spread
            error = residual[b][d] ** 2 / target_spread
            total += error / (distance + 1e-6) * distance
    return total / (rows * width)


@pytest.mark.parametrize("dead", [NONE, SOME, ALL], ids=["none", "some", "all"])
@pytest.mark.parametrize("k_aux", [1, 2, 4, 6, F, 50])
def test_auxk_against_loops(dead, k_aux):
    ours = auxk_error(PRE, TARGET - X_HAT, W_DEC, dead, k_aux)
    assert float(ours) == pytest.approx(auxk_oracle(PRE, TARGET - X_HAT, W_DEC, dead, k_aux), rel=1e-6)
    assert (float(ours) == 0) == (not dead.any())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("k_aux", [1, 2, 6])
def test_auxk_with_scores_of_its_own_against_loops(k_aux, signed):
    scores = (PRE * torch.arange(1.0, F + 1)).abs() if signed else PRE * torch.arange(1.0, F + 1)
    ours = auxk_error(PRE, TARGET - X_HAT, W_DEC, SOME, k_aux, scores, signed)
    expected = auxk_oracle(PRE, TARGET - X_HAT, W_DEC, SOME, k_aux, scores, signed)
    assert float(ours) == pytest.approx(expected, rel=1e-6)


def test_auxk_by_hand():
    pre, residual = torch.tensor([[9.0, 1.0, -1.0]]), torch.tensor([[2.0, 1.0]])
    W_dec = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    dead = torch.tensor([False, True, True])
    # the living latent has no part in it, the negative one is no code: e_hat = (1, 0)
    assert_close(auxk_error(pre, residual, W_dec, dead, 2), torch.tensor(2.0))
    # two dead of four that might take part, were there so many latents; only three are there
    assert_close(auxk_error(pre, residual, W_dec, dead, 4), torch.tensor(2.0 * 2 / 3))


@pytest.mark.parametrize("dead", [SOME, ALL], ids=["some", "all"])
def test_ghost_against_loops(dead):
    ours = ghost_error(PRE, X_HAT, TARGET, W_DEC, dead)
    assert float(ours) == pytest.approx(ghost_oracle(PRE, X_HAT, TARGET, W_DEC, dead), rel=1e-12)
    assert float(ours) > 0


def test_ghost_gradients_against_loops_with_the_constants_held_fixed():
    """d/d pre of m / (l + 1e-6) l with the first factor fixed; numerically, from the loops' own pieces."""
    pre = PRE.clone().requires_grad_()
    ghost_error(pre, X_HAT, TARGET, W_DEC, SOME).backward()
    residual = TARGET - X_HAT
    spread = (residual - residual.mean(0)).norm(dim=-1)
    error = residual.square() / (TARGET - TARGET.mean(0)).norm(dim=-1, keepdim=True)

    def ghost(values):
        return torch.where(SOME, values, -torch.inf).exp() @ W_DEC

    scale = residual.norm(dim=-1) / (1e-6 + 2 * ghost(PRE).norm(dim=-1))
    expected = torch.zeros_like(PRE)
    for b in range(B):
        for i in SOME.nonzero().flatten().tolist():
            for d in range(D):
                distance = (ghost(PRE)[b, d] * scale[b] - residual[b, d]) ** 2 / spread[b]
                slope = 2 * (ghost(PRE)[b, d] * scale[b] - residual[b, d]) / spread[b]
                slope = slope * scale[b] * PRE[b, i].exp() * W_DEC[i, d]
                expected[b, i] += error[b, d] / (distance + 1e-6) * slope / (B * D)
    assert_close(pre.grad, expected)


def test_ghost_has_the_size_of_the_error_itself():
    error = (TARGET - X_HAT).square() / (TARGET - TARGET.mean(0)).norm(dim=-1, keepdim=True)
    assert_close(ghost_error(PRE, X_HAT, TARGET, W_DEC, SOME), error.mean(), rtol=1e-3, atol=0)


# ---- in a stack, and in a loss


def test_members_with_other_dead_latents_do_not_meet():
    dead = torch.stack([SOME, NONE, ALL])
    pre, x_hat, W_dec = drawn(3, B, F), drawn(3, B, D, seed=1), drawn(3, F, D, seed=2)
    auxk = auxk_error(pre, TARGET - x_hat, W_dec, dead, 3)
    ghost = ghost_error(pre, x_hat, TARGET, W_dec, dead)
    for member in range(3):
        alone = auxk_error(pre[member], TARGET - x_hat[member], W_dec[member], dead[member], 3)
        assert_close(auxk[member], alone)
        assert_close(ghost[member], ghost_error(pre[member], x_hat[member], TARGET, W_dec[member], dead[member]))
    assert auxk[1] == 0
    assert ghost[1] == 0


def stack_of(kind, settings, members=3):
    return kind.init([settings] * members, [torch.Generator().manual_seed(seed) for seed in range(members)])


X = drawn(B, D).float()


@pytest.mark.parametrize("revival", ["auxk", "ghost"])
def test_nothing_dead_adds_nothing_and_all_dead_stays_finite(revival):
    stack = stack_of(ReLU, ReLUSettings(D, F, dead_latents=revival, auxk_coefficient=1.0))
    with torch.no_grad():
        stack.b_enc[2] = -100  # nothing fires, so the residual is x itself
    plain = stack.loss(X)
    losses = stack.loss(X, moment=Moment(dead=torch.stack([NONE, SOME, ALL])))
    assert losses.total[0] == plain.total[0]
    assert losses.total[1] > plain.total[1]
    assert_close(losses.total - plain.total, losses.terms[revival])
    found = gradients(stack, losses)
    assert losses.total.isfinite().all()
    assert all(value.isfinite().all() for value in found.values())
    assert all(torch.equal(value[0], gradients(stack, stack.loss(X))[name][0]) for name, value in found.items())


@pytest.mark.parametrize("revival", ["auxk", "ghost"])
def test_only_dead_latents_learn_from_what_revives_them(revival):
    """Difference of the gradients with and without: in the encoder, its bias, the decoder and b_dec."""
    stack = stack_of(ReLU, ReLUSettings(D, F, dead_latents=revival, auxk_coefficient=1.0, k_aux=F), 1)
    with torch.no_grad():
        stack.b_enc += 0.3
    plain = gradients(stack, stack.loss(X))
    found = gradients(stack, stack.loss(X, moment=Moment(dead=SOME.unsqueeze(0))))
    moved = {name: (found[name] - plain[name])[0].abs() > 0 for name in found}
    assert torch.equal(moved["W_enc"].any(0), SOME)
    assert torch.equal(moved["b_enc"], SOME)
    assert torch.equal(moved["W_dec"].any(1), SOME)


def test_auxk_reaches_the_encoder_of_dead_latents_that_topk_does_not_keep():
    """The bug of peers: a fused encoder whose backward drops the gradient of pre-activations."""
    stack = stack_of(TopK, TopKSettings(D, F, k=1, k_aux=F), 1)
    with torch.no_grad():
        stack.b_enc[0, ~SOME] = 5.0
    losses = stack.loss(X, moment=Moment(dead=SOME.unsqueeze(0)))
    assert not losses.f[0, :, SOME].any()
    found = gradients(stack, losses)
    assert found["W_enc"][0, :, SOME].abs().sum(0).min() > 0
    without = gradients(stack, stack.loss(X))
    assert not without["W_enc"][0, :, SOME].any()
    assert_close(found["W_enc"][0, :, ~SOME], without["W_enc"][0, :, ~SOME])


def test_the_weight_of_auxk_is_its_coefficient_and_ghost_has_none():
    dead = Moment(dead=SOME.unsqueeze(0))
    for revival, weight in (("auxk", 0.25), ("ghost", 1.0)):
        stack = stack_of(ReLU, ReLUSettings(D, F, dead_latents=revival, auxk_coefficient=0.25), 1)
        losses = stack.loss(X, moment=dead)
        assert_close(losses.total, stack.loss(X).total + weight * losses.terms[revival])
    assert "auxk" not in stack_of(ReLU, ReLUSettings(D, F), 1).loss(X, moment=dead).terms


def test_half_of_the_targets_width_takes_part_by_default():
    target = drawn(B, 3, seed=5).float()
    stack = stack_of(ReLU, ReLUSettings(D, F, d_out=3, dead_latents="auxk"), 1)
    losses = stack.loss(X, target, Moment(dead=SOME.unsqueeze(0)))
    pre = stack.pre_activations(X)
    assert_close(losses.terms["auxk"], auxk_error(pre, target - losses.x_hat, stack.W_dec, SOME.unsqueeze(0), 1))

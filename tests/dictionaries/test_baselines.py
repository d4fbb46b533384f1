from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_coding.dictionaries import Dictionary
from sparse_coding.dictionaries.base import unit_rows
from sparse_coding.dictionaries.baselines import (
    BASELINES,
    NMF,
    FixedReLU,
    ica,
    identity_relu,
    nmf,
    oracle,
    pca,
    random_dictionary,
)
from sparse_coding.errors import UserError
from sparse_coding.metrics import evaluate_reconstruction, max_cosines, mcc, mmcs


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def correlated(rows: int = 400, d_in: int = 6) -> torch.Tensor:
    """Gaussian rows with a mean, unequal variances and correlations."""
    return gaussian(rows, d_in) @ gaussian(d_in, d_in, seed=1) + torch.arange(d_in)


def sparse_data(directions: torch.Tensor, rows: int = 3000, active: float = 3.0, seed: int = 0) -> torch.Tensor:
    """Every feature is on with probability active / G, at a strength of 0 to 1."""
    g = seeded(seed)
    shape = (rows, len(directions))
    on = torch.rand(shape, generator=g) < active / len(directions)
    return (on * torch.rand(shape, generator=g)) @ directions


def fvu(dictionary: Dictionary, x: torch.Tensor) -> float:
    value = evaluate_reconstruction(dictionary, [x]).result()["fvu"]
    assert value is not None
    return value


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_a_dictionary_of_unit_atoms_that_beats_predicting_nothing(name):
    x = sparse_data(unit_rows(gaussian(24, 12)))
    before = x.clone()
    state = torch.get_rng_state()
    dictionary = BASELINES[name](x, 20, seeded())
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (dictionary.d_in, dictionary.d_sae) == (12, 24 if name == "identity-relu" else 20)
    torch.testing.assert_close(dictionary.atoms.norm(dim=1), torch.ones(dictionary.d_sae))
    f = dictionary.encode(x)
    assert f.shape == (3000, dictionary.d_sae)
    assert f.min() >= 0
    torch.testing.assert_close(dictionary(x), dictionary.decode(f))
    torch.testing.assert_close(dictionary(x[:6].reshape(2, 3, 12)).reshape(6, 12), dictionary(x[:6]))
    assert fvu(dictionary, x) < 1


@pytest.mark.parametrize("name", BASELINES)
def test_the_seed_alone_decides_the_draws(name):
    x = sparse_data(unit_rows(gaussian(24, 12)), rows=500)
    first, second, other = (BASELINES[name](x, 20, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.atoms, second.atoms)
    assert torch.equal(first.atoms, other.atoms) == (name in ("identity-relu", "pca"))


@pytest.mark.parametrize("name", BASELINES)
def test_more_atoms_than_a_method_has_give_what_there_is(name):
    dictionary = BASELINES[name](correlated(rows=60, d_in=3) ** 3, 40, seeded())
    assert dictionary.d_sae == (40 if name in ("random", "nmf") else 6)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_take_any_float_type_and_come_back_in_float32(name):
    dictionary = BASELINES[name](sparse_data(unit_rows(gaussian(8, 4)), rows=300).bfloat16(), 6, seeded())
    assert {buffer.dtype for buffer in dictionary.buffers()} == {torch.float32}


def test_the_identity_reconstructs_exactly_with_codes_x_and_minus_x():
    x = gaussian(50, 5)
    dictionary = identity_relu(5)
    assert torch.equal(dictionary.encode(x), torch.relu(torch.cat([x, -x], 1)))
    assert torch.equal(dictionary(x), x)


def test_all_principal_components_reconstruct_exactly_and_fewer_are_the_best_plane():
    x = correlated()
    full = pca(x, 6)
    assert full.d_sae == 12
    torch.testing.assert_close(full(x), x, rtol=1e-4, atol=1e-4)
    part, centred = pca(x, 2), (x - x.mean(0)).double().numpy()
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    projected = centred @ right[:2].T @ right[:2] + x.mean(0).double().numpy()
    np.testing.assert_allclose(part(x).numpy(), projected, rtol=1e-3, atol=1e-4)
    assert fvu(part, x) == pytest.approx((singular[2:] ** 2).sum() / (singular**2).sum(), rel=1e-4)
    np.testing.assert_allclose(np.abs((part.atoms[:2].numpy() * right[:2]).sum(1)), 1, rtol=1e-5)
    assert torch.equal(part.atoms[:2], -part.atoms[2:])
    assert (part.atoms[:2].gather(1, part.atoms[:2].abs().argmax(1, keepdim=True)) > 0).all()


def mixture(rows: int = 4000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, sources, mixing): four sources of four laws, mixed obliquely into six dims, with a mean."""
    u = torch.rand(rows, 4, generator=seeded())
    laplace = (u[:, 1] - 0.5).sign() * -(1 - (2 * u[:, 1] - 1).abs()).clamp_min(1e-6).log()
    sources = torch.stack([u[:, 0], laplace, (u[:, 2] < 0.05).float(), -u[:, 3].log()], 1)
    mixing = torch.tensor([5.0, 1.0, 6.0, 2.0])[:, None] * unit_rows(gaussian(4, 6, seed=1) + 0.7)
    return sources @ mixing + 2, sources, mixing


def test_ica_finds_the_mixing_directions_in_data_space_and_the_sources():
    x, sources, mixing = mixture()
    dictionary = ica(x, 4, seeded())
    assert max_cosines(mixing, dictionary.atoms).min() > 0.98
    # The rows that unmix point elsewhere, since the mixing is oblique: taking them for atoms would be seen here.
    assert max_cosines(mixing, torch.linalg.pinv(mixing).T, absolute=True).min() < 0.95
    f = dictionary.encode(x)
    found = (f[:, :4] - f[:, 4:]).double().numpy()
    correlation = np.corrcoef(found.T, sources.T.double().numpy())[:4, 4:]
    assert np.abs(correlation).max(0).min() > 0.98
    torch.testing.assert_close(dictionary(x), x, rtol=1e-3, atol=1e-3)


def test_ica_keeps_no_more_components_than_the_data_has():
    x, _, mixing = mixture()
    dictionary = ica(x, 6, seeded())
    assert dictionary.d_sae == 8
    assert max_cosines(mixing, dictionary.atoms).min() > 0.98
    with pytest.raises(UserError, match="vary"):
        ica(torch.ones(10, 3), 2, seeded())


def test_ica_says_when_it_did_not_converge():
    with pytest.warns(UserWarning, match="did not converge in 2 iterations"):
        ica(mixture()[0], 4, seeded(), max_iterations=2, tolerance=1e-9)


def parts_and_codes(rows: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Four parts that mostly own their dims, and sparse codes: a factorisation with one answer."""
    parts = torch.eye(4).repeat_interleave(3, 1) * (1 + torch.rand(4, 12, generator=seeded(1)))
    parts[0, 3], parts[2, 1] = 0.5, 0.3
    codes = torch.rand(rows, 4, generator=seeded(2)) * (torch.rand(rows, 4, generator=seeded(3)) < 0.5)
    return parts, codes


def test_nmf_factorises_a_non_negative_matrix_of_low_rank():
    parts, codes = parts_and_codes()
    dictionary = nmf(codes @ parts, 4, seeded(), iterations=300)
    assert isinstance(dictionary, NMF)
    assert torch.equal(nmf(codes @ parts + 1, 4, seeded(), iterations=1).b_dec, torch.zeros(12))
    assert (dictionary.atoms >= 0).all()
    assert fvu(dictionary, codes @ parts) < 1e-3
    assert mcc(parts, dictionary.atoms) > 0.99


def test_nmf_shifts_data_with_negative_values_and_does_not_depend_on_its_scale():
    parts, codes = parts_and_codes()
    shift = torch.linspace(-2, -1, 12)
    dictionary = nmf(codes @ parts + shift, 4, seeded(), iterations=300)
    torch.testing.assert_close(dictionary.b_dec, shift)
    assert fvu(dictionary, codes @ parts + shift) < 1e-3
    for scale in (1e-8, 1e8):
        scaled = nmf((codes @ parts + shift) * scale, 4, seeded(), iterations=300)
        torch.testing.assert_close(scaled.atoms, dictionary.atoms, rtol=1e-3, atol=1e-3)


def test_nmf_codes_are_the_best_non_negative_ones_with_exact_zeros():
    scipy = pytest.importorskip("scipy.optimize")
    dictionary = NMF(unit_rows(gaussian(5, 8).abs()), torch.full((8,), -0.5), iterations=300)
    x = gaussian(20, 8, seed=1)
    f = dictionary.encode(x)
    matrix = dictionary.atoms.double().numpy().T
    wanted = np.stack([scipy.nnls(matrix, row)[0] for row in (x + 0.5).double().numpy()])
    np.testing.assert_allclose(f.numpy(), wanted, atol=1e-3)
    assert ((f == 0).numpy() == (wanted == 0)).mean() > 0.98
    assert 0 < (f == 0).float().mean() < 1


def test_nmf_of_nothing_encodes_nothing():
    dictionary = nmf(torch.zeros(10, 3), 2, seeded(), iterations=3)
    assert torch.equal(dictionary(gaussian(4, 3)), torch.zeros(4, 3))


def test_the_random_dictionary_has_the_gain_of_least_squares():
    x = correlated()
    dictionary = random_dictionary(x, 40, seeded())
    best = fvu(dictionary, x)
    for change in (0.95, 1.05):
        other = FixedReLU(change * dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, dictionary.b_dec)
        assert fvu(other, x) > best
    torch.testing.assert_close(dictionary(x.mean(0, keepdim=True)), x.mean(0, keepdim=True), rtol=1e-4, atol=1e-4)


def test_the_oracle_holds_the_truth_and_reconstructs_sparse_sums_well():
    directions = unit_rows(gaussian(384, 256)) * 3  # not of unit length, overcomplete
    x = sparse_data(directions, rows=1500, active=2)
    dictionary, held_out = oracle(directions, x), sparse_data(directions, rows=1500, active=2, seed=9)
    assert mmcs(directions, dictionary.atoms) == pytest.approx(1.0, abs=1e-6)
    result = evaluate_reconstruction(dictionary, [held_out]).result()
    assert (result["fvu"] or 0) < 0.1
    assert 1 < (result["l0"] or 0) < 6  # the truth is 2
    assert fvu(random_dictionary(x, 384, seeded()), held_out) > 3 * (result["fvu"] or 0)


def test_the_oracle_of_orthogonal_features_needs_no_threshold_and_is_exact():
    directions = torch.eye(8)
    dictionary = oracle(directions, sparse_data(directions))
    torch.testing.assert_close(dictionary.b_enc, torch.zeros(8))
    torch.testing.assert_close(dictionary.W_enc, torch.eye(8))


def test_no_other_threshold_and_gain_do_better_than_the_oracle():
    directions = unit_rows(gaussian(24, 12))
    x = sparse_data(directions, active=2)
    best = fvu(oracle(directions, x), x)
    projections = x @ directions.T
    for threshold in torch.linspace(0, 1, 101):
        f = torch.relu(projections - threshold)
        x_hat = f @ directions
        gain = (x * x_hat).sum() / x_hat.square().sum()
        error = (x - gain * x_hat).square().sum() / (x - x.mean(0)).square().sum()
        assert error > best - 1e-4


def test_mistakes_are_named():
    x = correlated()
    with pytest.raises(UserError, match=r"components is 7.*at most 6"):
        pca(x, 7)
    with pytest.raises(UserError, match="n_atoms is 0"):
        random_dictionary(x, 0, seeded())
    with pytest.raises(UserError, match="n_atoms is 0"):
        nmf(x, 0, seeded())
    with pytest.raises(UserError, match="rows, width"):
        pca(x[0], 1)
    with pytest.raises(UserError, match="inf or nan"):
        ica(x / 0, 2, seeded())

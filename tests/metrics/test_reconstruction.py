from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from sparse_coding.dictionaries import Dictionary, ReLU, ReLUSettings
from sparse_coding.errors import UserError
from sparse_coding.metrics import (
    Reconstruction,
    density_histogram,
    evaluate_reconstruction,
    evaluate_reconstructions,
)
from sparse_coding.metrics.reconstruction import fvu_by_part


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(rows: int = 200, d_in: int = 5, d_sae: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = gaussian(rows, d_in) + torch.arange(d_in)
    return x, torch.relu(gaussian(rows, d_sae, seed=1) - 1), 0.8 * x + 0.3 * gaussian(rows, d_in, seed=2)


def accumulated(x, f, x_hat, batch_sizes=None) -> Reconstruction:
    sums = Reconstruction(x.shape[1], f.shape[1])
    for part in zip(*(t.split(batch_sizes or len(x)) for t in (x, f, x_hat)), strict=True):
        sums.update(*part)
    return sums


def fvu(x, x_hat, batch_sizes=None) -> float:
    value = accumulated(x, torch.zeros(len(x), 1), x_hat, batch_sizes).result()["fvu"]
    assert value is not None
    return value


def relu_dictionary(d_in: int, d_sae: int, seed: int = 0) -> ReLU:
    settings = ReLUSettings(d_in, d_sae)
    return ReLU.single(settings, ReLU.initial(settings, torch.Generator().manual_seed(seed)))


def test_a_case_small_enough_for_pencil_and_paper():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    f = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 3.0, 0.0]])
    x_hat = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    sums = accumulated(x, f, x_hat)
    # Residuals 16 + 1 + 1; the mean is (4/3, 4/3), so sum ||x - mean||^2 = 26 - 3 * 32/9.
    assert sums.result() == pytest.approx(
        {
            "fvu": 18 / (26 - 32 / 3),
            "mse": 18 / 6,
            "l0": 1.0,
            "l1": 2.0,
            "cosine": (0.6 + 0.0) / 2,  # the zero x has no cosine, the zero reconstruction has 0
            "relative_bias": 10 / 9,
            "dead": 1,
            "dead_fraction": 1 / 3,
            "rows": 3,
        },
        rel=1e-6,
    )
    assert sums.firing_counts.tolist() == [2, 1, 0]
    assert sums.mean.tolist() == pytest.approx([4 / 3, 4 / 3])


def test_every_metric_equals_its_formula_in_numpy():
    x, f, x_hat = example()
    a, codes, b = x.double().numpy(), f.double().numpy(), x_hat.double().numpy()
    result = accumulated(x, f, x_hat, 64).result()
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert result["fvu"] == pytest.approx(((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum(), rel=1e-5)
    assert result["mse"] == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)
    assert result["l0"] == pytest.approx((codes != 0).sum(1).mean(), rel=1e-12)
    assert result["l1"] == pytest.approx(np.abs(codes).sum(1).mean(), rel=1e-5)
    assert result["cosine"] == pytest.approx(cosines.mean(), rel=1e-5)
    assert result["relative_bias"] == pytest.approx((b**2).sum() / (a * b).sum(), rel=1e-5)


def test_the_mean_predictor_has_fvu_one_and_zero_predicts_worse():
    x = gaussian(300, 4) + 3
    assert fvu(x, x.mean(0).expand_as(x), 100) == pytest.approx(1.0, rel=1e-5)
    assert fvu(x, torch.zeros_like(x)) == pytest.approx(1 + 9, rel=0.1)
    assert fvu(x, x) == 0.0


def test_a_constant_error_is_not_forgiven():
    x = gaussian(1000, 4)
    assert fvu(x, x + 1) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("scale", [1e-6, 10.0, 1e6])
def test_fvu_and_cosine_do_not_see_the_scale_and_mse_sees_its_square(scale):
    x, f, x_hat = example()
    plain, scaled = accumulated(x, f, x_hat).result(), accumulated(x * scale, f, x_hat * scale).result()
    for name in ("fvu", "cosine", "relative_bias"):
        assert scaled[name] == pytest.approx(plain[name], rel=1e-5)
    assert scaled["mse"] == pytest.approx(plain["mse"] * scale**2, rel=1e-5)


@pytest.mark.parametrize("shift", [2.0, 100.0, 4096.0])
def test_fvu_does_not_see_a_shift(shift):
    x, _, x_hat = example()
    x, x_hat = (x * 64).round() / 64, (x_hat * 64).round() / 64  # so that adding the shift rounds nothing
    assert fvu(x + shift, x_hat + shift, 50) == pytest.approx(fvu(x, x_hat), rel=1e-5)


@pytest.mark.parametrize("sizes", [1, 7, [1, 199], [150, 50]])
def test_the_cut_into_batches_does_not_matter(sizes):
    whole, parts = accumulated(*example()), accumulated(*example(), sizes)
    assert parts.result() == pytest.approx(whole.result(), rel=1e-5)
    assert torch.equal(parts.firing_counts, whole.firing_counts)


def test_a_first_batch_far_from_the_rest_costs_no_digits():
    x = gaussian(4001, 3)
    x[0] = 30_000.0
    exact = x.double()
    wanted = (0.01 * exact[1:].square().sum() / (exact - exact.mean(0)).square().sum()).item()
    assert fvu(x, torch.cat([x[:1], 1.1 * x[1:]]), [1, 2000, 2000]) == pytest.approx(wanted, rel=1e-4)
    sums = accumulated(x, torch.zeros(4001, 1), x, [1, 2000, 2000])
    sums.merge(accumulated(x[1:], torch.zeros(4000, 1), x[1:]))
    rest = torch.cat([exact, exact[1:]])
    torch.testing.assert_close(sums.mean, rest.mean(0), rtol=1e-6, atol=0)


def test_merging_equals_having_seen_all_rows_whichever_comes_first():
    x, f, x_hat = example()
    x[:60] += 50
    whole = accumulated(x, f, x_hat)
    for order in (1, -1):
        parts = [accumulated(x[:60], f[:60], x_hat[:60]), accumulated(x[60:], f[60:], x_hat[60:])][::order]
        merged = Reconstruction(5, 7)
        for part in (Reconstruction(5, 7), *parts, Reconstruction(5, 7)):
            merged.merge(part)
        assert merged.result() == pytest.approx(whole.result(), rel=1e-5)
        assert torch.equal(merged.firing_counts, whole.firing_counts)
        assert sum(part.rows for part in parts) == 200  # the parts are left as they were


def test_accumulators_of_different_dictionaries_do_not_merge():
    with pytest.raises(UserError, match="same dictionary"):
        Reconstruction(4, 8).merge(Reconstruction(4, 16))


def test_the_relative_bias_is_the_rescaling_that_would_reconstruct_best():
    x, f, x_hat = example()
    bias = accumulated(x, f, x_hat).result()["relative_bias"]
    trials = torch.linspace(0.5, 1.5, 2001)
    errors = torch.stack([(x_hat / gamma - x).square().sum() for gamma in trials])
    assert bias == pytest.approx(trials[errors.argmin()].item(), abs=1e-3)
    assert accumulated(x, f, 0.5 * x).result()["relative_bias"] == pytest.approx(0.5)


def test_negative_codes_are_active_and_count_by_size():
    sums = accumulated(torch.ones(2, 1), torch.tensor([[-2.0, 0.0], [1.0, 0.0]]), torch.ones(2, 1))
    assert sums.firing_counts.tolist() == [2, 0]
    assert sums.result()["l1"] == 1.5


def test_what_has_no_value_is_none_and_json_takes_it():
    constant = accumulated(torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)).result()
    assert (constant["fvu"], constant["relative_bias"], constant["dead"]) == (None, None, 2)
    diverged = accumulated(gaussian(3, 2), torch.full((3, 2), math.nan), torch.full((3, 2), math.nan)).result()
    assert (diverged["fvu"], diverged["mse"], diverged["l1"], diverged["cosine"]) == (None, None, None, None)
    empty = Reconstruction(2, 2).result()
    assert (empty["mse"], empty["l0"], empty["rows"]) == (None, None, 0)
    for result in (constant, diverged, empty):
        json.dumps(result, allow_nan=False)


def test_half_precision_rows_are_summed_in_float32():
    x, f, x_hat = (t.bfloat16() for t in example(rows=3000))
    halves, floats = accumulated(x, f, x_hat), accumulated(x.float(), f.float(), x_hat.float())
    assert halves.result() == pytest.approx(floats.result(), rel=1e-6)


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="do not fit"):
        Reconstruction(4, 8).update(torch.zeros(3, 4), torch.zeros(3, 8), torch.zeros(4))


def test_evaluation_runs_the_dictionary_over_all_rows():
    dictionary, x = relu_dictionary(6, 10), gaussian(500, 6)
    with torch.no_grad():
        f = dictionary.encode(x)
        direct = accumulated(x, f, dictionary.decode(f))
    sums = evaluate_reconstruction(dictionary, iter(x.split(128)))
    assert sums.result() == pytest.approx(direct.result(), rel=1e-5)
    assert torch.equal(sums.firing_counts, direct.firing_counts)
    on_device = evaluate_reconstruction(dictionary, x.bfloat16().split(128), device="cpu")
    assert on_device.result()["fvu"] == pytest.approx(direct.result()["fvu"], rel=0.02)


def test_many_dictionaries_in_one_pass_equal_each_alone():
    dictionaries = {f"s{seed}": relu_dictionary(6, 10 + seed, seed) for seed in range(3)}
    batches = gaussian(500, 6).split(200)
    together = evaluate_reconstructions(dictionaries, iter(batches))
    assert list(together) == list(dictionaries)
    for name, dictionary in dictionaries.items():
        assert together[name].result() == evaluate_reconstruction(dictionary, batches).result()


class Wide(Dictionary):
    """A dictionary that remembers how many rows it was given at a time."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []

    @property
    def atoms(self):
        return torch.zeros(2**18, 1)

    def encode(self, x):
        self.rows.append(len(x))
        return torch.zeros(len(x), 2**18)

    def decode(self, f, x=None):
        return f[:, :1]


def test_wide_dictionaries_are_given_few_rows_at_a_time():
    wide = Wide()
    sums = evaluate_reconstruction(wide, [gaussian(11, 1)])
    assert (wide.rows, sums.rows) == ([4, 4, 3], 11)


def test_an_evaluation_without_rows_is_refused():
    with pytest.raises(UserError, match="0 rows"):
        evaluate_reconstruction(relu_dictionary(2, 2), [])


def test_the_density_histogram_counts_each_latent_once():
    counts = torch.tensor([0, 0, 1, 9, 10, 99, 100, 1000])
    found = density_histogram(counts, 1000, edges=[-2.0, -1.0, 0.0])
    assert found == {"log10_edges": [-2.0, -1.0, 0.0], "counts": [4, 2], "never_fired": 2}
    default = density_histogram(counts, 10**9)
    assert isinstance(default["counts"], list)
    assert default["counts"][0] == 6  # far below the lowest edge is still counted
    assert len(default["counts"]) == 24
    with pytest.raises(UserError, match="rows"):
        density_histogram(counts, 0)


def test_an_accumulator_gives_the_histogram_of_its_own_counts():
    sums = accumulated(torch.ones(10, 1), torch.eye(10)[:, :2], torch.ones(10, 1))
    assert sums.density_histogram(torch.tensor([-2.0, -0.5, 0.0]))["counts"] == [2, 0]


def test_rows_and_targets_may_differ():
    """A transcoder's FVU is that of its targets: by hand for a constant prediction, the mean of the targets."""

    class Constant(Dictionary):
        @property
        def atoms(self):
            return torch.zeros(1, 2)

        def encode(self, x):
            return torch.zeros(len(x), 1)

        def decode(self, f, x=None):
            return torch.tensor([1.0, 3.0]).expand(len(f), 2)

    x, target = torch.randn(4, 5), torch.tensor([[0.0, 3.0], [2.0, 3.0], [1.0, 2.0], [1.0, 4.0]])
    assert evaluate_reconstruction(Constant(), [(x, target)]).result()["fvu"] == pytest.approx(1.0)


def test_fvu_by_part_is_the_fvu_of_each_site_alone():
    x = gaussian(64, 5)

    class Halves(Dictionary):
        @property
        def atoms(self):
            return torch.zeros(1, 5)

        def encode(self, x):
            return x

        def decode(self, f, x=None):
            return f * torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5])

    found = fvu_by_part(Halves(), x.split(10), [2, 3])
    assert found[0] == pytest.approx(0.0, abs=1e-9)
    part = x[:, 2:]
    expected = (0.5 * part).square().sum() / (part - part.mean(0)).square().sum()
    assert found[1] == pytest.approx(expected.item(), rel=1e-5)

from __future__ import annotations

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.stores.codec import CODECS, DTYPES, Affine8, calibrate, checked_codec, decode, encode


def noise(x: torch.Tensor, codec: str, affine: Affine8 | None = None) -> float:
    """Variance of the error as a share of the variance of the rows."""
    back = decode(encode(x, codec, affine), affine)
    return float((back - x).square().sum() / (x - x.mean(0)).square().sum())


def test_int8_by_hand():
    affine = Affine8(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0]))
    stored = encode(torch.tensor([[2.0, 5.1], [1.2, -1000.0]]), "int8", affine)
    assert stored.tolist() == [[2, 3], [0, -127]]
    assert decode(stored, affine).tolist() == [[2.0, 6.0], [1.0, -254.0]]


def test_floats_are_rounded_as_torch_does_and_come_back_exactly(generator):
    x = torch.randn(50, 7, generator=generator)
    assert torch.equal(decode(encode(x, "fp32")), x)
    for codec in ("bf16", "fp16"):
        assert torch.equal(decode(encode(x, codec)), x.to(DTYPES[codec]).float())
        exact = x.to(DTYPES[codec])
        assert torch.equal(encode(exact.float(), codec), exact)


def test_noise_of_normal_rows(generator):
    """The figures of docs/stores.md."""
    x = torch.randn(20_000, 64, generator=generator)
    affine = calibrate(x[:10_000])
    found = {codec: noise(x[10_000:], codec, affine) for codec in CODECS}
    assert found["fp32"] == 0
    assert found["fp16"] == pytest.approx(4.3e-8, rel=0.1)
    assert found["bf16"] == pytest.approx(2.8e-6, rel=0.1)
    assert 7e-5 < found["int8"] < 1.1e-4


def test_ranges_follow_heavy_tails(generator):
    """4 sigma would clip what matters at the hidden layer of an MLP: rare large values."""
    x = torch.randn(20_000, 16, generator=generator) ** 5
    sigma, mean = torch.std_mean(x[:10_000], 0)
    fixed = noise(x[10_000:], "int8", Affine8(mean, sigma * 4 / 127))
    assert noise(x[10_000:], "int8", calibrate(x[:10_000])) < fixed / 4


def test_one_sided_rows_use_the_whole_range(generator):
    x = torch.rand(4000, 8, generator=generator)
    affine = calibrate(x[:2000])
    assert encode(x[:2000], "int8", affine).min() < -100
    assert encode(x[:2000], "int8", affine).max() > 100
    assert noise(x[2000:], "int8", affine) < 3e-5 * 1.3  # (1.1/254)^2, a step over the variance of 1/12 times 12


def test_no_wrong_scale_where_a_channel_does_not_vary_or_there_is_one_row():
    x = torch.tensor([[3.0, 0.0, 1e-30]]).repeat(5, 1)
    for rows in (x, x[:1]):
        affine = calibrate(rows)
        assert affine.scale[:2].tolist() == [1.0, 1.0]
        assert torch.equal(decode(encode(rows, "int8", affine), affine), rows)


def test_shift_and_scale_of_the_rows_do_not_change_the_noise(generator):
    x = torch.randn(5000, 8, generator=generator)
    moved = x * 1000 + 5e4
    assert noise(moved, "int8", calibrate(moved)) == pytest.approx(noise(x, "int8", calibrate(x)), rel=0.05)


def test_what_fp16_cannot_hold_is_refused():
    with pytest.raises(UserError, match="use codec bf16"):
        encode(torch.tensor([[1.0, 70000.0]]), "fp16")
    assert encode(torch.full((100, 100), 60000.0), "fp16").max() == 60000  # a sum above the largest is fine


def test_an_unknown_codec_is_named():
    with pytest.raises(UserError, match="did you mean 'bf16'"):
        checked_codec("bfl16")

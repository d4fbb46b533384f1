"""Every architecture: what `to_inference` gives works on raw rows and means what the trained dictionary meant."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_coding.dictionaries.normalise import Affine, scaling, whitening
from sparse_coding.errors import UserError
from tests.dictionaries.variants import CASES, Case

AUTOENCODERS = [case for case in CASES if case.settings.target_width == case.settings.d_in]
TRANSCODERS = [case for case in CASES if case not in AUTOENCODERS]
KINDS = ("none", "scaling", "whitening")


def affine(kind: str, width: int) -> Affine | None:
    if kind == "none":
        return None
    if kind == "scaling":
        return scaling(2.5, width)
    generator = torch.Generator().manual_seed(2)
    return whitening(
        torch.randn(200, width, generator=generator) @ torch.randn(width, width, generator=generator) + 0.5
    )


def keeps_codes(case: Case) -> bool:
    """Whether codes stay what they were; else only the product of code and atom does."""
    if case.name == "matching-pursuit":
        return False
    return not (case.kind.compares_latents and case.settings.decoder == "free")  # type: ignore[attr-defined]


def check(case: Case, before: Affine | None, after: Affine | None) -> None:
    trained, (x, _) = case.stack().member(1, case.members[1]), case.data()
    inference = trained.to_inference(before, after)
    inside = before(x) if before else x
    f, raw_f = trained.encode(inside), inference.encode(x)
    assert (f != 0).any()
    x_hat, adds = trained(inside), f.unsqueeze(-1) * trained.atoms
    assert_close(inference(x), after.undo(x_hat) if after else x_hat, rtol=1e-4, atol=1e-4)
    assert_close(raw_f.unsqueeze(-1) * inference.atoms, after.after(adds) if after else adds, rtol=1e-4, atol=1e-4)
    if keeps_codes(case):
        assert_close(raw_f, f, rtol=1e-4, atol=1e-4)
    else:
        assert_close(raw_f != 0, f != 0)


@pytest.mark.parametrize("case", AUTOENCODERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_autoencoder_takes_and_gives_raw_rows(case, kind):
    mapped = affine(kind, case.settings.d_in)  # its rows are input and target: one map stands before and after
    if case.name == "matching-pursuit" and kind == "whitening":
        with pytest.raises(UserError, match=r"only one scale .* mean-norm"):
            case.stack().member(1, case.members[1]).to_inference(mapped, mapped)
    else:
        check(case, mapped, mapped)


@pytest.mark.parametrize("case", TRANSCODERS, ids=str)
@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("after", KINDS)
def test_a_transcoder_takes_raw_rows_and_gives_raw_targets(case, before, after):
    check(case, affine(before, case.settings.d_in), affine(after, case.settings.target_width))


def test_matching_pursuit_refuses_a_scale_that_differs_by_dim_and_a_shift():
    case = next(case for case in CASES if case.name == "matching-pursuit")
    trained, one = case.stack().member(1, case.members[1]), torch.ones(case.settings.d_in)
    uneven = one.clone()
    uneven[0] = 2
    for factor, shift in ((uneven, one * 0), (one, uneven)):
        mapped = Affine(factor, 1 / factor, shift)
        with pytest.raises(UserError, match="only one scale"):
            trained.to_inference(mapped, mapped)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inference_is_a_copy_and_at_rest(case):
    trained = case.stack().member(0, case.members[0])
    inference = trained.to_inference()
    theirs = {value.data_ptr() for value in (*trained.tensors().values(), *trained.state().values())}
    values = {**inference.tensors(), **inference.state()}
    assert "b_dec" in values
    for name, value in values.items():
        assert value.data_ptr() not in theirs, f"{name} shares memory"
        assert value.is_contiguous(), name
    again = inference.to_inference()
    assert_close({**again.tensors(), **again.state()}, values)
    x, _ = case.data()
    assert_close(again(x), inference(x))

"""The encoder's product by either of its kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_coding.kernels import triton
from sparse_coding.kernels.triton import encode as encode_


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 8, 40), (2, 130, 72, 300)], ids=str)
def test_tiles_from_the_copy_engine_make_the_same_product(shape, shared, above, device, generator, monkeypatch):
    """Remainders on every side; rows of the next member behind the last of this one."""
    n_members, n_rows, d_in, d_sae = shape
    inputs = torch.randn(n_members, n_rows, d_in, generator=generator).bfloat16().to(device)
    inputs = inputs[:1].expand(n_members, -1, -1) if shared else inputs
    weights = torch.randn(n_members, d_in, d_sae, generator=generator).bfloat16().to(device)
    bias = torch.randn(n_members, d_sae, generator=generator).to(device)
    found, kept = [], torch.float32 if above else torch.bfloat16
    for by_tiles in (True, False):
        monkeypatch.setattr(encode_, "in_tiles", lambda *_, by_tiles=by_tiles: by_tiles)
        found.append(encode_.encode(inputs, triton.latents_together(weights), bias, None, False, kept, above))
    ours, theirs = found
    assert ours.pre.dtype == (torch.float32 if above else torch.bfloat16)
    exact = inputs.double() @ weights.double() + bias.double().unsqueeze(1)
    for one in found:
        assert ((one.pre.double() - exact).norm() / exact.norm()) < (1e-6 if above else 3e-3)
    same = (ours.pre == theirs.pre) | torch.isclose(ours.pre.float(), theirs.pre.float(), rtol=1e-2, atol=1e-5)
    assert bool(same.all())
    whole = torch.nn.functional.pad(ours.pre.float(), (0, -d_sae % encode_.GROUP)).unflatten(-1, (-1, encode_.GROUP))
    keys = (whole > 0).int() if above else whole.clamp(min=0).view(torch.int32)
    assert torch.equal(ours.best, keys.amax(-1).int())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU what it can do")
def test_which_tensors_the_copy_engine_brings():
    weights = triton.latents_together(torch.randn(1, 16, 64, device="cuda").bfloat16())
    inputs = torch.randn(1, 4, 16, device="cuda").bfloat16()
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    assert encode_.in_tiles(inputs, weights) == hopper
    assert not encode_.in_tiles(inputs.float(), weights.float())
    assert not encode_.in_tiles(inputs, weights.contiguous())
    assert not encode_.in_tiles(inputs[..., :12].contiguous(), weights[:, :12].mT.contiguous().mT)

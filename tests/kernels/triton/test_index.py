"""The order by latents against a stable sort."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_coding.kernels.triton import index


@pytest.mark.parametrize("d_sae", [1, 7, 300])
@pytest.mark.parametrize("programs", [2, 128])
def test_entries_come_latent_by_latent_and_row_by_row(d_sae, programs, device, generator, monkeypatch):
    """Several chunks of a program, several words, places without an entry; a second list, of other gradients."""
    monkeypatch.setattr(index, "PROGRAMS", programs)
    monkeypatch.setattr(index, "CHUNK", 32)
    n_members, n_rows = 2, 70
    lists = []
    for slots, first_source in ((5, 0), (2, 420)):
        slots = min(slots, d_sae)
        latent = torch.rand(n_members, n_rows, d_sae, generator=generator).topk(slots).indices.int()
        latent[torch.rand(latent.shape, generator=generator) < 0.2] = -1
        f, slope = (torch.randn(latent.shape, generator=generator).to(device) for _ in range(2))
        lists.append(index.List(latent.to(device), f, slope, 3 if first_source == 0 else 1, first_source))
    ends = torch.tensor([d_sae // 3, d_sae // 2, d_sae], dtype=torch.int32, device=device)
    found = index.by_latent(lists, ends, n_rows, d_sae)
    for member in range(n_members):
        for latent in range(d_sae):
            expected = []
            for one in lists:
                for row, slot in (one.latent[member] == latent).nonzero().tolist():
                    prefix = int((latent >= ends[:2]).sum()) if one.n_ends > 1 else 0
                    at = member * n_rows + row
                    value, slope = one.f[member, row, slot].item(), one.slope[member, row, slot].item()
                    expected.append((at, one.first_source + at * one.n_ends + prefix, value, slope))
            start, count = int(found.starts[member, latent]), int(found.totals[member, latent])
            columns = (found.row, found.source, found.f, found.slope)
            assert list(zip(*(c[start : start + count].tolist() for c in columns), strict=True)) == expected

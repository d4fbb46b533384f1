"""AuxK's choice: the k largest of each row among the dead latents, against a stable sort."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_coding.kernels.triton import revive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_dead", "k"), [(0, 3), (4, 6), (6, 6), (60, 5), (60, 1), (60, 59)])
@pytest.mark.parametrize("levels", [3, 1000])
def test_the_first_of_the_largest_dead_are_kept(n_dead, k, levels, dtype, device, generator, monkeypatch):
    """More dead than places and fewer, several tiles of them, ties, a row without any above 0, signed scores, norms."""
    monkeypatch.setattr(revive, "TILE", 16)
    d_sae, n_rows = 70, 4
    pre = ((torch.rand(2, n_rows, d_sae, generator=generator) - 0.4) * levels).round().to(dtype)
    pre[0, 1] = -1.0
    dead = torch.zeros(2, d_sae, dtype=torch.bool)
    dead[0, torch.randperm(d_sae, generator=generator)[:n_dead]] = True
    dead[1, :3] = True
    for signed in (False, True):
        for norms in (None, torch.rand(2, d_sae, generator=generator) + 0.5):
            own = None if norms is None else norms.to(device)
            found = revive.largest_of_dead(pre.to(device), dead.to(device), k, own, signed)
            scores = pre.float().abs() if signed else pre.float()
            scores = scores if norms is None else scores * norms.unsqueeze(1)
            scores = torch.where(dead.unsqueeze(1), scores, 0.0)
            for member in range(2):
                at = 0
                for row in range(n_rows):
                    best = scores[member, row].sort(descending=True, stable=True).indices[:k]
                    expected = sorted(i for i in best.tolist() if scores[member, row, i] > 0)
                    n = int(found.count[member, row])
                    assert int(found.first[member, row]) == at
                    assert found.latent[member, at : at + n].tolist() == expected
                    assert found.f[member, at : at + n].tolist() == pre[member, row, expected].tolist()
                    assert found.rows[member, at : at + n].tolist() == [row] * n
                    at += n
                assert int(found.total[member]) == at

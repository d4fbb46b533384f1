"""A store is gone on with only from files that are there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.stores.intact import refuse_damaged
from sparse_coding.stores.manifest import read_manifest
from sparse_coding.stores.objects import open_objects
from sparse_coding.stores.store import Store
from tests.stores.test_store import WIDTHS, damage, files, sample, write


@pytest.mark.parametrize("kind", ["missing", "truncated", "longer", "header"])
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_an_unfinished_store_is_written_again_from_its_first_damaged_file(tmp_path, capsys, kind, codec):
    rows, tokens = sample()
    write(tmp_path / "whole", rows, tokens, codec=codec)
    write(tmp_path / "s", rows, tokens, last=48, finish=False, chunk=16, codec=codec)
    damage(tmp_path / "s" / "site-1" / "00001.safetensors", kind)
    (tmp_path / "s" / "tokens" / "00002.safetensors").unlink()
    resumed = write(tmp_path / "s", rows, tokens, last=0, finish=False, codec=codec).rows
    assert resumed == 16
    assert "site-1/00001.safetensors" in (said := capsys.readouterr().err)
    assert "going on from row 16" in said
    write(tmp_path / "s", rows, tokens, codec=codec)
    there = files(tmp_path / "s")
    whole = files(tmp_path / "whole")
    assert there.keys() == whole.keys()
    assert all(there[name] == whole[name] for name in whole if name != "manifest.json")
    one, two = (Store.open(tmp_path / name).manifest for name in ("s", "whole"))
    assert one.shards == two.shards
    for site in WIDTHS:  # the first shard's are those of its rows as they are stored
        step = 0 if one.sites[site].scale is None else max(one.sites[site].scale)
        np.testing.assert_allclose(one.statistics[site].mean, two.statistics[site].mean, rtol=0, atol=step + 1e-9)


def test_rows_that_are_not_those_written_are_not_counted_either(tmp_path):
    """Only where something else is damaged: rows are not read otherwise."""
    rows, tokens = sample()
    write(tmp_path, rows, tokens, last=48, finish=False, chunk=16)
    damage(tmp_path / "site-0" / "00001.safetensors", "row")
    damage(tmp_path / "site-0" / "00002.safetensors", "missing")
    assert write(tmp_path, rows, tokens, last=0, finish=False).rows == 16
    damage(tmp_path / "site-0" / "00000.safetensors", "missing")
    assert write(tmp_path, rows, tokens, last=0, finish=False).rows == 0
    write(tmp_path, rows, tokens)
    store = Store.open(tmp_path)
    x = torch.cat([store.read_shard("blocks.1", shard) for shard in range(4)])
    assert torch.equal(x, rows["blocks.1"])


def test_a_complete_store_that_lacks_files_says_which_and_what_to_do(tmp_path):
    rows, tokens = sample()
    write(tmp_path, rows, tokens)
    refuse_damaged(open_objects(tmp_path), read_manifest(open_objects(tmp_path)))
    damage(tmp_path / "site-0" / "00001.safetensors", "missing")
    damage(tmp_path / "tokens" / "00003.safetensors", "truncated")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"site-0/00001.* is missing, and 1 more .*or delete the store and harvest it"):
        refuse_damaged(open_objects(tmp_path), read_manifest(open_objects(tmp_path)))
    assert files(tmp_path) == before

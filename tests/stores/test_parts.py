from __future__ import annotations

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.stores.codec import Affine8
from sparse_coding.stores.objects import open_objects
from sparse_coding.stores.parts import PartObjects, join_parts
from sparse_coding.stores.store import Source, Store, StoreWriter

ROWS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


def write(folder, rank, scale=0.02):
    """Its half of the rows, as one of two processes."""
    affine = {"a": Affine8(torch.zeros(4), torch.full((4,), scale))}
    place = PartObjects(open_objects(folder), rank, 2, 2 * rank)
    with StoreWriter(place, {"a": 4}, Source("none"), codec="int8", shard_rows=10, affine=affine) as writer:
        resumed = writer.rows
        writer.append({"a": ROWS[20 * rank + resumed : 20 * rank + 20]})
        writer.finish()
    return resumed


def rows_of(folder):
    store = Store.open(folder)
    return torch.cat([store.decode("a", store.read_shard("a", shard)) for shard in range(len(store.shard_rows))])


def test_parts_of_one_scale_become_one_store(tmp_path):
    for rank in (0, 1):
        write(tmp_path, rank)
    join_parts(open_objects(tmp_path), 2)
    assert (rows_of(tmp_path) - ROWS).abs().max() <= 0.51 * 0.02 + (ROWS.abs() - 127 * 0.02).clamp(min=0).max()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "site-0"], "the parts are gone"


def test_parts_whose_int8_means_other_numbers_are_not_joined(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, scale=0.04)
    with pytest.raises(UserError, match=r"process 1 has other sites .* mean and scale of int8; delete the store"):
        join_parts(open_objects(tmp_path), 2)
    assert not (tmp_path / "manifest.json").exists()


def test_a_part_that_lacks_a_file_is_gone_on_with(tmp_path):
    for rank in (0, 1):
        write(tmp_path, rank)
    (tmp_path / "site-0" / "00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"site-0.00003\.safetensors is missing: start the same command again"):
        join_parts(open_objects(tmp_path), 2)
    assert not (tmp_path / "manifest.json").exists()
    assert write(tmp_path, 1) == 10, "after its first shard"
    join_parts(open_objects(tmp_path), 2)
    assert len(rows_of(tmp_path)) == 40

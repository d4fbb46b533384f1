from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_coding.stores import ranges
from sparse_coding.stores.ranges import FileRows, scatter
from sparse_coding.stores.store import Damaged, Source, Store, StoreWriter

WIDTH, ROWS = 1024, 2000


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    with StoreWriter(folder, {"a": WIDTH}, Source("none"), codec="bf16") as writer:
        writer.append({"a": torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))})
        writer.finish()
    return Store.open(folder)


def bytes_of(store: Store) -> np.ndarray:
    return store.read_shard("a", 0).view(torch.uint8).numpy().reshape(ROWS, 2 * WIDTH)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(("start", "stop"), [(0, ROWS), (0, 1), (511, 513), (512, 1024), (700, 1999), (5, 5)])
def test_any_range_comes_back_in_order(store, monkeypatch, start, stop, local):
    if not local:
        monkeypatch.setattr(ranges, "FolderObjects", str)
        monkeypatch.setattr(ranges, "PIECE", 2**20)
    with FileRows(store, "a", 0) as file:
        assert file.file.sums is not None
        assert file.file.sums.group_rows == 512
        found = [(first, rows.copy()) for first, rows in file.read(start, stop)]
    assert all(rows.nbytes <= 3 * 2**19 for _, rows in found)
    place = start
    for first, rows in found:
        assert first == place
        place += len(rows)
    assert place == stop
    if found:
        assert (np.concatenate([rows for _, rows in found]) == bytes_of(store)[start:stop]).all()


def test_a_flipped_bit_is_seen_wherever_it_is(store):
    path = store.objects.folder / "site-0/00000.safetensors"  # type: ignore[attr-defined]
    whole = path.read_bytes()
    begin = len(whole) - ROWS * 2 * WIDTH
    try:
        for place in (begin, begin + 512 * 2 * WIDTH - 1, begin + 600 * 2 * WIDTH + 77, len(whole) - 1):
            data = bytearray(whole)
            data[place] ^= 16
            path.write_bytes(data)
            group = (place - begin) // (512 * 2 * WIDTH)
            words = f"rows {group * 512} to {min(group * 512 + 512, ROWS) - 1} are not what was written"
            with FileRows(store, "a", 0) as file, pytest.raises(Damaged, match=words):
                list(file.read(0, ROWS))
            with pytest.raises(Damaged, match=words):
                store.read_rows("a", 0, min(group * 512 + 3, ROWS - 1), 1)
            with pytest.raises(Damaged, match=words):
                store.check_shard("a", 0)
            other = (group + 1) % 3 * 512
            with FileRows(store, "a", 0) as file:
                list(file.read(other, other + 1))
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("width", [1, 6, 255, 1536, 8192])
@pytest.mark.parametrize("n", [0, 1, 3, 130, 700])
def test_rows_go_to_their_places(width, n):
    rows = np.random.default_rng(0).integers(1, 256, (n, width)).astype(np.uint8)
    places = np.random.default_rng(1).permutation(1000)[:n]
    target = np.zeros((1000, width), np.uint8)
    rows.flags.writeable = False
    scatter(rows, target, places)
    assert (target[places] == rows).all()
    assert not np.delete(target, places, axis=0).any()
    ordered = np.zeros((n + 2, width), np.uint8)
    scatter(rows, ordered, np.arange(1, n + 1))
    assert (ordered[1 : n + 1] == rows).all()
    assert not ordered[[0, n + 1]].any()

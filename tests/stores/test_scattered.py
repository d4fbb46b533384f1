from __future__ import annotations

import os

import numpy as np
import pytest

from sparse_coding.stores.scattered import read_rows


def test_no_address_lies_outside_the_buffer(tmp_path):
    (tmp_path / "f").write_bytes(bytes(5120))
    for places in ([0, 3, 9], [0, -1, 2]):
        with (tmp_path / "f").open("rb") as file, pytest.raises(AssertionError, match="outside"):
            read_rows(file.fileno(), 0, np.zeros((9, 1024), np.uint8), np.array(places))


@pytest.mark.parametrize("width", [1, 255, 256, 1536])
@pytest.mark.parametrize("n", [0, 1, 3, 2500])
def test_rows_are_read_to_their_places(tmp_path, width, n):
    rows = np.random.default_rng(0).integers(0, 256, (n, width)).astype(np.uint8)
    (tmp_path / "f").write_bytes(b"header" + rows.tobytes())
    places = np.random.default_rng(1).permutation(3000)[:n]
    target = np.zeros((3000, width), np.uint8)
    file = os.open(tmp_path / "f", os.O_RDONLY)
    assert read_rows(file, 6, target, places) == n * width
    assert (target[places] == rows).all()
    assert not np.delete(target, places, axis=0).any()
    ordered = np.zeros((n + 2, width), np.uint8)
    assert read_rows(file, 6, ordered, np.arange(1, n + 1)) == n * width
    assert (ordered[1 : n + 1] == rows).all()
    if n:
        os.truncate(tmp_path / "f", 6 + n * width - 1)
        assert read_rows(file, 6, target, places) == n * width - 1
    os.close(file)

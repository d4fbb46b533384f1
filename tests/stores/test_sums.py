from __future__ import annotations

import numpy as np
import pytest
import xxhash

from sparse_coding.stores.sums import Sums, chunk_rows, group_rows, sum_of

ROWS = np.random.default_rng(0).integers(0, 256, (1030, 6)).astype(np.uint8)


def test_groups_are_powers_of_two_and_chunks_are_whole_groups():
    assert [group_rows(width) for width in (1, 768, 1024, 4096, 10**7)] == [512, 512, 512, 128, 1]
    for width in (1, 16, 768, 1000, 4096, 50_000, 10**7):
        assert chunk_rows(width) % group_rows(width) == 0
        assert chunk_rows(width) == group_rows(width) or chunk_rows(width) * 2 * width <= 2**23
    assert chunk_rows(768) == 5120


def test_sums_are_those_of_the_definition():
    """XXH3 of the library, and a value of its reference implementation."""
    assert sum_of(b"") == 0x2D06800538D394C2
    sums = Sums.of(ROWS, 512)
    assert sums.values.tolist() == [xxhash.xxh3_64_intdigest(ROWS[i : i + 512].tobytes()) for i in (0, 512, 1024)]
    back = Sums.read(sums.said(), 1030)
    assert back.group_rows == 512
    assert (back.values == sums.values).all()


def test_the_first_wrong_group_is_found():
    sums = Sums.of(ROWS, 512)
    assert sums.wrong(ROWS, 0) is None
    assert sums.wrong(ROWS[512:], 512) is None
    assert sums.wrong(ROWS[:512], 512) == (512, 1024)
    changed = ROWS.copy()
    changed[1029, 5] ^= 1
    assert sums.wrong(changed, 0) == (1024, 1030)
    exchanged = ROWS.copy()
    exchanged[[3, 4]] = exchanged[[4, 3]]
    assert sums.wrong(exchanged, 0) == (0, 512)
    assert sums.around(3, 513, 1030) == (0, 1024)
    assert sums.around(1024, 1029, 1030) == (1024, 1030)


@pytest.mark.parametrize(
    "change",
    [
        {"group_rows": "0"}, {"group_rows": "-512"}, {"group_rows": "256"}, {"group_rows": "5" * 5000},
        {"group_rows": 512},
        {"group_rows": None}, {"xxh3_64": None}, {"xxh3_64": "0" * 47}, {"xxh3_64": "g" * 48}, {"xxh3_64": " " * 48},
        {"xxh3_64": "00" * 23 + "\t\t"}, {"xxh3_64": []},
    ],
)  # fmt: skip
def test_metadata_that_hold_no_sums_are_refused(change):
    said = {**Sums.of(ROWS, 512).said(), **change}
    with pytest.raises(ValueError, match=r"checksums|hexadecimal"):
        Sums.read(said, 1030)
    with pytest.raises(ValueError, match="no checksums"):
        Sums.read(None, 1030)

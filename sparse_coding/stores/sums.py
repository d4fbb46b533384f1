"""Checksums of groups of rows: whether a range that was read is what was written, seen while it is in the cache.

XXH3 (https://xxhash.com, 64 bits) runs far faster than memory, so every row that is read is checked. It is no guard
against people: SHA-256 in the manifest is, of whole files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xxhash
from jaxtyping import UInt8, UInt64

GROUP_BYTES = 2**20
"""A group holds at most so much of the widest site at two bytes a number; the codec changes bytes, never the rows."""
LARGEST_GROUP = 512
"""Rows."""
CHUNK_BYTES = 2**23
"""What a chunk holds, said as for a group: one request to S3, where short ones cost speed."""
DIGITS = 16
"""Of a sum, in hexadecimal."""


def group_rows(widest: int) -> int:
    """Rows that share a sum in a store whose widest site is `widest`: a power of two."""
    return 1 << (max(1, min(GROUP_BYTES // (2 * widest), LARGEST_GROUP)).bit_length() - 1)


def chunk_rows(widest: int) -> int:
    """Rows of a chunk, which the order of the rows keeps together: one or more groups, at most 8 MiB at two bytes."""
    group = group_rows(widest)
    return max(1, CHUNK_BYTES // (2 * widest * group)) * group


def sum_of(data: bytes | memoryview | np.ndarray) -> int:
    """XXH3 of contiguous bytes, 64 bits."""
    return xxhash.xxh3_64_intdigest(data)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sums:
    """The sums of the rows of one file: of rows [0, group_rows), [group_rows, 2 group_rows), ..."""

    group_rows: int
    values: UInt64[np.ndarray, " n_groups"]

    @classmethod
    def of(cls, rows: UInt8[np.ndarray, "n bytes"], group_rows: int) -> Sums:
        starts = range(0, len(rows), group_rows)
        return cls(group_rows, np.array([sum_of(rows[start : start + group_rows]) for start in starts], np.uint64))

    def said(self) -> dict[str, str]:
        """As the metadata of a safetensors file."""
        return {"group_rows": str(self.group_rows), "xxh3_64": "".join(f"{one:0{DIGITS}x}" for one in self.values)}

    @classmethod
    def read(cls, metadata: object, n_rows: int) -> Sums:
        """From the metadata of a file of `n_rows` rows. Raises `ValueError` where they are not such sums."""
        if not isinstance(metadata, Mapping):
            raise ValueError("it has no checksums")
        group, digits = metadata.get("group_rows"), metadata.get("xxh3_64")
        if not (isinstance(group, str) and group.isascii() and group.isdigit() and 0 < len(group) < 10 and int(group)):
            raise ValueError("its checksums do not say of how many rows each is")
        n_groups = -(-n_rows // int(group))
        if not isinstance(digits, str) or not re.fullmatch(rf"[0-9a-f]{{{DIGITS * n_groups}}}", digits):
            raise ValueError("its checksums are too few, too many or not hexadecimal")
        return cls(int(group), np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64))

    def around(self, start: int, stop: int, n_rows: int) -> tuple[int, int]:
        """The groups about rows [start, stop) of a file of `n_rows`, in rows."""
        return start // self.group_rows * self.group_rows, min(-(-stop // self.group_rows) * self.group_rows, n_rows)

    def wrong(self, rows: UInt8[np.ndarray, "n bytes"], start: int) -> tuple[int, int] | None:
        """The first group of rows that are not what was written; `rows` begin at row `start`, where a group does."""
        first = start // self.group_rows
        for begin in range(0, len(rows), self.group_rows):
            piece = rows[begin : begin + self.group_rows]
            if sum_of(piece) != int(self.values[first + begin // self.group_rows]):
                return start + begin, start + begin + len(piece)
        return None

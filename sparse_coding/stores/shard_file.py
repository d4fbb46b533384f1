"""One file of a store: safetensors, read by byte ranges and never trusted.

A file is 8 bytes (length n of the header, little-endian), n bytes of JSON padded with spaces, and the tensors end to
end. Ours have a header whose size depends on the rows of a full shard alone, so a shard is one buffer that is filled as
rows come and sent as it is. The header holds the checksums of the rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_coding.errors import UserError
from sparse_coding.stores.objects import Objects
from sparse_coding.stores.sums import DIGITS, Sums, sum_of

ALIGNMENT = 1024
"""The tensors begin at a multiple of it in the files we write, so that they are aligned when mapped."""
FIRST_READ = 16 << 10
"""Bytes that are read for a header at once; most are shorter."""
LARGEST_HEADER = 16 << 20
"""Bytes; a file with a longer header is not one of ours."""
ITEMSIZES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U16": 2, "I32": 4, "I64": 8}


class Damaged(UserError):
    """A file of a store is not what its manifest says. `name` is the file's, below the store."""

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.name = name


Expected = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensors of a file in their order: name -> (safetensors dtype, shape)."""


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = ITEMSIZES[dtype]
    for length in shape:
        size *= length
    return size


@dataclass(frozen=True)
class ShardFile:
    """A file whose size and header were found to be right."""

    name: str
    starts: Mapping[str, int]
    """The byte where each tensor begins."""
    sums: Sums | None
    """Of its rows; None for files of format 1 and of tokens."""
    seen: np.ndarray
    """Which groups of rows this process has found to be what was written."""


def data_start(n_groups: int) -> int:
    """Where the tensors begin in a file with so many sums as we write it."""
    return -(-(512 + DIGITS * n_groups) // ALIGNMENT) * ALIGNMENT


def header(expected: Expected, n_bytes: int, sums: Sums | None = None) -> bytes:
    """The first `n_bytes` bytes of a file with these tensors."""
    tensors: dict[str, Any] = {} if sums is None else {"__metadata__": sums.said()}
    start = 0
    for name, (dtype, shape) in expected.items():
        end = start + tensor_bytes(dtype, shape)
        tensors[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(tensors, separators=(",", ":")).encode()
    assert len(text) <= n_bytes - 8
    return (n_bytes - 8).to_bytes(8, "little") + text.ljust(n_bytes - 8)


def read_header(
    objects: Objects, name: str, size: int, expected: Expected, sum_: str | None, summed_rows: int = 0
) -> ShardFile:
    """A file of `size` bytes, its header checked against what must be in it.

    sum_: of the header, as the manifest has it; None for format 1. summed_rows: rows whose sums it must hold then.
    Reads the header alone, and no more than `LARGEST_HEADER` of it whatever it claims. Raises `Damaged`.
    """

    def damaged(what: str) -> Damaged:
        return Damaged(f"{objects.url}/{name} is damaged: {what}", name)

    if size < 8:
        raise damaged(f"it has {size} bytes, less than a header")
    first = objects.get_range(name, 0, min(size, FIRST_READ))
    length = int.from_bytes(first[:8], "little")
    if length > min(size - 8, LARGEST_HEADER):
        raise damaged(f"its header claims {length} bytes, and the file has {size}")
    text = bytes(first[8 : 8 + length])
    if len(text) < length:
        text += bytes(objects.get_range(name, 8 + len(text), length - len(text)))
    try:
        tensors = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged("its header is no JSON") from None
    if not isinstance(tensors, dict):
        raise damaged("its header is no JSON object")
    if sum_ is not None and f"{sum_of(bytes(first[:8]) + text):0{DIGITS}x}" != sum_:
        raise damaged("its header is not the one that was written")
    metadata = tensors.pop("__metadata__", None)
    if set(tensors) != set(expected):
        raise damaged(f"it must hold the tensors {', '.join(expected)}")
    starts = {}
    for key, (dtype, shape) in expected.items():
        one = tensors[key]
        offsets = one.get("data_offsets") if isinstance(one, dict) else None
        begin = offsets[0] if isinstance(offsets, list) and offsets else None
        n_bytes = tensor_bytes(dtype, shape)
        if type(begin) is not int or not 0 <= begin <= size:
            raise damaged(f"the header says nothing usable about {key}")
        wanted = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + n_bytes]}
        if one != wanted:
            raise damaged(f"{key} must be {dtype} of shape {list(shape)}, the header says otherwise")
        starts[key] = 8 + length + begin
    order = sorted((start, tensor_bytes(*expected[key])) for key, start in starts.items())
    position = 8 + length
    for start, n_bytes in order:
        if start != position:
            raise damaged("its tensors overlap or leave gaps")
        position += n_bytes
    if position != size:
        raise damaged(f"it has {size} bytes, its tensors end at {position}")
    try:
        sums = Sums.read(metadata, summed_rows) if sum_ is not None and summed_rows else None
    except ValueError as error:
        raise damaged(str(error)) from None
    return ShardFile(name, starts, sums, np.zeros(0 if sums is None else len(sums.values), bool))

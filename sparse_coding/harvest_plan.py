"""What a harvest will cost, said before it begins: bytes counted, seconds measured on one forward pass."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_coding.progress import quantity
from sparse_coding.stores.codec import ITEMSIZE, Affine8, Codec, calibrate, encode
from sparse_coding.stores.objects import Objects
from sparse_coding.stores.running import Running

TRIAL_BYTES = 16 << 20
"""Most that is written to time writing."""
TOKEN_BYTES = 16
"""Of token id, context and position of a row."""


@dataclass(frozen=True)
class Cost:
    """Seconds a row takes in the model, as numbers of the codec, and on its way into the store."""

    model: float
    encoding: float
    sending: float

    def seconds(self, rows: int) -> float:
        """Of so many rows. One after the other: on a CPU they share its cores, elsewhere it is the most it takes."""
        return rows * (self.model + self.encoding + self.sending)

    def __str__(self) -> str:
        writing = 1 / (self.encoding + self.sending)
        return f"{quantity(1 / self.model)} rows/s in the model, {quantity(writing)} rows/s into the store"


def measured(read: Callable[[], Mapping[str, Tensor]], codec: Codec, objects: Objects, name: str, bytes_: int) -> Cost:
    """Time reading, encoding and sending the rows of a forward pass; the quicker of two.

    read: gives the rows `[n d]` by site. `name` is written to: the file that comes next, which is then written anew.
    `bytes_`: of one row in the store.
    """
    timings = []
    affines = [calibrate(x.float()) if codec == "int8" else None for x in read().values()]
    for _ in range(2):
        began = time.perf_counter()
        rows = read()
        for x in rows.values():
            x[-1:].cpu()  # a GPU has then done it
        read_at = time.perf_counter()
        stored = [_encoded(x, codec, affine) for x, affine in zip(rows.values(), affines, strict=True)]
        timings.append((read_at - began, time.perf_counter() - read_at))
    data = np.resize(stored[0], min(TRIAL_BYTES, max(1, len(stored[0]))))
    began = time.perf_counter()
    hashlib.sha256(data.data).hexdigest()
    objects.put(name, data.data)
    per_byte = (time.perf_counter() - began) / len(data)
    n_rows = len(next(iter(rows.values())))
    model, encoding = (min(one) / n_rows for one in zip(*timings, strict=True))
    return Cost(model, encoding, per_byte * bytes_)


def row_bytes(widths: Mapping[str, int], codec: Codec, tokens: bool) -> int:
    """Bytes of one row in a store."""
    return sum(widths.values()) * ITEMSIZE[codec] + (TOKEN_BYTES if tokens else 0)


def size(n_bytes: float) -> str:
    """A number of bytes as people say it."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.3g} {unit}"
    return f"{n_bytes / 1024:.3g} KiB"


def _encoded(x: Tensor, codec: Codec, affine: Affine8 | None) -> np.ndarray:
    """What the writer does with rows: counts them and turns them into bytes."""
    Running.of(0, None, x.shape[1]).add(x)
    return encode(x, codec, affine).contiguous().cpu().view(torch.uint8).numpy().reshape(-1)

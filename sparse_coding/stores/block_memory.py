"""Memory for a block of rows, lent to the tensors that are served from it and used again when all of them are gone."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

HUGE_PAGE = 2**21


class BlockMemory:
    """Room for `n` rows of every site."""

    def __init__(self, n: int, shapes: Mapping[str, tuple[int, torch.dtype]], pinned: bool):
        """shapes: width and dtype of the rows by site. pinned: for copies to a GPU, which no tensor here outlives."""
        self._shapes = dict(shapes)
        self._lent: list[weakref.ref] = []
        self._pinned: dict[str, Tensor] = {}
        self._bytes: dict[str, np.ndarray] = {}
        self.last_use: torch.Event | None = None
        """After it the device no longer reads the memory."""
        for site, (width, dtype) in shapes.items():
            if pinned:
                self._pinned[site] = torch.empty(n, width, dtype=dtype, pin_memory=True)
            else:
                self._bytes[site] = memory(n * width * dtype.itemsize)

    def lend(self, n: int) -> dict[str, Tensor]:
        """`n` rows of every site, `[n d]`; the memory is not `free` while one of them or a view of one lives."""
        assert self.free
        rows = {site: whole[:n] for site, whole in self._pinned.items()}
        with torch.inference_mode(False):  # the tensors count what is written to them
            for site, whole in self._bytes.items():
                width, dtype = self._shapes[site]
                lent = whole[: n * width * dtype.itemsize]
                self._lent.append(weakref.ref(lent))
                rows[site] = torch.from_numpy(lent).view(dtype).view(n, width)
        return rows

    @property
    def free(self) -> bool:
        self._lent = [one for one in self._lent if one() is not None]
        return not self._lent


def memory(n_bytes: int) -> UInt8[np.ndarray, " n_bytes"]:
    """Memory in pages of 2 MiB where the system has them: as rows go anywhere in it."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or n_bytes < 2 * HUGE_PAGE:
        return np.empty(n_bytes, np.uint8)
    found = mmap.mmap(-1, n_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        found.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(found, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + n_bytes]

"""Rows of a local file read straight to scattered places in memory, for those that need no look on the way.

The system is told where each row goes (preadv with one address per row). Its copy writes memory without reading it
first, which no copy of numpy's does, so it needs two thirds of the memory's bandwidth. It needs no interpreter lock.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

ADDRESSES_PER_CALL = 1024
"""IOV_MAX of Linux."""
NARROW = 256
"""Rows of fewer bytes are read in one run and scattered afterwards: an address costs more than the copy."""


@cache
def _preadv() -> Any | None:
    """The C library's preadv; None where there is none with 64-bit offsets."""
    if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).preadv
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_ssize_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
    return function


def read_rows(file: int, start: int, target: UInt8[np.ndarray, "N bytes"], places: Int[np.ndarray, " n"]) -> int:
    """Read `n` rows from byte `start` of an open file into rows `places` of `target`; gives the bytes that were there.

    Fewer than n times the bytes of a row: the file ends early. Raises `OSError`.
    """
    n, row_bytes = len(places), target.shape[1]
    preadv = _preadv()
    if n and int(places[-1]) - int(places[0]) == n - 1 and (np.diff(places) == 1).all():
        return _read_run(file, start, target[int(places[0]) : int(places[0]) + n])
    if preadv is None or row_bytes < NARROW or not target.flags.c_contiguous:
        run = np.empty((n, row_bytes), np.uint8)
        read = _read_run(file, start, run)
        target[places] = run
        return read
    assert places.min(initial=0) >= 0, "an address outside the buffer"
    assert places.max(initial=-1) < len(target), "an address outside the buffer"
    addresses = np.empty((n, 2), np.uint64)
    addresses[:, 0] = target.ctypes.data + places.astype(np.uint64) * np.uint64(row_bytes)
    addresses[:, 1] = row_bytes
    done = 0  # rows
    while done < n:
        count = min(ADDRESSES_PER_CALL, n - done)
        read = preadv(file, addresses[done:].ctypes.data, count, start + done * row_bytes)
        if read < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        if read < row_bytes and read < count * row_bytes:
            return done * row_bytes + read
        done += read // row_bytes  # a row that came in part is read again
    return n * row_bytes


def _read_run(file: int, start: int, out: UInt8[np.ndarray, "n bytes"]) -> int:
    view, done = memoryview(out.reshape(-1)), 0  # type: ignore[arg-type]
    while done < len(view) and (read := os.preadv(file, [view[done:]], start + done)):
        done += read
    return done

"""Rows of a file read in ranges that fit a core's cache, checked there, and put where they are served.

A range is read into a small buffer, its checksums are computed while it is in the cache, and each row goes from there
to its place. Rows that were checked before in this process are read straight to their places (scattered.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt8

from sparse_coding.stores.objects import PIECE, FolderObjects, ObjectMissing, ObjectTruncated
from sparse_coding.stores.scattered import read_rows
from sparse_coding.stores.store import Damaged, Store

CACHED_BYTES = 3 * 2**19
"""A local range: it stays in the caches, and is worth the calls that it takes."""
LOCKED = 500
"""numpy keeps the interpreter lock while it puts so many items or fewer."""
_buffers = threading.local()


class FileRows:
    """The rows of one file of a store. Use it in a `with` and in one thread. Raises `Damaged`."""

    def __init__(self, store: Store, site: str, shard: int):
        self.store, self.file, self.n_rows = store, store.file(site, shard), store.manifest.shards[shard].rows
        self.row_bytes = store.widths[site] * store.dtype.itemsize
        self._opened: int | None = None

    def __enter__(self) -> FileRows:
        if isinstance(self.store.objects, FolderObjects):
            self._opened = os.open(self.store.objects.folder / self.file.name, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        if self._opened is not None:
            os.close(self._opened)

    def read(self, start: int, stop: int) -> Iterator[tuple[int, UInt8[np.ndarray, "n bytes"]]]:
        """Rows [start, stop) as they are stored, one range after another, each with its first row.

        A range may be read-only and is valid until the next one. The groups that `start` and `stop` lie in are read
        whole.
        """
        sums = self.file.sums
        first, last = (start, stop) if sums is None else sums.around(start, stop, self.n_rows)
        group = (1 if sums is None else sums.group_rows) * self.row_bytes
        cached = max(1, CACHED_BYTES // group) * group // self.row_bytes
        asked = cached if self._opened is not None else max(1, PIECE // group) * group // self.row_bytes
        for begin in range(first, last, asked):
            whole = self._range(begin, min(begin + asked, last))
            for at in range(begin, begin + len(whole), cached):
                rows = whole[at - begin : at - begin + cached]
                if self._opened is None and sums is not None and sums.wrong(rows, at):
                    rows = self._range(at, at + len(rows))  # the fault may have been on the way: this answer decides
                self.store.check_rows(self.file, rows, at)
                yield max(at, start), rows[max(at, start) - at : min(at + len(rows), stop) - at]

    def scattered(self, start: int, target: UInt8[np.ndarray, "N bytes"], places: Int[np.ndarray, " n"]) -> bool:
        """Read the rows from `start` on straight to their places, unless some of them are still to be checked.

        False where they are, or the file is not on this machine: nothing was read. Files without sums are not checked.
        """
        stop, sums = start + len(places), self.file.sums
        if self._opened is None:
            return False
        if sums is not None and not self.file.seen[start // sums.group_rows : -(-stop // sums.group_rows)].all():
            return False
        read = read_rows(self._opened, self.file.starts["rows"] + start * self.row_bytes, target, places)
        if read < len(places) * self.row_bytes:
            raise self._truncated(stop)
        return True

    def _truncated(self, stop: int) -> Damaged:
        return Damaged(
            f"{self.store.url}/{self.file.name} is truncated: it ends before the end of row {stop - 1}", self.file.name
        )

    def _range(self, begin: int, end: int) -> UInt8[np.ndarray, "n bytes"]:
        place, n_bytes = self.file.starts["rows"] + begin * self.row_bytes, (end - begin) * self.row_bytes
        if self._opened is None:
            try:
                data = np.frombuffer(self.store.objects.get_range(self.file.name, place, n_bytes), np.uint8)
            except (ObjectMissing, ObjectTruncated) as error:
                raise Damaged(str(error), self.file.name) from None
        else:
            data = _buffer(n_bytes)
            done = 0
            while done < n_bytes and (read := os.preadv(self._opened, [data[done:].data], place + done)):
                done += read
            if done < n_bytes:
                raise self._truncated(end)
        return data.reshape(end - begin, self.row_bytes)


def _buffer(n_bytes: int) -> UInt8[np.ndarray, " n_bytes"]:
    """Memory of this thread, the same each time: so it stays in the cache."""
    if len(getattr(_buffers, "one", ())) < n_bytes:
        _buffers.one = np.empty(n_bytes, np.uint8)
    return _buffers.one[:n_bytes]


def scatter(
    rows: UInt8[np.ndarray, "n bytes"], target: UInt8[np.ndarray, "N bytes"], places: Int[np.ndarray, " n"]
) -> None:
    """target[places] = rows."""
    n, row_bytes = rows.shape
    if n and int(places[-1]) - int(places[0]) == n - 1 and (np.diff(places) == 1).all():
        target[int(places[0]) : int(places[0]) + n] = rows
        return
    parts = 1
    while n * parts <= LOCKED and row_bytes % (2 * parts) == 0 and n * row_bytes > CACHED_BYTES // 8:
        parts *= 2  # in halves, quarters, ...: so other threads go on
    if parts > 1:
        places = (places[:, None] * parts + np.arange(parts)).reshape(-1)
    item = np.dtype((np.void, row_bytes // parts))
    target.reshape(-1).view(item)[places] = np.ascontiguousarray(rows).reshape(-1).view(item)

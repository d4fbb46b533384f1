"""Blocks of rows read by threads, each row straight to its place in the order it is served in."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.stores.objects import FolderObjects
from sparse_coding.stores.order import Epoch, Order, Pieces
from sparse_coding.stores.scattered import memory, read_rows, scatter
from sparse_coding.stores.store import Damaged, Store

PIECES_PER_JOB = 8
"""Pieces of one local file that a thread reads with the file opened once."""
RANGE_BYTES = 4 * 2**20
"""Pieces that are neighbours in a file are read together up to so many bytes."""


def rows_place(store: Store, site: str, shard: int) -> tuple[str, int]:
    """(file, byte) where the rows of a shard begin; size and header are checked once. Raises `Damaged`."""
    name = store._checked(site, shard)
    return name, store._starts[name]["rows"]


class Block:
    """Rows of every site, in the order they are served in; whole once `done` is set without an `error`."""

    def __init__(self, epoch: Epoch, index: int, buffers: dict[str, Tensor]):
        self.key = epoch.number, index
        self.pieces = epoch.block(index)
        self.n_rows = int(self.pieces.rows.sum())
        self.buffers = buffers
        self.rows = {site: buffer[: self.n_rows] for site, buffer in buffers.items()}
        self.places: Int[np.ndarray, " n_rows"] = np.empty(0, np.int64)
        """Where each row is served, the rows counted in the order of `pieces`."""
        self.done, self.cancelled = threading.Event(), False
        self.error: BaseException | None = None
        self.last_use: torch.Event | None = None
        """After it the device no longer reads the buffers."""
        self._left, self._lock = 1, threading.Lock()

    def expect(self, jobs: int) -> None:
        with self._lock:
            self._left += jobs

    def finished(self, error: BaseException | None) -> None:
        """One job is over; after the first error the others need not start."""
        with self._lock:
            self._left -= 1
            if error is not None:
                self.error, self.cancelled = self.error or error, True
            if not self._left:
                self.done.set()

    def origin(self, row: int) -> tuple[int, int, int]:
        """(store, shard, row of the shard) of a row of the block."""
        at = int(np.flatnonzero(self.places == row)[0])
        ends = np.cumsum(self.pieces.rows)
        piece = int(np.searchsorted(ends, at, side="right"))
        within = at - int(ends[piece] - self.pieces.rows[piece])
        return (
            int(self.pieces.store[piece]),
            int(self.pieces.shard[piece]),
            int(self.pieces.start[piece]) + within,
        )


PATIENCE = 2.0
"""Seconds that threads have to end."""


class BlockReader:
    """At most two blocks in memory: the one that is served and the next."""

    def __init__(
        self, stores: Sequence[Store], order: Order, buffers: Mapping[str, tuple[int, torch.dtype]], *,
        threads: int, pinned: bool,
    ):  # fmt: skip
        """buffers: width and dtype of each site's rows in memory; decoded where it is not the stored dtype."""
        self.stores, self.order, self.pinned = stores, order, pinned
        self.seconds_waiting, self.bytes_read = 0.0, 0
        """Time spent waiting for rows; bytes that came from files."""
        self._shapes = dict(buffers)
        self._held: list[Block] = []  # the one used last is last
        self._jobs: SimpleQueue[tuple[Block, Callable[[], None]] | None] = SimpleQueue()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        # Daemons that know nothing but the queue: neither the end of the program nor of the reader waits for them.
        workers = [
            threading.Thread(target=_work, args=(self._jobs, self._stop), daemon=True, name="store reader")
            for _ in range(threads)
        ]
        for worker in workers:
            worker.start()
        self.close = weakref.finalize(self, _end, self._jobs, self._stop, workers)
        """Ends the threads; called by itself when the reader is gone."""

    def block(self, epoch: Epoch, index: int) -> Block:
        """A block, read now unless it is there or on its way. Raises what reading it raised."""
        if not self.close.alive:
            raise RuntimeError("the stream is closed")
        found = self._find(epoch, index) or self._start(epoch, index, urgent=True)
        if not found.done.is_set():
            began = time.perf_counter()
            try:
                found.done.wait()
            finally:
                self.seconds_waiting += time.perf_counter() - began
        if found.error is not None:
            self._held.remove(found)  # asked for again, it is read again
            raise found.error
        self._held.remove(found)
        self._held.append(found)
        return found

    def ahead(self, epoch: Epoch, index: int) -> None:
        """Begin to read a block in the place of the one that is not in use."""
        if not self._find(epoch, index):
            self._start(epoch, index, urgent=False)

    def _find(self, epoch: Epoch, index: int) -> Block | None:
        """A block that is there, on its way, or failed; not one that was given up."""
        held = [block for block in self._held if block.error or not block.cancelled]
        return next((block for block in held if block.key == (epoch.number, index)), None)

    def _start(self, epoch: Epoch, index: int, urgent: bool) -> Block:
        free = []
        for old in [block for block in self._held if block.cancelled or (urgent and not block.done.is_set())]:
            free.append(self._retire(old))
        if len(self._held) + len(free) > 1 and not free:
            free.append(self._retire(self._held[0]))
        buffers, last_use = free[0] if free else (self._allocate(), None)
        block = Block(epoch, index, buffers)
        whole = [old for old in self._held if old.done.is_set() and not old.error]
        same = next((old for old in whole if old.pieces == block.pieces), None)
        self._held.insert(0, block)
        self._jobs.put((block, lambda: self._plan(block, same, last_use)))
        return block

    def _retire(self, block: Block) -> tuple[dict[str, Tensor], torch.Event | None]:
        """Take a block's memory once nothing writes to it any more."""
        block.cancelled = True
        block.done.wait()
        self._held.remove(block)
        return block.buffers, block.last_use

    def _allocate(self) -> dict[str, Tensor]:
        n, found = self.order.block_rows, {}
        for site, (width, dtype) in self._shapes.items():
            if self.pinned:
                found[site] = torch.empty(n, width, dtype=dtype, pin_memory=True)
            else:
                found[site] = torch.from_numpy(memory(n * width * dtype.itemsize)).view(dtype).view(n, width)
        return found

    def _plan(self, block: Block, same: Block | None, last_use: torch.Event | None) -> None:
        """Draw the order of a block's rows and cut the work into jobs."""
        if last_use is not None:
            last_use.synchronize()
        block.places = self.order.places(*block.key, block.n_rows)
        jobs: list[Callable[[], None]] = []
        if same is not None:  # all rows fit into one block: they are there already, in the order of the last epoch
            jobs = [lambda site=site, same=same: self._reorder(block, same, site) for site in block.rows]
        else:
            widest = max(rows.shape[1] * rows.element_size() for rows in block.rows.values())
            pieces = block.pieces.merged(RANGE_BYTES // widest)
            ends = np.cumsum(pieces.rows)
            for run in self._runs(pieces):
                jobs += [
                    lambda site=site, run=run: self._read(block, site, pieces[run], ends[run]) for site in block.rows
                ]
        block.expect(len(jobs))
        for job in jobs:
            self._jobs.put((block, job))

    def _runs(self, pieces: Pieces) -> list[slice]:
        """Pieces that one job reads: a few of one local file, one of a remote one."""
        runs, first = [], 0
        for at in range(1, len(pieces) + 1):
            local = isinstance(self.stores[int(pieces.store[first])].objects, FolderObjects)
            full = at == len(pieces) or at - first == (PIECES_PER_JOB if local else 1)
            if full or pieces.store[at] != pieces.store[first] or pieces.shard[at] != pieces.shard[first]:
                runs.append(slice(first, at))
                first = at
        return runs

    def _reorder(self, block: Block, same: Block, site: str) -> None:
        source = np.empty_like(block.places)
        source[block.places] = same.places
        torch.index_select(same.rows[site], 0, torch.from_numpy(source), out=block.rows[site])

    def _read(self, block: Block, site: str, pieces: Pieces, ends: np.ndarray) -> None:
        store, shard = self.stores[int(pieces.store[0])], int(pieces.shard[0])
        rows, row_bytes = block.rows[site], store.widths[site] * store.dtype.itemsize
        target, as_stored = rows.view(torch.uint8).numpy(), rows.dtype == store.dtype
        name, data = rows_place(store, site, shard)
        folder = store.objects.folder if isinstance(store.objects, FolderObjects) else None
        file = os.open(folder / name, os.O_RDONLY) if folder and as_stored else None
        try:
            for start, n, end in zip(pieces.start.tolist(), pieces.rows.tolist(), ends.tolist(), strict=True):
                if block.cancelled:
                    return
                places = block.places[end - n : end]
                if file is None:
                    x = store.read_rows(site, shard, start, n)
                    x = x if as_stored else store.decode(site, x, rows.dtype)
                    scatter(x.view(torch.uint8).numpy(), target, places)
                elif read_rows(file, data + start * row_bytes, target, places) < n * row_bytes:
                    raise Damaged(f"{store.url}/{name} is truncated: it ends before the end of row {start + n}", name)
                with self._lock:
                    self.bytes_read += n * row_bytes
        finally:
            if file is not None:
                os.close(file)


def _work(jobs: SimpleQueue, stop: threading.Event) -> None:
    while (job := jobs.get()) is not None:
        block, action = job
        error = None
        try:
            if not block.cancelled and not stop.is_set():
                action()
        except FileNotFoundError as missing:
            error = UserError(f"{missing.filename} is missing: it has gone since the stream began")
        except OSError as refused:
            error = UserError(f"{refused.filename or 'a file of the store'} cannot be read: {refused.strerror}")
        except BaseException as other:
            error = other
        block.finished(error)
        del job, block, action, error  # nothing of it lives on while the next job is waited for


def _end(jobs: SimpleQueue, stop: threading.Event, workers: Sequence[threading.Thread]) -> None:
    """Let the threads end. Those that do so soon are waited for: one that is inside torch when the program ends would
    take it down with an abort. One that hangs is left behind."""
    stop.set()
    for _ in workers:
        jobs.put(None)
    deadline = time.monotonic() + PATIENCE
    for worker in workers:
        if worker is not threading.current_thread():
            worker.join(max(0.0, deadline - time.monotonic()))

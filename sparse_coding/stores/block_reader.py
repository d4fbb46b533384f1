"""Blocks of rows read by threads, each row to its place in the order it is served in."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sparse_coding.stores.block_memory import BlockMemory
from sparse_coding.stores.objects import PIECE, ObjectDamaged, unreadable
from sparse_coding.stores.order import Epoch, Order, Pieces
from sparse_coding.stores.ranges import FileRows, scatter
from sparse_coding.stores.store import Damaged, Store

RANGE_BYTES = PIECE
"""Pieces that are neighbours in a file are read together up to so many bytes."""
PATIENCE = 2.0
"""Seconds that threads have to end."""
LENIENCE = 8
"""Batches that the next block waits for tensors that were served from its memory; then it gets new memory."""


class Block:
    """Rows of every site, in the order they are served in; whole once `done` is set without an `error`."""

    def __init__(self, epoch: Epoch, index: int, memory: BlockMemory):
        self.key = epoch.number, index
        self.pieces = epoch.block(index)
        self.n_rows = int(self.pieces.rows.sum())
        self.memory = memory
        self.rows: dict[str, Tensor] = memory.lend(self.n_rows)
        self._versions = {site: x._version for site, x in self.rows.items()}
        self.places: Int[np.ndarray, " n_rows"] = np.empty(0, np.int64)
        """Where each row is served, the rows counted in the order of `pieces`."""
        self.done, self.cancelled = threading.Event(), False
        self.error: BaseException | None = None
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

    @property
    def written_to(self) -> bool:
        """Whether torch has changed rows through a tensor that was served: they are no longer those of the store."""
        return any(x._version != self._versions[site] for site, x in self.rows.items())

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


class BlockReader:
    """At most two blocks in memory, the one that is served and the next, besides what the tensors served hold on to."""

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
        self.written_to = False
        """Whether rows of a block were changed through a batch: from then on batches must be copies."""
        self._memories: list[BlockMemory] = []
        self._refused = 0
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
        if found := self._find(epoch, index):
            self._held.remove(found)
            self._held.append(found)
            if not found.done.is_set() and self.order.n_blocks > 1:
                self.ahead(epoch, index)  # its first rows follow the last ones of this block without a gap
        else:
            found = self._start(epoch, index, urgent=True)
            assert found
        if not found.done.is_set():
            began = time.perf_counter()
            try:
                found.done.wait()
            finally:
                self.seconds_waiting += time.perf_counter() - began
        if found.error is not None:
            if found in self._held:  # asked for again, it is read again
                self._retire(found)
            raise found.error
        self._held.remove(found)
        self._held.append(found)
        return found

    def ahead(self, epoch: Epoch, index: int) -> None:
        """Begin to read the block after this one, in the place of the one that is not in use."""
        following = self.order.after(epoch, index)
        if not self._find(*following):
            self._start(*following, urgent=False)

    def _find(self, epoch: Epoch, index: int) -> Block | None:
        """A block that is there, on its way, or failed; not one that was given up."""
        for block in self._held:
            if block.error is None and block.written_to:
                self.written_to = block.cancelled = True
        held = [block for block in self._held if block.error or not block.cancelled]
        return next((block for block in held if block.key == (epoch.number, index)), None)

    def _start(self, epoch: Epoch, index: int, urgent: bool) -> Block | None:
        """Begin to read a block; None where it is not urgent and the memory for it is still lent."""
        for old in [block for block in self._held if block.cancelled or (urgent and not block.done.is_set())]:
            self._retire(old)
        if len(self._held) > 1:
            self._retire(self._held[0])
        if (memory := self._memory(urgent)) is None:
            return None
        block = Block(epoch, index, memory)
        whole = [old for old in self._held if old.done.is_set() and not old.error and not old.cancelled]
        same = next((old for old in whole if old.pieces == block.pieces), None)
        self._held.insert(0, block)
        self._jobs.put((block, lambda: self._plan(block, same)))
        return block

    def _retire(self, block: Block) -> None:
        """Give a block up once nothing writes to it any more."""
        block.cancelled = True
        block.done.wait()
        self._held.remove(block)
        block.rows = {}

    def _memory(self, urgent: bool) -> BlockMemory | None:
        """Memory that no block and no tensor uses, new memory where there is none and it cannot be waited for."""
        idle = [one for one in self._memories if all(one is not block.memory for block in self._held)]
        found = next((one for one in idle if one.free), None)
        if found is None and idle and not urgent and self._refused < LENIENCE:
            self._refused += 1
            return None
        self._refused = 0
        if found is None:
            for one in idle:  # it goes with the tensors that hold on to it
                self._memories.remove(one)
            found = BlockMemory(self.order.block_rows, self._shapes, self.pinned)
            self._memories.append(found)
        return found

    def _plan(self, block: Block, same: Block | None) -> None:
        """Draw the order of a block's rows and cut the work into jobs."""
        if block.memory.last_use is not None:
            block.memory.last_use.synchronize()
        block.places = self.order.places(*block.key, block.n_rows)
        jobs: list[Callable[[], None]] = []
        if same is not None:  # all rows fit into one block: they are there already, in the order of the last epoch
            jobs = [lambda site=site, same=same: self._reorder(block, same, site) for site in block.rows]
        else:
            widest = max(rows.shape[1] * rows.element_size() for rows in block.rows.values())
            pieces = block.pieces.merged(RANGE_BYTES // widest)
            for index in np.argsort(-pieces.rows, kind="stable").tolist():  # so all threads end at about one time
                piece = pieces[index : index + 1], int(pieces.rows[:index].sum())
                jobs += [lambda site=site, piece=piece: self._read(block, site, *piece) for site in block.rows]
        block.expect(len(jobs))
        for job in jobs:
            self._jobs.put((block, job))

    def _reorder(self, block: Block, same: Block, site: str) -> None:
        source = np.empty_like(block.places)
        source[block.places] = same.places
        torch.index_select(same.rows[site], 0, torch.from_numpy(source), out=block.rows[site])

    def _read(self, block: Block, site: str, piece: Pieces, place: int) -> None:
        """Read a piece, whose first row is row `place` of the block as `Block.places` counts them."""
        store, dtype = self.stores[int(piece.store[0])], self._shapes[site][1]
        start, n = int(piece.start[0]), int(piece.rows[0])
        target = block.rows[site].view(torch.uint8).numpy()
        with read_from(store, site, int(piece.shard[0])) as file:
            placed = dtype == store.dtype and file.scattered(start, target, block.places[place : place + n])
            for first, rows in () if placed else file.read(start, start + n):
                if block.cancelled:
                    return
                if dtype != store.dtype:
                    stored = torch.from_numpy(rows.copy()).view(store.dtype)
                    rows = store.decode(site, stored, dtype).view(torch.uint8).numpy()
                at = place + first - start
                scatter(rows, target, block.places[at : at + len(rows)])
        with self._lock:
            self.bytes_read += n * file.row_bytes


@contextmanager
def read_from(store: Store, site: str, shard: int) -> Iterator[FileRows]:
    """A file to read rows from. Raises `Damaged` where the system cannot read it."""
    try:
        with FileRows(store, site, shard) as file:
            yield file
    except OSError as error:
        name = store.manifest.file_name(site, shard)
        failure = unreadable(Path(store.url) / name, error)
        raise Damaged(str(failure), name) if isinstance(failure, ObjectDamaged) else failure from None


def _work(jobs: SimpleQueue, stop: threading.Event) -> None:
    while (job := jobs.get()) is not None:
        block, action = job
        error = None
        try:
            if not block.cancelled and not stop.is_set():
                action()
        except Damaged as damaged:
            error = Damaged(f"{damaged}; or begin anew (--fresh) without its shard (--skip-damaged)", damaged.name)
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

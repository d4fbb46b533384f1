"""Batches of rows from stores, shuffled across all of them, each a pure function of its position.

order.py says in which order, block_reader.py brings the rows. While one block is served the next is read. A batch that
needs no decoding is a view of its block; else it is decoded from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.progress import Progress
from sparse_coding.stores.block_reader import Block, BlockReader
from sparse_coding.stores.codec import Affine8, decode
from sparse_coding.stores.objects import FolderObjects
from sparse_coding.stores.order import Order
from sparse_coding.stores.store import Damaged, Store

LOCAL_READERS, REMOTE_READERS = 2, 16
CHECKERS = 16
"""Threads that look at the files before the first batch."""


class StoreStream:
    """Batches of one or several stores; with weights of 1, every row exactly once per epoch.

    Epochs follow each other without a gap, each in a new order. The order depends on seed, weights, `buffer_rows` and
    the rows of each store, not on shards, codec, sites chosen, or where the stores lie. Memory: two blocks of
    `buffer_rows` rows of every site as they are stored (pinned where the device is a GPU), and what is on its way from
    S3, at most 8 MiB a reader. Batches asked for in order read each block once; any other step reads the one or two
    blocks it lies in. Rows that all fit into one block are read once altogether.

    A batch is the caller's, also to write to with torch. On the CPU, in the dtype of the store, it is a view of its
    block: kept, it keeps the whole block in memory, so clone what is to be kept for long. Rows are checked against the
    sums that were written with them, those of local files the first time they are read in this process; files of format
    1 are looked through for NaN and infinity.
    """

    def __init__(
        self,
        stores: str | Path | Store | Sequence[str | Path | Store],
        sites: Sequence[str] | None = None,
        *,
        batch_size: int,
        buffer_rows: int = 131_072,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shuffled: bool = True,
        skip_damaged: bool = False,
        verify: bool = False,
        readers: int | None = None,
    ) -> None:
        """sites: by default all of the first store. weights: how often each store's rows come per epoch. dtype: of the
        rows served. shuffled: False serves the rows in the order of the text, store after store.

        Every file's size and header are checked at once, and all of its rows with `verify`, which reads them. A damaged
        one is an error, or `skip_damaged` leaves its shard out: `skipped` says which, and the order is another. Since
        that order is fixed before the first batch, `skip_damaged` verifies. readers: threads, by default 2 for local
        stores and 16 where one is on S3. Raises UserError.
        """
        given = [stores] if isinstance(stores, str | Path | Store) else list(stores)
        if not given:
            raise UserError("no store is given: name a folder or s3://bucket/prefix")
        self.stores = [store if isinstance(store, Store) else Store.open(store) for store in given]
        self.batch_size, self.seed, self.dtype, self.device = batch_size, seed, dtype, torch.device(device)
        self.sites = tuple(sites if sites is not None else self.stores[0].widths)
        self.widths: Mapping[str, int] = self._checked_sites()
        """Width of the activations by site."""
        self.weights = self._checked_weights(weights, shuffled)
        self.skipped: list[str] = []
        """What is wrong with each shard left out."""
        self.left_out: list[list[int]] = []
        """Number of the store and of the shard, for each."""
        sound = [self._sound_rows(number, skip_damaged, verify or skip_damaged) for number in range(len(self.stores))]
        widest = [max(store.widths.values()) for store in self.stores]
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1")
        if buffer_rows < batch_size:
            raise UserError(
                f"buffer_rows is {buffer_rows}, less than one batch of {batch_size}: "
                "set it to several batches, so that rows of many contexts are mixed"
            )
        self._order = Order(sound, widest, self.weights, buffer_rows=buffer_rows, seed=seed, shuffled=shuffled)
        self.rows_per_epoch = self._order.rows_per_epoch
        """Rows of all stores together, each store times its weight."""
        if self.rows_per_epoch < batch_size:
            raise UserError(
                f"the stores give {self.rows_per_epoch} rows, fewer than one batch of {batch_size}: "
                "name more stores or a smaller batch_size"
            )
        self._affine: dict[str, Affine8 | None] = {}
        buffers = {site: (self.widths[site], self._buffer_dtype(site)) for site in self.sites}
        local = all(isinstance(store.objects, FolderObjects) for store in self.stores)
        self._reader = BlockReader(
            self.stores, self._order, buffers, threads=readers or (LOCAL_READERS if local else REMOTE_READERS),
            pinned=self.device.type == "cuda",
        )  # fmt: skip
        self._summed = all(store.summed(self.sites) for store in self.stores)
        self._finite_block: tuple[int, int] | None = None
        self._straddling: tuple[int, dict[str, list[Tensor]]] | None = None

    @property
    def n_batches(self) -> int:
        """Whole batches in one epoch."""
        return self.rows_per_epoch // self.batch_size

    @property
    def seconds_waiting(self) -> float:
        """Time that `batch` has spent waiting for rows to be read."""
        return self._reader.seconds_waiting

    @property
    def bytes_read(self) -> int:
        """Bytes of rows that came from files."""
        return self._reader.bytes_read

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d_in"]]:
        """Batch number `step` of each site. Raises UserError for a file that is damaged, NaN or infinity."""
        assert step >= 0
        if self._straddling and self._straddling[0] == step:  # asked for again: its first block has gone by now
            parts = self._straddling[1]
        else:
            parts = self._parts(step)
        return {name: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for name, pieces in parts.items()}

    def close(self) -> None:
        """End the threads. Not needed at the end of a program."""
        self._reader.close()

    def __enter__(self) -> StoreStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parts(self, step: int) -> dict[str, list[Tensor]]:
        self._straddling = None
        epoch, index, first = self._order.locate(step * self.batch_size)
        left, parts = self.batch_size, {name: [] for name in self.sites}
        while True:
            block = self._reader.block(epoch, index)
            count = min(left, block.n_rows - first)
            for name in self.sites:
                parts[name].append(self._rows(block, name, first, count))
            if self.device.type == "cuda":
                block.memory.last_use = torch.cuda.current_stream(self.device).record_event()
            left, first = left - count, 0
            if not left:
                break
            epoch, index = self._order.after(epoch, index)
        self._reader.ahead(epoch, index)
        if count < self.batch_size:
            self._straddling = step, parts
        return parts

    def _rows(self, block: Block, site: str, first: int, count: int) -> Float[Tensor, "count d_in"]:
        """Rows of a block, decoded on the device; a view where nothing is to be done.

        Not of a block that holds all rows and is never read again, not once a caller has written to a batch, and not
        for a part of a batch: its block gives way to the next but one at once.
        """
        stored = block.rows[site][first : first + count]
        if not self._summed:
            self._check_finite(block)
        moved = stored.to(self.device, non_blocking=self.device.type == "cuda")
        x = decode(moved, self._affine[site], self.dtype)
        copied = self._order.n_blocks == 1 or self._reader.written_to or count < self.batch_size
        return x.clone() if copied and x.data_ptr() == stored.data_ptr() else x

    def _check_finite(self, block: Block) -> None:
        """Once per block and on the CPU: the device is not waited for."""
        if block.key != self._finite_block:
            for site, rows in block.rows.items():
                if not _finite(rows):
                    self._report(block, site)
            self._finite_block = block.key

    def _report(self, block: Block, site: str) -> None:
        """Raise a UserError if rows of a block are not finite; a sum can overflow where they are."""
        if not block.rows[site].is_floating_point():
            return
        bad = (~torch.isfinite(block.rows[site]).all(1)).nonzero().flatten()
        if len(bad):
            index, shard, row = min(block.origin(int(one)) for one in bad)
            store = self.stores[index]
            raise UserError(
                f"{store.url}/{store.file(site, shard).name} holds NaN or infinity, first in row {row} "
                f"({len(bad)} such rows among {block.n_rows} of {site}): run `python -m sparse_coding store verify` to "
                "see if it is damaged"
            )

    def _buffer_dtype(self, site: str) -> torch.dtype:
        """As stored, and decoded batch by batch on the device, where that is one rule for all stores."""
        affines = [store.affine(site) for store in self.stores]
        first = affines[0]
        alike = len({store.dtype for store in self.stores}) == 1 and (
            first is None
            or all(a and torch.equal(a.centre, first.centre) and torch.equal(a.scale, first.scale) for a in affines)
        )
        self._affine[site] = first.to(self.device) if alike and first is not None else None
        return self.stores[0].dtype if alike else self.dtype

    def _checked_sites(self) -> dict[str, int]:
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise UserError(f"sites is {list(self.sites)}: name at least one, each once")
        for store in self.stores:
            store.need_sites(self.sites)
        for site in self.sites:
            if len(found := {store.widths[site] for store in self.stores}) > 1:
                raise UserError(f"the stores have rows of different widths at {site}: {sorted(found)}")
        return {site: self.stores[0].widths[site] for site in self.sites}

    def _checked_weights(self, weights: Sequence[float] | None, shuffled: bool) -> list[float]:
        found = [1.0] * len(self.stores) if weights is None else list(weights)
        if len(found) != len(self.stores):
            raise UserError(f"weights has {len(found)} numbers for {len(self.stores)} stores: give one for each")
        if bad := [weight for weight in found if not (math.isfinite(weight) and weight > 0)]:
            raise UserError(f"weights has {bad[0]}: each must be greater than 0")
        if not shuffled and any(weight != 1 for weight in found):
            raise UserError("weights need shuffled rows: leave them out, or shuffle")
        return found

    def _sound_rows(self, number: int, skip_damaged: bool, verify: bool) -> list[int]:
        """Rows of each shard of a store, 0 where it is left out."""
        store = self.stores[number]
        rows = list(store.shard_rows)

        def look(shard: int) -> Damaged | None:
            return damage(store, self.sites, shard, verify) if rows[shard] else None  # of others nothing is read

        label = f"checking {store.url} before the first batch"
        shown = Progress(label, len(rows), "shards") if verify else nullcontext()
        # A thread each takes the next shard, so the first damage found ends the search.
        with ThreadPoolExecutor(CHECKERS) as threads, shown as progress:
            for shard, found in enumerate(threads.map(look, range(len(rows)))):
                if progress:
                    progress.update(shard + 1)
                if found and not skip_damaged:
                    threads.shutdown(cancel_futures=True)
                    raise UserError(f"{found}; or leave its shard out with --skip-damaged")
                if found:
                    self.skipped.append(str(found))
                    self.left_out.append([number, shard])
                    rows[shard] = 0
        if not any(rows):
            raise UserError(f"all shards of {store.url} are damaged, the first: {self.skipped[0]}")
        return rows


def damage(store: Store, sites: Sequence[str], shard: int, verify: bool) -> Damaged | None:
    """What is wrong with a shard's files of these sites: with size and header, and where `verify`, with the rows."""
    try:
        for site in sites:
            store.file(site, shard)
            if verify:
                store.check_shard(site, shard)
    except Damaged as found:
        return found
    return None


def _finite(x: Tensor) -> bool:
    """Whether nothing is NaN or infinite; may be False where a sum of large numbers overflows."""
    if not x.is_floating_point() or not x.numel():
        return True
    if x.dtype == torch.float32:
        return bool(torch.isfinite(x.sum()))
    return all(bool(torch.isfinite(one)) for one in torch.aminmax(x))

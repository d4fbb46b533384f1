"""In which order the rows of stores are served: a pure function of (seed, position), known without reading a row.

Every store is cut into equal chunks of about 8 MiB of its widest site, whatever its shards. An epoch is a sequence of
pieces (chunks, or parts of one): those of each store in a random order, the stores dealt evenly among each other.
Consecutive pieces make blocks of about `buffer_rows` rows, and the rows of a block are permuted as a whole. So a
batch holds rows from all over the stores, and reading stays in long runs. Blocks end to end, epoch after epoch, are
one endless sequence of rows.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from sparse_coding.activations.stream import keyed_generator
from sparse_coding.stores.sums import chunk_rows, group_rows

CHUNKS_PER_BLOCK = 24
"""At least so many places of the stores are mixed in a block, where rows are narrow and 8 MiB would hold very many."""


@dataclass(frozen=True)
class Pieces:
    """Runs of rows: of which store and shard, from which row of the shard on, how many.

    In an epoch they are not cut at shards yet: rows are counted over the whole store, and `shard` is 0.
    """

    store: Int[np.ndarray, " n"]
    shard: Int[np.ndarray, " n"]
    start: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: slice | np.ndarray) -> Pieces:
        return Pieces(self.store[chosen], self.shard[chosen], self.start[chosen], self.rows[chosen])

    def __eq__(self, other: object) -> bool:
        fields = ("store", "shard", "start", "rows")
        return isinstance(other, Pieces) and all(np.array_equal(getattr(self, f), getattr(other, f)) for f in fields)

    def cut(self, shard_starts: Int[np.ndarray, " n_shards+1"]) -> Pieces:
        """Pieces of one store, counted over all of it, as pieces of its shards."""
        ends = self.start + self.rows
        first, last = (np.searchsorted(shard_starts, at, side="right") - 1 for at in (self.start, ends - 1))
        count = last - first + 1
        of = np.repeat(np.arange(len(self)), count)
        shard = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count) + first[of]
        begin = np.maximum(self.start[of], shard_starts[shard])
        rows = np.minimum(ends[of], shard_starts[shard + 1]) - begin
        return Pieces(self.store[of], shard, begin - shard_starts[shard], rows)[rows > 0]

    def merged(self, most: int) -> Pieces:
        """Neighbours in a file as one piece, of at most `most` rows unless one is longer already."""
        starts, rows = [], 0
        for at in range(len(self)):
            joins = (
                at > 0
                and self.store[at] == self.store[at - 1]
                and self.shard[at] == self.shard[at - 1]
                and self.start[at] == self.start[at - 1] + self.rows[at - 1]
                and rows + self.rows[at] <= most
            )
            if not joins:
                starts.append(at)
            rows = rows + self.rows[at] if joins else self.rows[at]
        firsts = self[np.array(starts, dtype=np.int64)]
        return Pieces(firsts.store, firsts.shard, firsts.start, np.add.reduceat(self.rows, starts))

    @staticmethod
    def joined(parts: Sequence[Pieces]) -> Pieces:
        fields = ("store", "shard", "start", "rows")
        return Pieces(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


@dataclass(frozen=True)
class Epoch:
    """One epoch's pieces in order, and where its blocks begin."""

    number: int
    pieces: Pieces
    borders: Int[np.ndarray, " n_blocks+1"]
    """In pieces."""
    starts: Int[np.ndarray, " n_blocks+1"]
    """In rows."""
    shard_starts: Sequence[Int[np.ndarray, " n_shards+1"]]
    """For each store, its first row in each shard."""

    @property
    def n_blocks(self) -> int:
        return len(self.borders) - 1

    def block(self, index: int) -> Pieces:
        """The pieces of a block, by place: neighbours in a file are read one after the other."""
        pieces = self.pieces[slice(int(self.borders[index]), int(self.borders[index + 1]))]
        pieces = pieces[np.lexsort((pieces.start, pieces.store))]
        parts = [pieces[pieces.store == store].cut(starts) for store, starts in enumerate(self.shard_starts)]
        return Pieces.joined(parts)


class Order:
    """The endless sequence of the rows of one or several stores.

    A store of weight w gives w times its rows to each epoch: with 1 every row comes once, with 2 twice, with 0.5 one
    half of the rows in one epoch and the other half in the next.
    """

    def __init__(
        self,
        shard_rows: Sequence[Sequence[int]],
        widths: Sequence[int],
        weights: Sequence[float],
        *,
        buffer_rows: int,
        seed: int = 0,
        shuffled: bool = True,
    ):
        """shard_rows, widths, weights: for each store, the rows of its shards, its widest site, its weight.

        shuffled: False is the order of the text, store after store; weights are then 1.
        """
        assert shuffled or all(weight == 1 for weight in weights)
        self.seed, self.shuffled = seed, shuffled
        self._chunks = []
        for store, (rows, width) in enumerate(zip(shard_rows, widths, strict=True)):
            most, group = max(1, min(chunk_rows(width), buffer_rows // CHUNKS_PER_BLOCK)), group_rows(width)
            self._chunks.append(_chunks(store, sum(rows), most // group * group or most))
        self._shard_starts = [np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]) for rows in shard_rows]
        self._rows = [int(chunks.rows.sum()) for chunks in self._chunks]
        self._share = [round(weight * rows) for weight, rows in zip(weights, self._rows, strict=True)]
        self.rows_per_epoch = sum(self._share)
        self.n_blocks = max(1, -(-self.rows_per_epoch // buffer_rows))
        """Of an epoch."""
        longest = max((int(chunks.rows.max(initial=0)) for chunks in self._chunks), default=0)
        self.block_rows = min(-(-self.rows_per_epoch // self.n_blocks) + longest, self.rows_per_epoch)
        """No block has more rows."""
        self._epochs: dict[int, Epoch] = {}
        self._lock = threading.Lock()

    def locate(self, position: int) -> tuple[Epoch, int, int]:
        """(epoch, block, row of the block) of a row of the endless sequence."""
        number, offset = divmod(position, self.rows_per_epoch)
        epoch = self.epoch(number)
        index = int(np.searchsorted(epoch.starts, offset, side="right")) - 1
        return epoch, index, offset - int(epoch.starts[index])

    def after(self, epoch: Epoch, index: int) -> tuple[Epoch, int]:
        """The block that follows."""
        return (epoch, index + 1) if index + 1 < epoch.n_blocks else (self.epoch(epoch.number + 1), 0)

    def epoch(self, number: int) -> Epoch:
        with self._lock:
            if number not in self._epochs:
                while len(self._epochs) > 1:
                    self._epochs.pop(next(iter(self._epochs)))
                self._epochs[number] = self._epoch(number)
            return self._epochs[number]

    def places(self, epoch: int, block: int, n_rows: int) -> Int[np.ndarray, " n_rows"]:
        """Where in its block each row is served, the rows counted in the order of `Epoch.block`."""
        if not self.shuffled:
            return np.arange(n_rows)
        return torch.randperm(n_rows, generator=keyed_generator(self.seed, epoch, block)).numpy()

    def _epoch(self, number: int) -> Epoch:
        parts = [self._part(store, number) for store in range(len(self._chunks))]
        pieces = Pieces.joined(parts)
        if self.shuffled and len(parts) > 1:
            # Piece j of n belongs at a random point of [j, j + 1) / n: every stretch holds each store's share.
            spots = []
            for store, part in enumerate(parts):
                generator = keyed_generator(self.seed, number, store, "spot")
                jitter = torch.rand(len(part), generator=generator, dtype=torch.float64).numpy()
                spots.append((np.arange(len(part)) + jitter) / max(len(part), 1))
            pieces = pieces[np.argsort(np.concatenate(spots), kind="stable")]
        before = np.concatenate([[0], np.cumsum(pieces.rows)])
        # Equal blocks rather than full ones and a small rest, whose rows would hardly be mixed.
        aims = np.linspace(0, self.rows_per_epoch, self.n_blocks + 1)
        after = np.searchsorted(before, aims).clip(1, len(pieces))
        borders = np.where(aims - before[after - 1] < before[after] - aims, after - 1, after)
        borders[0], borders[-1] = 0, len(pieces)
        borders = np.unique(borders)
        return Epoch(number, pieces, borders, before[borders], self._shard_starts)

    def _part(self, store: int, number: int) -> Pieces:
        """What a store gives to an epoch: a stretch of its own endless sequence, one permutation after another."""
        chunks, rows, share = self._chunks[store], self._rows[store], self._share[store]
        first, last = number * share, (number + 1) * share
        found = [chunks[:0]]
        for turn in range(first // rows, -(-last // rows)) if share else ():
            one = chunks
            if self.shuffled:
                generator = keyed_generator(self.seed, turn, store, "chunks")
                one = chunks[torch.randperm(len(chunks), generator=generator).numpy()]
            ends = turn * rows + np.cumsum(one.rows)
            begins = ends - one.rows
            skipped = (first - begins).clip(0)
            kept = (ends.clip(max=last) - begins - skipped).clip(0)
            cut = Pieces(one.store, one.shard, one.start + skipped, kept)
            found.append(cut[kept > 0])
        return Pieces.joined(found)


def _chunks(store: int, rows: int, chunk_rows: int) -> Pieces:
    """All chunks of a store in the order of the text, the last one as short as it must be."""
    count = -(-rows // chunk_rows)
    borders = (np.arange(count + 1) * chunk_rows).clip(max=rows)
    return Pieces(np.full(count, store), np.zeros(count, np.int64), borders[:-1], np.diff(borders))

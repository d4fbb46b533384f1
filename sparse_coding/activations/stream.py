"""Activations of a language model as shuffled batches, each a pure function of its position.

The contexts of an epoch are permuted by (seed, epoch) and cut into blocks that give about `buffer_rows` rows each. The
rows of a block are captured together and permuted by (seed, epoch, block). The blocks end to end, epoch after epoch,
are one endless sequence of rows: batch number `step` is its rows [step * B, (step + 1) * B). How many rows a context
gives is known from its mask alone, so any batch can be asked for at once, and a resumed run needs no saved state.
Without shuffling, both permutations are the identity: rows come in the order of the text, as a store holds them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.activations.capture import default_contexts_per_forward, rows, rows_per_context, widths
from sparse_coding.activations.models import LanguageModel
from sparse_coding.activations.sites import Site, resolve_all
from sparse_coding.activations.tokens import Contexts
from sparse_coding.errors import UserError
from sparse_coding.kernels.picked import picked


@dataclass(frozen=True)
class _Epoch:
    number: int
    order: Int[np.ndarray, " n_contexts"]
    borders: Int[np.ndarray, " n_blocks+1"]  # in contexts
    starts: Int[np.ndarray, " n_blocks+1"]  # in rows


@dataclass(frozen=True)
class _Block:
    key: tuple[int, int]  # epoch, block
    rows: dict[str, Tensor]  # in the model's dtype, in the order of the text
    order: Tensor  # in which they are served


class ActivationStream:
    """Batches of activations at one or several sites; every row of the text exactly once per epoch.

    Epochs follow each other without a gap, each in a new order, so a batch may hold the last rows of one and the first
    of the next. Memory: one block, `buffer_rows` rows of every site in the model's dtype, on the model's device.
    Batches asked for in order compute each block once; any other step computes the one or two blocks it lies in.
    """

    def __init__(
        self,
        model: LanguageModel,
        contexts: Contexts,
        sites: Sequence[str | Site],
        *,
        batch_size: int,
        buffer_rows: int = 131_072,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        contexts_per_forward: int | None = None,
        shuffled: bool = True,
        check_finite: bool = True,
    ) -> None:
        """dtype: of the rows served. contexts_per_forward: contexts the model reads at once, by default by device.

        shuffled: False serves the rows in the order of the text, for comparisons; `seed` is then unused. check_finite:
        False serves NaN and infinity too, to a trainer that leaves such batches out.

        Raises UserError when the text gives fewer rows than one batch, or the buffer holds fewer.
        """
        self.model, self.contexts, self.batch_size, self.seed, self.dtype = model, contexts, batch_size, seed, dtype
        self.shuffled, self.check_finite = shuffled, check_finite
        self.sites = resolve_all(model, sites)
        self.contexts_per_forward = contexts_per_forward or default_contexts_per_forward(model, contexts)
        self._counts = rows_per_context(contexts)
        self.rows_per_epoch = int(self._counts.sum())
        """Rows the text gives: its unmasked tokens."""
        self._check(buffer_rows)
        n_blocks = max(1, round(self.rows_per_epoch / buffer_rows))
        self._n_blocks = min(n_blocks, len(self._counts))
        self.widths: Mapping[str, int] = widths(model, list(self.sites.values()))
        """Width of the activations by site."""
        self.seconds_capturing, self.rows_captured = 0.0, 0
        """Time spent in the language model so far, and the rows it gave."""
        self._epoch: _Epoch | None = None
        self._block: _Block | None = None

    @property
    def n_batches(self) -> int:
        """Whole batches in one epoch."""
        return self.rows_per_epoch // self.batch_size

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d_in"]]:
        """Batch number `step` of each site, on the model's device. UserError for NaN or infinity (check_finite)."""
        assert step >= 0
        position, left = step * self.batch_size, self.batch_size
        parts: dict[str, list[Tensor]] = {name: [] for name in self.sites}
        while left:
            number, offset = divmod(position, self.rows_per_epoch)
            epoch = self._epoch_at(number)
            index = int(np.searchsorted(epoch.starts, offset, side="right")) - 1
            block = self._block_at(epoch, index)
            first = offset - int(epoch.starts[index])
            chosen = block.order[first : first + left]
            # Taken out before the next block replaces this one: two never lie in memory together.
            for name, x in block.rows.items():
                parts[name].append(picked(x, chosen, self.dtype))
            position, left = position + len(chosen), left - len(chosen)
        return {name: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for name, pieces in parts.items()}

    def _check(self, buffer_rows: int) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")
        if buffer_rows < self.batch_size:
            raise UserError(
                f"buffer_rows is {buffer_rows}, less than one batch of {self.batch_size}: "
                "set it to several batches, so that rows of many contexts are mixed"
            )
        if self.rows_per_epoch < self.batch_size:
            raise UserError(
                f"the text gives {self.rows_per_epoch} activations, fewer than one batch of {self.batch_size}: "
                "give more text or a smaller batch_size"
            )

    def _epoch_at(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != number:
            n = len(self._counts)
            order = self._permutation(n, number).numpy()
            # Equal blocks rather than full ones and a small rest, whose rows would hardly be mixed.
            borders = np.linspace(0, n, self._n_blocks + 1).round().astype(np.int64)
            rows_before = np.concatenate([[0], np.cumsum(self._counts[order])])
            self._epoch = _Epoch(number, order, borders, rows_before[borders])
        return self._epoch

    def _block_at(self, epoch: _Epoch, index: int) -> _Block:
        key = epoch.number, index
        if self._block is None or self._block.key != key:
            self._block = None  # its memory goes first
            start = time.perf_counter()
            chosen = np.sort(epoch.order[epoch.borders[index] : epoch.borders[index + 1]])  # in the order of the file
            captured = rows(
                self.model,
                self.contexts,
                chosen,
                list(self.sites.values()),
                contexts_per_forward=self.contexts_per_forward,
            )
            if self.check_finite:
                for name, x in captured.items():
                    self._refuse_not_finite(name, x, chosen)
            n_rows = int(epoch.starts[index + 1] - epoch.starts[index])
            order = self._permutation(n_rows, *key)
            self._block = _Block(key, captured, order.to(self.model.device))
            self.seconds_capturing += time.perf_counter() - start
            self.rows_captured += n_rows
        return self._block

    def _permutation(self, n: int, *key: int) -> Int[Tensor, " n"]:
        return torch.randperm(n, generator=keyed_generator(self.seed, *key)) if self.shuffled else torch.arange(n)

    def _refuse_not_finite(self, name: str, x: Float[Tensor, "rows d_in"], chosen: Int[np.ndarray, " n"]) -> None:
        """One sum per block; only where it is not finite, which large finite values can cause too, a closer look."""
        if torch.isfinite(x.sum(dtype=torch.float32)):
            return
        bad = (~torch.isfinite(x).all(1)).nonzero().flatten()
        if not len(bad):
            return
        row = int(bad[0])
        ends = np.cumsum(self._counts[chosen])
        which = int(np.searchsorted(ends, row, side="right"))
        context = int(chosen[which])
        within = row - int(ends[which] - self._counts[context])
        mask = self.contexts.mask
        position = within if mask is None else int(np.flatnonzero(mask[context])[within])
        dtype = str(self.model.dtype).removeprefix("torch.")
        advice = (
            "the weights of the model are damaged or it diverged: use another model or site"
            if self.model.dtype == torch.float32
            else f"the model overflows in {dtype}: load it in float32"
        )
        raise UserError(
            f"the activations at {name} hold NaN or infinity in {len(bad)} of {len(x)} rows, first in context "
            f"{context} at position {position}: {advice}, or leave such batches out with --nan skip"
        )


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator for (seed, epoch), (seed, epoch, block), ...: hashed, so that near keys have nothing in common."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

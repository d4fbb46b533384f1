"""Activations captured beside the training on one GPU: one block of rows is served while the next is being filled.

Rows, batches and their order are those of `ActivationStream`, bit for bit; all that differs is when rows are captured.
The passes of the language model for the next block are launched a few at a time, in step with the batches that are
served, on a stream of their own, into one of two parts of a ring in GPU memory. A batch is picked from its block by
index. Events put the two streams in order (no block is written to before its last batch was picked, none is picked from
before it is full), so the CPU waits for neither; it does for the first block, and after a jump to another place.

On a CPU it does the same, one thing after another. Not run on a GPU yet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.activations.capture import rows
from sparse_coding.activations.models import LanguageModel
from sparse_coding.activations.sites import Site
from sparse_coding.activations.stream import ActivationStream, _Block, _Epoch
from sparse_coding.activations.tokens import Contexts


@dataclass
class _Part:
    """One of the two blocks of the ring, and how far it is."""

    memory: dict[str, Tensor] = field(default_factory=dict)
    """By site, room for the largest block."""
    block: _Block | None = None
    contexts: Int[np.ndarray, " n"] | None = None
    """In the order in which the model reads them."""
    read: int = 0
    filled: int = 0
    """Contexts the model has read, and rows they gave."""
    full: torch.Event | None = None
    picked: torch.Event | None = None
    """Of the last batch that was picked from it."""
    turn: int = -1
    """When rows were last picked from it, counted."""


class RingStream(ActivationStream):
    """`ActivationStream` with the next block captured meanwhile. Memory: two blocks of `buffer_rows` rows.

    It does not look for NaN or infinity, for which a GPU would have to be waited for: the trainer finds them at its
    next line of the log. `seconds_capturing` and `rows_captured` are of the blocks that were waited for.
    """

    def __init__(
        self,
        model: LanguageModel,
        contexts: Contexts,
        sites: Sequence[str | Site],
        *,
        n_batches: int,
        **settings: Any,
    ) -> None:
        """n_batches: batches of the whole run, beyond which nothing is captured; the settings of `ActivationStream`."""
        super().__init__(model, contexts, sites, **settings)
        self.last = n_batches * self.batch_size
        self._ring = _Part(), _Part()
        self._epochs: dict[int, _Epoch] = {}
        self._turns = 0
        device = model.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        n_contexts, length = contexts.tokens.shape
        self._room = min(self.rows_per_epoch, length * (n_contexts // self._n_blocks + 1))

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d_in"]]:
        """Batch number `step` of each site, on the model's device."""
        before = self._turns
        found = super().batch(step)
        for part in self._ring:
            if self._stream and part.turn > before:
                part.picked = torch.cuda.current_stream(self.model.device).record_event()
        self._capture_ahead((step + 1) * self.batch_size - 1)
        return found

    def _epoch_at(self, number: int) -> _Epoch:
        """The last two are kept: at the end of one, blocks of the next are begun."""
        if number not in self._epochs:
            self._epochs = {n: e for n, e in self._epochs.items() if n == number - 1}
            self._epochs[number] = super()._epoch_at(number)
        return self._epochs[number]

    def _block_at(self, epoch: _Epoch, index: int) -> _Block:
        part = self._part(epoch, index)
        assert part.contexts is not None
        assert part.block is not None
        if part.read < len(part.contexts):
            start, before = time.perf_counter(), part.filled
            self._fill(part, len(part.contexts))
            if part.full:
                part.full.synchronize()
            self.seconds_capturing += time.perf_counter() - start
            self.rows_captured += part.filled - before
        elif part.full:
            torch.cuda.current_stream(self.model.device).wait_event(part.full)
        self._turns += 1
        part.turn = self._turns
        return part.block

    def _capture_ahead(self, last: int) -> None:
        """As large a share of the next block as will have been served of this one after the next batch, `last` being
        the last row of all that was served."""
        number, offset = divmod(last, self.rows_per_epoch)
        epoch = self._epoch_at(number)
        index = int(np.searchsorted(epoch.starts, offset, side="right")) - 1
        start, end = int(epoch.starts[index]), int(epoch.starts[index + 1])
        if number * self.rows_per_epoch + end >= self.last:
            return
        if index + 1 == self._n_blocks:
            epoch, index = self._epoch_at(number + 1), -1
        part = self._part(epoch, index + 1)
        assert part.contexts is not None
        served = (offset + 1 + self.batch_size - start) / (end - start)
        self._fill(part, math.ceil(min(1.0, served) * len(part.contexts)))

    def _part(self, epoch: _Epoch, index: int) -> _Part:
        """The part that holds a block, begun in the one that served longest ago where none does."""
        key = epoch.number, index
        found = next((part for part in self._ring if part.block and part.block.key == key), None)
        if found is None:
            found = min(self._ring, key=lambda part: part.turn)
            self._begin(found, epoch, index)
        return found

    def _begin(self, part: _Part, epoch: _Epoch, index: int) -> None:
        key, n_rows = (epoch.number, index), int(epoch.starts[index + 1] - epoch.starts[index])
        part.contexts = np.sort(epoch.order[epoch.borders[index] : epoch.borders[index + 1]])
        part.read, part.filled, part.full, part.turn = 0, 0, None, -1
        if not part.memory:
            part.memory = {
                name: torch.empty(self._room, width, dtype=self.model.dtype, device=self.model.device)
                for name, width in self.widths.items()
            }
        order = self._permutation(n_rows, *key)
        if self._stream:
            order = order.pin_memory()
            # memory that others may just have freed, or that batches are still picked from
            current = torch.cuda.current_stream(self.model.device)
            self._stream.wait_event(part.picked) if part.picked else self._stream.wait_stream(current)
        part.block = _Block(
            key,
            {name: memory[:n_rows] for name, memory in part.memory.items()},
            order.to(self.model.device, non_blocking=True),
        )

    def _fill(self, part: _Part, n_contexts: int) -> None:
        """Let the model read on until it has read `n_contexts` of the block, in the passes `ActivationStream` makes."""
        assert part.contexts is not None
        with self._beside():
            while part.read < min(n_contexts, len(part.contexts)):
                chosen = part.contexts[part.read : part.read + self.contexts_per_forward]
                found = rows(
                    self.model, self.contexts, chosen, list(self.sites.values()), contexts_per_forward=len(chosen)
                )
                n_rows = len(next(iter(found.values())))
                for name, x in found.items():
                    part.memory[name][part.filled : part.filled + n_rows].copy_(x)
                part.read, part.filled = part.read + len(chosen), part.filled + n_rows
            if self._stream and part.full is None and part.read == len(part.contexts):
                part.full = self._stream.record_event()

    def _beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

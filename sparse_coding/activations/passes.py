"""Forward passes over a text on a fixed grid of contexts, and the rows that each gives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparse_coding.activations.capture import rows_per_context
from sparse_coding.activations.tokens import Contexts


class Passes:
    """The forward passes over a text, in order, and the rows that each gives."""

    def __init__(self, text: Contexts, per_forward: int):
        self.text, self.per_forward = text, per_forward
        counts = rows_per_context(text)
        self.context_starts = np.concatenate([[0], np.cumsum(counts)])
        """Rows before each context, and those of all."""
        self.starts = self.context_starts[np.r_[np.arange(0, len(counts), per_forward), len(counts)]]
        """Rows before each pass, and those of all."""

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    def contexts(self, number: int) -> slice:
        return slice(number * self.per_forward, min((number + 1) * self.per_forward, len(self.text.tokens)))

    def within(self, first: int, last: int) -> Iterator[tuple[int, slice]]:
        """Passes that give rows [first, last), and which of their rows those are."""
        for number in range(int(np.searchsorted(self.starts, first, side="right")) - 1, len(self.starts) - 1):
            start, stop = int(self.starts[number]), int(self.starts[number + 1])
            if start >= last:
                return
            if chosen := range(max(first, start), min(last, stop)):
                yield number, slice(chosen.start - start, chosen.stop - start)

    def columns(self, number: int, chosen: slice) -> dict[str, np.ndarray]:
        """Token id, context and position of rows of a pass."""
        which = self.contexts(number)
        tokens = np.asarray(self.text.tokens[which])
        mask = np.ones(tokens.shape, bool) if self.text.mask is None else self.text.mask[which]
        context, position = np.nonzero(mask)
        found = {"token": tokens[mask], "context": context + which.start, "position": position}
        return {name: column[chosen] for name, column in found.items()}

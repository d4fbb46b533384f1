"""What a run does so that nothing is lost, and when a checkpoint is due. None of it changes an undisturbed run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from sparse_coding.errors import UserError

DISK_BYTES_PER_SECOND = 150e6
"""Taken for the first checkpoint, before one was timed."""


@dataclass(frozen=True)
class Safety:
    """What happens when things go wrong. None of these changes a run in which nothing does."""

    checkpoint_share: float = 0.02
    """Most of the time that checkpoints may take: where one takes long, they come less often than
    --checkpoint-seconds. 1: as often as that says, whatever they cost."""
    keep_checkpoints: int = 2
    """Checkpoints kept while training; one that is damaged gives way to the one before it."""
    keep_best: bool = False
    """Keep the checkpoint of the lowest mean FVU too, and save its dictionaries under best/."""
    nan: Literal["stop", "skip"] = "stop"
    """What a batch with NaN or infinity does: stop the run, with the state from before it saved, or leave the batch
    out and count it."""
    auto_batch: bool = False
    """Where memory does not hold a batch, take it in halves, quarters, ...; gradients are averaged."""

    def __post_init__(self) -> None:
        if not 0 < self.checkpoint_share <= 1:
            raise UserError(f"--checkpoint-share is {self.checkpoint_share}: it must be above 0 and at most 1")
        if self.keep_checkpoints < 1:
            raise UserError(f"--keep-checkpoints is {self.keep_checkpoints}: it must be at least 1")
        if self.nan not in ("stop", "skip"):
            raise UserError(f"--nan is {self.nan!r}: allowed are stop, skip")


class CheckpointClock:
    """Says when a checkpoint is due: `seconds` after the last one, and not before its cost fits into `share`.

    Durations are of the monotonic clock, so setting the clock of the machine moves nothing.
    """

    def __init__(self, seconds: float, share: float, state_bytes: int):
        self.seconds, self.share = seconds, share
        self.cost = state_bytes / DISK_BYTES_PER_SECOND
        """Seconds the next one will take: like the last, or a guess before the first."""
        self.spent, self.count = 0.0, 0
        self.began = self.last = time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        affordable = self.share >= 1 or self.spent + self.cost <= self.share * (now - self.began)
        return now - self.last >= self.seconds and affordable

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Around the writing of one."""
        start = time.monotonic()
        yield
        self.last = time.monotonic()
        self.cost = self.last - start
        self.spent += self.cost
        self.count += 1

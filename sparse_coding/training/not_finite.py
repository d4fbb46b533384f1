"""Rows and losses that are no numbers: found where a run waits for the device anyway, and undone.

When something is found, the run goes back to its last checkpoint and repeats what it did, looking at every update, up
to the one at fault. Batches are a function of the step, so the state it then saves is from before that update.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sparse_coding.errors import UserError
from sparse_coding.training.stream import MOST_SKIPPED

if TYPE_CHECKING:
    from sparse_coding.training.trainer import Trainer


class NotFinite(Exception):
    """The batch of the next update holds NaN, infinity, or values whose squares are no numbers."""


def finite(trainer: Trainer) -> bool:
    """Whether all rows, and the loss of some member, were numbers since the last line of the log; waits."""
    if not all(bool(moments.isfinite().all()) for moments in trainer.moments.values()):
        return False
    return any(bool(stack.sums["loss"].isfinite().any()) for stack in trainer.stacks)


def go_back(trainer: Trainer) -> bool:
    """Back to the last state that was saved (or the beginning), and forward again up to the update at fault.

    True where all was finite this time, up to where the run stood.
    """
    until = trainer.step
    print(f"NaN or infinity by step {until:,}: looking for the update that met it", file=sys.stderr, flush=True)
    careful, trainer.careful = trainer.careful, True
    trainer.restore()
    _replay(trainer, until)
    trainer.careful = careful
    if trainer.step == until:
        return finite(trainer)
    rows = finite(trainer)
    if not rows:  # this update's losses, not its rows: it was made to see that
        at = trainer.step - 1
        trainer.restore()
        _replay(trainer, at)
    leave_out(trainer, "the batch holds" if rows else "the loss of every dictionary is")
    trainer.save()
    return False


def _replay(trainer: Trainer, until: int) -> None:
    """Updates up to `until`, without a log; ends early where the next batch, or the last loss, is no number."""
    while trainer.step < until:
        try:
            trainer.advance()
        except NotFinite:
            return
        if trainer.careful and not finite(trainer):
            return
        if trainer.step % trainer.settings.log_every == 0 and trainer.step < until:
            for stack in trainer.stacks:
                stack.averages()
            for moments in trainer.moments.values():
                moments.zero_()


def leave_out(trainer: Trainer, what: str = "the batch holds") -> None:
    """The state is from before update `trainer.step`, which meets NaN: save and stop there, or leave its batch out."""
    step, steps, skipped = trainer.step, trainer.settings.steps, trainer.skipped
    told = f"update {step + 1:,} of {steps:,}: {what} NaN or infinity"
    if trainer.safety.nan == "stop":
        trainer.save()
        kept = "the state from before it is saved: " if trainer.folder and step else ""
        raise UserError(
            f"{told}; {kept}mend the activations or lower --lr, or start the same command with --nan skip, "
            "which leaves such batches out"
        )
    skipped.append(step)
    if len(skipped) >= MOST_SKIPPED and skipped[-MOST_SKIPPED] == step - MOST_SKIPPED + 1:
        raise UserError(f"{told}, as did the {MOST_SKIPPED - 1} before it, which were left out: this does not pass")
    trainer.careful = True
    print(f"{told}; it is left out ({len(skipped):,} so far)", file=sys.stderr, flush=True)
    if trainer.folder:
        trainer.folder.note(skipped_batches={"count": len(skipped), "updates": skipped[:1000]})

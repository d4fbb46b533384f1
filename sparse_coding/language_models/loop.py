"""The training loop: updates, evaluations, the log, saved states, and stopping when asked."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sparse_coding.errors import Interrupted, UserError
from sparse_coding.language_models.trainer import Trainer, learning_rate
from sparse_coding.language_models.training_state import (
    LOG,
    STATE,
    STATE_FILE,
    Progress,
    keep_log_until,
    load_state,
    load_weights,
    save_state,
    save_weights,
)
from sparse_coding.progress import duration


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM only makes the yielded function true; a second one acts as usual."""
    asked = False
    usual: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, usual[number])

    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
        usual.update({number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield lambda: asked
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class Display:
    """A rich progress bar on a terminal; elsewhere a plain line about every ten seconds."""

    def __init__(self, total: int, start: int, shown: bool = True):
        self.total, self.start, self.begun, self.last_line = total, start, time.monotonic(), time.monotonic()
        self.bar, self.shown = None, shown
        if shown and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}")
            self.bar = Progress(BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
            self.task = self.bar.add_task("", total=total, completed=start)
            self.bar.start()

    def update(self, iteration: int, loss: float, rate: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=iteration, description=f"loss {loss:.4f}  {rate:,.0f} tokens/s")
        elif self.shown and time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            left = (self.last_line - self.begun) / max(1, iteration - self.start) * (self.total - iteration)
            self.say(f"{iteration}/{self.total}  loss {loss:.4f}  {rate:,.0f} tokens/s  {duration(left)} left")

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        elif self.shown:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class Run:
    """A trainer with its folder: knows where training stands, and writes the log, the best weights and the state.

    Every process has one; the first writes.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        identity: Mapping[str, Any],
        mirror: Callable[[Mapping[str, float], int], None] | None = None,
    ):
        self.trainer, self.config, self.folder, self.identity = trainer, trainer.config, folder, identity
        self.first, self.mirror = trainer.processes.first, mirror
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        self.state, self.best = folder / STATE / STATE_FILE, folder / STATE / "best.safetensors"
        self.progress = load_state(self.state, trainer, identity) if self.state.exists() else Progress()
        if self.first:
            keep_log_until(folder / LOG, self.progress)
        self.display = Display(self.config.max_iters, self.progress.iteration, self.first)
        if self.progress.iteration:
            self.display.say(f"going on after update {self.progress.iteration} of {self.config.max_iters}")
        self.begun = time.monotonic() - self.progress.seconds
        self.saved_at, self.save_cost = time.monotonic(), 0.0
        self.mark, self.mark_iteration = time.monotonic(), self.progress.iteration  # since when speed is measured

    def log(self, loss: Float[Tensor, ""], norm: Float[Tensor, ""]) -> None:
        """The line of an update."""
        iteration, now, value, norm_value = self.progress.iteration, time.monotonic(), loss.item(), norm.item()
        rate = (iteration - self.mark_iteration) * self.config.tokens_per_iteration / (now - self.mark)
        self.mark, self.mark_iteration = now, iteration
        lr = learning_rate(self.config, iteration - 1)
        known = {"grad_norm": norm_value} if math.isfinite(norm_value) else {}  # float16: a step that was skipped
        self._write({"tokens_per_second": rate, "lr": lr, "loss": value, **known}, value)
        self.display.update(iteration, value, rate)

    def evaluate(self, stop: Callable[[], bool]) -> None:
        """Log the losses on both texts, once; keep the weights if they are the best so far (fresh ones never are).

        Does nothing where this update was evaluated already, and nothing lasting where `stop` becomes true.
        """
        progress, iteration = self.progress, self.progress.iteration
        if progress.evaluated == iteration:
            return
        losses = self.trainer.evaluate(stop)
        if losses is None:
            return
        self._write(losses, losses["val_loss"])
        said = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.display.say(f"{iteration}/{self.config.max_iters}  {said}")
        progress.evaluated = iteration
        if iteration and losses["val_loss"] < progress.best_loss:
            progress.best_loss, progress.best_iteration = losses["val_loss"], iteration
            if self.first:
                save_weights(self.best, self.trainer.model)

    def save(self) -> None:
        start = time.monotonic()
        self.progress.seconds = start - self.begun
        if self.first:
            save_state(self.state, self.trainer, self.progress, self.identity)
        self.saved_at, self.save_cost = time.monotonic(), time.monotonic() - start
        self.mark, self.mark_iteration = self.saved_at, self.progress.iteration

    def save_is_late(self) -> bool:
        """Whether the last save is a minute old, or so old that saving stays below a twentieth of the time."""
        return time.monotonic() - self.saved_at > max(60.0, 20 * self.save_cost)

    def _write(self, facts: Mapping[str, float], loss: float) -> None:
        """Append a line to the log; raises `UserError` if the loss is not finite."""
        iteration, config = self.progress.iteration, self.config
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at update {iteration}: lower learning_rate (now {config.learning_rate:g}), "
                f"raise warmup_iters (now {config.warmup_iters}) or set grad_clip (now {config.grad_clip:g})"
            )
        if not self.first:
            return
        line = {"iteration": iteration, "tokens": iteration * config.tokens_per_iteration}
        with (self.folder / LOG).open("a") as log:
            log.write(json.dumps({**line, "seconds": time.monotonic() - self.begun, **facts}) + "\n")
        if self.mirror is not None:
            self.mirror({**line, **facts}, iteration)


def fit(
    trainer: Trainer,
    folder: Path,
    identity: Mapping[str, Any],
    stop_at: int | None = None,
    mirror: Callable[[Mapping[str, float], int], None] | None = None,
) -> Progress:
    """Train to `max_iters`, going on from `folder`'s state if it has one; the model ends with the weights to keep.

    Every `eval_interval` updates: evaluate, keep the best weights, save the state. Raises `Interrupted` once the state
    is saved after Ctrl-C, SIGTERM or, for tests, after update `stop_at`; `UserError` if the loss is not finite.
    mirror: is given every line of the log with its update.
    """
    config, run = trainer.config, Run(trainer, folder, identity, mirror)
    progress, everyone = run.progress, trainer.processes
    with stop_requests() as asked:
        try:
            while True:
                due = progress.iteration % config.eval_interval == 0 or progress.iteration == config.max_iters
                if due:
                    run.evaluate(asked)
                stop = everyone.any(asked()) or progress.iteration == stop_at
                if stop or run.save_is_late() or (due and progress.iteration):
                    run.save()
                if progress.iteration == config.max_iters and progress.evaluated == config.max_iters:
                    break
                if stop:
                    raise Interrupted(
                        f"training is saved after update {progress.iteration} of {config.max_iters} in {folder}; "
                        "start the same command again to go on"
                    )
                loss, norm = trainer.update(progress.iteration)
                progress.iteration += 1
                if progress.iteration % config.log_interval == 0:
                    run.log(loss, norm)
        finally:
            run.display.close()
    everyone.wait()  # until the best weights are written
    if not config.always_save_checkpoint:
        load_weights(run.best, trainer.model)
    return progress

"""The loop: one stream, many members. Reading `fit` is reading what training does."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_coding.dictionaries import Moment, Sample, TrainableDictionary, architecture
from sparse_coding.dictionaries.base import ErrorFunction
from sparse_coding.errors import Interrupted, UserError
from sparse_coding.progress import Progress, quantity
from sparse_coding.training import checkpoint
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.precision import Precision, products_dtype
from sparse_coding.training.resample import resample
from sparse_coding.training.run_folder import RunFolder
from sparse_coding.training.stack import Stack
from sparse_coding.training.stream import Stream, first_rows
from sparse_coding.training.sweep import Member, split_into_stacks, stack_bytes

Logger = Callable[[dict[str, Any]], None]
StepError = Callable[[int, str], ErrorFunction]
"""(step, site) -> x_hat [M B d] -> what the reconstruction costs, one value per member."""

SAMPLE_ROWS = 32_768
"""Rows that initial values are taken from."""


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how exactly to train; the batch size belongs to the stream."""

    steps: int
    """Updates, one batch of the stream each."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    precision: Precision = "auto"
    """Of the matrix products: bf16 where the hardware has it (auto), bf16, fp16, fp32."""
    log_every: int = 100
    """Steps between two lines of log.jsonl."""
    sparsity_warmup_steps: int = 0
    """Updates over which L1 and L0 weights rise from 0, and k falls to its value."""
    dead: DeadSettings = field(default_factory=DeadSettings)
    """When a latent is dead, and whether dead ones are resampled."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.precision == "fp16" and self.optimizer.name == "schedule-free":
            raise UserError(
                "precision fp16 makes single dictionaries skip updates, which schedule-free, whose average counts the "
                "updates of all, cannot follow: use bf16, fp32 or another optimizer"
            )
        if self.sparsity_warmup_steps < 0:
            raise UserError(f"sparsity_warmup_steps is {self.sparsity_warmup_steps}: it must be 0 or more")

    def sparsity(self, step: int) -> float:
        """How far sparsity has warmed up at this step, up to 1."""
        return min(1.0, (step + 1) / self.sparsity_warmup_steps) if self.sparsity_warmup_steps else 1.0


class Trainer:
    """Trains every member on one stream. With a run folder it logs, checkpoints and resumes from it."""

    def __init__(
        self,
        members: Sequence[Member],
        stream: Stream,
        settings: TrainingSettings,
        device: str = "cpu",
        folder: RunFolder | None = None,
        checkpoint_seconds: float = 120.0,
        loggers: Sequence[Logger] = (),
        error: StepError | None = None,
    ):
        """`error` gives, for a step and a site, what replaces the reconstruction error there (end-to-end losses)."""
        self.members, self.stream, self.settings, self.folder = list(members), stream, settings, folder
        self.checkpoint_seconds, self.loggers, self.device, self.error = checkpoint_seconds, loggers, device, error
        settings.dead.check(settings.steps, stream.batch_size)
        self.groups = split_into_stacks(self.members, stream.batch_size, stack_bytes(device))
        self.stacks = build_stacks(self.members, self.groups, stream, settings, device)
        self.step, self.seconds = 0, 0.0
        sites = dict.fromkeys(member.output_site for member in self.members)
        self.moments = {site: torch.zeros(2, dtype=torch.float64, device=device) for site in sites}
        self._stop: str | None = None
        self._resume()

    def fit(self) -> None:
        """Train from where the run stands to its end. Ctrl-C and SIGTERM save first and raise `Interrupted`."""
        settings, rows = self.settings, self.stream.batch_size
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        if self.step:
            print(f"continuing at step {self.step:,} of {settings.steps:,}", file=sys.stderr, flush=True)
        with self._signals(), Progress("training", settings.steps, start=self.step) as progress:
            while self.step < settings.steps:
                batch = self.stream.batch(self.step)
                scale = settings.optimizer.scale(self.step, settings.steps, settings.dead.since_resampling(self.step))
                for stack in self.stacks:
                    stack.step(batch, scale, self._moment(stack))
                self._measure(batch)
                self.step += 1
                if settings.dead.resamples_after(self.step) and self.step < settings.steps:
                    self._resample()
                self.seconds = time.monotonic() - began
                if self.step % settings.log_every == 0 or self.step == settings.steps:
                    record = self._log(scale)
                    progress.update(self.step, _summary(record, rows))
                if self._stop or time.monotonic() - saved > self.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
                if self._stop and self.step < settings.steps:
                    kept = "its state is saved; the same command continues it" if self.folder else "nothing is saved"
                    raise Interrupted(f"by {self._stop} at step {self.step:,} of {settings.steps:,}: {kept}")
        self.save()

    def dictionary(self, index: int) -> TrainableDictionary:
        """Member `index` as a dictionary of its own (a copy)."""
        for group, stack in zip(self.groups, self.stacks, strict=True):
            if index in group:
                return stack.trained(group.index(index))
        raise IndexError(index)

    def _moment(self, stack: Stack) -> Moment:
        """What this step's losses depend on besides rows and weights."""
        error = self.error and self.error(self.step, stack.target or stack.site)
        return Moment(self.step, self.settings.steps, self.settings.sparsity(self.step), error=error)

    def _resample(self) -> None:
        """Give dead latents new directions, from the losses on the next rows of the stream."""
        n_batches = max(1, self.settings.dead.resample_rows // self.stream.batch_size)
        batches = (self.stream.batch(self.step + i) for i in range(n_batches))
        resample(self.stacks, batches, self._moment(self.stacks[0])._replace(error=None))

    def _measure(self, batch: dict[str, Tensor]) -> None:
        """Sum the total variance of each site, the denominator of FVU in the log."""
        for site, moments in self.moments.items():
            x = batch[site]
            moments[0] += (x - x.mean(0)).square().sum() / len(x)
            moments[1] += 1

    def _log(self, scale: float) -> dict[str, Any]:
        """One line of the log: averages since the last line. The only place that waits for the device."""
        columns: dict[str, list[float]] = {}
        for group, stack in zip(self.groups, self.stacks, strict=True):
            for name, values in stack.averages().items():
                column = columns.setdefault(name, [math.nan] * len(self.members))
                for index, value in zip(group, values, strict=True):
                    column[index] = value
        variances = {site: (moments[0] / moments[1]).item() for site, moments in self.moments.items()}
        for moments in self.moments.values():
            moments.zero_()
        squared_error = columns.pop("squared_error")
        columns["mse"] = [e / m.settings.target_width for e, m in zip(squared_error, self.members, strict=True)]
        columns["fvu"] = [
            e / variances[m.output_site] if variances[m.output_site] > 0 else math.nan
            for e, m in zip(squared_error, self.members, strict=True)
        ]
        record = {
            "step": self.step,
            "tokens": self.step * self.stream.batch_size,
            "seconds": round(self.seconds, 3),
            "lr_scale": scale,
            **{name: [value if math.isfinite(value) else None for value in column] for name, column in columns.items()},
        }
        if all(value is None for value in record["loss"]):
            raise UserError(
                f"the loss of every member stopped being a number by step {self.step:,}: lower --lr, "
                "or look for NaN in the activations"
            )
        if self.folder:
            self.folder.append("log.jsonl", record)
        for logger in self.loggers:
            logger(record)
        return record

    def save(self) -> None:
        """Write a checkpoint into the run folder, if there is one."""
        if self.folder is None:
            return
        tensors = {name: value for stack in self.stacks for name, value in stack.state().items()}
        tensors |= {f"moments/{site}": value for site, value in self.moments.items()}
        facts = {"seconds": self.seconds, "steps_summed": self.stacks[0].steps_summed}
        checkpoint.save(self.folder.path / "checkpoints", self.step, tensors, facts)

    def _resume(self) -> None:
        found = checkpoint.newest(self.folder.path / "checkpoints", self.device) if self.folder else None
        if self.folder is None or found is None:
            if self.folder:
                self.folder.rewind_log(0)
            return
        tensors, facts = found
        self.step, self.seconds = facts["step"], facts["seconds"]
        for stack in self.stacks:
            stack.load_state(tensors, facts["steps_summed"])
        for site, moments in self.moments.items():
            moments.copy_(tensors[f"moments/{site}"])
        self.folder.rewind_log(self.step)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into a request to stop after this step; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, frame: object) -> None:
            self._stop = signal.Signals(number).name
            signal.signal(number, before[signal.Signals(number)])

        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def build_stacks(
    members: Sequence[Member],
    groups: Sequence[Sequence[int]],
    stream: Stream,
    settings: TrainingSettings,
    device: str,
) -> list[Stack]:
    """The stacks of a sweep with their initial weights, which may be taken from the stream's first rows."""
    dtype = products_dtype(settings.precision, device)
    rows = None
    if any(architecture(m.architecture).needs_sample(m.settings) for m in members):
        rows = {site: x.cpu() for site, x in first_rows(stream, SAMPLE_ROWS).items()}
    stacks = []
    for group in groups:
        chosen = [members[index] for index in group]
        sample = Sample(rows[chosen[0].site], rows[chosen[0].output_site]) if rows else None
        stacks.append(Stack(chosen, settings.optimizer, device, dtype, settings.dead, sample))
    return stacks


def _summary(record: dict[str, Any], rows: int) -> str:
    """Ranges over the members, for the progress line."""
    words = []
    for name in ("fvu", "l0"):
        values = [value for value in record[name] if value is not None]
        if values:
            words.append(f"{name} {min(values):.3g} to {max(values):.3g}")
    words.append(f"{quantity(record['step'] * rows)} rows")
    return ", ".join(words)

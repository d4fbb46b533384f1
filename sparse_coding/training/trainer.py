"""The loop: one stream, many members. Reading `fit` is reading what training does."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sparse_coding.dictionaries import Moment, TrainableDictionary
from sparse_coding.dictionaries.base import ErrorFunction
from sparse_coding.errors import Interrupted
from sparse_coding.kernels.spread import spread
from sparse_coding.progress import Progress
from sparse_coding.training import checkpoint
from sparse_coding.training.build import build_stacks
from sparse_coding.training.graph import Graphs
from sparse_coding.training.log_line import averages, mean, summary
from sparse_coding.training.micro_batches import memory_for
from sparse_coding.training.not_finite import NotFinite, finite, go_back, leave_out
from sparse_coding.training.resample import resample
from sparse_coding.training.resting import groups_of, set_aside
from sparse_coding.training.run_folder import RunFolder
from sparse_coding.training.safety import CheckpointClock, Safety
from sparse_coding.training.settings import TrainingSettings
from sparse_coding.training.settling import Settling
from sparse_coding.training.stack import Stack
from sparse_coding.training.stopping import Stopping, StopRequested
from sparse_coding.training.stream import Stream, sound
from sparse_coding.training.sweep import Member

__all__ = ["StepError", "Trainer", "TrainingSettings"]

Logger = Callable[[dict[str, Any]], None]
StepError = Callable[[int, str], ErrorFunction]
"""(step, site) -> x_hat [M B d] -> what the reconstruction costs, one value per member."""

UNDISTURBED = Safety()


class Trainer:
    """Trains every member on one stream. With a run folder it logs, checkpoints and resumes from it.

    Rows or losses that are no numbers are looked for where the loop waits for the device anyway: at every line of the
    log and before every checkpoint (on a CPU, which never waits, the rows of each batch). What is saved is therefore
    always from before them. See not_finite.py.
    """

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
        safety: Safety = UNDISTURBED,
    ):
        """`error` gives, for a step and a site, what replaces the reconstruction error there (end-to-end losses)."""
        self.members, self.stream, self.settings, self.folder = list(members), stream, settings, folder
        self.checkpoint_seconds, self.loggers, self.device, self.error = checkpoint_seconds, loggers, device, error
        self.safety, self.stopping = safety, Stopping()
        settings.dead.check(settings.steps, stream.batch_size)
        self.settling = Settling(settings.settling, len(self.members), device)
        sites = dict.fromkeys(member.output_site for member in self.members)
        self.moments = {site: torch.zeros(2, dtype=torch.float64, device=device) for site in sites}
        self.step, self.seconds = 0, 0.0
        self.skipped: list[int] = []
        """Updates whose batch was left out."""
        self.resampling = False
        """Dead latents are to be resampled before the next update."""
        self.mean_fvu = math.nan
        """Of the last line of the log."""
        self.careful = torch.device(device).type == "cpu"
        """Look at each batch before it is trained on; costs a wait for the device."""
        self._diverged: set[str] = set()
        self._saved: tuple = ()
        self.clock: CheckpointClock | None = None
        self._began = 0.0
        self.graphs = Graphs(self)
        self.restore()
        if folder:
            folder.rewind_log(self.step)

    def fit(self) -> None:
        """Train from where the run stands to its end. Ctrl-C and SIGTERM save first and raise `Interrupted`."""
        settings = self.settings
        if self.step:
            print(f"continuing at step {self.step:,} of {settings.steps:,}", file=sys.stderr, flush=True)
        self.clock = CheckpointClock(self.checkpoint_seconds, self.safety.checkpoint_share, self._state_bytes())
        self._began = time.monotonic() - self.seconds
        with self.stopping.listening(), Progress("training", settings.steps, start=self.step) as progress:
            try:
                if self.resampling:
                    self._resample()
                    self._after(progress)
                while not self.done:
                    try:
                        self.advance()
                    except NotFinite:
                        leave_out(self) if finite(self) else go_back(self)
                    else:
                        self._after(progress)
            except StopRequested:
                self._save_if_sound()
                self._say_stopped()
        self.save()
        if self.folder and self.clock.count:
            self.folder.note(checkpoints={"written": self.clock.count, "seconds": round(self.clock.spent, 3)})

    @property
    def done(self) -> bool:
        """Whether all updates are made, or no member is left to train."""
        return self.step >= self.settings.steps or all(stack.resting for stack in self.stacks)

    def updates(self, index: int) -> int:
        """How many updates were done when member `index` settled, or are done by now."""
        stopped = int(self.settling.stopped[index])
        return self.step if stopped < 0 else stopped

    @property
    def steps_summed(self) -> int:
        """Updates since the last line of the log."""
        return next((stack.steps_summed for stack in self.stacks if not stack.resting), 0)

    def dictionary(self, index: int) -> TrainableDictionary:
        """Member `index` as a dictionary of its own (a copy)."""
        for group, stack in zip(self.groups, self.stacks, strict=True):
            if index in group:
                return stack.trained(group.index(index))
        raise IndexError(index)

    @contextmanager
    def at_best(self) -> Iterator[bool]:
        """Inside, the members are those of the checkpoint with the lowest mean FVU; False where none is kept."""
        found = checkpoint.best(self.folder.path / "checkpoints", self.device) if self.folder else None
        kept = {name: value.clone() for name, value in self._tensors().items()} if found else {}
        summed = self.steps_summed
        try:
            if found:
                self._load(found[0], found[1]["steps_summed"])
            yield bool(found)
        finally:
            if found:
                self._load(kept, summed)

    # ---- one update

    def advance(self) -> None:
        """One update, or none where its batch is left out. Raises `NotFinite` before anything changes."""
        settings = self.settings
        if self.step not in self.skipped:
            batch, scale = self._read(self.step), self._scale(self.step)
            if not self.graphs.update(batch, scale):
                self.update(batch, scale)
        self.step += 1
        if self.settling.look(self.step):
            set_aside(self)
        if settings.dead.resamples_after(self.step) and self.step < settings.steps:
            self.resampling = True
            self._resample()

    def update(self, batch: Mapping[str, Tensor], scale: float | Tensor) -> None:
        """What an update does on the device; it waits for it only where each batch is looked at."""
        variances = {site: spread(batch[site]) / len(batch[site]) for site in self.moments}
        if self.careful and not all(bool(value.isfinite()) for value in variances.values()):
            raise NotFinite
        losses: dict[int, Tensor] = {}
        with memory_for("updating the weights", "lower --ratios, or train fewer dictionaries at once"):
            for number, stack in enumerate(self.stacks):
                if not stack.resting:
                    with self.graphs.beside(number):
                        losses[number] = stack.step(batch, scale, self.moment(stack))
        self.graphs.join()
        for number, value in losses.items():
            stack = self.stacks[number]
            self.settling.count(self.groups[number], value, variances[stack.target or stack.site])
        for site, value in variances.items():
            self.moments[site][0] += value
            self.moments[site][1] += 1

    def _after(self, progress: Progress) -> None:
        """What follows an update now and then: a line of the log, a checkpoint, an end that was asked for."""
        self.seconds = time.monotonic() - self._began
        logs = self.step % self.settings.log_every == 0 or self.done
        saves = bool(self.stopping.reason) or (self.clock is not None and self.clock.due())
        if (logs or saves) and not finite(self) and not go_back(self):
            return
        if logs:
            progress.update(self.step, summary(self._log(self._scale(self.step - 1)), self.stream.batch_size))
        if saves:
            self.save()
        if self.stopping.reason:
            self._say_stopped()

    def _say_stopped(self) -> None:
        if not self.done:
            kept = "its state is saved; the same command continues it" if self.folder else "nothing is saved"
            where = f"at step {self.step:,} of {self.settings.steps:,}"
            raise Interrupted(f"by {self.stopping.reason} {where}: {kept}")

    def _scale(self, step: int) -> float:
        return self.settings.optimizer.scale(step, self.settings.steps, self.settings.dead.since_resampling(step))

    def moment(self, stack: Stack) -> Moment:
        """What this step's losses depend on besides rows and weights."""
        error = self.error and self.error(self.step, stack.target or stack.site)
        return Moment(self.step, self.settings.steps, self.settings.sparsity(self.step), error=error)

    def _read(self, step: int) -> dict[str, Tensor]:
        """A batch of the stream. Given up at once when a stop is asked for; what fails leaves the state saved."""
        try:
            with self.stopping.abandoning(), memory_for("reading activations", "lower --buffer-rows or --batch-size"):
                return self.stream.batch(step)
        except Exception as error:
            if not isinstance(error, StopRequested):
                self._save_if_sound()
            raise

    def _resample(self) -> None:
        """Give dead latents new directions, from the losses on the next rows of the stream.

        Nothing changes before all rows are read, so a stop in between leaves it to be done again, with the same draws.
        """
        n_batches = max(1, self.settings.dead.resample_rows // self.stream.batch_size)
        batches = (self._read(self.step + i) for i in range(n_batches))
        if self.safety.nan == "skip":
            batches = filter(sound, batches)
        resample(self.stacks, batches, self.moment(self.stacks[0])._replace(error=None))
        self.resampling = False

    def _log(self, scale: float) -> dict[str, Any]:
        """One line of the log: averages since the last line. The only place that waits for the device."""
        columns = averages(self.groups, self.stacks, self.members, self.moments)
        self.mean_fvu = mean(columns["fvu"])
        record = {
            "step": self.step,
            "tokens": self.step * self.stream.batch_size,
            "seconds": round(self.seconds, 3),
            "lr_scale": scale,
            **({"skipped_batches": len(self.skipped)} if self.skipped else {}),
            **{name: [value if math.isfinite(value) else None for value in column] for name, column in columns.items()},
        }
        self._tell_diverged(record["loss"])
        if self.folder:
            self.folder.append("log.jsonl", record)
        for logger in self.loggers:
            logger(record)
        return record

    def _tell_diverged(self, losses: Sequence[float | None]) -> None:
        if any(value is not None for value in losses):
            for member, value in zip(self.members, losses, strict=True):
                if value is None and member.name not in self._diverged:
                    self._diverged.add(member.name)
                    told = f"{member.name} diverged by step {self.step:,} (its loss is no number); the others go on"
                    print(told, file=sys.stderr, flush=True)

    # ---- checkpoints

    def save(self) -> None:
        """Write a checkpoint into the run folder, if there is one and it does not hold this state yet."""
        state = self.step, self.resampling, len(self.skipped)
        if self.folder is None or state == self._saved:
            return
        with self.clock.timing() if self.clock else nullcontext():
            facts = {
                "seconds": self.seconds,
                "steps_summed": self.steps_summed,
                "skipped": self.skipped,
                "resampling": self.resampling,
                "pieces": [stack.micro.pieces for stack in self.stacks],
                "fvu": self.mean_fvu,
            }
            self.folder.make_durable("log.jsonl")
            checkpoint.save(
                self.folder.path / "checkpoints", self.step, self._tensors(), facts,
                self.safety.keep_checkpoints, self.safety.keep_best,
            )  # fmt: skip
            self._saved = state
            self.folder.push()

    def _save_if_sound(self) -> None:
        if self.step and finite(self):
            self.save()

    def _state_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: value for stack in self.stacks for name, value in stack.state().items()}
        tensors |= {f"moments/{site}": value for site, value in self.moments.items()}
        return tensors | self.settling.state()

    def restore(self) -> None:
        """The newest checkpoint, or the beginning where there is none."""
        self.stacks: list[Stack] = []  # the memory of those that were goes first
        found = checkpoint.newest(self.folder.path / "checkpoints", self.device) if self.folder else None
        self.settling.load_state(found[0]) if found else self.settling.begin()
        self.groups = groups_of(self)
        with memory_for("making the dictionaries", "lower --ratios, or train fewer dictionaries at once"):
            self.stacks = build_stacks(self.members, self.groups, self.stream, self.settings, self.device)
        for group, stack in zip(self.groups, self.stacks, strict=True):
            stack.resting = bool(self.settling.stopped[group[0]] >= 0)
        for moments in self.moments.values():
            moments.zero_()
        self.step, self.resampling, pieces = 0, False, [1] * len(self.stacks)
        if found:
            tensors, facts = found
            self.step, self.resampling, pieces = facts["step"], facts["resampling"], facts["pieces"]
            self.seconds = max(self.seconds, facts["seconds"])
            self.skipped = sorted({*self.skipped, *facts["skipped"]})
            self.mean_fvu = facts["fvu"]
            self._load(tensors, facts["steps_summed"])
            self._saved = self.step, self.resampling, len(facts["skipped"])
        if self.safety.auto_batch:
            for stack, number in zip(self.stacks, pieces, strict=True):
                stack.allow_micro_batches(number)
        else:
            for stack, number in zip(self.stacks, pieces, strict=True):
                stack.micro.pieces = number

    def _load(self, tensors: Mapping[str, Tensor], steps_summed: int) -> None:
        for stack in self.stacks:
            stack.load_state(tensors, 1 if stack.resting else steps_summed)
        for site, moments in self.moments.items():
            moments.copy_(tensors[f"moments/{site}"])

"""What comes home of jobs: their logs as they grow, what they have saved, all of it before a machine is given up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from sparse_coding.errors import UserError
from vast_utils.clock import Clock
from vast_utils.crew import Crew
from vast_utils.rental import Lost, Rental
from vast_utils.ssh import CommandFailed, MachineError
from vast_utils.tasks import Queue, Task

TAIL_BYTES = 4000


class NotFetched(UserError):
    """A job ended and its results do not fit here: its machine is kept until its limit."""


class Results:
    """Brings home what the jobs of a queue make. `kept`: labels of rentals that stay alive on purpose, and why."""

    def __init__(
        self, crew: Crew, queue: Queue, clock: Clock, say: Callable[[str], None], show: Callable[[Task, str], None]
    ):
        self.crew, self.queue, self.clock, self.say, self.show = crew, queue, clock, say, show
        self.kept: dict[str, str] = {}

    def log(self, rental: Rental, task: Task, last: bool = False) -> None:
        """Keep and show what the log has grown by, in whole lines: a piece of it, or all once the job is over."""
        while self._piece_of_log(rental, task) and last:
            pass

    def _piece_of_log(self, rental: Rental, task: Task) -> bool:
        """Whether there was one."""
        at = self.queue[task.name].log_bytes
        new, end, _ = self.crew.log(rental, task, at).rpartition(b"\n")
        if not end:
            return False
        for line in new.decode("utf-8", "replace").split("\n"):
            self.show(task, line)
        self.queue.change(task, log_bytes=at + len(new) + 1)
        return True

    def tail(self, rental: Rental, task: Task, log_bytes: int) -> str:
        """The end of a log of that length."""
        return self.crew.log(rental, task, max(0, log_bytes - TAIL_BYTES)).decode("utf-8", "replace")

    def fetch(self, rental: Rental, task: Task, last: bool) -> None:
        """Bring results here. What this computer cannot take is said; at the end that keeps the machine."""
        try:
            runs = self.crew.fetch(rental, task, last)
        except MachineError:
            raise
        except (UserError, OSError) as error:
            if last:
                until = (rental.useful_until - self.clock.now()) / 60
                said = (
                    f"{task.name} has results on machine {rental.record.instance} that do not fit here ({error}): "
                    f"it stays for {max(until, 0):.0f} minutes more; mend that and give the same command again"
                )
                self.kept[rental.record.label] = said
                self.queue.change(task, why="its results could not be brought here")
                raise NotFetched(said) from None
            self.say(f"{task.name}: {error}")
            return
        known = self.queue[task.name].runs
        if more := tuple(run for run in runs if run not in known):
            self.queue.change(task, runs=known + more)

    def wind_down(self, rental: Rental, task: Task) -> None:
        """Stop a job and bring here what it saved, as far as the machine answers."""
        try:
            if self.crew.job(rental, task).state != "absent":
                self.crew.stop(rental, task)
                try:
                    self.log(rental, task, last=True)
                finally:  # a log that cannot be kept here loses no results
                    self.fetch(rental, task, last=True)
        except (MachineError, Lost) as error:
            self.say(f"{task.name}: what it made since the last fetch is lost: {error}")

    def rescue(self, rental: Rental, task: Task, error: MachineError) -> None:
        """A machine that answers and yet does nothing we ask (a full disk) may still give its results away."""
        if isinstance(error, CommandFailed):
            with suppress(MachineError):
                self.fetch(rental, task, last=False)

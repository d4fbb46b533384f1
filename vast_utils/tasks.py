"""What a run has to do and how far it is: a queue of commands that survives whoever works on it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sparse_coding.config import from_dict
from sparse_coding.errors import UserError
from vast_utils.ledger import Ledger

Phase = Literal["waiting", "running", "done", "failed"]
SUFFIX = ".task.json"


@dataclass(frozen=True)
class Task:
    """A command that is to run to its end on some machine, as the run's folder has it."""

    name: str
    """Also that of its job on a machine."""
    argv: tuple[str, ...]
    out: str = ""
    """Its folder under `outputs/`; empty where that is not known: then all of its machine's results are its own."""
    about: str = ""
    """What tells it from the others of a sweep."""
    phase: Phase = "waiting"
    label: str = ""
    """The rental that it is on, or was on last."""
    failures: int = 0
    """How often it was lost with its machine, or had to be started again."""
    why: str = ""
    """What went wrong last."""
    log_bytes: int = 0
    """How much of its log on that rental is kept here."""
    runs: tuple[str, ...] = ()
    """Folders under `outputs/` that came from it."""
    seconds: float = 0.0
    """Time on machines."""

    @property
    def over(self) -> bool:
        return self.phase in ("done", "failed")

    @property
    def syncs(self) -> bool:
        """Whether it copies its checkpoints away by itself."""
        return syncs(self.argv)


def syncs(argv: Sequence[str]) -> bool:
    """Whether a command is a run.py that copies its checkpoints away."""
    return any(word.split("=")[0] == "--sync" for word in argv)


class Queue:
    """The tasks of a run in their order, on disk after every change. Several threads may take from it."""

    def __init__(self, ledger: Ledger, tasks: Sequence[Task] = ()):
        """tasks: what the run consists of; those known from before keep what they have reached.

        Raises `UserError` where a task of that name was another command.
        """
        self.ledger, self._lock = ledger, threading.RLock()
        known = {task.name: task for task in read_tasks(ledger)}
        for task in tasks:
            before = known.get(task.name)
            if before is not None and before.argv != task.argv:
                raise UserError(
                    f"{task.name} of run {ledger.run!r} was another command ({' '.join(before.argv)}): name a new run"
                )
        self._tasks = {task.name: known.get(task.name, task) for task in tasks} or known

    def __iter__(self):
        with self._lock:
            return iter(list(self._tasks.values()))

    def __getitem__(self, name: str) -> Task:
        with self._lock:
            return self._tasks[name]

    @property
    def open(self) -> list[Task]:
        """Those that are not over."""
        return [task for task in self if not task.over]

    def begin(self, labels: Collection[str]) -> None:
        """Start, or start again: what ran on a rental that is no more waits, and what failed may try anew."""
        for task in self:
            if task.phase == "failed" or (task.phase == "running" and task.label not in labels):
                self.change(task, phase="waiting", failures=0)
            else:
                self.change(task)

    def on(self, label: str) -> Task | None:
        """The task that a machine works on."""
        return next((task for task in self if task.phase == "running" and task.label == label), None)

    def take(self) -> Task | None:
        """The next one that waits, which is nobody else's from now on."""
        with self._lock:
            task = next((task for task in self if task.phase == "waiting"), None)
            return self.change(task, phase="running", label="", why="") if task else None

    def place(self, task: Task, label: str) -> Task:
        """Write down where a task is before it is started there."""
        kept = task.log_bytes if task.label == label else 0
        return self.change(task, phase="running", label=label, log_bytes=kept)

    def change(self, task: Task, **changes: Any) -> Task:
        """The same task with other values, on disk."""
        with self._lock:
            task = replace(self._tasks.get(task.name, task), **changes)
            self._tasks[task.name] = task
            self.ledger.put(task.name + SUFFIX, asdict(task))
            return task


def read_tasks(ledger: Ledger) -> list[Task]:
    """The tasks of a run, as whoever works on it left them; empty where it has none."""
    read = [ledger.get(path.name) for path in sorted(ledger.folder.glob("*" + SUFFIX))]
    return [from_dict(Task, task) for task in read if task]

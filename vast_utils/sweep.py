"""`sweep`: many commands on several rented machines, a table of how they stand, their results in one file."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from sparse_coding.config import parse
from sparse_coding.errors import UserError
from vast_utils.ledger import Ledger, check_run_name
from vast_utils.merge import merge
from vast_utils.reap import cost
from vast_utils.session import RentFlags, dispatch, is_done, say_line, settle, with_bucket
from vast_utils.sky_export import SkyFlags, export
from vast_utils.sweep_file import read, tasks
from vast_utils.tasks import Queue, Task, read_tasks

if TYPE_CHECKING:
    from rich.table import Table

REFRESH = 1.0


@dataclass(frozen=True, kw_only=True)
class SweepFlags(RentFlags, SkyFlags):
    """Run the commands of a YAML file on several rented machines. Without --yes this only shows what would happen.

        command: run.py --model gpt2 --tokens 100M
        grid: {layer: [2, 5, 8], l1: [[0.3, 1, 3]], seeds: [[0, 1]]}

    `runs` is a list of words to add to the command, `grid` combines the values of flags. Each machine works on one
    command after another. Results come to outputs/NAME/COMMAND, those of all to outputs/NAME/results.jsonl with a
    report beside it. The same command continues a sweep that was stopped or killed, and tries again what failed.
    """

    file: Positional[Path]
    """The sweep."""
    max_hours: float = 8.0
    """Most hours by the clock; machines are given back some minutes before."""
    machines: int = 1
    """How many to rent at once, the cheapest first."""
    machine_cost: float = 0.0
    """Most dollars for one machine; 0: its share of --max-cost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.machines < 1:
            raise UserError(f"--machines is {self.machines}: it must be at least 1")
        if self.machine_cost < 0:
            raise UserError(f"--machine-cost is {self.machine_cost}: it must be 0 or more")


def main(arguments: Sequence[str]) -> None:
    """run many commands on several rented machines"""
    flags = parse(SweepFlags, arguments, "python -m vast_utils sweep", getdoc(SweepFlags) or "")
    name = check_run_name(flags.name or re.sub(r"[^a-z0-9]+", "-", flags.file.stem.lower()).strip("-")[:40])
    todo = [
        Task(task.name, with_bucket(task.argv, flags.bucket, f"{name}/{task.name}"), task.out, task.about)
        for task in tasks(read(flags.file), name)
    ]
    if flags.backend == "skypilot":
        export(flags, flags, todo)
        return
    flags.check_unused()
    machines, ledger = min(flags.machines, len(todo)), Ledger(name)
    if not is_done(ledger, todo):
        if not flags.yes:
            from vast_utils.account import Account
            from vast_utils.preview import preview

            preview(Account(), flags, name, todo, machines)
            print("\nnothing was rented; with --yes it will be")
            return
        try:
            with Board(ledger) as board:
                share = flags.machine_cost or flags.max_cost / machines
                dispatch(flags, name, todo, machines, share, say=board.say, log_lines=False)
        finally:
            _merge(flags.folder / "outputs", ledger, todo)
    else:
        _merge(flags.folder / "outputs", ledger, todo)
    settle(Queue(ledger, todo))


def _merge(outputs: Path, ledger: Ledger, todo: Sequence[Task]) -> None:
    known = {task.name: task for task in read_tasks(ledger)}
    if not known:
        return
    spent = cost(ledger.records(), ledger.latest())
    folder = merge(outputs, ledger.run, [known.get(task.name, task) for task in todo], spent)
    print(f"results of all: {folder / 'results.jsonl'}, {folder / 'report.md'}")


class Board:
    """A table of the commands that is drawn anew every second, events above it; off a terminal events alone."""

    def __init__(self, ledger: Ledger):
        self.ledger, self.say = ledger, say_line
        self._over = threading.Event()

    def __enter__(self) -> Board:
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(_table(self.ledger), refresh_per_second=4)
            self._live.start()
            self.say: Callable[[str], None] = self._above
            self._thread = threading.Thread(target=self._draw, daemon=True)
            self._thread.start()
        return self

    def _above(self, line: str) -> None:
        with suppress(OSError):  # the terminal was closed
            self._live.console.print(line, markup=False, highlight=False)

    def _draw(self) -> None:
        while not self._over.wait(REFRESH):
            with suppress(UserError):  # a ledger that cannot be read is said by who works with it
                self._live.update(_table(self.ledger))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if sys.stdout.isatty():
            self._thread.join()
            with suppress(OSError, UserError):
                self._live.update(_table(self.ledger))
            with suppress(OSError):
                self._live.stop()


def _table(ledger: Ledger) -> Table:
    """How the commands stand, and what the machines have cost."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    records = {record.label: record for record in ledger.records()}
    todo = read_tasks(ledger)
    done = sum(task.phase == "done" for task in todo)
    spent = cost(list(records.values()), ledger.latest())
    table = Table(title=f"{ledger.run}: {done} of {len(todo)} done, at most ${spent:.2f}", box=SIMPLE_HEAD)
    for column in ("command", "state", "machine", "$/h", "failures"):
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    for task in todo:
        record = records.get(task.label) if task.phase == "running" else None
        where = (str(record.instance), f"{record.hourly:.3f}") if record else ("", "")
        table.add_row(task.about or task.name, task.phase, *where, str(task.failures or ""))
    return table

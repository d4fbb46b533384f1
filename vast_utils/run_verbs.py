"""The verbs for runs on rented machines: status, logs, fetch, stop. With `--ssh` they are those of `machine_verbs`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import getdoc
from typing import Annotated, TypeVar

from tyro.conf import Positional, arg

from sparse_coding.config import parse
from sparse_coding.errors import UserError, near
from vast_utils import machine_verbs
from vast_utils.ledger import Ledger, ledgers
from vast_utils.tasks import Task, read_tasks

T = TypeVar("T")


def status(arguments: Sequence[str]) -> None:
    """show all runs, or the jobs of the machine at --ssh"""
    if _one_machine(arguments):
        return machine_verbs.status(arguments)
    flags = _parse(StatusFlags, arguments, "status")
    from vast_utils.overview import overview

    for line in overview([choose_run(flags.run)] if flags.run else _begun(), flags.ask):
        print(line, flush=True)


@dataclass(frozen=True)
class StatusFlags:
    """Show runs on rented machines: what they cost, their machines, their commands. For a machine of yours: --ssh."""

    run: Positional[str] = ""
    """The run; by default all."""
    ask: bool = True
    """Ask vast.ai and the machines too; without, what this computer knows is shown."""


@dataclass(frozen=True)
class LogsFlags:
    """Print what a run has printed, on all the machines that it was on. For a machine of yours: --ssh."""

    run: Positional[str] = ""
    """The run; by default the only one that is not over, or the only one."""
    task: str = ""
    """Which command of a sweep."""
    follow: Annotated[bool, arg(aliases=["-f"])] = False
    """Go on until the command has ended."""


def logs(arguments: Sequence[str]) -> None:
    """print the log of a run, or of a job at --ssh"""
    if _one_machine(arguments):
        return machine_verbs.logs(arguments)
    flags = _parse(LogsFlags, arguments, "logs")
    ledger = choose_run(flags.run)
    task = _choose_task(ledger, flags.task)
    for line in _kept_log(ledger, task, flags.follow):
        print(line, flush=True)
    if not ledger.busy and read_task(ledger, task).phase == "running":
        _live_log(ledger, task, flags.follow)


@dataclass(frozen=True)
class FetchFlags:
    """Bring the results of a run here that its machines hold now. For a machine of yours: --ssh."""

    run: Positional[str] = ""
    """The run; by default the only one that is not over, or the only one."""


def fetch(arguments: Sequence[str]) -> None:
    """bring results here from a run's machines, or from --ssh"""
    if _one_machine(arguments):
        return machine_verbs.fetch(arguments)
    flags = _parse(FetchFlags, arguments, "fetch")
    from vast_utils.account import Account
    from vast_utils.hands import Hands
    from vast_utils.session import reopen

    ledger = choose_run(flags.run)
    dispatcher = reopen(ledger, Account())
    assert isinstance(dispatcher.crew, Hands)
    seen = {one.label: one for one in dispatcher.desk_instances()}
    fetched = 0
    for rental in dispatcher.fleet.rentals:
        task, instance = dispatcher.queue.on(rental.record.label), seen.get(rental.record.label)
        if task and instance and instance.addresses:
            dispatcher.crew.meet(rental, instance)
            runs = dispatcher.crew.fetch(rental, task, last=False)
            print(f"{task.name}: fetched {', '.join(runs) or 'nothing yet'}")
            fetched += 1
    if not fetched:
        print(f"run {ledger.run} has no machine at work; what was fetched is in {dispatcher.crew.outfit.outputs}")


@dataclass(frozen=True)
class StopFlags:
    """Stop a run: its commands save, their results are fetched, its machines destroyed. For a machine of yours: --ssh.

    `launch` or `sweep`, given again, goes on from there. Exit status 1: not confirmed, look at the console.
    """

    run: Positional[str] = ""
    """The run; by default the only one that is not over, or the only one."""


def stop(arguments: Sequence[str]) -> None:
    """stop a run: save, fetch, destroy; or a job at --ssh"""
    if _one_machine(arguments):
        return machine_verbs.stop(arguments)
    ledger = choose_run(_parse(StopFlags, arguments, "stop").run)
    from vast_utils.account import Account
    from vast_utils.destroy import Unconfirmed
    from vast_utils.session import alarm, ask_to_stop, reopen
    from vast_utils.signals import stopping

    ask_to_stop(ledger)
    with ledger.held(), stopping() as ear:
        ear.deaf = True
        dispatcher = reopen(ledger, Account())
        try:
            dispatcher.end()
        except Unconfirmed as error:
            alarm(error)
    if dispatcher.kept:
        print("\n".join(dispatcher.kept.values()), file=sys.stderr)
        raise SystemExit(1)
    print(f"run {ledger.run} has no machine left; it cost at most ${dispatcher.fleet.desk.budget.spent():.2f}")


def choose_run(name: str) -> Ledger:
    """The run of that name; with no name the only one that is not over, or the only one. `UserError` otherwise."""
    known = {ledger.run: ledger for ledger in _begun()}
    if name:
        if name not in known:
            raise UserError(f"there is no run {name!r}: have {', '.join(known) or 'none'}{near(name, known)}")
        return known[name]
    found = [one for one in known.values() if is_open(one)] or list(known.values())
    if len(found) == 1:
        return found[0]
    raise UserError(f"which run? give its name: have {', '.join(one.run for one in found) or 'none'}")


def is_open(ledger: Ledger) -> bool:
    """Whether a run has something to do, or a machine."""
    return any(not task.over for task in read_tasks(ledger)) or bool(ledger.open_records())


def read_task(ledger: Ledger, name: str) -> Task:
    """A task as it stands on disk now."""
    return next(task for task in read_tasks(ledger) if task.name == name)


def _begun() -> list[Ledger]:
    return [ledger for ledger in ledgers() if (ledger.folder / "run.json").exists()]


def _choose_task(ledger: Ledger, name: str) -> str:
    known = {task.name: task for task in read_tasks(ledger)}
    if name in known:
        return name
    running = [task.name for task in known.values() if task.phase == "running"] or list(known)
    if not name and len(running) == 1:
        return running[0]
    what = f"run {ledger.run} has no command {name!r}" if name else "which command? give --task"
    raise UserError(f"{what}: have {', '.join(known) or 'none'}{near(name, known)}")


def _kept_log(ledger: Ledger, task: str, follow: bool) -> Iterator[str]:
    """What the dispatcher kept of a log; when following, as long as one is at work on it."""
    from vast_utils.session import log_path

    path, at = log_path(ledger, task), 0
    while True:
        last = not follow or not ledger.busy or read_task(ledger, task).over
        if path.exists():
            with path.open("rb") as file:
                file.seek(at)
                new, end, _ = file.read().rpartition(b"\n")
            at += len(new) + len(end)
            if end:
                yield from new.decode("utf-8", "replace").split("\n")
        if last:
            return
        time.sleep(0.5)


def _live_log(ledger: Ledger, name: str, follow: bool) -> None:
    """What nobody has kept: of a run that goes on by itself, from its machine."""
    from vast_utils.account import Account
    from vast_utils.hands import Hands
    from vast_utils.logs import lines
    from vast_utils.said import printable
    from vast_utils.secrets import Redactor, known
    from vast_utils.session import reopen

    dispatcher, task = reopen(ledger, Account()), read_task(ledger, name)
    assert isinstance(dispatcher.crew, Hands)
    seen = {one.label: one for one in dispatcher.desk_instances()}
    hide = Redactor(known(os.environ))
    for rental in dispatcher.fleet.rentals:
        if rental.record.label == task.label and task.label in seen:
            dispatcher.crew.meet(rental, seen[task.label])
            for line in lines(dispatcher.crew.machine(rental), name, task.log_bytes, follow):
                print(printable(hide(line)), flush=True)
            return
    print(f"{name} is on no machine", file=sys.stderr)


def _one_machine(arguments: Sequence[str]) -> bool:
    return any(word == "--ssh" or word.startswith("--ssh=") for word in arguments)


def _parse(cls: type[T], arguments: Sequence[str], verb: str) -> T:
    return parse(cls, arguments, f"python -m vast_utils {verb}", getdoc(cls) or "")

"""One dispatch from its lock to its report: what `launch` and `sweep` have in common."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from sparse_coding.config import from_dict
from sparse_coding.errors import Interrupted, UserError
from vast_utils.account import Account
from vast_utils.budget import Budget
from vast_utils.clock import SafeClock
from vast_utils.destroy import Unconfirmed
from vast_utils.dispatch import WIND_DOWN, Dispatcher
from vast_utils.fleet import Fleet
from vast_utils.hands import IMAGE, OUTFIT, Hands, Outfit
from vast_utils.ledger import Caps, Ledger
from vast_utils.offers import Need
from vast_utils.push import project_files
from vast_utils.results import NotFetched
from vast_utils.said import printable
from vast_utils.secrets import Redactor, collect, known, refuse_in
from vast_utils.setup import Needs
from vast_utils.signals import HaltingClock, Stopped, stopping
from vast_utils.tasks import Queue, Task, syncs
from vast_utils.workers import run

STOP_SECONDS = 1800.0
"""So long a dispatcher that was asked to stop may save, fetch and destroy."""
MOST_GRACE = 0.8 * WIND_DOWN


@dataclass(frozen=True, kw_only=True)
class RentFlags(Need):
    """What to rent and what it may cost."""

    max_cost: float
    """Most dollars in all, whatever happens; downloads are reckoned as --down GB for each machine."""
    max_hours: float
    """Most hours by the clock; machines are given back some minutes before."""
    max_price: float = 0.0
    """Most dollars per hour of a machine, disk included; 0: what makes --max-hours affordable within --max-cost."""
    hours: Annotated[float, tyro.conf.Suppress] = 1.0
    name: str = ""
    """The run's name; by default made from the command and the folder, so that the same command is the same run."""
    folder: Path = Path(".")
    """The project; results come to its outputs/."""
    models: tuple[Path, ...] = ()
    """Folders that git ignores and that go along: models, or a run of outputs/ to be continued."""
    env: tuple[str, ...] = ()
    """Names of environment variables that go along besides WANDB_API_KEY, HF_TOKEN and AWS_*."""
    bucket: str = ""
    """s3://BUCKET/PATH: run.py copies its checkpoints to PATH/NAME there (--sync) and continues from it."""
    image: str = IMAGE
    """The Docker image; its torch is kept where it works."""
    ssh_user: str = "root"
    """Whom the image lets in."""
    require_gpu: bool = True
    """The machine must have a GPU that torch can use."""
    min_mbps: float = 50.0
    """Megabits per second that a download must reach there; 0: not tried."""
    python: str = ""
    """The image's Python; by default the first whose torch works."""
    quiet_minutes: float = 30.0
    """A job whose log stands still this long is taken for wedged: it goes on on another machine."""
    grace: float = 120.0
    """Seconds that a job has to save when it is stopped."""
    retries: int = 3
    """How often a command is started again after it was lost or has failed."""
    yes: bool = False
    """Rent. Without it nothing is rented or changed: what would be is shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.grace <= MOST_GRACE:
            raise UserError(f"--grace is {self.grace:g}: between 0 and {MOST_GRACE:g} seconds are kept for it")
        if self.retries < 0:
            raise UserError(f"--retries is {self.retries}: it must be 0 or more")

    def need(self, machines: int) -> Need:
        """What offers must satisfy."""
        values = {field.name: getattr(self, field.name) for field in fields(Need)}
        return Need(**{**values, "hours": self.max_hours, "max_price": self.caps(machines).max_price})

    def caps(self, machines: int) -> Caps:
        affordable = self.max_cost / (machines * self.max_hours) if machines * self.max_hours > 0 else 0.0
        return Caps(self.max_price or affordable, self.max_cost, self.max_hours)

    def outfit(self) -> Outfit:
        folder = self.folder.resolve()
        for models in self.models:
            if not models.is_dir():
                raise UserError(f"--models {models}: there is no such folder")
        return Outfit(
            folder=str(folder),
            image=self.image,
            ssh_user=self.ssh_user,
            needs=Needs(self.require_gpu, min(10.0, self.disk / 2), self.min_mbps, python=self.python),
            models=tuple(str(models.resolve()) for models in self.models),
            quiet_seconds=self.quiet_minutes * 60,
            grace_seconds=self.grace,
        )


def with_bucket(argv: Sequence[str], bucket: str, name: str) -> tuple[str, ...]:
    """The command that also copies its checkpoints to a bucket, and continues from there."""
    if not bucket:
        return tuple(argv)
    if not bucket.startswith("s3://"):
        raise UserError(f"--bucket is {bucket!r}: it must start with s3://")
    if "run.py" not in argv:
        raise UserError("only run.py copies its checkpoints to a bucket: leave --bucket out for other programs")
    return tuple(argv) if syncs(argv) else (*argv, "--sync", f"{bucket.rstrip('/')}/{name}")


def dispatch(
    flags: RentFlags,
    run_name: str,
    tasks: Sequence[Task],
    machines: int = 1,
    machine_cost: float = 0.0,
    detach: bool = False,
    say: Callable[[str], None] = print,
    log_lines: bool = True,
) -> Queue:
    """Rent, run, fetch, destroy; the tasks as they stand at the end. Prints what it cost.

    Exits 1 where a machine may still be running; raises `Interrupted` after a signal, `UserError` for what the user
    can mend.
    """
    ledger, secrets, outfit = Ledger(run_name), collect(os.environ, flags.env), flags.outfit()
    for task in tasks:
        refuse_in(task.argv, secrets)
    ledger.check_not_reaped()
    if "requirements.txt" not in project_files(flags.folder).names:
        raise UserError(f"{flags.folder} holds no requirements.txt that git knows: there is nothing to install")
    account = Account()
    halt = threading.Event()
    hide = Redactor(known(os.environ) | secrets)
    with ledger.held(), stopping(say) as ear:
        clock = HaltingClock(SafeClock(ledger.latest()), halt)
        caps, started = ledger.begin(flags.caps(machines), clock.now())
        budget = Budget(caps, started, ledger, clock, machine_cost=machine_cost)
        fleet = Fleet(account, ledger, budget, clock, lambda line: say(hide(line)))
        queue = Queue(ledger, tasks)
        ledger.put(OUTFIT, asdict(outfit))
        crew = Hands(ledger, outfit, clock, secrets, account.url, fleet.say)
        show = LogKeeper(ledger, hide, say if log_lines else None)
        dispatcher = Dispatcher(
            fleet, crew, queue, flags.need(machines), fleet.say, show, retries=flags.retries, detach=detach
        )
        stopped = False
        try:
            run(dispatcher, machines, halt)
        except Stopped:
            stopped = True
        except (Unconfirmed, NotFetched):
            pass  # `close` tries once more, and says what it comes to
        finally:
            ear.deaf = True
            _close(dispatcher, say)
        say(f"run {run_name} cost at most ${budget.spent():.2f}")
    if stopped and not dispatcher.kept:
        raise Interrupted("nothing is left at vast.ai; the same command goes on from what was fetched")
    return queue


def is_done(ledger: Ledger, tasks: Sequence[Task]) -> bool:
    """Whether all was done before and no machine is left."""
    if not ledger.folder.is_dir():
        return False
    queue = Queue(ledger, tasks)
    return all(task.phase == "done" for task in queue) and all(record.over for record in ledger.records())


def reopen(ledger: Ledger, account: Account, say: Callable[[str], None] = print) -> Dispatcher:
    """The dispatcher of a run as it stands on disk, to look at its machines or to end them; it rents nothing.

    What changes anything is to be done under `ledger.held()`. Raises `UserError` where the run was never begun.
    """
    begun, outfit = ledger.begun(), ledger.get(OUTFIT)
    if begun is None or outfit is None:
        raise UserError(f"run {ledger.run!r} has not begun to rent")
    clock = SafeClock(ledger.latest())
    budget = Budget(*begun, ledger, clock)
    hide = Redactor(known(os.environ))
    fleet = Fleet(account, ledger, budget, clock, lambda line: say(hide(line)))
    crew = Hands(ledger, from_dict(Outfit, outfit), clock, api_url=account.url, say=fleet.say)
    return Dispatcher(fleet, crew, Queue(ledger), Need(), fleet.say, LogKeeper(ledger, hide, None))


def ask_to_stop(ledger: Ledger, say: Callable[[str], None] = print) -> None:
    """Have whoever is at work on a run save, fetch and destroy, and wait for its end. `UserError` where none comes."""
    if pid := ledger.holder():
        say(f"asking the dispatcher of {ledger.run} (process {pid}) to stop")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    while ledger.busy:
        if time.monotonic() > end:
            raise UserError(f"the dispatcher of {ledger.run} does not stop: `reap --run {ledger.run}` ends the run")
        time.sleep(0.5)


def _close(dispatcher: Dispatcher, say: Callable[[str], None]) -> None:
    """End what is not kept; where that cannot be confirmed, loudly."""
    try:
        dispatcher.close()
    except Unconfirmed as error:
        alarm(error)
    finally:
        for reason in dispatcher.kept.values():
            say(reason)


def say_line(line: str) -> None:
    """Print a line at once. A terminal that was closed, or a pipe that nobody reads, ends no run."""
    with suppress(OSError, ValueError):
        print(line, flush=True)


def alarm(error: Unconfirmed) -> NoReturn:
    """Say that a machine may still cost money, and end with exit status 1."""
    print(f"ERROR: {error}", file=sys.stderr, flush=True)
    raise SystemExit(1)


class LogKeeper:
    """Keeps the jobs' logs beside the ledger, values of secrets replaced, and shows them."""

    def __init__(self, ledger: Ledger, hide: Redactor, say: Callable[[str], None] | None):
        self.ledger, self.hide, self.say = ledger, hide, say

    def __call__(self, task: Task, line: str) -> None:
        line = printable(self.hide(line))
        with log_path(self.ledger, task.name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self.say:
            self.say(line)


def log_path(ledger: Ledger, task: str) -> Path:
    """Where a task's log is kept here."""
    return ledger.folder / f"{task}.log"


def settle(queue: Queue, detached: bool = False) -> None:
    """End with exit status 1 and say why, where a task is not done. detached: one that runs is as it should be."""
    left = [task for task in queue if task.phase != "done" and not (detached and task.phase == "running")]
    if not left:
        return
    for task in left:
        state = "failed" if task.phase == "failed" else "not finished"
        print(f"{task.name}: {state}: {task.why or 'it did not begin'}", file=sys.stderr)
    raise SystemExit(1)

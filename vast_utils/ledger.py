"""What we mean to rent and what we hold, on disk before the request that rents: a killed program loses nothing.

One folder per run, one JSON file per rental, written whole (fsync, rename). The label that goes to vast.ai with the
request stands in the file first, so that a machine is found again whatever happened in between.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, Literal

from sparse_coding.errors import UserError
from vast_utils import state
from vast_utils.state import state_folder

PREFIX = "sparse-coding."
"""Every label of ours starts so: `sparse-coding.RUN.NONCE`."""
RUN = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
State = Literal["intended", "doubtful", "rented", "ready", "destroying", "destroyed", "refused"]
OVER: tuple[State, ...] = ("destroyed", "refused")
LOCK_TRIES = 20
"""Whoever asks whether a ledger is busy holds its lock for a moment: so often, 50 ms apart, it is tried."""


@dataclass(frozen=True)
class Caps:
    """The limits a user set: dollars per hour of one machine, dollars in all, hours by the clock."""

    max_price: float
    max_cost: float
    max_hours: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must be a number above 0")


@dataclass(frozen=True)
class Record:
    """One rental. Times in seconds since the epoch, money in dollars."""

    label: str
    state: State
    offer: int
    machine: int
    """The host's machine, by which it is banned."""
    gpu: str
    hourly: float
    """What an hour costs, disk included: as shown, then as bid or read back."""
    dearest: float
    """Most that an hour may come to cost; a machine that is dearer is given back."""
    traffic: float
    """What its uploads and downloads are reckoned to cost, with what was fetched beyond that."""
    reserved: float
    """Most that this rental may cost, traffic included."""
    disk: float
    intended: float
    """When it was written down, just before the request: its cost is counted from here."""
    bid: float | None = None
    """Of an interruptible machine, for the GPU alone."""
    instance: int | None = None
    ready: float | None = None
    ended: float | None = None
    """When its end was confirmed."""
    up_cost: float = 0.0
    """$ per GB of its uploads."""
    up_free: float = 0.0
    """GB of its uploads that are reckoned in and not used up."""
    rebid: bool = False
    ban: str = ""
    """Why this run does not take this machine again."""

    @property
    def over(self) -> bool:
        return self.state in OVER

    def cost(self, now: float) -> float:
        """Most that it can have cost until `now`: every hour since the request at the full price."""
        if self.state in ("refused", "doubtful", "intended") and self.instance is None:
            return 0.0
        until = self.ended if self.ended is not None else now
        return self.hourly * max(0.0, until - self.intended) / 3600 + self.traffic

    def deadline(self) -> float:
        """When what is reserved for it is used up."""
        return self.intended + 3600 * max(0.0, self.reserved - self.traffic) / self.dearest


def check_run_name(run: str) -> str:
    """A run's name as it can stand in a label and a path."""
    if not RUN.fullmatch(run):
        raise UserError(f"the run is named {run!r}: use 1 to 40 lower-case letters, digits and hyphens")
    return run


def run_of(label: str) -> str | None:
    """The run whose label this is; None where the machine is not ours."""
    run, dot, nonce = label.removeprefix(PREFIX).partition(".")
    ours = label.startswith(PREFIX) and dot and nonce and RUN.fullmatch(run)
    return run if ours else None


class Ledger:
    """The rentals of one run. Reading needs no lock; `held()` keeps a second dispatcher out while we write."""

    def __init__(self, run: str, folder: Path | None = None):
        self.run = check_run_name(run)
        self.folder = (folder or state_folder()) / self.run
        self._locked = False

    def label(self) -> str:
        """A label that no other rental has."""
        return f"{PREFIX}{self.run}.{secrets.token_hex(6)}"

    @contextmanager
    def held(self) -> Iterator[Ledger]:
        """The right to rent for this run, until the block or the process ends. `UserError` where another has it."""
        state.make(self.folder)
        with (self.folder / "lock").open("a+") as lock:
            if not any(_lock(lock, pause) for pause in [0.0] + [0.05] * (LOCK_TRIES - 1)):
                raise UserError(
                    f"run {self.run!r} is in the hands of another dispatcher on this computer: wait for it, stop it, "
                    "or give this run another name"
                )
            with suppress(OSError):  # on a full disk nobody learns whose it is
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
            self._locked = True
            try:
                yield self
            finally:
                self._locked = False

    def begin(self, caps: Caps, now: float) -> tuple[Caps, float]:
        """The caps and the start of the run. What it has cost and the time since it was begun count on at a restart.

        A restart may raise the caps, and the price per hour may be any, for it is asked of new machines alone. Raises
        `UserError` where a cap is lower than before: machines may have it set aside; or where `reap` ended the run.
        """
        self.check_not_reaped()
        begun = self.begun()
        before, started = begun or (caps, now)
        for name in ("max_cost", "max_hours"):
            asked, had = getattr(caps, name), getattr(before, name)
            if asked < had:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"run {self.run!r} was begun with {flag} {had:g}, not {asked:g}: keep it, raise it, or name a new "
                    "run"
                )
        if begun is None or before != caps:
            state.write(self.folder / "run.json", {"caps": asdict(caps), "started": started})
        return caps, started

    def begun(self) -> tuple[Caps, float] | None:
        """The caps and the start of the run, None where it was never begun."""
        read = self.get("run.json")
        if read is None:
            return None
        try:
            return Caps(**read["caps"]), float(read["started"])
        except (KeyError, TypeError, ValueError):
            raise state.damaged(self.folder / "run.json", "something is missing") from None

    def records(self) -> list[Record]:
        """All rentals, oldest first."""
        names = {field.name for field in fields(Record)}
        found = []
        for path in self.folder.glob("*.rental.json"):
            read = state.read(path)
            try:
                found.append(Record(**{key: value for key, value in read.items() if key in names}))
            except TypeError:
                raise state.damaged(path, "something is missing") from None
        return sorted(found, key=lambda record: (record.intended, record.label))

    def write(self, record: Record) -> Record:
        """Put a rental on disk before going on. Only under `held()`."""
        assert self._locked, "a ledger is written by who holds it"
        state.write(self.folder / f"{record.label.rsplit('.', 1)[1]}.rental.json", asdict(record))
        return record

    def open_records(self) -> list[Record]:
        """Those that are not over."""
        return [record for record in self.records() if not record.over]

    def write_off(self, seen: Mapping[str, int], now: float, keep: Collection[str] = ()) -> None:
        """Write down that all is over but what `keep` names by labels: nothing of it is to be found any more.

        seen: numbers by labels of machines that were seen; what has no number came of no request.
        """
        for record in self.open_records():
            if record.label not in keep:
                number = record.instance or seen.get(record.label)
                self.change(record, state="refused" if number is None else "destroyed", instance=number, ended=now)

    def change(self, record: Record, **changes: Any) -> Record:
        """The same rental with other values, on disk."""
        return self.write(replace(record, **changes))

    def owns(self, label: str) -> bool:
        """Whether a rental of this label was written down here, readable or not. Another computer's never is."""
        nonce = label.rsplit(".", 1)[-1]
        return run_of(label) == self.run and nonce.isalnum() and (self.folder / f"{nonce}.rental.json").exists()

    def check_not_reaped(self) -> None:
        """Raise `UserError` where `reap` ended this run: its dispatcher rents nothing more."""
        if (self.folder / "reaped").exists():
            raise UserError(f"run {self.run!r} was ended by reap: start a new one under another name")

    def put(self, name: str, value: dict[str, Any]) -> None:
        """Another small file of the run, whole or not at all."""
        state.make(self.folder)
        state.write(self.folder / name, value)

    def get(self, name: str) -> dict[str, Any] | None:
        """What `put` wrote; None where there is no such file."""
        path = self.folder / name
        return state.read(path) if path.exists() else None

    @property
    def is_held(self) -> bool:
        """Whether this very object holds the right to rent, and so may write."""
        return self._locked

    @property
    def busy(self) -> bool:
        """Whether a dispatcher is at work on this run."""
        return self.holder() is not None

    def holder(self) -> int | None:
        """The process that holds this ledger (0: one that is not known); None where nobody does."""
        if not (self.folder / "lock").exists():
            return None
        with (self.folder / "lock").open("r") as lock:
            if _lock(lock):
                return None
            said = lock.read().strip()
            return int(said) if said.isdigit() else 0

    def end(self) -> None:
        """Forbid the run, also to a dispatcher that is at work, to rent anything more."""
        state.make(self.folder)
        state.write(self.folder / "reaped", {})

    def seen(self, now: float) -> None:
        """Note that it is `now`: as a file's time of change, for that is quickly done, and whole or not at all."""
        clock = self.folder / "clock"
        with suppress(OSError):  # on a full disk it matters least
            if not clock.exists():
                clock.touch()
            os.utime(clock, (now, now))

    def latest(self) -> float:
        """The latest time that stands in this ledger, 0 where there is none: a floor for `SafeClock`."""
        times = [when for record in self.records() for when in (record.intended, record.ready, record.ended) if when]
        if begun := self.begun():
            times.append(begun[1])
        clock = self.folder / "clock"
        if clock.exists():
            times.append(clock.stat().st_mtime)
        return max(times, default=0.0)


def ledgers(folder: Path | None = None) -> list[Ledger]:
    """Those of all runs on this computer."""
    base = folder or state_folder()
    if not base.is_dir():
        return []
    return [Ledger(path.name, base) for path in sorted(base.iterdir()) if path.is_dir() and RUN.fullmatch(path.name)]


def _lock(file: IO[str], pause: float = 0.0) -> bool:
    """Take a lock, after a pause; False where another process has it."""
    time.sleep(pause)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

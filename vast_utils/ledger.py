"""What we mean to rent and what we hold, on disk before the request that rents: a killed program loses nothing.

One folder per run, one JSON file per rental, written whole (fsync, rename). The label that goes to vast.ai with the
request stands in the file first, so that a machine is found again whatever happened in between.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from sparse_coding.errors import UserError

PREFIX = "sparse-coding."
"""Every label of ours starts so: `sparse-coding.RUN.NONCE`."""
RUN = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
State = Literal["intended", "doubtful", "rented", "ready", "destroying", "destroyed", "refused"]
OVER: tuple[State, ...] = ("destroyed", "refused")


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
    """What its uploads and downloads are reckoned to cost."""
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


def state_folder() -> Path:
    """Where ledgers lie: VAST_UTILS_STATE, else the user's state folder."""
    if given := os.environ.get("VAST_UTILS_STATE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "sparse-coding" / "vast"


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
        _make(self.folder)
        with (self.folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"run {self.run!r} is in the hands of another dispatcher on this computer: wait for it, stop it, "
                    "or give this run another name"
                ) from None
            self._locked = True
            try:
                yield self
            finally:
                self._locked = False

    def begin(self, caps: Caps, now: float) -> tuple[Caps, float]:
        """The caps and the start of the run: those on disk where it was begun before, so that a restart adds nothing.

        Raises `UserError` where other caps are asked for than it was begun with, or where `reap` ended the run.
        """
        self.check_not_reaped()
        path = self.folder / "run.json"
        if not path.exists():
            self._write(path, {"caps": asdict(caps), "started": now})
        begun = _read(path)
        if (before := Caps(**begun["caps"])) != caps:
            asked, had = (", ".join(f"{key} {value:g}" for key, value in asdict(one).items()) for one in (caps, before))
            raise UserError(f"run {self.run!r} was begun with {had}, not {asked}: keep them, or name a new run")
        return before, float(begun["started"])

    def records(self) -> list[Record]:
        """All rentals, oldest first."""
        names = {field.name for field in fields(Record)}
        found = []
        for path in self.folder.glob("*.rental.json"):
            read = _read(path)
            found.append(Record(**{key: value for key, value in read.items() if key in names}))
        return sorted(found, key=lambda record: (record.intended, record.label))

    def write(self, record: Record) -> Record:
        """Put a rental on disk before going on. Only under `held()`."""
        assert self._locked, "a ledger is written by who holds it"
        self._write(self.folder / f"{record.label.rsplit('.', 1)[1]}.rental.json", asdict(record))
        return record

    def change(self, record: Record, **changes: Any) -> Record:
        """The same rental with other values, on disk."""
        return self.write(replace(record, **changes))

    def check_not_reaped(self) -> None:
        """Raise `UserError` where `reap` ended this run: its dispatcher rents nothing more."""
        if (self.folder / "reaped").exists():
            raise UserError(f"run {self.run!r} was ended by reap: start a new one under another name")

    def put(self, name: str, value: dict[str, Any]) -> None:
        """Another small file of the run, whole or not at all."""
        _make(self.folder)
        self._write(self.folder / name, value)

    def get(self, name: str) -> dict[str, Any] | None:
        """What `put` wrote; None where there is no such file."""
        path = self.folder / name
        return _read(path) if path.exists() else None

    @property
    def busy(self) -> bool:
        """Whether a dispatcher is at work on this run."""
        if not (self.folder / "lock").exists():
            return False
        with (self.folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def end(self) -> None:
        """Forbid the run, also to a dispatcher that is at work, to rent anything more."""
        _make(self.folder)
        self._write(self.folder / "reaped", {})

    def seen(self, now: float) -> None:
        """Note that it is `now`: as a file's time of change, for that is quickly done, and whole or not at all."""
        clock = self.folder / "clock"
        if not clock.exists():
            clock.touch()
        os.utime(clock, (now, now))

    def latest(self) -> float:
        """The latest time that stands in this ledger, 0 where there is none: a floor for `SafeClock`."""
        times = [time for record in self.records() for time in (record.intended, record.ready, record.ended) if time]
        path, clock = self.folder / "run.json", self.folder / "clock"
        if path.exists():
            times.append(float(_read(path)["started"]))
        if clock.exists():
            times.append(clock.stat().st_mtime)
        return max(times, default=0.0)

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(value, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the new name may not survive a crash
        finally:
            os.close(folder)


def ledgers(folder: Path | None = None) -> list[Ledger]:
    """Those of all runs on this computer."""
    base = folder or state_folder()
    if not base.is_dir():
        return []
    return [Ledger(path.name, base) for path in sorted(base.iterdir()) if path.is_dir() and RUN.fullmatch(path.name)]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"the state folder {folder} cannot be made ({error.strerror}): set VAST_UTILS_STATE") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); look at https://cloud.vast.ai/instances/") from None
    return read

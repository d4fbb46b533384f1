"""Machines and jobs in virtual time: what `hands.Hands` does over ssh, pretended, with faults of their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.vast_utils.fake_market import Market
from vast_utils.account import Container
from vast_utils.job import Job
from vast_utils.rental import Lost, Rental
from vast_utils.rows import Instance
from vast_utils.ssh import CommandFailed, Unreachable
from vast_utils.tasks import Task

SAVED_EVERY = 300.0
"""Seconds between two checkpoints of a job."""


@dataclass
class Work:
    """A job on a machine: seconds of work done, of which only what is saved survives an end."""

    length: float
    begun: float
    base: float
    boot: int
    fate: str = ""
    """`crash` (exit code 1), `kill` (137), `wedge`, or nothing: in the middle of this start."""
    rc: int | None = None
    frozen: float | None = None
    """What was done when it stopped."""

    def done(self, now: float) -> float:
        """Seconds of work that are done by now; what is due to happen to the job happens."""
        if self.frozen is not None:
            return self.frozen
        done = self.base + now - self.begun
        if self.base + 400 >= self.length:
            self.fate = ""  # it ends before
        if self.fate in ("crash", "kill") and done > self.base + 400:
            self.frozen, self.rc = self.base + 400, 1 if self.fate == "crash" else 137
        elif self.fate == "wedge":
            return min(done, self.base + 400)
        elif done >= self.length:
            self.frozen, self.rc = self.length, 0
        return done if self.frozen is None else self.frozen


@dataclass
class FakeMachine:
    """What stands behind a lease."""

    market: Market
    up: bool = False
    boot: int = 0
    jobs: dict[str, Work] = field(default_factory=dict)

    def start(self, authorized_keys: list[str], env: dict[str, str], onstart: str) -> tuple[str, int]:
        self.up, self.boot = True, self.boot + 1
        return "127.0.0.1", 9

    def authorize(self, key: str) -> None: ...

    def pause(self) -> None:
        self.up = False

    def stop(self) -> None:
        self.up = False
        for work in self.jobs.values():
            if work.frozen is None:
                work.frozen = work.done(self.market.clock.now())


@dataclass
class FakeCrew:
    """One crew over all dispatchers of a schedule; `here` is this computer's disk: seconds of work, by task."""

    market: Market
    length: float
    """Seconds that each job takes."""
    rng: random.Random
    silent: float = 0.0
    """How likely a machine does not answer a question."""
    unfit: float = 0.0
    """How likely a machine fails its check."""
    fates: tuple[str, ...] = ("",)
    here: dict[str, float] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    bases: list[float] = field(default_factory=list)
    """Seconds of work that each start went on from."""
    tick: Callable[[], None] = lambda: None
    """Called at each thing it does: where a schedule kills."""
    public_key: str = "ssh-x"
    no_watchdog: str = ""
    """Why machines cannot end themselves."""

    def furnish(self, rental: Rental) -> Container:
        return Container(image="pytorch/pytorch")

    def check(self, rental: Rental, instance: Instance) -> None:
        self.tick()
        self.market.clock.sleep(self.rng.uniform(20, 200))
        if self.rng.random() < self.unfit:
            raise Lost("nvidia-smi finds no GPU")

    def unguarded(self, rental: Rental) -> str:
        return self.no_watchdog

    def meet(self, rental: Rental, instance: Instance) -> None: ...

    def forget(self, rental: Rental) -> None: ...

    def release(self, rental: Rental) -> None:
        self._machine(rental)

    def job(self, rental: Rental, task: Task) -> Job:
        work = self._machine(rental).jobs.get(task.name)
        if work is None:
            return Job(task.name, "absent")
        done, boot = work.done(self.market.clock.now()), self._machine(rental).boot
        if work.rc is not None:
            return Job(task.name, "done", rc=work.rc, seconds=done)
        if work.boot != boot:
            return Job(task.name, "dead")
        if work.fate == "wedge" and done == work.base + 400:
            return Job(task.name, "wedged", still_seconds=1800.0)
        return Job(task.name, "running", seconds=done)

    def start(self, rental: Rental, task: Task, again: bool) -> None:
        machine = self._machine(rental)
        before = machine.jobs.get(task.name)
        if before and not again:
            return
        base = self.here.get(task.name, 0.0)
        if before:
            assert again, "an older state would be put over a newer one"
            base = self._saved(before)
        self.market.clock.sleep(self.rng.uniform(1, 30))
        fate = self.rng.choice(self.fates)
        self.bases.append(base)
        machine.jobs[task.name] = Work(self.length, self.market.clock.now(), base, machine.boot, fate)

    def log(self, rental: Rental, task: Task, offset: int) -> bytes:
        work = self._machine(rental).jobs[task.name]
        return b"" if offset else f"at {work.done(self.market.clock.now()):.0f}\n".encode()

    def fetch(self, rental: Rental, task: Task, last: bool) -> tuple[str, ...]:
        work = self._machine(rental).jobs.get(task.name)
        if work is None:
            return ()
        saved = self._saved(work)
        self.market.clock.sleep(self.rng.uniform(1, 20))
        self._machine(rental)
        assert saved >= self.here.get(task.name, 0.0), "older results were put over newer ones"
        self.here[task.name] = saved
        if work.rc == 0:
            self.complete.add(task.name)
        return (task.name,)

    def stop(self, rental: Rental, task: Task) -> Job:
        work = self._machine(rental).jobs[task.name]
        done = work.done(self.market.clock.now())
        if work.rc is None:
            work.frozen, work.rc = done, 130
        return self.job(rental, task)

    def _saved(self, work: Work) -> float:
        """What survives: all of it after an end in peace, else the last checkpoint."""
        done = work.done(self.market.clock.now())
        whole = work.rc in (0, 130)
        return done if whole else max(work.base, done - done % SAVED_EVERY)

    def _machine(self, rental: Rental) -> FakeMachine:
        """The machine, where it answers."""
        self.tick()
        self.market.advance()
        self.market.clock.sleep(1.0)
        lease = self.market.leases.get(rental.record.instance or 0)
        if lease is None or not isinstance(lease.machine, FakeMachine) or not lease.machine.up:
            self.market.clock.sleep(15.0)
            raise Unreachable("no answer")
        if self.rng.random() < self.silent:
            raise self.rng.choice([Unreachable("the connection was lost"), CommandFailed("it failed", 1, "")])
        return lease.machine

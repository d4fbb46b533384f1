"""What is done on a rented machine, over ssh: made ready, given work, looked at, emptied of results."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sparse_coding.errors import UserError
from vast_utils import job as jobs
from vast_utils import logs
from vast_utils.account import Container
from vast_utils.budget import MARGIN
from vast_utils.clock import Clock
from vast_utils.destroy import LIMIT
from vast_utils.fetch import STORES, fetch
from vast_utils.job import Job
from vast_utils.ledger import Ledger
from vast_utils.push import REMOTE, RESULTS, push_models, push_project
from vast_utils.rental import Lost, Rental
from vast_utils.rows import Instance
from vast_utils.said import plain
from vast_utils.setup import INSTALL_SECONDS, Needs, setup
from vast_utils.ssh import Machine, MachineError, Unreachable
from vast_utils.tasks import Task
from vast_utils.transfer import Moved, remote_files
from vast_utils.watchdog import GUARDED, onstart

IMAGE = "pytorch/pytorch:latest"
SSH_SECONDS = 240.0
"""A machine that runs answers ssh within so long, or it is of no use."""
OUTFIT = "outfit.json"


@dataclass(frozen=True)
class Outfit:
    """What every machine of a run gets, and where its results go. It is kept beside the ledger: nothing is secret."""

    folder: str
    """The project here, by its full path; results go to its `outputs/`."""
    image: str = IMAGE
    ssh_user: str = "root"
    remote: str = REMOTE
    needs: Needs = field(default_factory=Needs)
    models: tuple[str, ...] = ()
    """Folders that go along besides the project."""
    quiet_seconds: float = jobs.QUIET_SECONDS
    """A job whose log stands still this long is wedged."""
    grace_seconds: float = jobs.GRACE_SECONDS
    """What a job has to save its state when it is stopped."""

    @property
    def outputs(self) -> Path:
        return Path(self.folder) / RESULTS


class Hands:
    """The machines of one run, by their rentals. `meet` comes before all else."""

    def __init__(
        self,
        ledger: Ledger,
        outfit: Outfit,
        clock: Clock,
        secrets: Mapping[str, str] | None = None,
        api_url: str = "",
        say: Callable[[str], None] = print,
    ):
        self.ledger, self.outfit, self.clock, self.say = ledger, outfit, clock, say
        self._secrets, self._api_url = dict(secrets or {}), api_url
        self._machines: dict[str, Machine] = {}
        self._receiving, self._making_key = threading.Lock(), threading.Lock()
        self.identity = ledger.folder / "id_ed25519"

    @property
    def public_key(self) -> str:
        """The run's own ssh key, made at its first use: the user's keys stay out of it."""
        with self._making_key:
            return self._public_key()

    def _public_key(self) -> str:
        if not self.identity.exists():
            self.ledger.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=self.ledger.folder) as folder:
                made = Path(folder) / "key"
                make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.ledger.run, "-f", str(made)]
                try:
                    subprocess.run(make, check=True, capture_output=True)
                except (FileNotFoundError, subprocess.CalledProcessError):
                    raise UserError("no ssh-keygen works here; install OpenSSH (openssh-client)") from None
                made.with_suffix(".pub").replace(self.identity.with_suffix(".pub"))
                made.replace(self.identity)  # last: once it is there, both are
        return self.identity.with_suffix(".pub").read_text(encoding="utf-8").strip()

    def furnish(self, rental: Rental) -> Container:
        """What a machine starts with: the image, and a watchdog that ends it when its time is up."""
        return Container(self.outfit.image, onstart=onstart(rental.useful_seconds, api_url=self._api_url))

    def check(self, rental: Rental, instance: Instance) -> None:
        """Bring the project to a new machine and set it up. Raises `Lost` where it is not fit for work."""
        try:
            self.meet(rental, instance)
            machine = self._wait_for_ssh(rental, instance)
            folder = Path(self.outfit.folder)
            with self._in_time(rental) as progress:
                moved = push_project(machine, folder, self.outfit.remote, progress=progress)
                _all_moved(moved)
                for models in self.outfit.models:
                    _all_moved(push_models(machine, Path(models), folder, self.outfit.remote, progress=progress)[0])
            left = min(INSTALL_SECONDS, rental.useful_until - self.clock.now())
            setup(machine, self.outfit.needs, self.outfit.remote, self.say, limit_seconds=left)
        except MachineError as error:
            raise Lost(str(error)) from None

    def unguarded(self, rental: Rental) -> str:
        """Why the machine's watchdog cannot end it; empty where it can."""
        try:
            said = self.machine(rental).run(["sh", "-c", GUARDED], check=False)
        except MachineError as error:
            return str(error)
        return "" if said.rc == 0 else plain(said.text).strip() or "its watchdog does not run"

    def meet(self, rental: Rental, instance: Instance) -> None:
        """Know where a machine answers; that may change when it was stopped for a while."""
        known = self._known(rental)
        if instance.addresses and (known is None or (known.host, known.port) not in instance.addresses):
            self._keep(rental, instance.addresses[0])

    def machine(self, rental: Rental) -> Machine:
        """The machine over ssh. Raises `Unreachable` before `meet` has seen an address."""
        if machine := self._known(rental):
            return machine
        raise Unreachable(f"machine {rental.record.instance} has shown no address yet")

    def job(self, rental: Rental, task: Task) -> Job:
        """How the task's job stands there."""
        return jobs.status(self.machine(rental), task.name, self.outfit.quiet_seconds)

    def start(self, rental: Rental, task: Task, again: bool) -> None:
        """Start the task's job, on a new machine with all that was fetched of it, so that it continues.

        again: it ran on this very machine before; what is there is newer than what is here.
        """
        machine = self.machine(rental)
        if not again and not task.syncs:
            for run in task.runs:
                self._send_back(rental, run)
        jobs.start(machine, task.argv, self._secrets, task.name, again, self.outfit.remote)

    def log(self, rental: Rental, task: Task, offset: int) -> bytes:
        """The job's log from a byte on."""
        return logs.read(self.machine(rental), task.name, offset)

    def fetch(self, rental: Rental, task: Task, last: bool) -> tuple[str, ...]:
        """Bring the task's results here; the folders under `outputs/` that are its own.

        last: all of them, harvested stores too, or `MachineError`. Raises `UserError` where they do not fit here.
        """
        machine, outputs = self.machine(rental), self.outfit.outputs
        if task.out and not remote_files(machine, f"{self.outfit.remote}/{RESULTS}", [task.out])[0]:
            return ()
        checkpoints = not task.syncs
        with self._receiving, self._in_time(rental, paid=True) as progress:
            done = fetch(machine, outputs, task.out, False, checkpoints, self.outfit.remote, progress)
            failed = dict(done.moved.failed)
            if last and not task.out and remote_files(machine, f"{self.outfit.remote}/{RESULTS}", [STORES])[0]:
                failed |= fetch(machine, outputs, STORES, False, True, self.outfit.remote, progress).moved.failed
        if last:
            for name in done.kept:
                self.say(f"left alone: {outputs / name} is newer here")
            for name in done.odd:
                self.say(f"left there: {name}: such a name is not fetched")
            _all_moved(Moved(failed=failed))
        return tuple(done.runs)

    def stop(self, rental: Rental, task: Task) -> Job:
        """SIGTERM, and time to save."""
        return jobs.stop(self.machine(rental), task.name, self.outfit.grace_seconds)

    def release(self, rental: Rental) -> None:
        """Tell the machine's watchdog that nothing of worth is left there."""
        jobs.release(self.machine(rental))

    def forget(self, rental: Rental) -> None:
        """Close the connection to a machine."""
        if machine := self._machines.pop(rental.record.label, None):
            machine.close()

    def _known(self, rental: Rental) -> Machine | None:
        """The machine where it answered last, to this or an earlier process."""
        if rental.record.label not in self._machines and (kept := self.ledger.get(_address_file(rental))):
            self._keep(rental, (kept["host"], kept["port"]))
        return self._machines.get(rental.record.label)

    def _keep(self, rental: Rental, address: tuple[str, int]) -> Machine:
        """The machine at an address, which is remembered: a later look at the account may show none."""
        host, port = address
        known = self.ledger.folder / "known_hosts" / f"{rental.record.instance}_{host.replace(':', '_')}_{port}"
        machine = Machine(host, port, self.outfit.ssh_user, known, self.identity)
        self._machines[rental.record.label] = machine
        self.ledger.put(_address_file(rental), {"host": host, "port": port})
        return machine

    def _wait_for_ssh(self, rental: Rental, instance: Instance) -> Machine:
        """The first of its addresses that answers; the others are tried where one does not."""
        for at, address in enumerate(instance.addresses, 1):
            machine = self._keep(rental, address)
            try:
                machine.ready(SSH_SECONDS / len(instance.addresses))
                return machine
            except MachineError:
                if at == len(instance.addresses):
                    raise
        raise Unreachable(f"machine {instance.id} shows no address")

    def _send_back(self, rental: Rental, run: str) -> None:
        """Put a run that was fetched from another machine on this one."""
        machine, folder = self.machine(rental), self.outfit.outputs / run
        if not folder.is_dir():
            return
        with self._in_time(rental) as progress:
            moved, _ = push_models(machine, folder, Path(self.outfit.folder), self.outfit.remote, progress=progress)
        _all_moved(moved)

    @contextmanager
    def _in_time(self, rental: Rental, paid: bool = False) -> Iterator[Callable[[int], None]]:
        """For transfers: what they call as bytes move, which ends them while there is time to destroy the machine.

        paid: they are uploads of the machine.
        """
        moved = 0

        def progress(count: int) -> None:
            nonlocal moved
            moved += count
            if self.clock.now() > rental.useful_until + MARGIN - LIMIT:
                raise Lost("its time was up in the middle of a transfer")

        try:
            yield progress
        finally:
            if paid:
                rental.came(moved / 1e9)


def _address_file(rental: Rental) -> str:
    return f"{rental.record.label.rsplit('.', 1)[1]}.address.json"


def _all_moved(moved: Moved) -> None:
    if moved.failed:
        told = "; ".join(f"{name}: {why}" for name, why in list(moved.failed.items())[:5])
        raise MachineError(f"{len(moved.failed)} files could not be brought over ({told})")

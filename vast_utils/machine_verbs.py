"""The verbs for a machine one already has: push, setup, start, logs, fetch, stop. Each takes `--ssh user@host:port`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from tyro.conf import Positional, arg

from sparse_coding.config import parse
from sparse_coding.errors import Interrupted, UserError
from vast_utils.push import REMOTE
from vast_utils.said import printable
from vast_utils.ssh import Machine, parse_address

if TYPE_CHECKING:
    from vast_utils.job import Job

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    """What every verb for a machine needs."""

    ssh: str
    """The machine: user@host:port."""
    identity: Path | None = None
    """The private ssh key; by default ssh's agent and its usual files."""
    known_hosts: Path | None = None
    """Where this machine's own key alone is kept from the first contact on; by default a file of the state folder."""
    remote: str = REMOTE
    """The project's folder there."""

    def machine(self) -> Machine:
        from vast_utils.ledger import state_folder

        user, host, port = parse_address(self.ssh)
        if self.identity is not None and not self.identity.is_file():
            raise UserError(f"--identity {self.identity}: there is no such file")
        known = self.known_hosts or state_folder() / "known_hosts" / f"{host.replace(':', '_')}_{port}"
        return Machine(host, port, user, known, self.identity)


@dataclass(frozen=True, kw_only=True)
class PushFlags(MachineFlags):
    """Send the project to the machine: what git tracks, and new files that .gitignore does not name.

    Only what differs is sent. Files that look like secrets are named and left out. What an earlier push brought and is
    gone here is deleted there; results never are.
    """

    models: Path | None = None
    """Send this folder (models, or one run to continue there) instead of the project."""
    folder: Path = Path(".")
    """The project."""
    dry_run: bool = False
    """Only say what would be sent."""


def push(arguments: Sequence[str]) -> None:
    """send the project, or a folder of models"""
    flags = _parse(PushFlags, arguments, "push")
    from vast_utils.push import folder_files, project_files, push_models, push_project

    machine = flags.machine()
    chosen = folder_files(flags.models) if flags.models else project_files(flags.folder)
    for name, why in chosen.left_out.items():
        print(f"left out: {name if name.isprintable() else ascii(name)}: {why}", file=sys.stderr)
    print(f"{len(chosen.names)} files, {_size(chosen.bytes)}, to {machine}")
    if flags.dry_run:
        print("\n".join(chosen.names))
        return
    if not chosen.names:
        raise UserError(f"{flags.models or flags.folder} has no file to send: hidden files, links and keys are not")
    with _closing(machine):
        if flags.models:
            moved, place = push_models(machine, flags.models, flags.folder, flags.remote, chosen)
        else:
            moved, place = push_project(machine, flags.folder, flags.remote, chosen), "."
    print(f"{len(moved.placed)} sent ({_size(moved.sent_bytes)}), {len(moved.gone)} deleted, in {flags.remote}/{place}")
    _complain(moved.failed)


@dataclass(frozen=True, kw_only=True)
class FetchFlags(MachineFlags):
    """Bring results from the machine's outputs/ here: all runs but stores of activations, or one.

    Files come whole or not at all, a broken connection is continued, and what is newer here stays.
    """

    run: Positional[str] = ""
    """A run, such as gpt2-1a2b3c4d; by default all."""
    latest: bool = False
    """Only the run that changed last."""
    checkpoints: bool = True
    """Bring checkpoints too, to continue the run elsewhere."""
    outputs: Path = Path("outputs")
    """The folder to bring them to."""


def fetch(arguments: Sequence[str]) -> None:
    """bring results here"""
    flags = _parse(FetchFlags, arguments, "fetch")
    from vast_utils.fetch import fetch as run

    if flags.run and flags.latest:
        raise UserError("--latest and a run's name say two things: give one of them")
    with _closing(flags.machine()) as machine:
        done = run(machine, flags.outputs, flags.run, flags.latest, flags.checkpoints, flags.remote)
    for name in done.kept:
        print(f"left alone: {flags.outputs / name} is newer here", file=sys.stderr)
    for name in done.odd:
        print(f"left there: {name}: such a name is not fetched", file=sys.stderr)
    print(f"{len(done.moved.placed)} files ({_size(done.moved.sent_bytes)}) of {', '.join(done.runs) or 'no run'}")
    _complain(done.moved.failed)


@dataclass(frozen=True, kw_only=True)
class SetupFlags(MachineFlags):
    """Check the machine (disk, nvidia-smi, download speed), install the pushed project's requirements.txt, check torch.

    The image's torch is kept where it works. The environment is ~/.sparse_coding/venv; a second setup is quick.
    """

    gpu: bool = True
    """The machine must have a GPU that torch can use."""
    disk: float = 10.0
    """Gigabytes that must be free."""
    min_mbps: float = 50.0
    """Megabits per second that a download must reach; 0: not tried."""
    download_url: str = ""
    """What to try it with; by default GPT-2 small of the Hugging Face hub."""
    python: str = ""
    """The Python there to build on; by default the first whose torch works."""


def setup(arguments: Sequence[str]) -> None:
    """check the machine and install what the project needs"""
    flags = _parse(SetupFlags, arguments, "setup")
    from vast_utils.setup import DOWNLOAD, Needs
    from vast_utils.setup import setup as run

    needs = Needs(flags.gpu, flags.disk, flags.min_mbps, flags.download_url or DOWNLOAD, flags.python)
    with _closing(flags.machine()) as machine:
        ready = run(machine, needs, flags.remote)
    print("ready" if ready.installed else "ready: nothing was left to install")


@dataclass(frozen=True, kw_only=True)
class StartFlags(MachineFlags):
    """Start a command on the machine, detached: it goes on whatever becomes of the connection.

        python -m vast_utils start --ssh root@HOST:PORT -- run.py --model gpt2 --layer 2

    The same command is the same job: one that lives, or is over, is told about and not started again (`resume` does).
    WANDB_API_KEY, HF_TOKEN and AWS_* go along where they are set here, in the job's environment only.
    """

    name: str = ""
    """The job's name; by default made from the command."""
    env: tuple[str, ...] = ()
    """Names of further environment variables that go along."""
    follow: bool = False
    """Show its log until it ends."""


@dataclass(frozen=True, kw_only=True)
class ResumeFlags(StartFlags):
    """Start a command on the machine again that is over: give the words of `start`. run.py continues where it was.

    What its last start left running is ended first; its log goes on. One that lives is only told about.
    """


def start(arguments: Sequence[str]) -> None:
    """start a command there, detached"""
    _start(StartFlags, arguments, "start")


def resume(arguments: Sequence[str]) -> None:
    """start a command again that is over; run.py continues from its last checkpoint"""
    _start(ResumeFlags, arguments, "resume")


def _start(cls: type[StartFlags], arguments: Sequence[str], verb: str) -> None:
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    flags, argv = _parse(cls, words[:at], verb), words[at + 1 :]
    from vast_utils.job import start as run
    from vast_utils.job import status as status_of
    from vast_utils.secrets import collect

    secrets = collect(os.environ, flags.env)
    with _closing(flags.machine()) as machine:
        job, started = run(machine, argv, secrets, flags.name, cls is ResumeFlags, flags.remote)
        print(f"{'started' if started else 'not started again'}: {job}")
        if flags.follow:
            _show_log(machine, job.name, follow=True)
            _end_as(status_of(machine, job.name))


@dataclass(frozen=True, kw_only=True)
class StatusFlags(MachineFlags):
    """List the machine's jobs."""

    quiet_minutes: float = 30.0
    """A job whose log stands still this long is called wedged."""


def status(arguments: Sequence[str]) -> None:
    """list the jobs of a machine"""
    flags = _parse(StatusFlags, arguments, "status")
    from vast_utils.job import all_jobs

    with _closing(flags.machine()) as machine:
        jobs = all_jobs(machine, flags.quiet_minutes * 60)
    for job in jobs:
        print(f"{job}, {job.seconds / 60:.1f} min, log {_size(job.log_bytes)}")
    if not jobs:
        print(f"{machine} has no job")


@dataclass(frozen=True, kw_only=True)
class LogsFlags(MachineFlags):
    """Print a job's log. Values of secrets that are set here are shown as [NAME]."""

    job: Positional[str] = ""
    """The job; by default the only one that lives, or the only one."""
    follow: Annotated[bool, arg(aliases=["-f"])] = False
    """Go on until the job is over, over connections that break."""


def logs(arguments: Sequence[str]) -> None:
    """print a job's log"""
    flags = _parse(LogsFlags, arguments, "logs")
    from vast_utils.job import choose

    with _closing(flags.machine()) as machine:
        _show_log(machine, choose(machine, flags.job).name, flags.follow)


@dataclass(frozen=True, kw_only=True)
class StopFlags(MachineFlags):
    """Stop a job: SIGTERM, at which run.py saves its state, and SIGKILL to what is left after the grace."""

    job: Positional[str] = ""
    """The job; by default the only one that lives, or the only one."""
    grace: float = 120.0
    """Seconds it has to save."""

    def __post_init__(self) -> None:
        if not 0 <= self.grace < math.inf:
            raise UserError(f"--grace is {self.grace:g}: it must be 0 or more seconds")


def stop(arguments: Sequence[str]) -> None:
    """stop a job, with time to save its state"""
    flags = _parse(StopFlags, arguments, "stop")
    from vast_utils.job import choose
    from vast_utils.job import stop as run

    with _closing(flags.machine()) as machine:
        print(run(machine, choose(machine, flags.job).name, flags.grace))


def _show_log(machine: Machine, name: str, follow: bool) -> None:
    from vast_utils.logs import lines
    from vast_utils.secrets import Redactor, known

    hide = Redactor(known(os.environ))
    try:
        for line in lines(machine, name, follow=follow):
            print(printable(hide(line)), flush=True)
    except KeyboardInterrupt:
        raise Interrupted(f"the job {name} goes on; `logs -f` shows the rest") from None


def _end_as(job: Job) -> None:
    """End with exit status 1, and say so, where a job that was followed to its end has not done its work."""
    if job.rc != 0:
        print(job, file=sys.stderr)
        raise SystemExit(1)


def _parse(cls: type[T], arguments: Sequence[str], verb: str) -> T:
    return parse(cls, arguments, f"python -m vast_utils {verb}", getdoc(cls) or "")


@contextmanager
def _closing(machine: Machine) -> Iterator[Machine]:
    try:
        yield machine
    finally:
        machine.close()


def _complain(failed: dict[str, str]) -> None:
    if failed:
        told = "; ".join(f"{name}: {why}" for name, why in list(failed.items())[:5])
        raise UserError(f"{len(failed)} files could not be brought over ({told}): the same command tries again")


def _size(count: int) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count} bytes"

"""A command on a machine that outlives the connection: started once, found again, resumed, stopped in peace."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import getsource
from pathlib import PurePosixPath
from typing import Any, Literal

from sparse_coding.config import from_dict
from sparse_coding.errors import UserError
from vast_utils.on_machine import jobs
from vast_utils.push import REMOTE
from vast_utils.secrets import refuse_in
from vast_utils.ssh import Machine, MachineError

QUIET_SECONDS = 1800.0
"""A log that stands still this long is called wedged: capturing activations may be silent for minutes."""
GRACE_SECONDS = 120.0
State = Literal["absent", "running", "wedged", "done", "dead"]
LIVE: tuple[State, ...] = ("running", "wedged")


@dataclass(frozen=True)
class Job:
    """What is known of a job. `dead` ended unseen (the machine restarted, out of memory); `done` has its `rc`."""

    name: str
    state: State
    rc: int | None = None
    argv: tuple[str, ...] = ()
    attempt: int = 0
    pid: int | None = None
    seconds: float = 0.0
    still_seconds: float = 0.0
    """How long its log has stood still."""
    log_bytes: int = 0

    @property
    def lives(self) -> bool:
        return self.state in LIVE

    def __str__(self) -> str:
        told = {"done": f"ended with exit code {self.rc}", "dead": "ended, and nobody saw how", "absent": "not there"}
        return f"{self.name}: {told.get(self.state, self.state)} ({' '.join(self.argv)}, start {self.attempt})"


def job_name(argv: Sequence[str]) -> str:
    """The name of a command's job: the same command is the same job."""
    script = next((PurePosixPath(word).stem for word in argv if word.endswith(".py")), PurePosixPath(argv[0]).name)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", script).strip(".-_") or "job"
    return f"{readable[:40]}-{hashlib.sha256(json.dumps(list(argv)).encode()).hexdigest()[:8]}"


def start(
    machine: Machine,
    argv: Sequence[str],
    secrets: Mapping[str, str] | None = None,
    name: str = "",
    again: bool = False,
    project: str = REMOTE,
) -> tuple[Job, bool]:
    """Start a command in the project's folder; the job, and whether this call started it.

    One that lives, or is over, is only told about; `again` starts one that is over anew (resume), its log goes on.
    secrets: {name: value} for its environment. Raises `UserError` for a name that another command has.
    """
    argv = ["python", *argv] if argv and argv[0].endswith(".py") else list(argv)
    if not argv:
        raise UserError("there is no command; give it after --, such as: -- run.py --model gpt2")
    refuse_in(argv, secrets or {})
    name = _checked(name or job_name(argv))
    answer = machine.ask(
        jobs,
        {
            "verb": "start",
            "name": name,
            "argv": argv,
            "project": project,
            "again": again,
            "secrets": dict(secrets or {}),
            "source": getsource(jobs),
        },
    )
    with machine.understood():
        match answer.get("error"):
            case "other":
                other = " ".join(answer["argv"])
                raise UserError(f"the job {name} on {machine} is another command ({other}): choose another --name")
            case "project":
                raise UserError(f"{machine} has no folder {project}: push the project first")
            case "supervisor":
                said = answer["said"].strip()[-300:] or "no reason was given"
                raise MachineError(f"{machine}: the job did not start: {said}")
        return _job(machine, answer["job"]), bool(answer["started"])


def status(machine: Machine, name: str, quiet_seconds: float = QUIET_SECONDS) -> Job:
    """How a job stands; `absent` where there is none of that name."""
    found = _asked(machine, {"verb": "status", "name": _checked(name), "quiet_seconds": quiet_seconds})
    with machine.understood():
        return found[0]


def all_jobs(machine: Machine, quiet_seconds: float = QUIET_SECONDS) -> list[Job]:
    """Every job of the machine, by name."""
    return _asked(machine, {"verb": "status", "quiet_seconds": quiet_seconds})


def stop(machine: Machine, name: str, grace_seconds: float = GRACE_SECONDS) -> Job:
    """SIGTERM, time to save, then SIGKILL to whatever is left of it. Goes on there if the connection breaks."""
    request = {"verb": "stop", "name": _checked(name), "grace_seconds": grace_seconds}
    answer = machine.ask(jobs, request, grace_seconds + 60)
    with machine.understood():
        return _job(machine, answer["job"])


def contact(machine: Machine) -> None:
    """Tell the machine's watchdog that somebody still looks after it; every other call here does so too."""
    machine.ask(jobs, {"verb": "contact", "name": "", "quiet_seconds": QUIET_SECONDS})


def release(machine: Machine) -> None:
    """Tell the machine's watchdog that everything is fetched: it may destroy the machine at once."""
    machine.ask(jobs, {"verb": "release"})


def choose(machine: Machine, name: str) -> Job:
    """The job of that name; with no name the only one that lives, or the only one. `UserError` where that is none."""
    known = all_jobs(machine)
    found = [one for one in known if one.name == name] if name else [one for one in known if one.lives] or known
    if len(found) == 1:
        return found[0]
    have = ", ".join(one.name for one in known) or "none"
    raise UserError(f"{machine}: " + (f"no job {name!r}" if name else "which job? give its name") + f": have {have}")


def _asked(machine: Machine, request: Mapping[str, Any]) -> list[Job]:
    answer = machine.ask(jobs, request)
    with machine.understood():
        return [_job(machine, one) for one in answer["jobs"]]


def _job(machine: Machine, known: Any) -> Job:
    """What the machine says of a job; it is checked as settings are."""
    with machine.understood():
        values = {field.name: known[field.name] for field in fields(Job) if known.get(field.name) is not None}
    try:
        return from_dict(Job, values)
    except UserError as error:
        raise MachineError(f"{machine} answered what we do not understand: {error}") from None


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UserError(f"the job name {name!r} is not allowed: letters, digits, dots and dashes, at most 64")
    return name

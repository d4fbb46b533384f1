"""The same job as a task file for SkyPilot: an engine for other clouds and bigger fleets, with recovery of its own.

Its schema is SkyPilot's (0.14); nothing here imports it. Check a file by hand with `sky launch --dryrun FILE`, or run
the tests with SKYPILOT_PYTHON set to a Python that has skypilot.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparse_coding.errors import UserError

IDLE_MINUTES = 10
SETUP = "pip install -r requirements.txt"


@dataclass(frozen=True)
class SkyTask:
    """A job as SkyPilot is told of it."""

    name: str
    """Lower-case letters, digits, hyphens: also where results go in the bucket."""
    command: tuple[str, ...]
    """What to run in the project's folder: `run.py --model gpt2`, or any program with its arguments."""
    gpu: str = ""
    """As vast.ai or SkyPilot writes it ("RTX 4090", "A100-80GB"); empty: none is asked for."""
    num_gpus: int = 1
    disk: int = 40
    """GB."""
    cloud: str = ""
    """Such as aws, gcp, vast; empty: SkyPilot takes the cheapest."""
    region: str = ""
    """Such as us-east-1: put the machine where the bucket is, and traffic between them costs nothing."""
    spot: bool = False
    max_hours: float | None = None
    bucket: str = ""
    """s3://BUCKET or a path in one: `run.py` copies its checkpoints to BUCKET/NAME and continues from there."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Plain variables. Nothing secret: the file shows them."""
    secrets: tuple[str, ...] = ()
    """Names of variables whose values SkyPilot takes from your environment at launch (`--secret NAME`)."""


def accelerator(gpu: str) -> str:
    """SkyPilot's name of a GPU from vast.ai's: `RTX 4090` is RTX4090, `H100 SXM` is H100; its own names stay."""
    return re.sub(r" (SXM\d?|PCIE|NVL)$", "", gpu.replace("_", " "), flags=re.IGNORECASE).replace(" ", "")


def task(job: SkyTask) -> dict[str, Any]:
    """The task as SkyPilot's schema has it. Raises `UserError` for what cannot be said in it."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", job.name):
        raise UserError(f"the job is named {job.name!r}: use 1 to 40 lower-case letters, digits and hyphens")
    if not job.command:
        raise UserError("there is no command to run: give one, such as run.py --model gpt2")
    resources: dict[str, Any] = {"disk_size": job.disk, "use_spot": job.spot}
    if job.region and not job.cloud:
        raise UserError(f"the region {job.region!r} belongs to no cloud: name it too, such as aws")
    if job.cloud:
        resources["infra"] = f"{job.cloud}/{job.region}" if job.region else job.cloud
    if job.gpu:
        resources["accelerators"] = f"{accelerator(job.gpu)}:{job.num_gpus}"
    resources["autostop"] = {"idle_minutes": IDLE_MINUTES, "down": True}
    made: dict[str, Any] = {"name": job.name, "workdir": ".", "resources": resources}
    if job.env:
        made["envs"] = dict(job.env)
    if job.secrets:
        made["secrets"] = dict.fromkeys(job.secrets)
    return {**made, "setup": SETUP, "run": run_line(job)}


def run_line(job: SkyTask) -> str:
    """The shell line that starts the job, or continues it on another machine: `run.py` resumes from the bucket."""
    words = list(job.command)
    if words[0].endswith(".py"):
        words = ["python", *words]
    if job.bucket:
        if not job.bucket.startswith("s3://"):
            raise UserError(f"the bucket is {job.bucket!r}: it must start with s3://")
        if "run.py" not in words:
            raise UserError("only run.py copies its checkpoints to a bucket: leave the bucket out for other programs")
        if "--sync" not in words:
            words += ["--sync", f"{job.bucket.rstrip('/')}/{job.name}"]
    if job.max_hours is not None:
        words = ["timeout", "--signal=TERM", "--kill-after=300", f"{job.max_hours * 3600:.0f}", *words]
    return shlex.join(words)


def to_yaml(job: SkyTask) -> str:
    """The task file, with the commands that use it on top."""
    import yaml

    secrets = "".join(f" --secret {name}" for name in job.secrets)
    head = [
        f"# sky jobs launch{secrets} FILE    on a machine of its own that is replaced when it is lost",
        f"# sky launch --down{secrets} FILE  once",
        "# SkyPilot knows no cap on dollars: what limits the cost is max-hours (timeout, below) and autostop.",
    ]
    return "\n".join(head) + "\n" + yaml.safe_dump(task(job), sort_keys=False, width=1000)

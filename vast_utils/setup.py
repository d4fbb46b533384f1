"""A machine made ready for a run: looked at first, so that one that cannot do the work is known within a minute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vast_utils.on_machine import prepare
from vast_utils.push import REMOTE
from vast_utils.ssh import CommandFailed, Machine, MachineError

DOWNLOAD = "https://huggingface.co/openai-community/gpt2/resolve/main/model.safetensors"
SPEED_SECONDS = 6.0
SKIPPED = ("vastai", "pytest")
"""Requirements of the laptop alone."""
INSTALL_SECONDS = 1800.0


class Unfit(MachineError):
    """The machine answers and cannot do the work: no GPU, a broken driver, a full disk, a slow line."""


@dataclass(frozen=True)
class Needs:
    """What a machine must have."""

    gpu: bool = True
    disk_gb: float = 10.0
    download_mbps: float = 50.0
    """Megabits per second; 0: not tried."""
    download_url: str = DOWNLOAD
    python: str = ""
    """The Python to build on; by default the first with a torch that sees the GPU."""


@dataclass(frozen=True)
class Ready:
    """A machine that is set up."""

    gpus: tuple[str, ...]
    free_bytes: int
    mbps: float | None
    python: str
    torch: str
    image_torch: bool
    """Whether torch is the image's own, not installed by us."""
    installed: bool
    """False where an earlier setup had done it all."""


def setup(
    machine: Machine,
    needs: Needs | None = None,
    remote: str = REMOTE,
    say: Callable[[str], Any] = print,
    pip_flags: tuple[str, ...] = (),
    limit_seconds: float = INSTALL_SECONDS,
) -> Ready:
    """Check the machine, install what requirements.txt of the pushed project asks for, check that torch works there.

    The image's torch is kept where it works. Running it again is quick. Raises `Unfit` and the errors of ssh.
    """
    needs = needs or Needs()
    found = check(machine, needs, remote)
    with machine.understood():
        say(f"{machine}: {', '.join(found['gpus']) or 'no GPU'}, {found['free'] / 1e9:.0f} GB free")
    mbps = measure(machine, needs)
    if mbps is not None:
        say(f"{machine}: downloads at {mbps:.0f} Mbit/s")
    with machine.understood():
        best = found["pythons"][0]
        keeps = bool(best.get("torch")) and (best["cuda"] or not needs.gpu)
        request = {
            "verb": "install",
            "python": best["python"],
            "packages": best["packages"] if keeps else [],  # a torch that is not kept must not be found by pip
            "pip": best["pip"],
            "project": remote,
            "skip": [*SKIPPED, "torch"] if keeps else SKIPPED,
            "torch": best["torch"].split("+")[0] if keeps else "",
            "pip_flags": pip_flags,
        }
    try:
        done = machine.ask(prepare, request, limit_seconds)
    except CommandFailed as error:
        raise Unfit(str(error)) from None
    with machine.understood():
        now = _working(machine, needs, done["about"] or {})
        where = " on " + now["gpu"] if needs.gpu else ""
        say(f"{machine}: torch {now['torch']}{' of the image' if keeps else ''} works{where}")
        return Ready(tuple(found["gpus"]), found["free"], mbps, best["python"], now["torch"], keeps, done["installed"])


def _working(machine: Machine, needs: Needs, about: dict[str, Any]) -> dict[str, Any]:
    """What a Python says of itself, if its torch is of use."""
    if not about.get("torch"):
        raise Unfit(f"{machine}: torch cannot be imported after the installation: {about.get('why', 'Python fails')}")
    if needs.gpu and not about["cuda"]:
        raise Unfit(f"{machine}: torch {about['torch']} cannot use the GPU: {about.get('why', 'it sees none')}")
    return about


def check(machine: Machine, needs: Needs, remote: str = REMOTE) -> dict[str, Any]:
    """What the machine has. Raises `Unfit` where that is too little."""
    found = machine.ask(prepare, {"verb": "look", "python": needs.python, "project": remote}, 900)
    with machine.understood():
        if found["free"] < needs.disk_gb * 1e9:
            raise Unfit(f"{machine}: {found['free'] / 1e9:.1f} GB of disk are free, {needs.disk_gb:g} are needed")
        if needs.gpu and not found["gpus"]:
            said = " ".join(found["nvidia_smi"].split()) or "it said nothing"
            raise Unfit(f"{machine}: nvidia-smi finds no GPU ({said}); --no-gpu is for machines without")
        if not found["pythons"]:
            raise Unfit(f"{machine}: no Python 3.10 or newer" + (f" at {needs.python}" if needs.python else ""))
        if not found["project"]:
            raise Unfit(f"{machine}: no requirements.txt in {remote}: push the project first")
    return found


def measure(machine: Machine, needs: Needs) -> float | None:
    """Megabits per second of a download; None where that is not asked. Raises `Unfit` below what is needed."""
    if needs.download_mbps <= 0:
        return None
    got = machine.ask(prepare, {"verb": "speed", "url": needs.download_url, "seconds": SPEED_SECONDS}, 90)
    if "error" in got:
        raise Unfit(f"{machine}: cannot download {needs.download_url}: {got['error']}")
    with machine.understood():
        mbps = float(got["bytes_per_second"]) * 8 / 1e6
    if mbps < needs.download_mbps:
        raise Unfit(f"{machine}: downloads at {mbps:.0f} Mbit/s, {needs.download_mbps:g} are needed")
    return mbps

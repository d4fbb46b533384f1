"""A whole rented world on loopback: the fake API on a port, machines with a real sshd, a project, fast time.

Run as a program it is the dispatcher of a test in a process of its own: `rented.py SPEED ORIGIN VERB ...`.
"""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.vast_utils.fake_market import Host, Lease, Market
from tests.vast_utils.fake_vast import KEY, FakeVast
from tests.vast_utils.loopback_machine import LoopbackMachine
from vast_utils.watchdog import STALE_SECONDS

ROOT = Path(__file__).parents[2]
STUB = """
import json, os, pathlib, signal, sys, time
steps, seconds = int(sys.argv[1]), float(sys.argv[2])
run = pathlib.Path("outputs") / (sys.argv[sys.argv.index("--out") + 1][8:] if "--out" in sys.argv else "toy")
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
def write(name, text):
    (run / (name + ".partial")).write_text(text)
    os.replace(run / (name + ".partial"), run / name)
state = json.loads((run / "state.json").read_text()) if (run / "state.json").exists() else {"sum": 0, "step": 0}
print("begins at", state["step"], flush=True)
for step in range(state["step"], steps):
    state = {"sum": state["sum"] * 3 % 1000003 + step, "step": step + 1}
    write("state.json", json.dumps(state))
    print("step", step, flush=True)
    if stopped:
        sys.exit(130)
    time.sleep(0 if pathlib.Path("hurry").exists() else seconds)
if "--break" in sys.argv:
    sys.exit(int(sys.argv[sys.argv.index("--break") + 1]))
write("results.jsonl", json.dumps({"sum": state["sum"]}) + "\\n")
print("ends with", state["sum"], flush=True)
"""
"""A job with a state that it continues from: STEPS SECONDS. `Rented.hurry` makes it end soon."""


def expected(steps: int) -> int:
    """What the stub comes to."""
    value = 0
    for step in range(steps):
        value = value * 3 % 1000003 + step
    return value


class SharedClock:
    """Real time `speed` times as fast, the same in every process that knows the origin."""

    def __init__(self, speed: float, origin: float):
        self.speed, self.origin = speed, origin

    def now(self) -> float:
        return self.origin + self.speed * (time.time() - self.origin)

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds) / self.speed)


PASSED_ON = ("OMP_NUM_THREADS", "SPARSE_CODING_NATIVE", "TEST_SSHD")


@dataclass
class Rented:
    """What a test holds."""

    fake: FakeVast
    clock: SharedClock
    folder: Path
    project: Path
    machines: list[RentedMachine] = field(default_factory=list)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    python: str = ""
    stale: int = 1800

    @property
    def market(self) -> Market:
        return self.fake.market

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "VAST_URL": self.fake.url,
            "VAST_API_KEY": KEY,
            "VAST_UTILS_STATE": str(self.folder / "state"),
            "PYTHONPATH": str(ROOT),
            "TMPDIR": "/tmp",
            "HF_HUB_OFFLINE": "1",
            **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
        }

    def argv(self, verb: str, *words: str) -> list[str]:
        return [sys.executable, __file__, str(self.clock.speed), repr(self.clock.origin), verb, *words]

    def launch_words(self, *flags: str) -> list[str]:
        """The flags of a launch on these machines."""
        given = ["--max-cost", "5", "--max-hours", "6", "--folder", str(self.project), "--min-mbps", "0"]
        given += ["--no-require-gpu", "--disk", "1", "--ssh-user", getpass.getuser(), "--python", self.python]
        return [*given, "--yes", *flags]

    def start(self, verb: str, *words: str, aws: bool = False) -> subprocess.Popen[str]:
        """A verb in a process of its own; aws: with the keys of a bucket."""
        keys = {name: value for name, value in os.environ.items() if aws and name.startswith("AWS_")}
        process = subprocess.Popen(
            self.argv(verb, *words),
            env=self.environment | keys,
            cwd=self.project,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End what a test left: its dispatchers too, which would look for their machines for hours."""
        for process in self.processes:
            process.kill()
            process.wait()
        for machine in self.machines:
            machine.stop()

    def run(self, verb: str, *words: str, timeout: float = 120) -> tuple[int, str]:
        """A verb to its end: exit status and all it printed."""
        process = self.start(verb, *words)
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            raise AssertionError(f"{verb} does not end: {out}") from None
        return process.returncode, out

    def hurry(self) -> None:
        """Jobs no longer wait between their steps, on machines that are there and on those to come."""
        for folder in (self.project, *(machine.home / "sparse_coding" for machine in self.machines)):
            if folder.is_dir():
                (folder / "hurry").touch()

    def result(self, name: str = "toy") -> str | None:
        path = self.project / "outputs" / name / "results.jsonl"
        return path.read_text() if path.exists() else None


class RentedMachine(LoopbackMachine):
    """A loopback machine whose watchdog looks every second, and gives up an unused machine after `stale` seconds."""

    stale = 1800

    def start(
        self, authorized_keys: list[str], env: dict[str, str] | None = None, onstart: str = ""
    ) -> tuple[str, int]:
        assert not onstart or f" {round(STALE_SECONDS)} " in onstart
        settings = self.home / ".config" / "pip" / "pip.conf"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text("[install]\nno-index = true\n")  # no test asks a package registry
        onstart = onstart.replace(f" {round(STALE_SECONDS)} ", f" {self.stale} ")
        return super().start(authorized_keys, {**(env or {}), "WATCHDOG_PAUSE": "1"}, onstart)


def make_rented(fake_of: Callable[[Market], FakeVast], folder: Path, python: str, speed: float = 40.0) -> Rented:
    """Machines that run at once; each lease of a host is a new machine."""
    clock = SharedClock(speed, time.time())
    hosts = [Host(100 + i, 10 + i, dph_base=0.4 + 0.01 * i) for i in range(6)]
    for host in hosts:
        host.fate.runs_after = 6.0
    market = Market(clock, hosts)  # type: ignore[arg-type]
    project = folder / "project"
    project.mkdir(parents=True)
    (project / "run.py").write_text(STUB)
    (project / "requirements.txt").write_text("")
    (project / ".gitignore").write_text("outputs/\n")
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    rented = Rented(fake_of(market), clock, folder, project, python=python)

    def machine(lease: Lease) -> Any:
        rented.machines.append(RentedMachine(folder / f"machine-{lease.id}"))
        rented.machines[-1].stale = rented.stale
        return rented.machines[-1]

    market.machine_factory = machine
    return rented


def until(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not (seen := what()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.03)
    return seen


if __name__ == "__main__":
    import faulthandler
    import signal as signals

    faulthandler.register(signals.SIGUSR1, all_threads=True)
    from sparse_coding.errors import reported
    from vast_utils.__main__ import main

    shared = SharedClock(float(sys.argv[1]), float(sys.argv[2]))
    for module in ("session", "overview", "reap"):
        sys.modules.get(f"vast_utils.{module}") or __import__(f"vast_utils.{module}")
        sys.modules[f"vast_utils.{module}"].SafeClock = lambda floor=0.0: shared  # type: ignore[attr-defined]
    with reported():
        main(sys.argv[3:])

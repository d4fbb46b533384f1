"""Files to a machine and back, over ssh alone: what differs, continued after a broken connection, whole or not at all.

Not rsync: it need not be on either side, and the machine may be a stranger's. The receiver here asks for names it has
checked and takes nothing else.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_coding.errors import UserError
from vast_utils.on_machine import exchange
from vast_utils.said import ANSWER_BYTES, plain, plain_throughout
from vast_utils.ssh import (
    CommandFailed,
    Machine,
    MachineError,
    Started,
    TimedOut,
    Unreachable,
    python_command,
)

STALLED_SECONDS = 60.0
ATTEMPTS = 5
PAUSE_SECONDS = 2.0
SPARE_BYTES = 200_000_000
ASK_SECONDS = 120.0


@dataclass
class Moved:
    """What a transfer did: names placed, names that could not be and why, names deleted, bytes that travelled."""

    placed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    sent_bytes: int = 0


Files = dict[str, tuple[int, int]]
"""{name: (size, mtime_ns)}"""


def remote_files(machine: Machine, root: str, below: Sequence[str] = ()) -> tuple[Files, list[str]]:
    """The finished files of a folder there, and names that are never fetched (control characters and the like)."""
    answer = machine.ask(exchange, {"verb": "walk", "root": root, "below": list(below)}, ASK_SECONDS)
    with machine.understood():
        odd = [str(name) for name in answer["odd"]]
        files = {name: (known[0], known[1]) for name, known in answer["files"].items()}
        if not all(exchange.is_safe(name) and exchange.is_version(*known) for name, known in files.items()):
            raise ValueError
    return files, odd


def pull(
    machine: Machine,
    root: str,
    folder: Path,
    wanted: Files,
    progress: Callable[[int], Any] | None = None,
) -> Moved:
    """Bring files {name: (size, mtime_ns)} of `root` on the machine to the same names under `folder`, in that order."""
    with _local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    need = sum(size for size, _ in wanted.values())
    if need + SPARE_BYTES > (free := shutil.disk_usage(folder).free):
        raise UserError(f"{folder} has {free / 1e9:.1f} GB free, and {need / 1e9:.1f} GB are to come; make room")
    moved, left = Moved(), dict(wanted)

    def once(command: Started, came: Callable[[int], None]) -> None:
        begun = exchange.begun(str(folder))
        asked = [[n, size, time_, begun.get(exchange.key(n, size, time_), 0)] for n, (size, time_) in left.items()]
        _write(command, json.dumps({"verb": "send", "root": root, "wanted": asked}).encode() + b"\n")
        command.stdin.close()

        # a log grows between the listing and now: as much again as it had, and a little, is believed
        limits = {name: 2 * size + (1 << 20) for name, (size, _) in left.items()}
        with _local(folder):
            placed, failed = exchange.receive(command.stdout, str(folder), limits, came)
        moved.placed += placed
        moved.failed = failed
        left.clear()

    _attempts(machine, once, moved, progress)
    return moved


def push_files(
    machine: Machine,
    folder: Path,
    root: str,
    names: Collection[str],
    manifest: str = "",
    progress: Callable[[int], Any] | None = None,
) -> Moved:
    """Bring files under `folder` to the same names under `root` on the machine; only those that differ travel.

    manifest: a file there that names what was pushed; what an earlier push brought and this one lacks is deleted.
    """
    here = {name: exchange.facts(folder / name) for name in names}
    here = {name: known for name, known in here.items() if known}
    moved = Moved()

    def once(command: Started, came: Callable[[int], None]) -> None:
        there = machine.ask(exchange, {"verb": "look", "root": root, "names": list(here)}, ASK_SECONDS)
        with machine.understood():
            left = {name: known for name, known in here.items() if there["files"].get(name) != known}
            begun = {name: int(there["begun"].get(exchange.key(name, *known[:2]), 0)) for name, known in left.items()}
            need, free = sum(known[0] - begun[name] for name, known in left.items()), there["free"] / 1
        if need + SPARE_BYTES > free:
            raise MachineError(f"{machine} has {free / 1e9:.1f} GB free, and {need / 1e9:.1f} GB are to go there")
        request = {"verb": "receive", "root": root, "manifest": manifest, "names": list(here)}
        _write(command, json.dumps(request).encode() + b"\n")
        wanted = [[name, known[0], known[1], begun[name]] for name, known in left.items()]
        exchange.send(str(folder), wanted, _Counted(command, came))
        command.stdin.close()
        said = command.stdout.readline(ANSWER_BYTES)
        if not said:
            raise exchange.Broken(exchange.LOST)
        with machine.understood():
            answer = plain_throughout(json.loads(said))
            moved.placed, moved.failed, moved.gone = (
                list(answer["placed"]),
                dict(answer["failed"]),
                list(answer["gone"]),
            )

    _attempts(machine, once, moved, progress)
    return moved


def _attempts(
    machine: Machine,
    once: Callable[[Started, Callable[[int], None]], None],
    moved: Moved,
    progress: Callable[[int], Any] | None,
) -> None:
    """Try until it works; `ATTEMPTS` failures in a row in which nothing moved are the end of it."""
    failures = 0
    while True:
        before = moved.sent_bytes
        try:
            _attempt(machine, once, moved, progress)
            return
        except (Unreachable, TimedOut):
            failures = 1 if moved.sent_bytes > before else failures + 1
            if failures >= ATTEMPTS:
                raise
            time.sleep(min(PAUSE_SECONDS * failures, 15.0))


def _attempt(
    machine: Machine,
    once: Callable[[Started, Callable[[int], None]], None],
    moved: Moved,
    progress: Callable[[int], Any] | None,
) -> None:
    """One connection. When no byte moves for a minute, it is cut."""
    last, over = [time.monotonic()], threading.Event()

    def came(count: int) -> None:
        last[0] = time.monotonic()
        moved.sent_bytes += count
        if progress:
            progress(count)

    def watch() -> None:
        while not over.wait(1.0):
            if time.monotonic() - last[0] > STALLED_SECONDS:
                command.process.kill()

    with machine.start(python_command(exchange)) as command:
        threading.Thread(target=watch, daemon=True).start()
        try:
            once(command, came)
        except BrokenPipeError:
            raise _why(machine, command, exchange.LOST) from None
        except exchange.Broken as error:
            raise _why(machine, command, str(error)) from None
        finally:
            over.set()


def _why(machine: Machine, command: Started, ours: str) -> MachineError:
    """Why a transfer broke: by ssh's exit code and last words, else by what we saw."""
    with suppress(subprocess.TimeoutExpired):
        command.process.wait(5)
    rc = command.process.poll()
    said = command.stderr.read() if rc is not None else b""
    if rc == 255:
        return machine.failure(said)
    if rc is not None and rc > 0:
        words = plain(said).strip()
        return CommandFailed(f"{machine}: the transfer failed: {''.join(words.splitlines()[-1:])}", rc, words)
    if rc is not None and rc < 0:  # we cut it: nothing moved
        return Unreachable(f"{machine}: {exchange.LOST}")
    return Unreachable(f"{machine}: {ours}") if ours == exchange.LOST else MachineError(f"{machine}: {ours}")


@contextmanager
def _local(folder: Path) -> Iterator[None]:
    """For writing here: what this computer cannot do is the user's to mend, and no fault of the machine."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be written here ({error.strerror})") from None


def _write(command: Started, data: bytes) -> None:
    command.stdin.write(data)
    command.stdin.flush()


class _Counted:
    """A process's stdin that tells how much went into it."""

    def __init__(self, command: Started, came: Callable[[int], None]):
        self._file, self._came = command.stdin, came

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._came(len(data))

    def flush(self) -> None:
        self._file.flush()

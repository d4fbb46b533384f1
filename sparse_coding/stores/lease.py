"""One writer at a time for a store on S3, which has no locks: an object that says who writes, and a beating heart.

The lease is written where there is none (a conditional put), and its beat goes up every few seconds. Whoever finds a
lease watches it: one that beats is another writer's, one that does not is taken over. Only where both see the same
processes (one boot, one namespace) is a look at the process enough. No clock is compared with another.

Not covered: a service that ignores conditional puts, where two writers begin within `SETTLE` of each other; and a
writer that was stopped for longer than `STALE` and goes on before its next beat tells it that it was replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_coding.errors import UserError
from sparse_coding.stores.manifest import LEASE
from sparse_coding.stores.objects import ObjectMissing, Objects
from sparse_coding.stores.objects_s3 import S3Objects

BEAT, STALE = 10.0, 45.0
"""Seconds between two beats; after so many without one the writer is gone."""
SETTLE = 1.0
"""Seconds after which a lease is read again, where the service may have ignored the condition."""


@contextlib.contextmanager
def leased(objects: S3Objects) -> Iterator[None]:
    """Nobody else writes there meanwhile. Raises `UserError` that names the host and process of another writer.

    Takes up to `STALE` seconds where a writer has died on another machine. If the lease is lost on the way, the error
    comes at the end: the manifest may count files of the other writer.
    """
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
    mine |= {"system": _system(), "started": _started(os.getpid())}
    _take(objects, mine)
    over, lost = threading.Event(), list[dict[str, Any] | None]()

    def beat() -> None:
        count = 0
        while not over.wait(BEAT):
            with contextlib.suppress(UserError):  # the service fails for now; the next beat tells
                found = _found(objects)
                if not _same(found, mine):
                    lost.append(found)
                    return
                count += 1
                objects.put(LEASE, json.dumps({**mine, "beat": count}).encode())

    heart = threading.Thread(target=beat, daemon=True, name="store lease")
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join(BEAT)
        if not lost:
            with contextlib.suppress(UserError):  # else it goes stale
                if _same(found := _found(objects), mine):
                    objects.delete(LEASE)
                else:
                    lost.append(found)
    if lost:
        raise UserError(f"{objects.url} was taken over by {_who(lost[0])} meanwhile: run `store verify` on it")


def only_writer(objects: Objects) -> contextlib.AbstractContextManager[None]:
    """`leased` on S3, nothing for anything else: `own` locks folders."""
    return leased(objects) if isinstance(objects, S3Objects) else contextlib.nullcontext()


def _take(objects: S3Objects, mine: dict[str, Any]) -> None:
    data = json.dumps({**mine, "beat": 0}).encode()
    if not objects.put_new(LEASE, data):
        found = _found(objects)
        if not _same(found, mine):
            if found is not None:
                _wait_until_stale(objects, found)
            objects.put(LEASE, data)
    time.sleep(SETTLE)
    if not _same(found := _found(objects), mine):
        raise UserError(f"{objects.url} is being written by {_who(found)}: wait for it or name another store")


def _wait_until_stale(objects: S3Objects, first: dict[str, Any]) -> None:
    """Returns once the writer of a lease is gone; raises `UserError` as soon as it shows that it is there."""
    refused = UserError(f"{objects.url} is being written by {_who(first)}: wait for it or name another store")
    if (alive := _alive(first)) is not None:
        if alive:
            raise refused
        return
    print(f"{objects.url} has a writer, {_who(first)}: seeing whether it is there ({STALE:.0f} s)", file=sys.stderr)
    until = time.monotonic() + STALE
    while time.monotonic() < until:
        time.sleep(BEAT / 4)
        if (now := _found(objects)) is None:
            return
        if now != first:
            raise refused


def _found(objects: S3Objects) -> dict[str, Any] | None:
    try:
        found = json.loads(bytes(objects.get(LEASE)))
    except (ObjectMissing, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _same(found: dict[str, Any] | None, mine: dict[str, Any]) -> bool:
    return found is not None and found.get("id") == mine["id"]


def _alive(lease: dict[str, Any]) -> bool | None:
    """Whether the process of a lease is there; None where that cannot be seen from here."""
    pid, here = lease.get("pid"), _system()
    if here is None or lease.get("system") != here or not isinstance(pid, int):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's, or no process can have this number
        return None
    started = _started(pid)
    return None if started is None else started == lease.get("started")


def _system() -> str | None:
    """Names what numbers of processes mean here: this boot, this namespace. Containers of one machine differ in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return None


def _started(pid: int) -> str | None:
    """Clock ticks from the boot to the start of a process, which tells it from a later one of the same number."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if facts[0] == "Z" else facts[19]  # Z: killed, and nobody has asked about it yet


def _who(lease: dict[str, Any] | None) -> str:
    if lease is None:
        return "another writer, which has ended"
    return f"process {str(lease.get('pid', '?'))[:20]} on {str(lease.get('host', '?'))[:100]}"

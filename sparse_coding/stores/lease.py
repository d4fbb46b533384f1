"""One writer at a time for a store on S3, which has no locks: an object that says who writes, and a beating heart.

The lease is written where there is none (a conditional put), and its beat goes up every few seconds. Whoever finds a
lease watches it: one that beats is another writer's; one that does not, or whose process on this machine is gone, is
taken over. No clock is compared with another.

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
    _take(objects, mine)
    over, lost = threading.Event(), []

    def beat() -> None:
        count = 0
        while not over.wait(BEAT):
            with contextlib.suppress(UserError):  # the service fails for now; the next beat tells
                found = _found(objects)
                if found is not None and found.get("id") != mine["id"]:
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
                objects.delete(LEASE)
    if lost:
        raise UserError(f"{objects.url} was taken over by {_who(lost[0])} meanwhile: run `store verify` on it")


def only_writer(objects: Objects) -> contextlib.AbstractContextManager[None]:
    """`leased` on S3, nothing for a folder, which harvest locks."""
    return leased(objects) if isinstance(objects, S3Objects) else contextlib.nullcontext()


def _take(objects: S3Objects, mine: dict[str, Any]) -> None:
    data = json.dumps({**mine, "beat": 0}).encode()
    if not objects.put_new(LEASE, data):
        found = _found(objects)
        if found is not None and found.get("id") != mine["id"]:
            _wait_until_stale(objects, found)
            objects.put(LEASE, data)
        elif found is None:
            objects.put(LEASE, data)
    time.sleep(SETTLE)
    found = _found(objects)
    if found is None or found.get("id") != mine["id"]:
        raise UserError(f"{objects.url} is being written by {_who(found or {})}: wait for it or name another store")


def _wait_until_stale(objects: S3Objects, first: dict[str, Any]) -> None:
    """Returns once the writer of a lease is gone; raises `UserError` as soon as it shows that it is there."""
    refused = UserError(f"{objects.url} is being written by {_who(first)}: wait for it or name another store")
    if first.get("host") == socket.gethostname() and isinstance(pid := first.get("pid"), int):
        if _alive(pid):
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


def _alive(pid: int) -> bool:
    """Whether a process is there; one that was killed and that nobody has asked about yet is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    with contextlib.suppress(OSError):  # where there is no /proc
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def _who(lease: dict[str, Any]) -> str:
    return f"process {str(lease.get('pid', '?'))[:20]} on {str(lease.get('host', '?'))[:100]}"

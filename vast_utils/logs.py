"""A job's log as it grows: no line lost and none twice, over connections that break."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress

from sparse_coding.errors import UserError
from vast_utils.on_machine import jobs
from vast_utils.said import plain
from vast_utils.ssh import (
    CONNECT_SECONDS,
    AuthFailed,
    Machine,
    MachineError,
    Refused,
    TimedOut,
    Unreachable,
    python_command,
)

PATIENCE_SECONDS = 600.0
LONGEST = 1 << 16
"""A line is cut after so many bytes: a progress bar may never end one."""
MOST = 1 << 24
NO_JOB = 3


def lines(
    machine: Machine, name: str, offset: int = 0, follow: bool = False, patience_seconds: float = PATIENCE_SECONDS
) -> Iterator[str]:
    """The lines of a job's log from byte `offset` on, without their ends; when following, until the job is over.

    What counts is the bytes received, so that a connection that breaks costs nothing. Raises how the machine fails once
    it has not answered for `patience_seconds`, `UserError` where there is no such job.
    """
    rest, last, pause = b"", time.monotonic(), 0.5
    while True:
        began = time.monotonic()
        try:
            for block in _blocks(machine, name, offset, follow):
                offset, last, pause = offset + len(block), time.monotonic(), 0.5
                *whole, rest = _cut(rest + block).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in whole)
            break
        except (Unreachable, Refused, AuthFailed, TimedOut):
            if (
                time.monotonic() - began > CONNECT_SECONDS + 5
            ):  # that was a quiet log, not a machine that does not answer
                last = time.monotonic()
            if not follow or time.monotonic() - last > patience_seconds:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 15.0)
    if rest:
        yield rest.decode("utf-8", "replace")


def read(machine: Machine, name: str, offset: int) -> bytes:
    """What a job's log holds now from byte `offset` on: whole lines after `_cut`, and `MOST` bytes or a little more.

    Raises as `lines` does.
    """
    said = bytearray()
    for block in _blocks(machine, name, offset, follow=False):
        said += block
        if len(said) >= MOST:
            break
    return _cut(bytes(said))


def _cut(text: bytes) -> bytes:
    """As many bytes, a line ending at least every `LONGEST`: in place of a progress bar's return, a space, or any."""
    cut, start = bytearray(text), 0
    while len(cut) - start > LONGEST:
        ends = (cut.rfind(sign, start, start + LONGEST) for sign in (b"\n", b"\r", b" "))
        end = next((end for end in ends if end >= start), start + LONGEST - 1)
        cut[end : end + 1] = b"\n"
        start = end + 1
    return bytes(cut)


def _blocks(machine: Machine, name: str, offset: int, follow: bool) -> Iterator[bytes]:
    """The log's bytes over one connection; returns when the machine said that this is all."""
    with machine.start(python_command(jobs)) as command:
        request = {"verb": "tail", "name": name, "offset": offset, "follow": follow}
        with suppress(BrokenPipeError):  # why is in its last words
            command.stdin.write(json.dumps(request).encode() + b"\n")
            command.stdin.flush()
        while block := os.read(command.stdout.fileno(), 1 << 16):
            yield block
        rc = command.process.wait()
        if rc == 0:
            return
        said = command.stderr.read()
    if rc == NO_JOB:
        raise UserError(f"{machine} has no job {name}")
    if rc == 255:
        raise machine.failure(said)
    raise MachineError(f"{machine}: reading the log failed: {plain(said)[-300:]}")

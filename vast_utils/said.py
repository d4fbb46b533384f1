"""What a machine says, which may be a stranger's: never more than we can hold, and harmless to a terminal."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import suppress
from typing import IO, Any

ANSWER_BYTES = 64_000_000
"""No machine makes us hold more than this of what it says."""


def plain(said: bytes | str) -> str:
    """What a machine said, without signs that would steer our terminal; `?` stands for each."""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "?" for sign in text.replace("\r\n", "\n"))


def plain_throughout(value: Any) -> Any:
    """A JSON value whose strings are all `plain`."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        return [plain_throughout(one) for one in value]
    if isinstance(value, dict):
        return {plain(key): plain_throughout(one) for key, one in value.items()}
    return value


def printable(line: str) -> str:
    """A line of a log as a terminal can be shown it: of a progress bar its end."""
    return plain(line.rstrip("\r").rpartition("\r")[2])


def collected(process: subprocess.Popen[bytes], stdin: bytes, timeout: float | None) -> tuple[bytes, bytes]:
    """Both outputs of a command, which is killed once one has more than `ANSWER_BYTES`. Raises `TimeoutExpired`."""

    def feed() -> None:
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.write(stdin)
            process.stdin.close()

    def collect(pipe: IO[bytes], into: bytearray) -> None:
        with suppress(OSError, ValueError):
            while len(into) <= ANSWER_BYTES and (block := os.read(pipe.fileno(), 1 << 16)):
                into += block
        if len(into) > ANSWER_BYTES:
            process.kill()

    out, err = bytearray(), bytearray()
    work = ((feed,), (collect, process.stdout, out), (collect, process.stderr, err))
    threads = [threading.Thread(target=what, args=given, daemon=True) for what, *given in work]
    for thread in threads:
        thread.start()
    process.wait(timeout)
    for thread in threads:
        thread.join(10.0)
    return bytes(out), bytes(err)

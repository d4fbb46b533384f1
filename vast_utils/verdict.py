"""What the end of a job means: whose fault it was, and so what to do."""

from __future__ import annotations

import re
from typing import Literal

Verdict = Literal["done", "machine", "again", "failed"]
MISTAKE = 2
"""The exit code of our programs for what only the user can mend."""
STOPPED = 130
MACHINE_FAULT = re.compile(
    r"No space left on device|disk is full|CUDA (error|driver)|no NVIDIA driver|NVML|Bus error|uncorrectable ECC"
    r"|Input/output error",
    re.IGNORECASE,
)
"""Words at the end of a log that speak of the machine, not of the command."""


def verdict(rc: int | None, tail: str) -> Verdict:
    """`machine`: elsewhere it may work; `again`: it may there; `failed`: nowhere. tail: the end of the log.

    A process that was killed (128 and more, as for want of memory) may have been so by its machine; one that was
    stopped in peace goes on when it is started again.
    """
    if rc == 0:
        return "done"
    if MACHINE_FAULT.search(tail) or (rc is not None and rc >= 128 and rc != STOPPED):
        return "machine"
    return "failed" if rc == MISTAKE else "again"


def last_words(tail: str) -> str:
    """The last line that says something."""
    return next((line.strip()[-200:] for line in reversed(tail.splitlines()) if line.strip()), "it said nothing")

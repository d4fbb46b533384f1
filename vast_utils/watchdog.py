"""The dead man's switch: what a rented machine is told to run at its start, so that it destroys itself."""

from __future__ import annotations

import base64
import gzip
import shlex
from pathlib import Path

from sparse_coding.errors import UserError

SCRIPT = Path(__file__).parent / "on_machine" / "watchdog.sh"
LONGEST = 4000
"""vast.ai takes about this many characters of onstart."""
STALE_SECONDS = 1800.0
GUARDED = (
    'cd ~/.sparse_coding && read -r pid _ <watchdog.pid && kill -0 "$pid" && cat watchdog.lacks && '
    "[ ! -s watchdog.lacks ]"
)
"""Shell for a machine, over ssh: succeeds where its watchdog runs and lacks nothing, else prints what it lacks."""


def onstart(
    limit_seconds: float, stale_seconds: float = STALE_SECONDS, api_url: str = "https://console.vast.ai"
) -> str:
    """The onstart command: puts the watchdog in place and starts it, detached.

    limit_seconds: wall time after which the machine is destroyed whatever it does. stale_seconds: silence after which
    one on which no job was ever started is. api_url: of the account's API. The key is the instance's own, which the
    machine finds in its environment (`CONTAINER_ID`, `CONTAINER_API_KEY`); ours never goes there.
    """
    if limit_seconds < 1 or stale_seconds < 1:
        raise UserError("a machine needs a time limit of at least a second")
    packed = base64.b64encode(gzip.compress(_without_comments(SCRIPT.read_text(encoding="utf-8")).encode(), 9, mtime=0))
    place = '"$HOME"/.sparse_coding/watchdog.sh'
    command = (
        'mkdir -p "$HOME"/.sparse_coding; '
        f"echo {packed.decode()} | base64 -d | gzip -dc > {place}; "
        f"setsid sh {place} {round(limit_seconds)} {round(stale_seconds)} {shlex.quote(api_url.rstrip('/'))} "
        "</dev/null >/dev/null 2>&1 &"
    )
    assert len(command) < LONGEST, "the watchdog has outgrown what onstart takes"
    return command


def _without_comments(script: str) -> str:
    lines = script.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("# "))

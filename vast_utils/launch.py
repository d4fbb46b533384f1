"""`launch`: one command to its end on a rented machine, for a price that is known before."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path, PurePosixPath

from sparse_coding.config import parse
from sparse_coding.errors import UserError
from vast_utils.ledger import Ledger, check_run_name
from vast_utils.session import RentFlags, dispatch, is_done, say_line, settle, with_bucket
from vast_utils.sky_export import SkyFlags, export
from vast_utils.tasks import Task


@dataclass(frozen=True, kw_only=True)
class LaunchFlags(RentFlags, SkyFlags):
    """Run a command on a rented machine and bring its results here. Without --yes this only shows what would happen.

        python -m vast_utils launch --max-cost 5 --max-hours 6 -- run.py --model gpt2 --layer 2

    The cheapest machine that works is rented; it is destroyed when the command has ended and its results are here, or
    at Ctrl-C. One that is lost is replaced, and the run goes on from its last checkpoint. The same command takes over a
    run whose launch was killed.
    """

    detach: bool = False
    """Leave once the command runs. The machine ends at its limit; the same command without this follows it."""


def main(arguments: Sequence[str]) -> None:
    """run a command on a rented machine, fetch its results, destroy the machine"""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    flags = parse(LaunchFlags, words[:at], "python -m vast_utils launch", getdoc(LaunchFlags) or "")
    argv = words[at + 1 :]
    if not argv:
        raise UserError("there is no command; give it after --, such as: launch ... -- run.py --model gpt2")
    name = check_run_name(flags.name or run_name(argv, flags.folder))
    argv = with_bucket(argv, flags.bucket, name)
    task = Task(name, argv, _out(argv))
    if flags.backend == "skypilot":
        export(flags, flags, [task])
        return
    flags.check_unused()
    ledger = Ledger(name)
    if is_done(ledger, [task]):
        print(f"run {name} is done: its results are in {flags.folder / 'outputs'}; for a new one give another --name")
        return
    if not flags.yes:
        from vast_utils.account import Account
        from vast_utils.preview import preview

        preview(Account(), flags, name, [task], 1)
        print("\nnothing was rented; with --yes it will be")
        return
    settle(dispatch(flags, name, [task], detach=flags.detach, say=say_line), detached=flags.detach)


def run_name(argv: Sequence[str], folder: Path) -> str:
    """A name that the same command in the same folder gives again."""
    script = next((PurePosixPath(word).stem for word in argv if word.endswith(".py")), PurePosixPath(argv[0]).name)
    readable = re.sub(r"[^a-z0-9]+", "-", script.lower()).strip("-")[:30].rstrip("-") or "job"
    key = json.dumps([list(argv), str(folder.resolve())])
    return f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _out(argv: Sequence[str]) -> str:
    """The folder below outputs/ that --out names; empty where it names none there."""
    words = [word for one in argv for word in (one.split("=", 1) if one.startswith("--out=") else [one])]
    if "--out" not in words[:-1]:
        return ""
    out = PurePosixPath(words[words.index("--out") + 1])
    if out.is_absolute() or ".." in out.parts or len(out.parts) < 2 or out.parts[0] != "outputs":
        raise UserError(f"--out {out}: results are fetched from outputs/ alone; name a folder below it")
    return PurePosixPath(*out.parts[1:]).as_posix()

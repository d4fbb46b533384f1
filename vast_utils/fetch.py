"""Results from a machine, as they appear: whole files, continued where a connection broke, nothing of ours lost."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sparse_coding.errors import UserError, near
from vast_utils.on_machine import exchange
from vast_utils.push import REMOTE, RESULTS
from vast_utils.ssh import Machine
from vast_utils.transfer import Moved, pull, remote_files

STORES = "stores"
"""Activations are large and made again at will: fetched only when named."""
RECORDS = "results.jsonl"
CHECKPOINT = re.compile(r"(.+/)?checkpoints/step-(\d+)[^/]*")


@dataclass
class Fetched:
    """What one fetch did."""

    runs: list[str]
    moved: Moved
    kept: list[str] = field(default_factory=list)
    """Files that are newer here than there, and were left alone."""
    odd: list[str] = field(default_factory=list)
    """Files there whose names (control characters and the like) are never fetched."""


def fetch(
    machine: Machine,
    folder: Path,
    run: str = "",
    latest: bool = False,
    checkpoints: bool = True,
    remote: str = REMOTE,
    progress: Callable[[int], Any] | None = None,
) -> Fetched:
    """Bring results below `folder` (the local `outputs`): all runs, one run, or the one that changed last.

    Raises `UserError` where there is no such run.
    """
    there, odd = remote_files(machine, f"{remote}/{RESULTS}", [run] if run and exchange.is_safe(run) else [])
    runs = _runs(there)
    if run:
        there = {name: known for name, known in there.items() if name.startswith(run.rstrip("/") + "/") or name == run}
        if not there:
            known = list(_runs(remote_files(machine, f"{remote}/{RESULTS}")[0]))
            raise UserError(f"{machine} has no run {run!r}: have {', '.join(known) or 'none'}{near(run, known)}")
        runs = {run: 0}
    else:
        runs.pop(STORES, None)
        if latest:
            runs = dict([max(runs.items(), key=lambda item: item[1])]) if runs else {}
        there = {name: known for name, known in there.items() if name.split("/")[0] in runs}
    if not checkpoints:
        there = {name: known for name, known in there.items() if not CHECKPOINT.match(name)}
    wanted, kept = _wanted(folder, there)
    moved = pull(machine, f"{remote}/{RESULTS}", folder, wanted, progress) if wanted else Moved()
    if checkpoints and not moved.failed:
        moved.gone = _drop_old_checkpoints(folder, there)
    return Fetched(sorted(runs), moved, kept, [name for name in odd if name.split("/")[0] in runs or run])


def _runs(there: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """{top of the name: when it last changed}."""
    runs: dict[str, int] = {}
    for name, (_, mtime_ns) in there.items():
        top = name.split("/")[0]
        runs[top] = max(runs.get(top, 0), mtime_ns)
    return runs


def _wanted(folder: Path, there: Mapping[str, tuple[int, int]]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """What differs and is not newer here. JSON comes last in its folder: it vouches for the files beside it."""
    wanted, kept = {}, []
    for name in sorted(there, key=lambda one: (str(PurePosixPath(one).parent), one.endswith(".json"), one)):
        size, mtime_ns = there[name]
        here = exchange.facts(folder / name)
        if here is None or (here[1] < mtime_ns):
            wanted[name] = (size, mtime_ns)
        elif here[:2] != [size, mtime_ns] and here[1] > mtime_ns:
            kept.append(name)
        elif here[0] < size:  # of one instant, and longer there: a log that we have a beginning of
            wanted[name] = (size, mtime_ns)
    return wanted, kept


def _drop_old_checkpoints(folder: Path, there: Collection[str]) -> list[str]:
    """Checkpoints that the run itself has dropped since: older than its oldest now, or all where it has results
    and none. Without this a long run would leave every checkpoint here. One further than any there is somebody's own.
    """
    steps: dict[str, list[int]] = {name.removesuffix(RECORDS): [] for name in there if name.endswith("/" + RECORDS)}
    for name in there:
        if found := CHECKPOINT.match(name):
            steps.setdefault(found[1] or "", []).append(int(found[2]))
    gone = []
    for run, kept in steps.items():
        for path in sorted((folder / run / "checkpoints").glob("step-*")):
            step = CHECKPOINT.fullmatch(path.relative_to(folder).as_posix())
            if step and (not kept or int(step[2]) < min(kept)) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
                gone.append(path.relative_to(folder).as_posix())
    return gone

"""The file of a sweep: which commands it consists of. Strict: an unknown key is an error that names the near one."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_coding.config import from_dict
from sparse_coding.errors import UserError
from vast_utils.tasks import Task

MOST = 1000
"""Commands in a sweep: more is a slip."""


@dataclass(frozen=True)
class SweepFile:
    """Each command is `command`, then one of `runs` (if there are any), then one combination of `grid`."""

    command: str = ""
    """What all have in common: `run.py --model gpt2 --tokens 100M`."""
    runs: tuple[str, ...] = ()
    """What tells them apart, as words of a command line: `--layer 2 --l1 0.3`. Without `command`, whole commands."""
    grid: dict[str, Any] = field(default_factory=dict)
    """{flag: values}: every combination is run. A value that is a list gives several words, true the bare flag."""


def read(path: Path) -> SweepFile:
    """Read a sweep from YAML. Raises `UserError` for what it cannot mean."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not YAML that can be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: it must hold keys such as command, runs, grid")
    try:
        return from_dict(SweepFile, {str(key): value for key, value in data.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def tasks(sweep: SweepFile, name: str) -> list[Task]:
    """The commands of a sweep named `name`. Those of run.py get a folder `outputs/NAME/TASK` each."""
    for flag, values in sweep.grid.items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", str(flag)):
            raise UserError(f"grid: {flag!r} is no flag; write it without dashes, as in l1: [0.1, 0.3]")
        if not isinstance(values, list) or not values:
            raise UserError(f"grid: {flag} is {values!r}: it must be a list of values, as in [0.1, 0.3]")
    made: dict[str, Task] = {}
    for own in sweep.runs or ("",):
        for values in itertools.product(*sweep.grid.values()):
            flags = [word for flag, value in zip(sweep.grid, values, strict=True) for word in _words(str(flag), value)]
            argv = [*_split(sweep.command), *_split(own), *flags]
            if not argv:
                raise UserError("the sweep has no command: give command, runs or both")
            task = _task(name, argv, [*_split(own), *flags] if sweep.command else flags)
            if task.name in made:
                raise UserError(f"the sweep has the same command twice: {' '.join(argv)}")
            made[task.name] = task
    if len(made) > MOST:
        raise UserError(f"the sweep has {len(made):,} commands: {MOST} is the most")
    return list(made.values())


def _task(sweep: str, argv: list[str], own: list[str]) -> Task:
    """A task whose name says what is its own, and that the same command has again."""
    readable = re.sub(r"[^a-z0-9.]+", "-", " ".join(own).lower()).strip("-.")[:40].strip("-.")
    name = f"{readable or 'run'}-{hashlib.sha256(json.dumps(argv).encode()).hexdigest()[:6]}"
    out = ""
    if any(word == "--out" or word.startswith("--out=") for word in argv):
        raise UserError("leave --out away: each command of a sweep has a folder of its own below outputs/")
    if argv[0] == "run.py":
        out = f"{sweep}/{name}"
        argv = [*argv, "--out", f"outputs/{out}"]
    return Task(name, tuple(argv), out, " ".join(own))


def _words(flag: str, value: Any) -> list[str]:
    """A flag and its value as words of a command line."""
    flag = flag.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list):
        return [f"--{flag}", *(_word(flag, one) for one in value)]
    return [f"--{flag}", _word(flag, value)]


def _word(flag: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"grid: {flag} has the value {value!r}: it must be a number or text")
    return str(value)


def _split(words: str) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError as error:
        raise UserError(f"{words!r} cannot be read as a command line: {error}") from None

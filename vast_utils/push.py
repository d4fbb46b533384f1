"""The project's files, or a folder of models, to a machine: what git would keep, and never a secret."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_coding.errors import UserError
from vast_utils.on_machine import exchange
from vast_utils.secrets import known, why_secret
from vast_utils.ssh import Machine
from vast_utils.transfer import Moved, push_files

REMOTE = "~/sparse_coding"
"""Where the project lies on a machine."""
MANIFEST = ".pushed.json"
RESULTS = "outputs"


@dataclass(frozen=True)
class Chosen:
    """Files to send, and those left out with the reason."""

    names: list[str]
    left_out: dict[str, str] = field(default_factory=dict)
    bytes: int = 0


def project_files(folder: Path, environ: Mapping[str, str] = os.environ) -> Chosen:
    """What git tracks in `folder`, and what it would add: but for secrets, results, and links."""
    folder = _folder(folder, "--folder")
    try:
        listed = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
    except FileNotFoundError:
        raise UserError("push needs git, which says what belongs to the project; install it") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip().splitlines()[:1]
        raise UserError(
            f"{folder}: push sends what git would keep, and git says {said[0] if said else 'nothing'!r}; "
            "where it is no repository, run `git init` there"
        ) from None
    names = sorted({os.fsdecode(name) for name in listed.split(b"\0") if name})
    return _choose(folder, (name for name in names if not name.startswith(RESULTS + "/")), environ)


def folder_files(folder: Path, environ: Mapping[str, str] = os.environ) -> Chosen:
    """All files of a folder, hidden ones and secrets left out."""
    folder = _folder(folder, "--models")
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())
    shown = (path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
    return _choose(folder, shown, environ)


def push_project(
    machine: Machine,
    folder: Path,
    remote: str = REMOTE,
    chosen: Chosen | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Moved:
    """Send the project, or what was `chosen` of it.

    What an earlier push brought and is no more here is deleted there; results never are.
    """
    chosen = chosen or project_files(folder)
    if not chosen.names:
        raise UserError(f"{folder} has no file to send")
    return push_files(machine, folder, remote, chosen.names, MANIFEST, progress)


def push_models(
    machine: Machine,
    models: Path,
    project: Path,
    remote: str = REMOTE,
    chosen: Chosen | None = None,
    progress: Callable[[int], Any] | None = None,
) -> tuple[Moved, str]:
    """Send a folder to the same place below the project, or to `models/` there; what moved, and where to.

    Of a run that is to go on there, files are dated back to before all that the machine will write: `fetch` keeps what
    is newer, and the machine's clock may be behind.
    """
    models, project = models.resolve(), project.resolve()
    place = models.relative_to(project) if models.is_relative_to(project) else Path("models") / models.name
    chosen = chosen or folder_files(models)
    if place.parts[:1] == (RESULTS,):
        _date_back(machine, [models / name for name in chosen.names])
    moved = push_files(machine, models, f"{remote}/{place.as_posix()}", chosen.names, progress=progress)
    return moved, place.as_posix()


def _date_back(machine: Machine, paths: Iterable[Path]) -> None:
    said = machine.run(["date", "+%s"])
    with machine.understood():
        there = int(said.text)
    for path in paths:
        if path.stat().st_mtime > there:
            os.utime(path, (there, there))


def _folder(folder: Path, flag: str) -> Path:
    """A folder by its own name: it may be given by a link to it."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: there is no such folder")
    return folder.resolve()


def _choose(folder: Path, names: Iterable[str], environ: Mapping[str, str]) -> Chosen:
    secrets = known(environ)
    chosen, size = Chosen([], {}), 0
    for name in names:
        path = folder / name
        if path.is_symlink() or any((folder / part).is_symlink() for part in Path(name).parents):
            chosen.left_out[name] = "it is a link"
        elif not path.exists():  # tracked, and deleted here
            continue
        elif not path.is_file():
            chosen.left_out[name] = "it is no file"
        elif not exchange.is_safe(name):
            chosen.left_out[name] = "such a name is not sent"
        elif not os.access(path, os.R_OK):
            chosen.left_out[name] = "it cannot be read"
        elif why := why_secret(folder, name, secrets):
            chosen.left_out[name] = why
        else:
            chosen.names.append(name)
            size += path.stat().st_size
    return Chosen(chosen.names, chosen.left_out, size)

"""The small files that a run keeps on this computer: whole or not at all, and every trouble with one in one line."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from sparse_coding.errors import UserError


def state_folder() -> Path:
    """Where ledgers lie: VAST_UTILS_STATE, else the user's state folder."""
    if given := os.environ.get("VAST_UTILS_STATE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "sparse-coding" / "vast"


def make(folder: Path) -> None:
    """Make a folder that only its owner may look into."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"the state folder {folder} cannot be made ({error.strerror}): set VAST_UTILS_STATE") from None


def write(path: Path, value: dict[str, Any]) -> None:
    """Write a file that survives a crash, in place of what is there. `UserError` on a full disk: the old one stays."""
    try:
        _write(path, json.dumps(value, indent=1))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): mend that, then give the same command again"
        ) from None


def read(path: Path) -> dict[str, Any]:
    """What was written. Raises `UserError` where it was damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from None
    if not isinstance(found, dict):
        raise damaged(path, "it holds no object")
    return found


def damaged(path: Path, why: str) -> UserError:
    """The error that a file is of no use."""
    return UserError(f"{path} cannot be read ({why}): `reap` ends the machines all the same")


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the new name may not survive
    finally:
        os.close(folder)

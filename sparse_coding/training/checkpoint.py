"""Checkpoints that appear whole or not at all: a folder of one safetensors file and one JSON, renamed into place.

The JSON holds the SHA-256 of the tensors' file and of its own facts; both are checked when a checkpoint is read, and a
damaged one gives way to the one before it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.files import file_sha256, write_tensors, write_text

FORMAT = 3
KEPT = 2
TENSORS, FACTS = "state.safetensors", "state.json"
BEFORE = ".before"
"""Ends the name of a checkpoint that one of the same step is about to replace."""


class DamagedCheckpoint(Exception):
    """What is there is not what was written."""


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    keep: int = KEPT,
    keep_best: bool = False,
) -> Path:
    """Write the checkpoint of `step` under `folder`, then drop all but the last `keep`.

    keep_best: the one whose fact `fvu` is lowest stays too. A failure leaves what was there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:09d}"
    temporary, before = folder / f".{final.name}.{os.getpid()}", folder / (final.name + BEFORE)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write_tensors(temporary / TENSORS, tensors)
        known = {"step": step, **facts, "tensors_sha256": file_sha256(temporary / TENSORS)}
        write_text(temporary / FACTS, json.dumps({"format": FORMAT, "facts": known, "sha256": _digest(known)}))
        if final.exists():  # set aside, not removed: a kill between the two lines must not cost it
            shutil.rmtree(before, ignore_errors=True)
            os.replace(final, before)
        os.replace(temporary, final)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)
    _prune(folder, keep, keep_best)
    return final


def newest(folder: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of the newest sound checkpoint, or None where there is none yet.

    Damaged ones that are newer are named on stderr and removed, so that they never stand before what is saved next.
    Raises `UserError` where all that is there is damaged.
    """
    broken: list[tuple[Path, str]] = []
    for path in reversed(_complete(folder)):
        try:
            found = read(path, device)
        except DamagedCheckpoint as damage:
            broken.append((path, str(damage)))
            continue
        for one, why in broken:
            print(
                f"the checkpoint {one.name} is damaged ({why}): going on from the one before it, {path.name}",
                file=sys.stderr,
                flush=True,
            )
            shutil.rmtree(one, ignore_errors=True)
        return found
    if broken:
        told = "; ".join(f"{path.name}: {why}" for path, why in broken)
        raise UserError(f"no checkpoint under {folder} can be read ({told}): use --fresh to start over")
    return None


def best(folder: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The sound checkpoint of the lowest `fvu`; None where none has one."""
    for path in sorted(_complete(folder), key=_fvu):
        if math.isfinite(_fvu(path)):
            try:
                return read(path, device)
            except DamagedCheckpoint as damage:
                print(f"the checkpoint {path.name} is damaged ({damage}): it is passed over", file=sys.stderr)
    return None


def read(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of one checkpoint.

    Raises `DamagedCheckpoint`, and `UserError` for another format and where the system fails to read, which may pass.
    """
    try:
        written = json.loads((path / FACTS).read_text(encoding="utf-8"))
        if written["format"] != FORMAT:
            raise UserError(f"{path} was written in checkpoint format {written['format']}, this version reads {FORMAT}")
        facts = written["facts"]
        if _digest(facts) != written["sha256"]:
            raise DamagedCheckpoint(f"wrong checksum of {FACTS}")
        if file_sha256(path / TENSORS) != facts["tensors_sha256"]:
            raise DamagedCheckpoint(f"wrong checksum of {TENSORS}")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{type(error).__name__}: {error}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    try:  # its bytes are those that were written
        return load_file(path / TENSORS, device=str(device)), facts
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint by its name alone, -1 where there is none."""
    found = _complete(folder)
    return _order(found[-1])[0] if found else -1


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _complete(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if (path / FACTS).is_file()), key=_order)


def _order(path: Path) -> tuple[int, bool]:
    """By step; one that was being replaced comes before its replacement."""
    digits = path.name.removeprefix("step-").removesuffix(BEFORE)
    return (int(digits) if digits.isdigit() else -1), not path.name.endswith(BEFORE)


def _fvu(path: Path) -> float:
    """What a checkpoint says of its FVU; infinity where it says nothing. Raises `UserError` where reading it fails."""
    try:
        value = json.loads((path / FACTS).read_text(encoding="utf-8"))["facts"]["fvu"]
        return value if isinstance(value, float) and math.isfinite(value) else math.inf
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return math.inf
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    why = (isinstance(error, OSError) and error.strerror) or error
    return UserError(f"the checkpoint {path} cannot be read now ({why}); it stays: start the same command again")


def _prune(folder: Path, keep: int, keep_best: bool) -> None:
    there = _complete(folder)
    kept = set(there[-keep:])
    if keep_best:
        try:
            lowest = min(there, key=_fvu)
        except UserError:  # any of them may be the best: all stay until the next time
            return
        kept |= {lowest} if math.isfinite(_fvu(lowest)) else set()
    for old in set(there) - kept:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _fsync(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

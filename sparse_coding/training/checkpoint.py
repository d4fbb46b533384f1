"""Checkpoints that appear whole or not at all: a folder of one safetensors file and one JSON, renamed into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.files import write_tensors, write_text

FORMAT = 2
KEPT = 2


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` under `folder` and drop all but the last `KEPT`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:09d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write_tensors(temporary / "state.safetensors", tensors)
        write_text(temporary / "state.json", json.dumps({"format": FORMAT, "step": step, **facts}))
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _complete(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def newest(folder: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of the newest readable checkpoint, or None where there is none yet."""
    broken = []
    for path in reversed(_complete(folder)):
        try:
            facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if facts["format"] != FORMAT:
                raise UserError(
                    f"{path} was written in checkpoint format {facts['format']}, this version reads {FORMAT}"
                )
            return load_file(path / "state.safetensors", device=str(device)), facts
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            broken.append(f"{path.name}: {error}")
    if broken:
        raise UserError(f"no checkpoint under {folder} can be read ({'; '.join(broken)}): use --fresh to start over")
    return None

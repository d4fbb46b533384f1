"""What a run needs to be repeated: versions, git state, command. Keys and the environment are not read."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import sparse_coding

PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "datasets", "safetensors", "transformer-lens")


def provenance() -> dict[str, Any]:
    """Facts about this process and this checkout."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "version": sparse_coding.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit and whether files differ from it, or None outside a checkout."""

    def git(*words: str) -> str:
        root = Path(__file__).resolve().parent
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def short_hash(data: Any, length: int = 8) -> str:
    """A short name for settings: the same settings give the same name."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:length]

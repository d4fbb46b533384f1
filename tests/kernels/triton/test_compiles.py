"""What the interpreter runs, the compiler takes too: for a Hopper card, on a machine without one."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")

from sparse_coding.kernels import triton

MODULES = [import_module(f"{triton.__name__}.{one.name}") for one in pkgutil.iter_modules(triton.__path__)]


def test_every_kernel_compiles_for_a_card(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("compile_all.py"))]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    launched = {
        f"{module.__name__.split('.')[-1]}.{name}"
        for module in MODULES
        for name, found in vars(module).items()
        if name.startswith("_") and hasattr(found, "arg_names")
    }
    assert set(done.stdout.split()) == launched

"""The tests of triton/ need Triton imported in its interpreter, which is too late where others have imported it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).with_name("triton")


def test_where_triton_was_imported_before_its_tests_pass_in_a_process_of_their_own():
    if torch.cuda.is_available() or "triton" not in sys.modules:
        pytest.skip("they run in this process, or Triton is not installed")
    from triton.runtime.interpreter import InterpretedFunction

    if isinstance(sys.modules["triton"].language.sum, InterpretedFunction):
        pytest.skip("they run in this process")
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", str(FOLDER)]
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Triton was imported" not in done.stdout
